from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from actors.errors import CheckpointError
from orchestrator.head import (
    Checkpoint,
    CheckpointInfo,
    Read,
    check_fits,
    load_checkpoint,
    masked_softmax,
    pick,
    save_checkpoint,
)
from orchestrator.landmarks import Landmarks

INFO = CheckpointInfo(workers=("a", "b", "c"), backbone="org/model", revision="r1", trained={"tasks": 3})


def checkpoint(**changes: Any) -> Checkpoint:
    fields: dict[str, Any] = {"info": INFO, "weight": torch.arange(12.0).reshape(3, 4)}
    return Checkpoint(**{**fields, **changes})


# --- logits, masks, choice -------------------------------------------------------------------------------------------


def test_logits_are_w_h_and_fold_the_standardisation() -> None:
    hidden = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert checkpoint().logits(hidden).tolist() == [[20.0, 60.0, 100.0]]
    folded = checkpoint(shift=torch.tensor([1.0, 1.0, 1.0, 1.0]), scale=torch.tensor([1.0, 0.5, 0.0, 2.0]))
    # (h - shift) * scale = [0, 0.5, 0, 6]
    assert folded.logits(hidden).tolist() == [[18.5, 44.5, 70.5]]


def test_logits_add_the_prior_and_may_be_of_landmarks() -> None:
    hidden = torch.tensor([[3.0, 1.0, 9.0, 9.0], [1.0, -1.0, 0.0, 0.0]])
    # Standardised and projected these are [2, 0] and [0, -2]: one at the first landmark and at right angles to the
    # second, the other at right angles to the first and opposite to the second.
    landmarks = Landmarks(torch.eye(2, 4), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.5]))
    head = checkpoint(
        weight=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        shift=torch.tensor([1.0, 1.0, 0.0, 0.0]),
        scale=torch.ones(4),
        prior=torch.tensor([0.0, 10.0, 20.0]),
        landmarks=landmarks,
    )
    one, two = math.exp(-1), math.exp(-2)  # exp(−2γ(1 − cos)) with cos 0 and −1
    expected = torch.tensor([[1.0, 10 + one, 20 + 1 + one], [one, 10 + two, 20 + one + two]])
    torch.testing.assert_close(head.logits(hidden), expected)
    assert head.dimension == 4
    assert head.features(hidden).shape == (2, 2)


def test_masked_softmax_by_hand() -> None:
    got = masked_softmax(torch.tensor([[0.0, 5.0, math.log(3)]]), torch.tensor([[True, False, True]]))
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64), atol=1e-7, rtol=0)


rows = st.integers(1, 8).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n).filter(any),
    )
)


@given(rows)
def test_the_mask_is_exact_and_the_rest_is_a_distribution(row: tuple[list[float], list[bool]]) -> None:
    logits, allowed = row
    got = masked_softmax(torch.tensor([logits]), torch.tensor([allowed]))[0].tolist()
    assert all(p == 0 for p, ok in zip(got, allowed, strict=True) if not ok)
    assert math.isclose(math.fsum(got), 1, abs_tol=1e-12)
    kept = [index for index, ok in enumerate(allowed) if ok]
    # What a mask leaves is what a head with only those rows would say.
    alone = masked_softmax(torch.tensor([[logits[i] for i in kept]]), torch.ones(1, len(kept), dtype=torch.bool))
    assert [got[i] for i in kept] == pytest.approx(alone[0].tolist(), abs=1e-12)


def test_masked_softmax_refuses_what_has_no_answer() -> None:
    with pytest.raises(ValueError, match="allows no worker"):
        masked_softmax(torch.zeros(2, 2), torch.tensor([[True, True], [False, False]]))
    with pytest.raises(ValueError, match="not finite"):
        masked_softmax(torch.tensor([[0.0, math.nan]]), torch.tensor([[True, True]]))
    with pytest.raises(ValueError, match="shape"):
        masked_softmax(torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool))
    # A masked logit may be anything.
    assert masked_softmax(torch.tensor([[0.0, math.nan]]), torch.tensor([[True, False]])).tolist() == [[1.0, 0.0]]


@given(rows, st.floats(0, 1, exclude_max=True))
def test_a_masked_worker_is_never_picked(row: tuple[list[float], list[bool]], draw: float) -> None:
    logits, allowed = row
    probabilities = masked_softmax(torch.tensor([logits]), torch.tensor([allowed]))[0].tolist()
    assert allowed[pick(probabilities, draw)]
    assert allowed[pick(probabilities, None)]


