"""Evolution on live sessions: real provider actors and Ray tasks, against providers on the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from actors.errors import ConfigError, DataError
from actors.messages import Usage
from orchestrator.head import load_checkpoint
from tests.loopback import Behaviour, LoopbackProvider, Recorded
from tests.orchestrator.tiny import tiny_folder
from tests.training.problems import SUBJECTS, WORKERS, world
from tests.training.test_evolve import repeatable
from training.evolution import Settings
from training.evolve import EvolveRun, Reading, run
from training.outcomes import Outcomes, read_outcomes, write_outcomes

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]


def speaks(request: Recorded) -> str:
    """A worker knows its own subject; a Verifier knows everything; a Thinker wants the Worker next."""
    asked = request.body["messages"][-1]["content"]
    verb = asked.split()[0]
    if "Begin with the single word ACCEPT" in asked:
        return "ACCEPT" if "<response>\nx\n" in asked else "REVISE it is wrong"
    if "Do not solve the task" in asked:
        return "<suggestion>Look closely.</suggestion><next>worker</next>"
    return "x" if verb in SUBJECTS.get(request.model, ()) else "y"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    (folder / "tiny").mkdir()
    tiny_folder(folder / "tiny")
    world(folder / "outcomes")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("FUGU_CACHE", str(place / "cache"))


def configured(folder: Path, upstream: LoopbackProvider, **more: Any) -> Path:
    workers = [
        {
            "name": name,
            "provider": "openai",
            "model": name,
            "base_url": upstream.url_for("openai"),
            "api_key": "sk-test-0123456789abcdef",
            "price": {"input": 1.0, "output": 10.0},
            "limits": {"concurrency": 16},
            "retry": {"attempts": 1},
        }
        | more.get(name, {})
        for name in WORKERS
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"workers": workers}))
    return path


def settings(place: Path, out: Path, config: Path, **more: Any) -> EvolveRun:
    given: dict[str, Any] = {
        "generations": 6,
        "search": Settings(sigma=0.3, population=8),
        "size": 8,
        "validation_tasks": 10,
        "validate_every": 3,
        "reading": Reading(backbone=str(place / "tiny"), max_tokens=128),
        "progress": False,
    }
    return EvolveRun(out / "router.safetensors", place / "outcomes", config, **{**given, **more})


def asked(upstream: LoopbackProvider) -> Counter[tuple[str, str, Any]]:
    """Calls by model, whole conversation and seed, without the tiny ones that see whether a worker is there."""
    calls = (
        (request.model, json.dumps(request.body["messages"]), request.body.get("seed"))
        for request in upstream.requests
        if "ready" not in request.body["messages"][-1]["content"]
    )
    return Counter(calls)


def test_one_worker_per_session(ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider) -> None:
    report = run(settings(place, tmp_path, configured(tmp_path, upstream)))
    calls = asked(upstream)
    assert max(calls.values()) == 1  # nothing is paid twice
    assert report.calls == len(calls)
    assert report.rollouts == report.naive_calls == 6 * 8 * 8
    assert report.calls < report.naive_calls / 2
    assert report.usd == pytest.approx(len(calls) * (10 * 1 + 20 * 10) / 1e6)
    assert report.best > report.start
    # The rewards are the workers' true ones: each is right exactly on its own subject, which is a third of the tasks.
    # One generation is eight tasks only, and which heads are drawn differs from processor to processor.
    rows = repeatable(report.folder / "history.jsonl")
    assert all(float(64 * row["reward"]).is_integer() for row in rows)
    assert sum(row["reward"] for row in rows) / len(rows) > 1 / 3
    assert all(row["turns"] == 1 and row["excluded"] == 0 for row in rows)


def test_sessions_with_roles(ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider) -> None:
    one = settings(
        place,
        tmp_path,
        configured(tmp_path, upstream),
        mode="fugu-trinity",
        generations=2,
        max_turns=3,
        choose="sample",
    )
    report = run(one)
    calls = asked(upstream)
    assert report.calls == sum(calls.values())
    assert max(calls.values()) == 1
    assert report.naive_calls > report.calls
    shipped = load_checkpoint(one.out)
    assert shipped.info.roles
    assert shipped.weight.shape == (6, 32)
    rows = repeatable(report.folder / "history.jsonl")
    assert 1 < rows[0]["turns"] <= 3
    kinds = Counter(
        "verifier" if "single word ACCEPT" in text else "thinker" if "Do not solve" in text else "worker"
        for _, text, _ in calls
    )
    assert min(kinds["worker"], kinds["thinker"], kinds["verifier"]) > 0
    # Played again from what was paid for, it is the same run and costs nothing.
    upstream.clear()
    anew = run(one)
    assert asked(upstream) == {}
    assert (anew.best, anew.calls) == (report.best, report.calls)
    for row in rows:
        del row["calls"], row["usd"]
    assert [{key: row[key] for key in rows[0]} for row in repeatable(anew.folder / "history.jsonl")] == rows


def with_marker(place: Path, tmp_path: Path) -> Path:
    found = read_outcomes(place / "outcomes")
    marker = {"marker": str(tmp_path / "died")}
    write_outcomes(
        tmp_path / "outcomes", Outcomes(tuple(replace(t, extra=marker) for t in found.tasks), found.outcomes)
    )
    return tmp_path / "outcomes"


@pytest.mark.parametrize("reward", ["dies_once", "loses_the_queue_once"])
def test_a_lost_process_is_made_good(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider, reward: str
) -> None:
    config = configured(tmp_path, upstream)
    more: dict[str, Any] = {"outcomes": with_marker(place, tmp_path), "generations": 2}
    report = run(replace(settings(place, tmp_path, config, reward=f"tests.training.rewards:{reward}"), **more))
    assert (tmp_path / "died").exists()
    plain = run(replace(settings(place, tmp_path / "plain", config, reward="tests.training.rewards:says_x"), **more))
    assert report.best == plain.best
    fields = {"naive_calls", "rollouts", "reward", "fitness_best", "shares", "excluded"}
    for one, other in zip(*(repeatable(r.folder / "history.jsonl") for r in (report, plain)), strict=True):
        assert {key: one[key] for key in fields} == {key: other[key] for key in fields}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "raises",
            r"the validation: 10 of 10 episodes .* the reward function raised RuntimeError\('the scorer is broken",
        ),
        ("too_much", "returned 7.0, not a number in 0..1"),
    ],
)
def test_a_reward_that_does_not_work_stops_the_run(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider, reward: str, message: str
) -> None:
    config = configured(tmp_path, upstream)
    with pytest.raises(DataError, match=message):
        run(settings(place, tmp_path, config, reward=f"tests.training.rewards:{reward}"))
    assert sum(asked(upstream).values()) <= 10
    assert not (tmp_path / "router.safetensors").exists()


def test_what_is_wrong_is_named_before_money_is_spent(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    config = configured(tmp_path, upstream)
    with pytest.raises(ConfigError, match=r"no reward function tests\.training\.rewards:nothing"):
        run(settings(place, tmp_path, config, reward="tests.training.rewards:nothing"))
    with pytest.raises(ConfigError, match="no worker nobody"):
        run(settings(place, tmp_path, config, workers=("nobody",)))
    with pytest.raises(DataError, match="no task has the split dev"):
        run(settings(place, tmp_path, config, split="dev"))
    assert upstream.total == 0
    upstream.by_model["words"] = Behaviour(status=500, error="the model is on fire")
    with pytest.raises(DataError, match=r"worker words cannot answer: .*the model is on fire"):
        run(settings(place, tmp_path, config))
    assert asked(upstream) == {}


def test_a_worker_that_begins_to_fail_stops_the_run_with_its_name(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    config = configured(tmp_path, upstream, sums={"breaker": {"failures": 500}})
    upstream.by_model["sums"] = Behaviour(status=500, error="out of order")
    upstream.enqueue(Behaviour(text="ready", usage=Usage(1, 1)))
    # The first of the three tiny calls is answered, whoever makes it; `sums` may or may not be it.
    with pytest.raises(DataError, match=r"sums.*(cannot answer|out of order)"):
        run(settings(place, tmp_path, config))


def test_a_budget_ends_the_run_cleanly(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    config = configured(tmp_path, upstream)
    one = settings(place, tmp_path, config, generations=30, max_calls=40)
    report = run(one)
    assert "of 40 calls were made" in report.stopped
    assert 0 < report.generations < 30
    assert report.calls <= 40 + 32
    assert load_checkpoint(one.out).info.trained["generations"] == report.generations
    with pytest.raises(ConfigError, match="too small to validate even the start"):
        run(settings(place, tmp_path / "less", config, max_calls=3))


DRIVER = """
import sys
from pathlib import Path
from training.evolution import Settings
from training.evolve import EvolveRun, Reading, run
place, out, config = map(Path, sys.argv[1:])
run(EvolveRun(out / "router.safetensors", place / "outcomes", config, generations=6, size=8, validation_tasks=10,
              validate_every=3, search=Settings(sigma=0.3, population=8), progress=False,
              reading=Reading(backbone=str(place / "tiny"), max_tokens=128)))
