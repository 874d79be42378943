"""Landmarks and the fits on them: the kernel they stand for, who decides far away, what a missing label says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.head import Checkpoint, CheckpointInfo
from orchestrator.landmarks import Landmarks
from training.fit import MOST_NUMBERS, Candidate, Kind, fit, folds_of, space_of, unfitted, unseen_logits
from training.landmarks import k_means, landmark_domains, place_landmarks, principal, whitening
from training.sft import change, kl_loss, reached, soft_targets, solve

INFO = CheckpointInfo(("a", "b", "c"), "none", "0")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.floats(0.1, 8), st.integers(0, 100))
def test_nearness_is_the_gaussian_of_the_distance_between_directions(
    count: int, directions: int, tasks: int, gamma: float, seed: int
) -> None:
    centres = torch.nn.functional.normalize(normal(count, directions, seed=seed))
    landmarks = Landmarks(normal(directions, 7, seed=seed + 1), centres, torch.tensor([gamma]))
    states = normal(tasks, 7, seed=seed + 2)
    places = torch.nn.functional.normalize(states @ landmarks.basis.T)
    expected = torch.exp(-gamma * (places[:, None] - centres[None]).square().sum(-1))
    torch.testing.assert_close(landmarks.features(states), expected, atol=1e-5, rtol=1e-4)
    # Length does not count, only direction.
    torch.testing.assert_close(landmarks.features(3 * states), landmarks.features(states), atol=1e-5, rtol=1e-4)


def test_principal_directions_whiten() -> None:
    states = normal(400, 6) @ torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.1, 0.0, 0.0]))
    states = states - states.mean(0)
    basis = principal(states, 3)
    assert basis.shape == (3, 6)
    places = states @ basis.T
    torch.testing.assert_close(places.T @ places / len(places), torch.eye(3), atol=1e-4, rtol=1e-4)
    # Fewer tasks than dimensions take the other way round; nothing varies in two dimensions.
    few = states[:5] - states[:5].mean(0)
    assert principal(few, 10).shape == (4, 6)
    white = few @ principal(few, 3).T
    torch.testing.assert_close(white.T @ white / 5, torch.eye(3), atol=1e-3, rtol=1e-3)
    assert principal(torch.zeros(5, 6), 3).shape == (1, 6)


def test_decay_on_whitened_features_is_that_of_kernel_ridge_regression() -> None:
    """With a landmark at every task, ridge on φ · whitening is (K + λ I)⁻¹ y, written down without any landmark."""
    landmarks = place_landmarks(normal(40, 10), count=40, gamma=1.5, seed=0)
    assert landmarks.count == 40
    inputs = (landmarks.nearness(landmarks.centres).double() @ whitening(landmarks)).float()
    scores = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    found = solve(inputs, scores, tau=0.5, decay=0.7, objective="squares")
    got = 0.5 * (found.prior + inputs @ found.weight.T)

    kernel = landmarks.nearness(landmarks.centres).double()
    mean = scores.double().mean(0)
    by_kernel = mean + kernel @ torch.linalg.solve(kernel + 0.7 * torch.eye(40).double(), scores.double() - mean)
    torch.testing.assert_close(got, (by_kernel - mean.mean()).float(), atol=2e-3, rtol=0)


def test_the_solution_is_where_the_gradient_vanishes() -> None:
    inputs, scores = normal(60, 8), torch.rand(60, 3, generator=torch.Generator().manual_seed(2))
    scores[::4, 0] = math.nan
    found = solve(inputs, scores, tau=0.25, decay=2.0)
    weight = found.weight.clone().requires_grad_()
    known = ~scores.isnan()
    total = 60 * kl_loss(found.prior + inputs @ weight.T, soft_targets(scores, 0.25), known) + weight.square().sum()
    (gradient,) = torch.autograd.grad(total, weight)
    assert float(gradient.abs().max()) < 2e-2
    assert found.losses[-1] < found.losses[0]
    again = solve(inputs, scores, tau=0.25, decay=2.0, start=found.weight)
    torch.testing.assert_close(again.weight, found.weight, atol=2e-3, rtol=0)
    # Nothing is left to change where the optimum is, but for the decay that a change starts anew.
    moved = change(found.prior + inputs @ found.weight.T, inputs, scores, tau=0.25, decay=1e6, rows=slice(0, 3))
    assert float(moved.abs().max()) < 1e-3


@pytest.mark.parametrize("objective", ["kl", "squares"])
def test_a_missing_label_says_nothing(objective: str) -> None:
    kind = torch.arange(120) % 3
    inputs = torch.nn.functional.one_hot(kind, 3).float()
    scores = inputs.clone()
    hidden, zeroed = scores.clone(), scores.clone()
    hidden[::2, 2], zeroed[::2, 2] = math.nan, 0.0
    whole, masked, imputed = (
        solve(inputs, table, tau=0.5, decay=0.1, objective=objective)  # type: ignore[arg-type]
        for table in (scores, hidden, zeroed)
    )

    def chance(found: object) -> float:
        return float(torch.softmax(found.prior + inputs @ found.weight.T, -1)[2, 2])  # type: ignore[attr-defined]

    assert chance(masked) == pytest.approx(chance(whole), abs=0.05)
    assert chance(imputed) < chance(whole) - 0.1


def clustered() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states `[300, 16]` around twelve places, and scores of three workers, each best at some of them; the
    second is the best on average."""
    kind = torch.arange(300) % 12
    hidden = 6 * normal(12, 16)[kind] + normal(300, 16, seed=1)
    best = torch.tensor([0, 1, 2, 1, 0, 1, 2, 1, 1, 0, 1, 2])[kind]
    scores = 0.2 + 0.6 * torch.nn.functional.one_hot(best, 3).float()
    return hidden, scores


