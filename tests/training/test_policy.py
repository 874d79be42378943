"""θ and the head are the same thing, and a start keeps its decisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import CheckpointError, DataError
from orchestrator.head import Checkpoint, CheckpointInfo
from orchestrator.landmarks import Landmarks
from training.policy import Policy, from_checkpoint, from_zeros, principal_axes, rounded

INFO = CheckpointInfo(("a", "b", "c"), "backbone", "r1", trained={"method": "sft"})


def near_landmarks(seed: int, *, landmarks: int = 4) -> Checkpoint:
    """A head on landmarks among hidden states `[5]`, with a prior."""
    generator = torch.Generator().manual_seed(seed)
    shift, scale = torch.randn(2, 5, generator=generator)
    centres = torch.nn.functional.normalize(torch.randn(landmarks, 3, generator=generator))
    return Checkpoint(
        INFO,
        torch.randn(3, landmarks, generator=generator),
        shift,
        scale.abs() + 0.1,
        prior=torch.randn(3, generator=generator),
        landmarks=Landmarks(torch.randn(3, 5, generator=generator), centres, torch.tensor([0.7])),
    )


def checkpoint(seed: int, *, dimension: int = 5, roles: bool = False, scaled: bool = True) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    info = replace(INFO, roles=roles)
    weight = torch.randn(info.rows, dimension, generator=generator)
    shift, scale = torch.randn(2, dimension, generator=generator)
    return Checkpoint(info, weight, shift if scaled else None, scale.abs() + 0.1 if scaled else None)


@given(st.integers(0, 1000), st.booleans(), st.booleans())
def test_flat_vector_and_head_are_one(seed: int, roles: bool, singular: bool) -> None:
    base = checkpoint(seed, roles=roles)
    if singular:
        base = replace(base, singular={"m": torch.tensor([0.5, -0.25]), "other": torch.ones(3)})
    policy = Policy(base, (("m", 2), ("new", 3)) if singular else ())
    theta = policy.vector()
    assert theta.shape == (policy.size,)
    back = policy.checkpoint(theta, {"method": "none"})
    assert torch.equal(back.weight, base.weight)
    assert back.info == replace(base.info, trained={"method": "none"})
    if singular:
        assert {name: offsets.tolist() for name, offsets in back.singular.items()} == {
            "m": [0.5, -0.25],
            "new": [0, 0, 0],
            "other": [1, 1, 1],
        }
    other = rounded(theta + np.random.default_rng(seed).normal(size=theta.shape))
    assert np.array_equal(Policy(policy.checkpoint(other, {}), policy.singular).vector(), other)


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.integers(0, 3))
def test_a_population_at_once_is_each_by_itself(
    seed: int, candidates: int, tasks: int, landmarks: bool, axes: int
) -> None:
    base = near_landmarks(seed) if landmarks else checkpoint(seed)
    many = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed))
    policy = Policy(base, axes=principal_axes(base, many, axes) if axes else None)
    assert policy.size == 3 * (axes or base.weight.shape[1])
    rng = np.random.default_rng(seed)
    thetas = rounded(rng.normal(size=(candidates, policy.size)))
    hidden = torch.from_numpy(rng.normal(size=(tasks, 5)).astype(np.float32))
    logits = policy.logits(thetas, policy.features(hidden))
    assert logits.shape == (candidates, tasks, 3)
    for theta, line in zip(thetas, logits, strict=True):
        np.testing.assert_allclose(line, policy.checkpoint(theta, {}).logits(hidden).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_start_keeps_its_decisions(scaled: bool) -> None:
    start = checkpoint(3, scaled=scaled)
    hidden = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.01, 1, 50, 3, 1])
    base = from_checkpoint(start, hidden, workers=("c", "a", "b"), roles=True)
    assert base.info.workers == ("c", "a", "b")
    logits = base.logits(hidden)
    torch.testing.assert_close(logits[:, [1, 2, 0]], start.logits(hidden), rtol=1e-4, atol=1e-5)
    assert not logits[:, 3:].any()  # every turn a Worker's
    if not scaled:
        spread = Policy(base).features(hidden)[:, 6:]
        np.testing.assert_allclose((spread**2).mean(0), 1, rtol=1e-4)


def test_a_start_on_landmarks_keeps_its_decisions_and_its_prior() -> None:
    start = near_landmarks(3)
    hidden = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    base = from_checkpoint(start, hidden, workers=("c", "a", "b"), roles=True)
    logits = base.logits(hidden)
    torch.testing.assert_close(logits[:, [1, 2, 0]], start.logits(hidden))
    assert not logits[:, 3:].any()
    assert base.landmarks is start.landmarks
    assert Policy(base).size == 6 * 4
    assert Policy(base).checkpoint(Policy(base).vector() + 1, {}).prior is base.prior


@pytest.mark.parametrize("landmarks", [True, False])
def test_axes_start_at_the_base_and_move_what_matters(landmarks: bool) -> None:
    base = near_landmarks(5) if landmarks else checkpoint(5)
    hidden = torch.randn(200, 5, generator=torch.Generator().manual_seed(2))
    policy = Policy(base, axes=principal_axes(base, hidden, 2))
    assert not policy.vector().any()
    torch.testing.assert_close(policy.checkpoint(policy.vector(), {}).weight, base.weight)
    # Moved at random by about 1, logits move by about 1; the largest component moves most of that.
    assert policy.axes is not None
    moved = base.features(hidden) @ policy.axes.T
    assert float(moved.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
    assert float(moved[:, 1].square().mean()) > float(moved[:, 0].square().mean())


def test_zeros_are_standardised_by_the_training_tasks() -> None:
    hidden = torch.randn(50, 5) * 7 + 3
    hidden[:, 2] = 4.0
    base = from_zeros(INFO, hidden)
    spread = Policy(base).features(hidden)[:, 3:]
    np.testing.assert_allclose(spread.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(spread.std(0), [1, 1, 0, 1, 1], atol=1e-5)
    assert not base.weight.any()
    with pytest.raises(DataError, match="two training tasks"):
        from_zeros(INFO, hidden[:1])


def test_a_start_for_something_else_is_refused() -> None:
    hidden = torch.randn(4, 5)
    with pytest.raises(CheckpointError, match="workers a, b, c; these are a, b"):
        from_checkpoint(checkpoint(0), hidden, workers=("a", "b"), roles=False)
    with pytest.raises(CheckpointError, match="size 5, these have 6"):
        from_checkpoint(checkpoint(0), torch.randn(4, 6), workers=("a", "b", "c"), roles=False)
    with pytest.raises(CheckpointError, match="has roles"):
        from_checkpoint(checkpoint(0, roles=True), hidden, workers=("a", "b", "c"), roles=False)
