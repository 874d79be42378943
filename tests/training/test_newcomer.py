"""A newcomer is labelled alone, on chosen tasks, and joins a head with what it has shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import fugu
from actors.errors import CheckpointError, ConfigError, DataError
from orchestrator.head import load_checkpoint
from tests.loopback import LoopbackProvider
from tests.orchestrator.tiny import tiny_folder
from tests.training.problems import world
from tests.training.test_live import configured
from training import train_sft
from training.newcomer import NewcomerRun, run, spread
from training.outcomes import Outcomes, read_outcomes, write_outcomes

OLD = ("words", "sums")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone in `tiny`, and a head of two workers whose outcomes are in `outcomes`."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "tiny").mkdir()
    tiny_folder(folder / "tiny")
    found = read_outcomes(world(folder / "outcomes", tasks=300))
    write_outcomes(
        folder / "outcomes", Outcomes(found.tasks, tuple(one for one in found.outcomes if one.worker in OLD))
    )
    train_sft.run(
        train_sft.SftRun(
            folder / "outcomes",
            folder / "old.safetensors",
            workers=OLD,
            backbone=str(folder / "tiny"),
            max_tokens=128,
            taus=(0.25,),
            decays=(0.3,),
            cache=folder / "features.sqlite",
            progress=False,
        )
    )
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("FUGU_CACHE", str(place / "cache"))


def copied(place: Path, folder: Path) -> Path:
    """The outcomes, to be written to."""
    write_outcomes(folder / "outcomes", read_outcomes(place / "outcomes"))
    return folder / "outcomes"


def settings(place: Path, folder: Path, upstream: LoopbackProvider, **more: Any) -> NewcomerRun:
    given_: dict[str, Any] = {"config": configured(folder, upstream), "outcomes": copied(place, folder)}
    given_ |= {"checkpoint": place / "old.safetensors", "backbone": str(place / "tiny"), "progress": False}
    return NewcomerRun(**{"worker": "maps", **given_, **more})


@given(count=st.integers(1, 12), seed=st.integers(0, 1000))
def test_what_is_spread_covers_at_least_as_closely_as_twice_the_best(count: int, seed: int) -> None:
    """Gonzalez' bound: no other choice of so many has less than half the greedy one's largest distance."""
    features = torch.randn(12, 2, generator=torch.Generator().manual_seed(seed)).double()
    rows = spread(features, count, first=seed % 12)
    assert len(set(rows)) == count
    reach = float(torch.cdist(features, features[rows]).min(1).values.max())
    others = torch.randperm(12, generator=torch.Generator().manual_seed(seed + 1))[:count]
    assert reach <= 2 * float(torch.cdist(features, features[others]).min(1).values.max()) + 1e-9


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("pick", ["spread", "random"])
def test_only_the_newcomer_is_asked_and_only_once(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider, pick: Any
) -> None:
    told = settings(place, tmp_path, upstream, tasks=40, held=20, pick=pick)
    report = run(told)
    assert report is not None
    assert report.complete
    assert {request.model for request in upstream.requests} == {"maps"}
    assert upstream.total == 60
    found = read_outcomes(told.outcomes)
    splits = {task.task_id: task.split for task in found.tasks}
    tried = [splits[one.task_id] for one in found.outcomes if one.worker == "maps"]
    assert (tried.count("train"), tried.count("val")) == (40, 20)
    # The others' outcomes are as they were.
    before = read_outcomes(place / "outcomes")
    assert {one.task_id for one in found.outcomes if one.worker == "words"} == {task.task_id for task in before.tasks}
    assert run(told) is None
    assert upstream.total == 60


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_from_the_command_line_it_joins(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    command = ["train", "add-worker", "maps", "--config", str(configured(tmp_path, upstream))]
    command += ["--outcomes", str(copied(place, tmp_path)), "--checkpoint", str(place / "old.safetensors")]
    command += ["--out", str(tmp_path / "wider.safetensors"), "--tasks", "60", "--held", "40", "--max-requests", "100"]
    command += ["--backbone", str(place / "tiny"), "--json", str(tmp_path / "told.json"), "--quiet", "--no-retrain"]
    result = CliRunner().invoke(fugu.app, command, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert upstream.total == 100
    report = json.loads((tmp_path / "told.json").read_text())
    assert (report["tasks"], report["held_out"]) == (60, 40)
    # It solves all tasks about maps, which nobody else could.
    assert report["after"] > report["before"] + 0.1
    assert load_checkpoint(tmp_path / "wider.safetensors").info.workers == (*OLD, "maps")


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_budget_covers_both_parts(ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider) -> None:
    told = settings(place, tmp_path, upstream, tasks=40, held=20, max_requests=30)
    report = run(told)
    assert report is not None
    assert "30 of 30 requests" in report.stopped
    found = read_outcomes(told.outcomes)
    splits = {task.task_id: task.split for task in found.tasks}
    tried = [splits[one.task_id] for one in found.outcomes if one.worker == "maps"]
    assert len(tried) == 30
    assert tried.count("val") >= 3


def test_mistakes_cost_nothing(place: Path, tmp_path: Path, upstream: LoopbackProvider) -> None:
    def fails(error: type[Exception], match: str, **more: Any) -> None:
        with pytest.raises(error, match=match):
            run(settings(place, tmp_path, upstream, **more))
        assert upstream.total == 0

    fails(ConfigError, "at least", tasks=0)
    fails(ConfigError, "has no worker who", worker="who")
    fails(CheckpointError, "has a row for words already", worker="words")
    fails(CheckpointError, "does not exist", checkpoint=tmp_path / "none")
    fails(DataError, "there are train, val", split="dev")