def test_the_head_knows_its_tasks_and_falls_back_on_the_best_worker_elsewhere() -> None:
    hidden, scores = clustered()
    head, losses = fit(hidden[:240], scores[:240], INFO, Candidate(0.25, 0.3, 4.0), Kind())
    assert head.landmarks is not None
    assert losses[-1] < losses[0]
    assert float(reached(head.logits(hidden[240:]), scores[240:]).mean()) > 0.75
    assert head.prior is not None
    mean = scores[:240].mean(0)
    torch.testing.assert_close(head.prior, (mean - mean.mean()) / 0.25, atol=1e-5, rtol=0)
    # Far from every landmark all φ nearly vanish, and the prior decides.
    narrow, _ = fit(hidden[:240], scores[:240], INFO, Candidate(0.25, 0.3, 60.0), Kind())
    assert narrow.landmarks is not None
    tried = normal(4000, 16, seed=9) * 5
    far = tried[narrow.features(tried).max(1).values < 1e-4]
    assert len(far) >= 50
    assert set(narrow.logits(far).argmax(-1).tolist()) == {1}
    torch.testing.assert_close(narrow.logits(far), head.prior.expand(len(far), 3), atol=0.05, rtol=0)


def test_the_linear_head_stays_the_other_option() -> None:
    hidden, scores = clustered()
    head, _ = fit(hidden, scores, INFO, Candidate(0.25, 30.0, 1.0), Kind("linear"))
    assert head.landmarks is None
    assert head.weight.shape == (3, 16)
    torch.testing.assert_close(head.features(hidden).mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    assert float(reached(head.logits(hidden), scores).mean()) > float(scores.mean(0).max())


def test_unseen_logits_do_not_know_the_tasks_own_labels() -> None:
    hidden, scores = clustered()
    candidate = Candidate(0.25, 0.3, 4.0)
    how = {"method": "sft", "tau": 0.25, "decay": 0.3, "objective": "kl"}
    head, _ = fit(hidden, scores, replace(INFO, trained=how), candidate, Kind())
    told = unseen_logits(head, hidden, scores, folds=5, seed=1)
    assert told is not None
    assert float(reached(told, scores).mean()) > 0.7
    other = scores.clone()
    fold = folds_of(range(300), 5, 1)[2]
    other[fold] = 1 - other[fold]
    again = unseen_logits(head, hidden, other, folds=5, seed=1)
    assert again is not None
    torch.testing.assert_close(again[fold], told[fold])
    rest = torch.ones(300, dtype=torch.bool)
    rest[fold] = False
    assert float((again[rest] - told[rest]).abs().max()) > 0.1
    # A head that was changed since, or does not say how it was made, is not refitted.
    for notes in ({}, {"method": "sep-cma-es", "start": how}, {**how, "added": [{"worker": "c"}]}):
        assert unseen_logits(replace(head, info=replace(INFO, trained=notes)), hidden, scores, folds=5, seed=1) is None


@pytest.mark.parametrize(
    ("tasks", "workers", "asked", "placed"), [(300, 3, 512, 300), (300, 3, 50, 50), (300, 150, 512, 132), (10, 2, 5, 5)]
)
def test_how_many_landmarks(tasks: int, workers: int, asked: int, placed: int) -> None:
    head = unfitted(normal(tasks, 12), workers, Kind(landmarks=asked))
    assert head.landmarks is not None
    assert head.landmarks.count == head.weight.shape[1] == placed
    assert head.weight.numel() + workers <= MOST_NUMBERS
    assert head.landmarks.fault(placed) is None
    torch.testing.assert_close(head.landmarks.centres.norm(dim=1), torch.ones(placed))
    space = space_of(head, 2.5)
    assert space.empty.landmarks is not None
    assert float(space.empty.landmarks.gamma) == 2.5


def test_weights_on_the_space_are_weights_on_the_features() -> None:
    hidden = normal(60, 12)
    space = space_of(unfitted(hidden, 3, Kind(landmarks=20)), 2.0)
    weight = normal(3, 20, seed=5)
    head = Checkpoint(INFO, space.weight(weight), space.empty.shift, space.empty.scale, landmarks=space.empty.landmarks)
    torch.testing.assert_close(head.logits(hidden), space.inputs(hidden) @ weight.T, atol=2e-3, rtol=1e-3)


def test_a_landmark_has_the_domain_of_its_nearest_task() -> None:
    states = normal(40, 6)
    names = [f"task {number}" for number in range(40)]
    landmarks = place_landmarks(states, count=40, gamma=1.0, seed=0)
    assert landmark_domains(landmarks, states, names) == tuple(names), "each task is a landmark of its own"
    turned = replace(landmarks, centres=landmarks.centres.flip(0))
    assert landmark_domains(turned, states, names) == tuple(reversed(names))


def test_k_means_finds_the_centres() -> None:
    centres = 20 * normal(4, 3)
    points = centres[torch.arange(200) % 4] + normal(200, 3, seed=1)
    found = k_means(points, 4, seed=0, rounds=5)
    assert float(torch.cdist(centres, found).min(1).values.max()) < 0.6
    assert torch.equal(found, k_means(points, 4, seed=0, rounds=5))
