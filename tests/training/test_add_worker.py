"""A newcomer joins a trained head: it is used where it is good, and nobody else's knowledge is lost."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fugu
from actors.errors import CheckpointError, ConfigError, DataError, FuguError
from orchestrator.head import Checkpoint, CheckpointInfo, load_checkpoint, save_checkpoint
from tests.orchestrator.tiny import tiny_folder
from tests.training.problems import world
from training import train_sft
from training.add_worker import AddWorkerRun, improved, run, usual, widened
from training.fit import Candidate
from training.outcomes import Outcomes, read_outcomes, write_outcomes
from training.sft import kl_loss, soft_targets

OLD = ("words", "sums")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone in `tiny`, outcomes of three workers in `outcomes`, and a head of two of them."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "tiny").mkdir()
    tiny_folder(folder / "tiny")
    world(folder / "outcomes", tasks=600)
    train_sft.run(
        train_sft.SftRun(
            folder / "outcomes",
            folder / "old.safetensors",
            workers=OLD,
            backbone=str(folder / "tiny"),
            max_tokens=128,
            taus=(0.25,),
            decays=(0.3,),
            gammas=(1.0,),
            cache=folder / "features.sqlite",
            progress=False,
        )
    )
    return folder


def settings(place: Path, out: Path, **more: Any) -> AddWorkerRun:
    given = {"outcomes": place / "outcomes", "checkpoint": place / "old.safetensors", "backbone": str(place / "tiny")}
    given |= {"cache": place / "features.sqlite", "progress": False}
    return AddWorkerRun("maps", out=out / "new.safetensors", **{**given, **more})


def test_newcomer_is_worth_what_a_full_training_gives_it(place: Path, tmp_path: Path) -> None:
    report = run(settings(place, tmp_path, tasks=150))
    assert report.tasks == 150
    assert report.workers == (*OLD, "maps")
    # It owns a third of the tasks, where it solves .8 of them and the others .3.
    assert report.after > report.before + 0.08
    assert report.retrained is not None
    assert report.after > report.retrained - 0.03
    assert 0.15 < report.share < 0.55
    written = load_checkpoint(tmp_path / "new.safetensors")
    assert written.info.workers == (*OLD, "maps")
    assert written.info.trained["added"] == [{"worker": "maps", "tasks": 150, "seed": 0, "polish": 5}]
    assert written.info.trained["method"] == "sft"
    again = run(settings(place, tmp_path, tasks=150))
    assert replace(again, seconds=0, retrain_seconds=0) == replace(report, seconds=0, retrain_seconds=0)


def test_without_polish_the_others_rows_stay(place: Path, tmp_path: Path) -> None:
    report = run(settings(place, tmp_path, polish=0, retrain=False))
    assert report.after == report.row
    assert report.retrained is None
    old, new = load_checkpoint(place / "old.safetensors"), load_checkpoint(tmp_path / "new.safetensors")
    torch.testing.assert_close(new.weight[:2], old.weight, rtol=0, atol=0)
    assert float(new.weight[2].norm()) > 0
    assert new.prior is not None
    assert old.prior is not None
    torch.testing.assert_close(new.prior[:2], old.prior, rtol=0, atol=0)


def test_roles_stay_where_they_belong() -> None:
    weight = torch.arange(20.0).reshape(5, 4)
    head = Checkpoint(CheckpointInfo(("a", "b"), "none", "0", roles=True), weight, prior=torch.arange(5.0))
    wider = widened(head, "c", -1.5)
    assert wider.info.workers == ("a", "b", "c")
    torch.testing.assert_close(wider.weight, torch.cat([weight[:2], torch.zeros(1, 4), weight[2:]]))
    assert wider.prior is not None
    assert wider.prior.tolist() == [0, 1, -1.5, 2, 3, 4]
    assert widened(replace(head, prior=None), "c", None).prior is None


def test_newcomers_prior_compares_it_with_the_others_where_it_was_tried() -> None:
    head = Checkpoint(CheckpointInfo(("a", "b"), "none", "0"), torch.zeros(2, 4), prior=torch.tensor([0.5, -0.1]))
    # Tried on hard tasks only, where the others reach .1 on average and it reaches .3.
    scores = torch.tensor([[1.0, 1.0, math.nan], [0.2, 0.0, 0.5], [math.nan, 0.1, 0.1]])
    assert usual(head, scores, 0.5) == pytest.approx(0.2 + (0.4 + 0.0) / 2 / 0.5)
    assert usual(replace(head, prior=None), scores, 0.5) is None


def test_fitting_lowers_the_loss_and_moves_the_chosen_rows_only() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(80, 6, generator=generator), torch.randn(3, 6, generator=generator)
    scores = torch.rand(80, 3, generator=generator)
    scores[::3, 1] = torch.nan
    head, fit = Checkpoint(CheckpointInfo(("a", "b", "c"), "none", "0"), weight), Candidate(0.25, 0.1, 1.0)
    after = improved(head, hidden, scores, fit, rows=slice(2, 3))
    torch.testing.assert_close(after.weight[:2], weight[:2], rtol=0, atol=0)

    def loss(head: Checkpoint) -> float:
        return float(kl_loss(head.logits(hidden), soft_targets(scores, fit.tau), ~scores.isnan()))

    assert loss(after) < loss(head)
    assert loss(improved(head, hidden, scores, fit, rows=slice(0, 3))) < loss(after)
    assert torch.equal(improved(head, hidden, scores, fit, rows=slice(0, 3), steps=0).weight, weight)


def only(place: Path, tmp_path: Path, keep: Any) -> dict[str, Path]:
    found = read_outcomes(place / "outcomes")
    splits = {task.task_id: task.split for task in found.tasks}
    kept = tuple(row for row in found.outcomes if keep(row.worker, splits[row.task_id]))
    write_outcomes(tmp_path / "part", Outcomes(found.tasks, kept))
    return {"outcomes": tmp_path / "part"}


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (lambda place, tmp: {"worker": "sums"}, CheckpointError, "has a row for sums already"),
        (lambda place, tmp: {"worker": "who"}, DataError, "no outcome of who; there are"),
        (lambda place, tmp: {"split": "dev"}, DataError, "there are train, val"),
        (lambda place, tmp: {"checkpoint": tmp / "none"}, CheckpointError, "does not exist"),
        (lambda place, tmp: {"tau": 0.0}, ConfigError, "must be positive"),
        (
            lambda place, tmp: only(place, tmp, lambda worker, split: worker != "words"),
            DataError,
            "no outcome of words",
        ),
        (
            lambda place, tmp: only(place, tmp, lambda worker, split: (worker, split) != ("maps", "train")),
            DataError,
            "maps shares no task of the split train",
        ),
        (
            lambda place, tmp: only(place, tmp, lambda worker, split: (worker, split) != ("maps", "val")),
            DataError,
            "no task of the split val has outcomes of all workers",
        ),
    ],
)
def test_bad_input(place: Path, tmp_path: Path, change: Any, kind: type[FuguError], says: str) -> None:
    with pytest.raises(kind, match=says):
        run(replace(settings(place, tmp_path), **change(place, tmp_path)))
    assert not (tmp_path / "new.safetensors").exists()


def test_command(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_CACHE", str(place / "cache"))
    save_checkpoint(tmp_path / "old.safetensors", load_checkpoint(place / "old.safetensors"))
    command = (
        *("train", "add-worker", "maps", "--outcomes", place / "outcomes", "--out", tmp_path / "new.safetensors"),
        *("--backbone", place / "tiny", "--tasks", 100, "--json", tmp_path / "new.json", "--quiet", "--checkpoint"),
    )
    result = CliRunner().invoke(fugu.app, [*map(str, command), str(tmp_path / "old.safetensors")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "new.json").read_text())
    assert (report["worker"], report["tasks"]) == ("maps", 100)
    assert "maps joined" in result.output
    result = CliRunner().invoke(fugu.app, [*map(str, command), str(tmp_path / "new.safetensors")])
    assert result.exit_code == 2
    assert "has a row for maps already" in result.output