"""


def test_killed_in_the_middle_it_pays_for_nothing_twice(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    """The driver is a program of its own with a Ray of its own."""
    upstream.default = Behaviour(text=speaks, usage=Usage(10, 20), delay=0.1)
    config = configured(tmp_path, upstream)
    straight = run(settings(place, tmp_path / "straight", config))
    whole = asked(upstream)
    upstream.clear()
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "FUGU_STATE": str(tmp_path / "state")}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(place), str(out), str(config)], env=environment)
    history = out / "router.evolve" / "history.jsonl"
    until = time.monotonic() + 90
    while not (history.exists() and history.read_text().count("\n") >= 2):
        assert driver.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait(30) == -signal.SIGKILL
    time.sleep(1.0)
    resumed = run(settings(place, out, config, resume=True))
    calls = asked(upstream)
    assert set(calls) == set(whole)
    assert sum(calls.values()) - len(calls) <= 32  # what was in flight
    assert repeatable(history)[-1]["fitness_best"] == repeatable(straight.folder / "history.jsonl")[-1]["fitness_best"]
    assert resumed.best == straight.best
    shipped, expected = (load_checkpoint(report.out) for report in (resumed, straight))
    assert torch.equal(shipped.weight, expected.weight)
    assert np.isfinite(shipped.weight.numpy()).all()
