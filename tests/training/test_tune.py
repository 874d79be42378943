"""Tuning: knobs as a user writes them, parts that nobody learns from twice, and Ray Tune's trials for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import CheckpointError, ConfigError, DataError
from orchestrator.head import load_checkpoint
from tests.orchestrator.tiny import tiny_folder
from tests.training.problems import world
from training import train_sft, tune
from training.outcomes import read_outcomes
from training.start import EvolveRun
from training.train_sft import SftRun
from training.tune import TuneRun, run
from training.tune_space import Among, Between, corners, evolve_run, first_of, read_knob, sft_run, space_of
from training.tune_trial import CHOOSE, LEARN, SCORE, Laboratory, lay_out

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone in `tiny`, outcomes of three workers in `outcomes`."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "tiny").mkdir()
    tiny_folder(folder / "tiny")
    world(folder / "outcomes", tasks=240)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("FUGU_CACHE", str(place / "cache"))


def settings(place: Path, folder: Path, **more: Any) -> TuneRun:
    given_: dict[str, Any] = {"trials": 4, "replicates": 2, "backbone": str(place / "tiny"), "max_tokens": 128}
    given_ |= {"cache": place / "features.sqlite", "progress": False}
    return TuneRun(place / "outcomes", folder / "router.safetensors", **{**given_, **more})


@pytest.mark.parametrize(
    ("text", "name", "knob"),
    [
        ("tau=0.1..1", "tau", Between(0.1, 1)),
        ("population=8..64", "population", Between(8, 64)),
        ("decay=0.3, 1,3", "decay", Among((0.3, 1, 3))),
        ("mirrored=true,false", "mirrored", Among((True, False))),
        ("choose=sample", "choose", Among(("sample",))),
    ],
)
def test_knobs_as_they_are_written(text: str, name: str, knob: Any) -> None:
    assert read_knob(text) == (name, knob)


@pytest.mark.parametrize(
    "text", ["tau", "tau=", "=1", "tau=1..1", "tau=2..1", "tau=a..b", "tau=1,1", "tau=1,,2", "tau=nan"]
)
def test_knobs_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--over"):
        read_knob(text)


@given(low=st.floats(-1e6, 1e6, allow_nan=False), more=st.floats(1e-3, 1e6), seed=st.integers(0, 2**31))
def test_drawn_values_stay_between_the_ends(low: float, more: float, seed: int) -> None:
    high = low + more
    knob = Between(low, high)
    drawn = knob.domain().sample(random_state=np.random.RandomState(seed))
    assert low - abs(low) * 1e-9 <= drawn <= high + abs(high) * 1e-9


@given(low=st.integers(1, 50), more=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_both_ends_of_whole_numbers_are_drawn(low: int, more: int, seed: int) -> None:
    drawn = Between(low, low + more).domain().sample(size=400, random_state=np.random.RandomState(seed))
    assert set(drawn) == set(range(low, low + more + 1))


def test_every_usual_setting_reaches_its_run() -> None:
    """Whatever SFT and evolution are called with tomorrow, the usual knobs have to be among it."""
    space = space_of("sft+evolve")
    first = first_of("sft+evolve", space)
    for config in corners(space, first):
        sft = sft_run(SftRun(Path("D"), Path("O")), config)
        train_sft.check(sft)
        assert sft.taus == (config["tau"],)
        evolved = evolve_run(EvolveRun(Path("O")), config, seed=3, tasks=100)
        assert evolved.search.sigma == config["sigma"]
        assert evolved.search.population == config["population"]
        assert evolved.search.seed == 3
        assert evolved.size == min(100, int(config["size"]))
        # A larger population gets fewer generations.
        assert evolved.generations * int(config["population"]) <= int(config["candidates"])
    assert all(name in space for name in first)


def test_other_settings_may_be_tuned_by_name() -> None:
    space = space_of(
        "sft+evolve", ("landmarks=5..9", "mirrored=true", "generations=7", "axes=8", "read=mean,last@1+mean")
    )
    assert "candidates" not in space
    config = first_of("sft+evolve", space)
    assert sft_run(SftRun(Path("D"), Path("O")), {**config, "read": "last@1+mean"}).reads == ((1, "last"), (-1, "mean"))
    evolved = evolve_run(EvolveRun(Path("O")), config, seed=1, tasks=10)
    assert (evolved.generations, evolved.search.mirrored, evolved.axes) == (7, True, 8)


@pytest.mark.parametrize("hold_out", ["tasks", "datasets"])
def test_nobody_is_scored_on_what_was_learned(place: Path, tmp_path: Path, hold_out: Any) -> None:
    learn = read_outcomes(place / "outcomes").split("train")
    laboratory = Laboratory("sft+evolve", tmp_path, ("words", "sums"))
    lay_out(laboratory, learn, None, folds=3, replicates=3, hold_out=hold_out)
    scored: list[str] = []
    for number in range(3):
        found = read_outcomes(laboratory.replicate(number))
        assert found.workers == ("words", "sums") or set(found.workers) == {"words", "sums"}
        splits = {task.task_id: task.split for task in found.tasks}
        assert set(splits) == {task.task_id for task in learn.tasks}
        assert set(splits.values()) == {LEARN, CHOOSE, SCORE}
        scored += [name for name, split in splits.items() if split == SCORE]
        if hold_out == "datasets":
            kinds = {split: {task.dataset for task in found.tasks if task.split == split} for split in (LEARN, SCORE)}
            assert not kinds[LEARN] & kinds[SCORE]
    assert sorted(scored) == sorted(task.task_id for task in learn.tasks)  # each exactly once


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_tuned_settings_are_better_than_bad_ones(ray_session: None, place: Path, tmp_path: Path) -> None:
    told = settings(place, tmp_path, over=("decay=1000,0.1", "tau=0.25", "gamma=4"))
    report = run(told)
    assert report.best.config == {"tau": 0.25, "decay": 0.1, "gamma": 4}
    assert report.best.replicates == 2
    assert report.best.score is not None
    worst = next(trial for trial in report.trials if trial.config["decay"] == 1000)
    assert worst.score is not None
    assert worst.score < report.best.score
    assert len(report.trials) == 4
    assert report.gain is not None
    assert report.gain.low > 0  # who is good at what can be read off the words
    head = load_checkpoint(tmp_path / "router.safetensors")
    assert head.info.trained["tuned"]["settings"] == {"tau": 0.25, "decay": 0.1, "gamma": 4}
    assert head.info.trained["tasks"] == len(
        [1 for task in read_outcomes(place / "outcomes").tasks if task.split == "train"]
    )
    json.dumps(report.json(), allow_nan=False)
    assert report.table().row_count == 4
    # What is there is not overwritten, and not taken for something else; resumed, nothing is done again.
    with pytest.raises(ConfigError, match="go on with it with --resume"):
        run(told)
    with pytest.raises(ConfigError, match=r"another tuning .*seed was 0, is 1"):
        run(replace(told, resume=True, seed=1))
    again = run(replace(told, resume=True))
    assert [replace(trial, seconds=0) for trial in again.trials] == [replace(one, seconds=0) for one in report.trials]
    assert again.validation == report.validation


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_evolution_is_tuned_on_top_of_sft(ray_session: None, place: Path, tmp_path: Path) -> None:
    over = ("candidates=24", "population=4", "size=32", "sigma=0.01..0.1")
    report = run(settings(place, tmp_path, method="sft+evolve", over=over, trials=2, objective="val"))
    assert {trial.config["population"] for trial in report.trials} == {4}
    head = load_checkpoint(tmp_path / "router.safetensors")
    assert head.info.trained["method"] == "sep-cma-es"
    assert head.info.trained["generations"] == 6
    assert head.info.trained["start"]["tau"] == report.best.config["tau"]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_trial_that_fails_is_told_and_the_others_go_on(
    ray_session: None, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reading all tasks first would find out; here the trial itself does.
    monkeypatch.setattr(tune, "_read_once", lambda *_: None)
    report = run(settings(place, tmp_path, over=("read=mean,mean@98,mean@99",), trials=3, seed=1))
    failed = [trial for trial in report.trials if trial.config["read"] != "mean"]
    assert failed
    assert all("layer" in trial.error and trial.score is None for trial in failed)
    assert report.best.config["read"] == "mean"


def test_mistakes_are_found_before_the_first_trial(place: Path, tmp_path: Path) -> None:
    def fails(error: type[Exception], match: str, **more: Any) -> None:
        with pytest.raises(error, match=match):
            run(settings(place, tmp_path, **more))
        assert not (tmp_path / "router.tune").exists()

    fails(ConfigError, "sft has no setting sigma to tune; there are .*tau", over=("sigma=0.1",))
    fails(ConfigError, "tau is given twice", over=("tau=0.1", "tau=0.2"))
    fails(ConfigError, "tau must be a positive number", over=("tau=-1..1",))
    fails(ConfigError, "population is 2", method="evolve", over=("population=2,8",))
    fails(ConfigError, "sigma is 0", method="evolve", over=("sigma=0..1",))
    fails(ConfigError, "landmarks is 2.5", over=("landmarks=2.5",))
    fails(ConfigError, "head is 'best'; it is one of landmarks, linear", over=("head=best",))
    fails(ConfigError, "choose is 'best'", method="evolve", over=("choose=best",))
    fails(ConfigError, "is not one of", over=("read=middle",))
    fails(ConfigError, "trials is 0", trials=0)
    fails(ConfigError, "for the method evolve", checkpoint=tmp_path / "none")
    fails(CheckpointError, "does not exist", method="evolve", checkpoint=tmp_path / "none")
    fails(DataError, "no outcome of who", workers=("sums", "who"))
    fails(ConfigError, "at least two workers", workers=("sums",))
    fails(DataError, "there are train, val", val_split="dev", objective="val")
    fails(DataError, "12 datasets are too few for 20 folds", replicates=20, hold_out="datasets")
    fails(ConfigError, "no tuning that could be resumed", resume=True)
    fails(ConfigError, "none", backbone=str(tmp_path / "none"))
    # This one only the backbone knows.
    with pytest.raises(ConfigError, match="layer"):
        run(settings(place, tmp_path, over=("read=mean,mean@99",)))
    assert not (tmp_path / "router.tune" / "trials").exists()


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_interrupted_it_goes_on_where_it_was(place: Path, tmp_path: Path) -> None:
    """In a process and a Ray of its own, as a user would."""
    command = [sys.executable, str(REPOSITORY / "fugu.py"), "tune", "--outcomes", str(place / "outcomes")]
    command += ["--out", str(tmp_path / "router.safetensors"), "--trials", "2", "--replicates", "2", "--quiet"]
    command += ["--backbone", str(place / "tiny"), "--read-tokens", "128", "--over", "landmarks=60"]
    environment = os.environ | {"FUGU_CACHE": str(place / "cache"), "COLUMNS": "200"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as first:
        trials = tmp_path / "router.tune" / "trials"
        deadline = time.monotonic() + 200
        while not any(trials.glob("*/checkpoint_*/scores.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
            assert first.poll() is None, first.communicate()
        first.send_signal(signal.SIGINT)
        assert first.wait(100) == 130
    assert not (tmp_path / "router.safetensors").exists()
    kept = {path: path.read_text() for path in trials.glob("*/checkpoint_*/scores.json")}
    told = tmp_path / "tune.json"
    again = subprocess.run(
        [*command, "--resume", "--json", str(told)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    report = json.loads(told.read_text())
    assert len(report["trials"]) == 2
    assert report["best"]["replicates"] == 2
    assert "2 trials of sft" in again.stdout
    for path, scores in kept.items():
        later = [json.loads(one.read_text()) for one in path.parents[1].glob("checkpoint_*/scores.json")]
        assert max(later, key=len)[: len(json.loads(scores))] == json.loads(scores)
