"""The training commands: as a user gives them, in processes of their own where the work is real."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fugu
from actors.errors import FuguError
from orchestrator.head import Checkpoint, CheckpointInfo, load_checkpoint, save_checkpoint
from tests.orchestrator.tiny import tiny_folder
from tests.training.problems import WORKERS, world
from training import (
    add_worker,
    conductor_sft,
    evaluate,
    evaluate_live,
    evolve,
    grpo_placed,
    label,
    newcomer,
    train_sft,
    tune,
)
from training.commands import reads
from training.outcomes import Outcomes, read_outcomes, write_outcomes

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = (("label",), ("train", "sft"), ("train", "evolve"), ("train", "add-worker"), ("eval",), ("tune",))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny backbone in `tiny` and outcomes in `outcomes`."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny").mkdir()
    tiny_folder(folder / "tiny")
    world(folder / "outcomes", tasks=150)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("FUGU_CACHE", str(place / "cache"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "fugu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=REPOSITORY)


def told(*arguments: object) -> tuple[int, str]:
    """Exit code and all that was printed, in this process."""
    result = CliRunner().invoke(fugu.app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})
    return result.exit_code, result.output


@pytest.mark.timeout(300)
def test_from_outcomes_to_a_gate(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = ("--outcomes", place / "outcomes")
    tiny = ("--backbone", place / "tiny", "--read-tokens", 128, "--quiet")
    sft = run(
        *("train", "sft", *outcomes, "--workers", "maps,sums,words", "--out", tmp_path / "sft.safetensors"),
        *("--tau", 0.25, "--decay", 0.3, "--json", tmp_path / "made" / "sft.json", *tiny),
    )
    assert sft.returncode == 0, sft.stderr
    assert sft.stderr == ""
    head = load_checkpoint(tmp_path / "sft.safetensors")
    assert head.info.workers == ("maps", "sums", "words")
    assert json.loads((tmp_path / "made" / "sft.json").read_text())["settings"]["tau"] == 0.25

    # By addresses, as on a cluster whose machines share a bucket: another machine goes on.
    at = f"file://{tmp_path}"
    grow = (
        *("train", "evolve", "--outcomes", f"file://{place}/outcomes", "--checkpoint", f"{at}/sft.safetensors"),
        *("--population", 6, "--out", f"{at}/evolved.safetensors", "--json", tmp_path / "evolved.json", *tiny),
    )
    for machine, more, generations in (("one", (), 3), ("two", ("--resume",), 4)):
        monkeypatch.setenv("FUGU_CACHE", str(tmp_path / machine))
        code, output = told(*grow, "--generations", generations, *more)
        assert code == 0, output
        assert json.loads((tmp_path / "evolved.json").read_text())["generations"] == generations
    assert (tmp_path / "evolved.evolve" / "state.pkl").exists()
    code, output = told("train", "sft", "--outcomes", f"{at}/none", "--out", tmp_path / "none.safetensors")
    assert code == 2
    assert f"there is no file {at}/none/tasks.parquet" in output

    measure = (
        *("eval", *outcomes, "--checkpoint", tmp_path / "sft.safetensors"),
        *("--checkpoint", tmp_path / "evolved.safetensors", "--split", "val", "--no-baselines", *tiny),
    )
    passed = run(*measure, "--json", tmp_path / "eval.json", "--min-gain", -1)
    assert passed.returncode == 0, passed.stderr
    report = json.loads((tmp_path / "eval.json").read_text())
    scores = {row["name"]: row["score"]["mean"] for row in report["rows"]}
    # The subject of a task can be read off its words, so routing has to be worth something here.
    assert scores["sft"] > max(scores[name] for name in WORKERS)
    assert scores["sft"] <= scores["oracle"]
    assert "oracle" in passed.stdout
    code, output = told(*measure, "--min-gain", 0.9)
    assert code == 1
    assert "gate: a gain of 0.9 was asked for: sft +" in output


@pytest.mark.model
@pytest.mark.timeout(300)
def test_sft_and_eval_with_the_embedded_backbone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUGU_CACHE")
    outcomes = ("--outcomes", place / "outcomes")
    router = tmp_path / "router.safetensors"
    sft = run("train", "sft", *outcomes, "--out", router, "--tau", 0.25, "--decay", 0.3, "--quiet")
    assert sft.returncode == 0, sft.stderr
    measured = run(
        *("eval", *outcomes, "--checkpoint", router, "--split", "val", "--json", tmp_path / "eval.json"),
        *("--min-gain", 0.05, "--quiet"),
    )
    assert measured.returncode == 0, measured.stderr
    report = json.loads((tmp_path / "eval.json").read_text())
    assert {"kNN", "k-means", "MLP", "oracle", "router"} <= {row["name"] for row in report["rows"]}


@pytest.mark.timeout(300)
def test_label_makes_what_sft_reads(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed workers, so that the answers are known; through a Ray of the command's own."""
    found = read_outcomes(place / "outcomes")
    tasks = tuple(replace(task, reference="yes", grader="exact") for task in found.tasks[:6])
    ids = {task.task_id for task in tasks}
    says = {"sums": "yes", "words": "no"}
    kept = tuple(
        replace(outcome, score=1.0, samples=(1.0,), answers=(says[outcome.worker],), response=says[outcome.worker])
        for outcome in found.outcomes
        if outcome.task_id in ids and outcome.worker in says
    )
    write_outcomes(tmp_path / "recorded", Outcomes(tasks, kept))
    pool = [
        {"name": name, "provider": "replay", "model": name, "outcomes": str(tmp_path / "recorded")} for name in says
    ]
    (tmp_path / "pool.yaml").write_text(json.dumps({"workers": pool}))
    # Paths as sources of tasks: the same folder without its outcomes.
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tasks.parquet").write_bytes((tmp_path / "recorded" / "tasks.parquet").read_bytes())
    out = tmp_path / "labelled"
    at = f"file://{out}"  # by an address, as on a cluster whose machines share a bucket
    command = ("label", "-c", tmp_path / "pool.yaml", "--out", at, "--tasks", tmp_path / "tasks", "--quiet")
    first = run(*command, "--json", tmp_path / "label.json")
    assert first.returncode == 0, first.stderr
    report = json.loads((tmp_path / "label.json").read_text())
    assert report["complete"]
    assert {name: worker["mean"] for name, worker in report["workers"].items()} == {"sums": 1.0, "words": 0.0}
    labelled = read_outcomes(out)
    assert {(row.worker, row.score) for row in labelled.outcomes} == {("sums", 1.0), ("words", 0.0)}
    # Nothing is left to ask, on another machine either, so no Ray is started.
    for machine, where in (("one", out), ("two", at)):
        monkeypatch.setenv("FUGU_CACHE", str(tmp_path / machine))
        code, output = told("label", "-c", tmp_path / "pool.yaml", "--out", where, "--resume", "--quiet")
        assert code == 0, output
        assert "sums" in output


