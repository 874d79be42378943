from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orchestrator.backbone import Backbone
from orchestrator.head import Read
from tests.orchestrator.tiny import said, tiny_folder
from training.evaluate import bootstrap
from training.features import features

TALKS = [said("short"), said("a rather longer text than the other"), said("mid size text")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def run(backbone: Backbone, cache: Path | None, talks: list = TALKS, **changes: object) -> tuple[torch.Tensor, int]:  # type: ignore[type-arg]
    """Features and how many prompts went through the model."""
    settings: dict = {"prompt_format": "chat", "max_tokens": 256, "revision": "r1", "batch_tokens": 1}  # type: ignore[type-arg]
    seen: list[int] = []
    got = features(
        backbone, talks, cache=cache, on_progress=lambda done, _total: seen.append(done), **{**settings, **changes}
    )
    assert seen[-1] == len(talks)
    return got, seen[-1] - seen[0]


def test_a_state_is_computed_once_per_setting(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(folder, dtype=torch.float32)
    cache = tmp_path / "deep" / "states.sqlite"
    plain, computed = run(backbone, None)
    assert computed == 3
    first, computed = run(backbone, cache)
    assert computed == 3
    torch.testing.assert_close(first, plain)
    again, computed = run(backbone, cache)
    assert computed == 0
    assert torch.equal(again, first)
    mixed, computed = run(backbone, cache, [TALKS[2], said("new"), TALKS[0]])
    assert computed == 1
    assert torch.equal(mixed[0], first[2])
    assert torch.equal(mixed[2], first[0])


def test_another_setting_is_another_state(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "states.sqlite"
    backbone = Backbone.load(folder, dtype=torch.float32)
    base, _ = run(backbone, cache)
    for changes in ({"prompt_format": "raw"}, {"revision": "r2"}):
        assert run(backbone, cache, **changes)[1] == 3
    assert run(backbone, cache, max_tokens=100)[1] == 3  # every prompt is longer than that
    for other in (
        Backbone.load(folder, dtype=torch.float32, reads=[Read(-1, "mean")]),
        Backbone.load(folder, dtype=torch.float32, reads=[Read(2)]),
        Backbone.load(folder, dtype=torch.bfloat16),
    ):
        got, computed = run(other, cache)
        assert computed == 3
        assert not torch.equal(got, base)


def test_a_run_that_was_stopped_goes_on(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(folder, dtype=torch.float32)
    cache = tmp_path / "states.sqlite"

    def stop_after_one(done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features(
            backbone,
            TALKS,
            prompt_format="chat",
            max_tokens=256,
            revision="r1",
            cache=cache,
            batch_tokens=1,
            on_progress=stop_after_one,
        )
    assert run(backbone, cache)[1] == 2


def test_bootstrap_intervals() -> None:
    import numpy as np

    values = np.array([0.0, 1.0] * 200)
    estimate = bootstrap(values, np.random.default_rng(0))
    assert estimate.mean == 0.5
    # The normal interval of 400 fair coins is 0.5 ± 0.049.
    assert estimate.low == pytest.approx(0.451, abs=0.006)
    assert estimate.high == pytest.approx(0.549, abs=0.006)
    assert str(bootstrap(np.ones(3), np.random.default_rng(0))) == "1.000 [1.000, 1.000]"
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap(np.array([]), np.random.default_rng(0))