def test_draws_follow_the_probabilities() -> None:
    assert [pick([0.25, 0.0, 0.75], draw) for draw in (0.0, 0.2499, 0.25, 0.999999)] == [0, 0, 2, 2]
    assert pick([0.4, 0.2, 0.4], None) == 0
    rng = random.Random(1)
    counts = Counter(pick([0.2, 0.5, 0.3], rng.random()) for _ in range(20_000))
    for index, expected in enumerate((0.2, 0.5, 0.3)):
        assert counts[index] / 20_000 == pytest.approx(expected, abs=0.015)  # 4 standard deviations


# --- the file --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    workers=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True),
    roles=st.booleans(),
    reads=st.lists(
        st.builds(Read, st.sampled_from([-1, 1, 7]), st.sampled_from(["penultimate", "last", "mean"])),
        min_size=1,
        max_size=4,
        unique=True,
    ),
    seed=st.integers(0, 100),
)
def test_what_is_saved_is_what_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, workers: list[str], roles: bool, reads: list[Read], seed: int
) -> None:
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    info = CheckpointInfo(
        tuple(workers), "org/m", "abc", tuple(reads), "raw", roles, {"tau": 0.25, "table": {"x": [1, 2]}}
    )
    generator = torch.Generator().manual_seed(seed)
    made = Checkpoint(
        info,
        torch.randn(info.rows, 6, generator=generator),
        shift=torch.randn(6, generator=generator),
        scale=torch.rand(6, generator=generator),
        singular={"layers.2.q.weight": torch.randn(6, generator=generator)},
        prior=torch.randn(info.rows, generator=generator) if seed % 2 else None,
    )
    if seed % 3 == 0:
        landmarks = Landmarks(*(torch.randn(*size, generator=generator) for size in ((4, 6), (5, 4))), torch.ones(1))
        made = replace(made, landmarks=landmarks, weight=torch.randn(info.rows, 5, generator=generator))
        made = replace(made, info=replace(info, max_tokens=seed + 1, domains=("sums", "", "sums", "letters", "ünï")))
        info = made.info
    save_checkpoint(path, made)
    back = load_checkpoint(path)
    assert back.info == info
    assert torch.equal(back.weight, made.weight)
    assert (back.prior is None) == (made.prior is None)
    assert (back.landmarks is None) == (made.landmarks is None)
    hidden = torch.randn(3, 6, generator=generator)
    assert torch.equal(back.logits(hidden), made.logits(hidden))
    assert made.shift is not None
    assert made.scale is not None
    assert back.shift is not None
    assert torch.equal(back.shift, made.shift)
    assert back.scale is not None
    assert torch.equal(back.scale, made.scale)
    assert torch.equal(back.singular["layers.2.q.weight"], made.singular["layers.2.q.weight"])
    assert [entry.name for entry in path.parent.iterdir()] == ["head.safetensors"]  # no temporary file stays


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_checkpoint(path, checkpoint())
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(path, checkpoint(weight=torch.full((3, 4), math.inf)))
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(path, checkpoint(info=replace(INFO, trained={"loss": math.nan})))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 7, 100, -1])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "head.safetensors"
    save_checkpoint(path, checkpoint())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"head\.safetensors is cut off or not a safetensors file"):
        load_checkpoint(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors does not exist"):
        load_checkpoint(tmp_path / "none.safetensors")


def rewritten(tmp_path: Path, metadata: dict[str, str | None], **tensors: torch.Tensor | None) -> Path:
    """A good checkpoint with some metadata or tensors replaced (None: removed)."""
    path = tmp_path / "head.safetensors"
    save_checkpoint(path, checkpoint(shift=torch.zeros(4)))
    with safe_open(path, framework="pt") as file:
        old = {**file.metadata(), **metadata}
        parts = {**{name: file.get_tensor(name) for name in file.keys()}, **tensors}  # noqa: SIM118
    save_file(
        {name: tensor for name, tensor in parts.items() if tensor is not None},
        path,
        {key: value for key, value in old.items() if value is not None},
    )
    return path


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"workers": None}, "lacks metadata: workers"),
        ({"revision": None, "roles": None}, "lacks metadata: revision, roles"),
        ({"format": "other"}, "is other, version 2; this program reads fugu-router up to version 2"),
        ({"format_version": "3"}, "is fugu-router, version 3"),
        ({"workers": "a,b"}, "metadata workers is not JSON"),
        ({"workers": '["a", "b", 3]'}, "metadata workers must be a list of names"),
        ({"workers": '["a", "b", "b"]'}, "names a worker twice"),
        ({"workers": '["a", "b"]'}, r"head.weight has shape \[3, 4\]; 2 workers need \[2, d\]"),
        ({"roles": "true"}, r"3 workers and 3 roles need \[6, d\]"),
        ({"roles": "1"}, "metadata roles must be bool"),
        ({"prompt_format": "xml"}, "metadata prompt_format is 'xml'"),
        ({"reads": None}, "lacks metadata: reads"),
        ({"reads": "[]"}, "reads must name at least one place, each once"),
        ({"reads": '[[-1, "last"], [-1, "last"]]'}, "reads must name at least one place, each once"),
        ({"reads": '[["last"]]'}, "reads must be pairs"),
        ({"reads": '[[-1, "first"]]'}, "metadata position is 'first'"),
        ({"reads": '[[0, "last"]]'}, "metadata layer is 0"),
        ({"reads": '[[2.0, "last"]]'}, "metadata layer is 2.0"),
        ({"max_tokens": "0"}, "metadata max_tokens is 0"),
        ({"max_tokens": "many"}, "metadata max_tokens is not JSON"),
        ({"domains": "[1]"}, "metadata domains must be a list of names"),
        ({"domains": '["a"]'}, "metadata domains names 1, not one per landmark"),
        ({"format_version": "1"}, "lacks metadata: position, layer"),
        ({"format_version": "1", "layer": "x", "position": "last"}, "metadata layer is not JSON"),
        ({"format_version": "1", "layer": "-1", "position": "first"}, "metadata position is 'first'"),
    ],
)
def test_wrong_metadata_is_named(tmp_path: Path, metadata: dict[str, str | None], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(rewritten(tmp_path, metadata))


def test_a_domain_is_that_of_the_nearest_landmark_if_any_is_near() -> None:
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    info = replace(INFO, domains=("sums", "letters"))
    hidden = torch.tensor([[2.0, 0.1, 9, 9], [0.1, 3.0, 9, 9], [-1.0, -1.0, 9, 9], [1.0, 1.2, 9, 9]])
    for gamma in (0.5, 4.0):
        landmarks = Landmarks(torch.eye(2, 4), centres, torch.tensor([gamma]))
        made = Checkpoint(info, torch.zeros(info.rows, 2), landmarks=landmarks)
        assert made.domains(hidden) == ["sums", "letters", None, "letters"]
        assert replace(made, info=INFO).domains(hidden) == [None] * 4
    assert checkpoint().domains(torch.zeros(2, 4)) == [None, None]


def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    old = {"format_version": "1", "position": "last", "layer": "7", "reads": None}
    assert load_checkpoint(rewritten(tmp_path, old)).info == replace(INFO, reads=(Read(7, "last"),))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"head.weight": None}, "has no tensor head.weight"),
        ({"head.weight": torch.full((3, 4), math.nan)}, "head.weight holds numbers that are not finite"),
        ({"head.prior": torch.zeros(5)}, r"head.prior has shape \[5\], not \[3\]"),
        ({"landmarks.basis": torch.zeros(2, 4)}, "has only landmarks.basis of"),
        (
            {
                "landmarks.basis": torch.zeros(2, 9),
                "landmarks.centres": torch.zeros(3, 2),
                "landmarks.gamma": torch.ones(1),
            },
            r"landmarks.centres has shape \[3, 2\], not \[4, 2\]",
        ),
        (
            {
                "landmarks.basis": torch.zeros(2, 9),
                "landmarks.centres": torch.zeros(4, 2),
                "landmarks.gamma": torch.zeros(1),
            },
            "landmarks.gamma is not one positive number",
        ),
        ({"head.shift": torch.zeros(5)}, r"head.shift has shape \[5\], not \[4\]"),
        ({"head.scale": torch.tensor([1.0, 1.0, 1.0, -math.inf])}, "head.scale holds numbers that are not finite"),
        ({"singular.x": torch.zeros(2, 2)}, r"singular.x has shape \[2, 2\]"),
        ({"singular.x": torch.tensor([math.nan])}, "singular.x holds numbers that are not finite"),
        ({"bias": torch.zeros(3)}, "unknown tensors: bias"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor | None], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(rewritten(tmp_path, {}, **tensors))


def test_a_checkpoint_of_something_else_says_all_that_differs() -> None:
    fits = {"workers": ("c", "b", "a"), "dimension": 4, "backbone": "org/model", "revision": "r1"}
    check_fits(checkpoint(), **fits)  # type: ignore[arg-type]
    other = {"workers": ("a", "b", "new"), "dimension": 8, "backbone": "org/other", "revision": "r2"}
    with pytest.raises(CheckpointError) as raised:
        check_fits(checkpoint(), **other, where="file x")  # type: ignore[arg-type]
    assert raised.value.message == (
        "file x does not fit: it has no row for new; it has rows for c, not in this pool; "
        "it was trained on the backbone org/model, this is org/other; "
        "it was trained on revision r1 of the backbone, this is r2; "
        "it reads hidden states of size 4, this backbone has 8"
    )