class SeenError(FuguError):
    """Ends a command where its work would begin."""


@pytest.mark.parametrize(
    ("room", "arguments", "plain"),
    [
        (label, ("label", "--out", "O"), label.LabelRun(fugu.EMBEDDED, Path("O"))),
        (train_sft, ("train", "sft", "--outcomes", "D", "--out", "O"), train_sft.SftRun(Path("D"), Path("O"))),
        (evolve, ("train", "evolve", "--outcomes", "D", "--out", "O"), evolve.EvolveRun(Path("O"), Path("D"))),
        (
            add_worker,
            ("train", "add-worker", "w", "--outcomes", "D", "--checkpoint", "C", "--out", "O"),
            add_worker.AddWorkerRun("w", Path("D"), Path("C"), Path("O")),
        ),
        (evaluate, ("eval", "--outcomes", "D"), evaluate.EvalRun(Path("D"))),
        (evaluate_live, ("eval", "--outcomes", "D", "-c", "C"), evaluate_live.LiveRun(Path("D"), Path("C"))),
        (
            newcomer,
            ("train", "add-worker", "w", "-c", "P", "--outcomes", "D", "--checkpoint", "C", "--out", "O"),
            newcomer.NewcomerRun("w", Path("P"), Path("D"), Path("C")),
        ),
        (tune, ("tune", "--outcomes", "D", "--out", "O"), tune.TuneRun(Path("D"), Path("O"))),
    ],
)
def test_options_that_are_not_given_are_the_functions_own(
    room: Any, arguments: tuple[str, ...], plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = []

    def seen(given: Any) -> None:
        settings.append(given)
        raise SeenError("seen")

    monkeypatch.setattr(room, "run", seen)
    assert told(*arguments) == (2, "error: seen\n")
    assert settings == [plain]


@pytest.mark.parametrize(
    ("room", "name", "arguments"),
    [(conductor_sft, "run", ("conductor", "--warm-start")), (grpo_placed, "run_here", ("grpo",))],
    ids=["conductor", "grpo"],
)
def test_a_conductor_and_its_state_go_to_an_address(
    room: Any, name: str, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(settings: Any) -> None:
        for folder, content in ((settings.out, "adapter"), (settings.folder, "state")):
            assert folder.is_dir()
            (folder / content).write_text(content)
        raise SeenError("as if it was lost")

    monkeypatch.setattr(room, name, runs)
    at = f"file://{tmp_path}/bucket/made"
    for given in ((), ("--state", f"file://{tmp_path}/bucket/other")):
        assert told("train", *arguments, "--out", at, *given) == (2, "error: as if it was lost\n")
    files = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "bucket").rglob("*") if path.is_file()}
    assert files == {"bucket/made/adapter", "bucket/made.state/state", "bucket/other/state"}


