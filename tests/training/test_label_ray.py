"""Labelling through real provider actors and Ray tasks, against a provider on the loopback interface."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.errors import ConfigError, DataError
from actors.messages import Usage
from tests.loopback import Behaviour, LoopbackProvider, Recorded
from training import label
from training.label import JOURNAL, LabelRun
from training.outcomes import read_outcomes

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]


def add_one(plus: int = 1, wrong: str = "") -> Any:
    """An upstream that adds, and is wrong about prompts that hold `wrong`."""

    def text(request: Recorded) -> str:
        prompt = request.body["messages"][-1]["content"]
        number = int(re.findall(r"\d+", prompt)[0])
        return f"It is {number + plus + (1 if wrong and wrong in prompt else 0)}"

    return text


@pytest.fixture
def upstream() -> Iterator[LoopbackProvider]:
    with LoopbackProvider(Behaviour(text=add_one(), usage=Usage(10, 20))) as provider:
        provider.by_model["wrong"] = Behaviour(text=add_one(2), usage=Usage(10, 20))
        yield provider


def configured(folder: Path, upstream: LoopbackProvider, *names: str, **more: Any) -> Path:
    workers = [
        {
            "name": name,
            "provider": "openai",
            "model": name,
            "base_url": upstream.url_for("openai"),
            "api_key": "sk-test-0123456789abcdef",
            "price": {"input": 1.0, "output": 10.0},
            "limits": {"concurrency": 8},
            "retry": {"attempts": 2},
        }
        | more
        for name in names
    ]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"workers": workers}))
    return path


def sums(folder: Path, count: int, **more: Any) -> str:
    path = folder / "sums.jsonl"
    rows = [
        {"prompt": f"What is {n} + 1?", "reference": str(n + 1), "grader": "number", "task_id": f"t{n}"} | more
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def started(folder: Path, config: Path, sources: str, **more: Any) -> LabelRun:
    return LabelRun(config, folder / "out", (sources,), **{"max_tokens": 50, "progress": False} | more)


def test_every_worker_samples_every_task_once(ray_session: None, tmp_path: Path, upstream: LoopbackProvider) -> None:
    config = configured(tmp_path, upstream, "right", "wrong")
    settings = started(tmp_path, config, sums(tmp_path, 12), samples=2)
    report = label.run(settings)
    assert upstream.total == 48
    assert len({(r.model, r.body["messages"][0]["content"], r.body["seed"]) for r in upstream.requests}) == 48
    assert report.complete
    assert (report.requests, report.wanted, report.tasks, report.stopped) == (48, 48, 12, "")
    cost = (10 * 1.0 + 20 * 10.0) / 1e6
    assert report.usd == pytest.approx(48 * cost)
    assert {worker.name: worker.mean for worker in report.workers} == {"right": 1.0, "wrong": 0.0}
    found = read_outcomes(tmp_path / "out")
    assert found.scores(("right", "wrong")).tolist() == [[1.0, 0.0]] * 12
    assert [outcome.cost_usd for outcome in found.outcomes] == [pytest.approx(cost)] * 24
    assert report.json()["workers"]["right"]["samples"] == 24
    assert report.table().row_count == 2
    # All is there: nothing is asked again. A new worker is asked only what is missing, the others' results stay.
    assert label.run(settings).requests == 48
    assert upstream.total == 48
    config = configured(tmp_path, upstream, "right", "wrong", "third")
    again = label.run(started(tmp_path, config, sums(tmp_path, 12), samples=2, workers=("third",)))
    assert upstream.total == 72
    assert again.complete
    assert read_outcomes(tmp_path / "out").scores(("right", "wrong", "third")).tolist() == [[1.0, 0.0, 1.0]] * 12


@pytest.mark.parametrize("limit", [1, 7, 20])
def test_requests_are_never_more_than_allowed(
    ray_session: None, tmp_path: Path, upstream: LoopbackProvider, limit: int
) -> None:
    # Every fourth call fails and is made again, which counts too.
    upstream.enqueue(*[Behaviour(status=500) if n % 4 == 3 else upstream.default for n in range(30)])
    config = configured(tmp_path, upstream, "right")
    settings = started(tmp_path, config, sums(tmp_path, 30), max_requests=limit)
    report = label.run(settings)
    assert upstream.total == limit == report.requests
    assert f"{limit} of {limit} requests" in report.stopped
    assert not report.complete
    # The same command spends nothing more; a higher limit goes on.
    assert label.run(settings).requests == limit
    assert upstream.total == limit
    rest = label.run(started(tmp_path, config, sums(tmp_path, 30)))
    if not rest.complete:  # a call and its repetition both met a failure; the next run makes it good
        rest = label.run(started(tmp_path, config, sums(tmp_path, 30)))
    assert rest.complete
    failures = sum(1 for n in range(30) if n % 4 == 3)
    assert limit < upstream.total <= 30 + failures


def test_money_is_never_more_than_allowed(ray_session: None, tmp_path: Path, upstream: LoopbackProvider) -> None:
    upstream.default = Behaviour(text=add_one(), usage=Usage(40, 50), delay=0.05)  # the longest answer allowed
    config = configured(tmp_path, upstream, "right")
    each = (40 * 1.0 + 50 * 10.0) / 1e6
    report = label.run(started(tmp_path, config, sums(tmp_path, 40), budget_usd=10.2 * each))
    assert upstream.total * each <= 10.2 * each
    assert upstream.total >= 8  # the estimate is careful, not timid
    assert report.usd == pytest.approx(upstream.total * each)
    assert "the next call does not fit into the budget" in report.stopped


def test_a_budget_that_cannot_be_kept_is_refused(ray_session: None, tmp_path: Path, upstream: LoopbackProvider) -> None:
    sources = sums(tmp_path, 3)
    unpriced = configured(tmp_path, upstream, "right", price=None)
    with pytest.raises(ConfigError, match="worker right has no price"):
        label.run(started(tmp_path, unpriced, sources, budget_usd=1.0))
    unbounded = configured(tmp_path, upstream, "right")
    with pytest.raises(ConfigError, match="nothing bounds the answers of worker right"):
        label.run(started(tmp_path, unbounded, sources, budget_usd=1.0, max_tokens=None))
    assert upstream.total == 0


def test_a_worker_that_always_fails_ends_the_run_before_money_is_spent(
    ray_session: None, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    upstream.by_model["broken"] = Behaviour(status=500, error="the model is on fire")
    config = configured(tmp_path, upstream, "right", "broken", breaker={"failures": 50})
    with pytest.raises(DataError, match=r"worker broken failed 5 times in a row: .*the model is on fire"):
        label.run(started(tmp_path, config, sums(tmp_path, 40)))
    asked = [request.model for request in upstream.requests]
    assert asked.count("broken") == 5
    assert asked.count("right") == 1
    # What came in is there.
    assert [outcome.worker for outcome in read_outcomes(tmp_path / "out").outcomes] == ["right"]
    upstream.by_model["broken"] = Behaviour(status=401)
    with pytest.raises(DataError, match="worker broken failed at once"):
        label.run(started(tmp_path, config, sums(tmp_path, 40)))


def test_a_rate_limit_is_waited_for(ray_session: None, tmp_path: Path, upstream: LoopbackProvider) -> None:
    upstream.enqueue(*[upstream.default] * 3, *[Behaviour(status=429, headers={"retry-after": "1"})] * 4)
    begin = time.monotonic()
    report = label.run(started(tmp_path, configured(tmp_path, upstream, "right"), sums(tmp_path, 20)))
    assert report.complete
    assert time.monotonic() - begin >= 1
    assert upstream.total == 24 == report.requests


def test_what_cannot_be_graded_is_kept_and_graded_later(
    ray_session: None, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    upstream.by_model["judge"] = Behaviour(text="It looks fine to me.", usage=Usage(100, 5))
    config = configured(tmp_path, upstream, "right", "judge")
    settings = started(tmp_path, config, sums(tmp_path, 3, grader="judge:judge"), workers=("right",))
    report = label.run(settings)
    assert not report.complete
    assert (report.workers[0].ungraded, report.workers[0].mean) == (3, None)
    assert all("gave no verdict 3 times" in what for _, _, what in report.errors)
    assert report.requests == 3 + 9 == upstream.total
    assert read_outcomes(tmp_path / "out").outcomes == ()
    upstream.by_model["judge"] = Behaviour(text="Both say the same.\nVERDICT: YES", usage=Usage(100, 5))
    report = label.run(settings)
    assert report.complete
    assert report.workers[0].mean == 1.0
    assert [request.model for request in upstream.requests][12:] == ["judge"] * 3
    assert report.requests == 15
    assert report.usd == pytest.approx((3 * (10 + 200) + 12 * (100 + 50)) / 1e6)


def test_another_model_under_the_same_name_is_refused(
    ray_session: None, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    label.run(started(tmp_path, configured(tmp_path, upstream, "right"), sums(tmp_path, 2)))
    changed = configured(tmp_path, upstream, "right", model="another")
    with pytest.raises(DataError, match="worker right was labelled with another model"):
        label.run(started(tmp_path, changed, sums(tmp_path, 4)))
    with pytest.raises(ConfigError, match="no worker nobody; there are right"):
        label.run(started(tmp_path, changed, sums(tmp_path, 4), workers=("nobody",)))
    with pytest.raises(DataError, match="no task has the split dev"):
        label.run(started(tmp_path, changed, sums(tmp_path, 4), split="dev"))
    assert upstream.total == 2


DRIVER = """
import sys
from pathlib import Path
from training import label
config, out, sources = sys.argv[1:]
try:
    label.run(label.LabelRun(Path(config), Path(out), (sources,), max_tokens=50, progress=False, samples=2))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_run_pays_for_nothing_twice(
    ray_session: None, tmp_path: Path, upstream: LoopbackProvider, number: signal.Signals
) -> None:
    """The driver is a program of its own with a Ray of its own, stopped in the middle and started again here."""
    upstream.default = Behaviour(text=add_one(), usage=Usage(10, 20), delay=0.15)
    config = configured(tmp_path, upstream, "right")
    arguments = [sys.executable, "-c", DRIVER, str(config), str(tmp_path / "out"), sums(tmp_path, 60)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "FUGU_STATE": str(tmp_path / "state")}
    # Where the tests run in the background of a shell, children would inherit that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    first = subprocess.Popen(arguments, env=environment, cwd=REPOSITORY, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    try:
        assert upstream.wait_for(lambda: upstream.total >= 40, 60), first.stderr
    finally:
        first.send_signal(number)
    code = first.wait(60)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    time.sleep(1.0)
    paid = upstream.total
    kept = sum("score" in json.loads(line) for line in whole_lines(tmp_path / "out" / JOURNAL))
    assert paid < 120
    assert paid - kept <= 8  # what was in flight
    if number != signal.SIGKILL:
        assert sum(len(outcome.samples) for outcome in read_outcomes(tmp_path / "out").outcomes) == kept
    upstream.clear()
    report = label.run(started(tmp_path, config, sums(tmp_path, 60), samples=2))
    assert report.complete
    assert upstream.total == 120 - kept
    # Calls that nothing is known of count as paid, so that a limit holds over kills.
    assert paid + upstream.total <= report.requests <= paid + upstream.total + 8
    assert read_outcomes(tmp_path / "out").scores(("right",)).tolist() == [[1.0]] * 60


def whole_lines(path: Path) -> list[str]:
    text = path.read_text()
    return text[: text.rfind("\n")].split("\n")
