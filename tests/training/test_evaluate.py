from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from actors.errors import CheckpointError, ConfigError, DataError, FuguError
from orchestrator.head import load_checkpoint
from tests.orchestrator.tiny import tiny_folder
from tests.training.known import COST, MASTER, MASTERY, known_folder
from training import evaluate, train_sft
from training.evaluate import EvalReport, EvalRun
from training.outcomes import read_outcomes
from training.train_sft import SftRun


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outcomes, a backbone, and a head trained on them by the command's own function."""
    base = tmp_path_factory.mktemp("eval")
    made = {
        "outcomes": known_folder(base / "outcomes"),
        "cache": base / "states.sqlite",
        "head": base / "head.safetensors",
    }
    made["backbone"] = tiny_folder(base / "tiny")
    run = SftRun(made["outcomes"], made["head"], backbone=str(made["backbone"]), max_tokens=128, cache=made["cache"])
    train_sft.run(replace(run, taus=(0.25,), decays=(0.3,), progress=False))
    return made


def settings(made: dict[str, Path], **changes: Any) -> EvalRun:
    run = EvalRun(
        made["outcomes"], (made["head"],), backbone=str(made["backbone"]), cache=made["cache"], progress=False
    )
    return replace(run, **changes)


@pytest.fixture(scope="module")
def report(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> EvalReport:
    folder = tmp_path_factory.mktemp("out")
    return evaluate.run(settings(made, out=folder, min_gain=0.1))


def test_the_head_finds_each_master_and_the_figures_are_right(report: EvalReport, made: dict[str, Path]) -> None:
    assert (report.best_single, report.best_single_from, report.tasks) == ("a", "the training tasks", 60)
    test = read_outcomes(made["outcomes"]).split("test")
    mean = dict(zip(COST, test.scores(list(COST)).mean(0), strict=True))
    for worker in COST:
        row = report.row(worker)
        assert row.score.mean == pytest.approx(mean[worker])
        assert row.gain.mean == pytest.approx(mean[worker] - mean["a"])
        assert row.cost_usd == pytest.approx(COST[worker])
    assert report.row("oracle").score.mean == pytest.approx(test.scores(list(COST)).max(1).mean())
    head = report.row("head")
    assert head.score.mean == pytest.approx(MASTERY, abs=0.06)
    assert head.gain.low > 0.15  # the paired interval excludes anything small
    assert head.cost_usd == pytest.approx(np.mean(list(COST.values())), rel=0.05)
    for kind, master in MASTER.items():
        assert head.shares[f"domain of {kind}"][master] > 0.9
    # Every other way that sees the kinds is as good here; the random worker is not.
    for name in ("lookup per dataset", "kNN", "k-means", "MLP"):
        assert report.row(name).score.mean == pytest.approx(head.score.mean, abs=0.1)
    assert report.row("random worker").score.mean == pytest.approx(np.mean(list(mean.values())))
    assert report.row("self-consistency of a").calls == 4
    assert report.row("a").score.mean < report.row("oracle, luck-free").score.mean < report.row("oracle").score.mean
    assert report.closed(report.row("oracle")) == pytest.approx(1)
    assert not report.left_out
    assert report.passed


def test_json_table_and_pictures_are_written(report: EvalReport) -> None:
    folder = report.settings.out
    assert folder is not None
    data = json.loads((folder / "eval.json").read_text())
    row = next(row for row in data["rows"] if row["name"] == "head")
    assert row["score"]["mean"] == report.row("head").score.mean
    assert row["gap_closed"] == pytest.approx(report.closed(report.row("head")))
    assert {path.name for path in folder.glob("*.png")} == {"quality.png", "shares-head.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    assert "head (sft)" in text
    assert f"{report.row('head').score.mean:.3f}" in text


def test_the_gate(made: dict[str, Path]) -> None:
    assert not evaluate.run(settings(made, min_gain=0.6, hidden_baselines=False)).passed
    report = evaluate.run(settings(made, checkpoints=(), min_gain=0.0))
    assert not report.passed  # nothing to pass with
    assert report.left_out["kNN"] == "no checkpoint says which hidden states to read"


def test_only_test_tasks_are_enough_to_measure_a_head(made: dict[str, Path], tmp_path: Path) -> None:
    full = evaluate.run(settings(made, hidden_baselines=False))
    report = evaluate.run(settings(made, outcomes=known_folder(tmp_path / "o", test_only=True)))
    assert report.row("head") == full.row("head")
    assert (report.best_single, report.best_single_from) == ("a", "the head's training tasks")
    for name in ("lookup per dataset", "kNN", "k-means", "MLP"):
        assert "has no training tasks of these workers (split train)" in report.left_out[name]


def test_the_figures_do_not_depend_on_the_order_of_the_workers(report: EvalReport, made: dict[str, Path]) -> None:
    other = evaluate.run(settings(made, workers=("c", "a", "b")))
    assert other.workers == ("c", "a", "b")
    for name in ("head", "a", "oracle", "kNN"):
        assert other.row(name).score == report.row(name).score


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"split": "nothing"}, DataError, "no task has the split nothing; there are test, train"),
        ({"workers": ("a", "x")}, DataError, r"outcomes\.parquet has no outcome of x; there are a, b, c"),
        ({"workers": ("a", "b", "a")}, ConfigError, "named twice"),
        ({"workers": ("a", "b")}, CheckpointError, r"head\.safetensors does not fit: it has rows for c"),
        ({"outcomes": Path("nowhere")}, DataError, r"nowhere/tasks\.parquet does not exist"),
        ({"checkpoints": (Path("none.safetensors"),)}, CheckpointError, "does not exist"),
    ],
)
def test_bad_input_is_named(made: dict[str, Path], changes: dict[str, Any], error: type[FuguError], says: str) -> None:
    with pytest.raises(error, match=says):
        evaluate.run(settings(made, **changes))


def nan_score(rows: list[dict[str, Any]]) -> None:
    rows[7]["score"] = float("nan")


def duplicate(rows: list[dict[str, Any]]) -> None:
    rows.append(rows[3])


def stranger(rows: list[dict[str, Any]]) -> None:
    rows[0]["task_id"] = "unknown"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (nan_score, r"outcomes\.parquet: row 7 \(task t2, worker b\): score holds nan"),
        (duplicate, r"outcomes\.parquet: rows 3 and 540 are both worker a on task t1"),
        (stranger, r"outcomes\.parquet: row 0 \(worker a\): task unknown is not in"),
    ],
)
def test_spoilt_outcomes_are_refused_by_training_and_evaluation(
    made: dict[str, Path], tmp_path: Path, spoil: Callable[[list[dict[str, Any]]], None], says: str
) -> None:
    import pyarrow as pa

    folder = known_folder(tmp_path / "o")
    rows = pq.read_table(folder / "outcomes.parquet").to_pylist()
    spoil(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "outcomes.parquet")
    with pytest.raises(DataError, match=says):
        evaluate.run(settings(made, outcomes=folder))
    with pytest.raises(DataError, match=says):
        train_sft.run(SftRun(folder, tmp_path / "h.safetensors", backbone=str(made["backbone"])))
    assert not (tmp_path / "h.safetensors").exists()


def test_two_heads_of_the_same_name_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "head.safetensors"
    other.write_bytes(made["head"].read_bytes())
    with pytest.raises(ConfigError, match="same file name"):
        evaluate.run(settings(made, checkpoints=(made["head"], other)))
    assert load_checkpoint(other).info.trained["best_single"] == "a"