def headed(folder: Path, workers: tuple[str, ...]) -> Path:
    path = folder / "head.safetensors"
    save_checkpoint(path, Checkpoint(CheckpointInfo(workers, "none", "0"), torch.ones(len(workers), 4)))
    return path


BAD: list[tuple[tuple[str, ...], str]] = [
    (("train", "sft", "--outcomes", "{none}", "--out", "{out}"), "does not exist"),
    (("train", "sft", "--outcomes", "{good}", "--out", "{out}", "--split", "dev"), "there are train, val"),
    (("train", "sft", "--outcomes", "{good}", "--out", "{out}", "--workers", "sums,who"), "no outcome of who"),
    (("train", "sft", "--outcomes", "{good}", "--out", "{out}", "--workers", "sums"), "at least two workers"),
    (("train", "sft", "--outcomes", "{good}", "--out", "{out}", "--workers", "sums,sums"), "sums is named twice"),
    (("train", "sft", "--outcomes", "{good}", "--out", "{out}", "--read", "middle"), "--read: 'middle' is not one of"),
    (("train", "sft", "--outcomes", "{good}", "--out", "{out}", "--backbone", "{none}"), "{none}"),
    (("train", "sft", "--outcomes", "{good}", "--out", "{out}", "--json", "{good}"), "--json: cannot write {good}"),
    (("train", "evolve", "--outcomes", "{good}", "--out", "{out}", "--sigma", "0"), "sigma is 0.0"),
    (("train", "evolve", "--outcomes", "{good}", "--out", "{out}", "--checkpoint", "{head}"), "no outcome of who"),
    (("train", "evolve", "--outcomes", "{good}", "--out", "{out}", "--mode", "fugu-trinity"), "--config"),
    (("train", "evolve", "--out", "{out}"), "--outcomes"),
    (("eval", "--outcomes", "{good}", "--checkpoint", "{none}"), "checkpoint {none} does not exist"),
    (("eval", "--outcomes", "{good}", "--checkpoint", "{head}", "--split", "val"), "who"),
    (("eval", "--outcomes", "{good}"), "there are train, val"),
    (("eval", "--outcomes", "{good}", "--min-gain", "0.1"), "give one with --checkpoint"),
    (("eval", "--outcomes", "{good}", "--config", "{none}"), "cannot read {none}"),
    (("eval", "--outcomes", "{good}", "--url", "http://127.0.0.1:1"), "--url and --model go together"),
    (("tune", "--outcomes", "{good}", "--out", "{out}", "--over", "sigma=0.1"), "sft has no setting sigma to tune"),
    (("tune", "--outcomes", "{good}", "--out", "{out}", "--resume"), "holds no tuning that could be resumed"),
    (
        (
            "train",
            "add-worker",
            "w",
            "--outcomes",
            "{good}",
            "--checkpoint",
            "{none}",
            "--out",
            "{out}",
            "--budget-usd=1",
        ),
        "give --config, too",
    ),
    (("label", "--out", "{out}"), "holds no tasks"),
    (("label", "--out", "{out}", "--resume"), "holds no labelling that could be resumed"),
    (("label", "--out", "{out}", "--tasks", "nonsense"), "nonsense is no source of tasks"),
    (
        ("label", "--out", "{out}", "--tasks", "x.jsonl", "--columns", "prompt"),
        "--columns: 'prompt' is not of the form",
    ),
    (("label", "--out", "{out}", "--config", "{none}"), "cannot read {none}"),
    (("label", "--out", "{out}", "--tasks", "embedded", "--workers", "who"), "has no worker who"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_a_mistake_is_a_line_and_exit_code_2(
    arguments: tuple[str, ...], says: str, place: Path, tmp_path: Path
) -> None:
    names = {
        "good": place / "outcomes",
        "none": tmp_path / "none",
        "out": tmp_path / "out",
        "head": headed(tmp_path, ("sums", "who")),
    }
    code, output = told(*(argument.format(**names) for argument in arguments))
    assert code == 2, output
    assert output.startswith("error: ")
    assert says.format(**names) in output
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: tuple[str, ...]) -> None:
    code, output = told(*command, "--help")
    assert code == 0
    assert "Examples:" in output
    assert f"fugu {' '.join(command)} " in output.partition("Examples:")[2]


def test_the_command_line_imports_nothing_heavy() -> None:
    program = "import fugu, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert {"training", "actors"} <= set(loaded.stdout.split())
    assert not {"ray", "torch", "transformers", "numpy", "pyarrow", "fastapi"} & set(loaded.stdout.split())


def test_places_to_read() -> None:
    assert reads([]) == ()
    assert [tuple(place) for place in reads(["mean@24", "last"])] == [(24, "mean"), (-1, "last")]
