"""Evaluation live: a pool behind real provider actors, routers and other systems on it, and a running endpoint."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fugu
from actors.config import WorkerSpec
from actors.errors import CheckpointError, ConfigError, DataError, WorkerUnavailableError
from actors.messages import ChatReply, ChatRequest, Message, Timing, Usage, Worker
from orchestrator.head import load_checkpoint, save_checkpoint
from tests.loopback import LoopbackProvider
from tests.orchestrator.tiny import tiny_folder
from tests.training.problems import SUBJECTS, WORKERS, world
from tests.training.test_live import asked, configured
from training import train_sft
from training.evaluate_live import LiveRun, endpoint_specs, run
from training.generations import BudgetReachedError
from training.metering import Meter, MeteredWorker, PaidCalls, Purse
from training.outcomes import read_outcomes, write_outcomes
from training.spending import Budget
from training.systems import System

COST = (10 * 1 + 20 * 10) / 1e6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone in `tiny`, tasks in `tasks.jsonl`, a head in `head.safetensors`, one with roles in `roles`."""
    folder = tmp_path_factory.mktemp("evaluate-live")
    (folder / "tiny").mkdir()
    tiny_folder(folder / "tiny")
    world(folder / "outcomes", tasks=400)
    train_sft.run(
        train_sft.SftRun(
            folder / "outcomes",
            folder / "head.safetensors",
            workers=WORKERS,
            backbone=str(folder / "tiny"),
            max_tokens=128,
            taus=(0.25,),
            decays=(0.3,),
            cache=folder / "features.sqlite",
            progress=False,
        )
    )
    tasks = [task for task in read_outcomes(folder / "outcomes").tasks if task.split == "val"][:24]
    rows = [
        {"task_id": task.task_id, "prompt": task.prompt, "reference": "x", "grader": "exact", "domain": task.domain}
        for task in tasks
    ]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    head = load_checkpoint(folder / "head.safetensors")
    weight = torch.cat([head.weight, torch.zeros(3, head.weight.shape[1])])
    prior = None if head.prior is None else torch.cat([head.prior, torch.zeros(3)])
    info = replace(head.info, roles=True)
    save_checkpoint(folder / "roles.safetensors", replace(head, info=info, weight=weight, prior=prior))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("FUGU_CACHE", str(place / "cache"))


def settings(place: Path, folder: Path, upstream: LoopbackProvider, **more: Any) -> LiveRun:
    given: dict[str, Any] = {
        "config": configured(folder, upstream),
        "checkpoints": (place / "head.safetensors",),
        "sources": (str(place / "tasks.jsonl"),),
        "split": None,
        "max_tokens": 50,
        "backbone": str(place / "tiny"),
        "max_read": 128,
        "progress": False,
    }
    return LiveRun(folder / "live", **{**given, **more})


def right(place: Path, worker: str) -> float:
    """How many of the tasks are of a worker's own subject, which it always solves."""
    prompts = [json.loads(line)["prompt"] for line in (place / "tasks.jsonl").read_text().splitlines()]
    return sum(prompt.split()[0] in SUBJECTS[worker] for prompt in prompts) / len(prompts)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_pool_and_its_router(ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider) -> None:
    told = settings(place, tmp_path, upstream, min_gain=0.1, out=tmp_path / "report")
    report = run(told)
    for name in WORKERS:
        assert report.row(name).score.mean == pytest.approx(right(place, name))
        assert report.row(name).cost_usd == pytest.approx(COST)
    assert report.row("oracle").score.mean == 1.0
    router = report.row("fugu")
    # What it answers are the workers' own answers, so it cannot be anything but what it chose.
    assert router.score.mean > report.row(report.reference).score.mean + 0.1
    assert router.gain.mean == pytest.approx(router.score.mean - report.row(report.reference).score.mean)
    assert (router.calls, router.cost_usd, router.failed) == (1.0, pytest.approx(COST), 0)
    assert router.p50_s is not None
    assert router.p50_s > 0
    assert {name for shares in router.shares.values() for name in shares} == set(WORKERS)
    assert report.passed
    # The router's answers were paid for when the workers gave them.
    calls = asked(upstream)
    assert len(calls) == 24 * 3
    assert max(calls.values()) == 1
    assert report.requests == 24 * 3
    assert report.usd == pytest.approx(24 * 3 * COST)
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"eval.json", "quality.png", "shares-fugu.png"}
    assert json.loads((tmp_path / "report" / "eval.json").read_text())["passed"] is True
    assert report.table().row_count == 3 + 1 + 2
    # Once more, with another head that has roles: only what is new is asked.
    upstream.requests.clear()
    more = run(replace(told, checkpoints=(place / "head.safetensors", place / "roles.safetensors"), min_gain=None))
    assert {row.name for row in more.systems} == {"fugu (head)", "fugu (roles)", "fugu-trinity (roles)"}
    assert more.row("fugu (head)").score == router.score
    sessions = more.row("fugu-trinity (roles)")
    assert sessions.calls is not None
    assert sessions.calls > 1
    assert sessions.cost_usd == pytest.approx(COST * sessions.calls)
    assert 0 < len(asked(upstream)) <= 24 * 5
    assert more.requests == 24 * 3 + len(asked(upstream))
    # And a third time nothing at all.
    upstream.requests.clear()
    again = run(replace(told, checkpoints=(place / "roles.safetensors",), min_gain=None))
    assert not asked(upstream)
    assert again.row("fugu-trinity").score == sessions.score
    # The answers are outcomes like any others.
    assert set(read_outcomes(tmp_path / "live").workers) == set(WORKERS)


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("limit", [10, 72, 90])
def test_a_budget_is_never_passed(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider, limit: int
) -> None:
    told = settings(place, tmp_path, upstream, checkpoints=(place / "roles.safetensors",), max_requests=limit)
    if limit == 10:
        # Not every worker has tried a task: where any has been tried by all, that is what is measured.
        report = run(told)
        assert report.tasks <= 3
    else:
        report = run(replace(told, min_gain=-1.0))
        assert report.tasks == 24
        assert not report.passed  # what was not measured is not good enough
    assert upstream.total <= limit
    assert report.requests <= limit
    assert "requests" in report.stopped
    # With more it goes on where it was.
    whole = run(replace(told, max_requests=None))
    assert whole.stopped == ""
    assert max(asked(upstream).values()) == 1
    assert whole.requests == len(asked(upstream))


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_systems_of_ones_own_and_failures(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    async def both(request: ChatRequest, workers: Mapping[str, Worker]) -> ChatReply:
        """Two at once; the first one's answer, unless the task is of a kind that it refuses."""
        if "river" in request.messages[0].text:
            raise WorkerUnavailableError("not this one", worker="sums")
        replies = await asyncio.gather(*(workers[name].complete(request) for name in ("sums", "words")))
        return replies[0]

    report = run(settings(place, tmp_path, upstream, checkpoints=()), [System("both", both, "a note")])
    row = report.row("both")
    rivers = sum("river" in line for line in (place / "tasks.jsonl").read_text().splitlines())
    assert rivers > 0
    assert (row.failed, row.tasks, row.calls) == (rivers, 24 - rivers, 2.0)
    assert row.cost_usd == pytest.approx(2 * COST)
    assert {(system, what) for system, _, what in report.errors} == {("both", "not this one")}
    assert len(asked(upstream)) == 24 * 3  # all of it was known


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_an_endpoint(ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider) -> None:
    told = LiveRun(
        tmp_path / "live",
        url=upstream.url_for("openai").removesuffix("/v1"),
        models=("maps", "org/words"),
        api_key="sk-test-0123456789abcdef",
        sources=(str(place / "tasks.jsonl"),),
        split=None,
        progress=False,
    )
    assert "sk-test" not in repr(told)
    report = run(told)
    assert [row.name for row in report.systems] == ["maps", "org-words"]
    assert report.row("maps").score.mean == pytest.approx(right(place, "maps"))
    assert (report.reference, report.reference_from) == ("maps", "the order of the models")
    assert report.row("maps").cost_usd is None
    assert Counter(request.model for request in upstream.requests) == {"maps": 24, "org/words": 24}


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_so_many_tasks_are_the_same_ones_each_time(
    ray_session: None, place: Path, tmp_path: Path, upstream: LoopbackProvider
) -> None:
    """The folder's own tasks, whose order labelling changes."""
    write_outcomes(tmp_path / "live", read_outcomes(place / "outcomes"))
    told = settings(place, tmp_path, upstream, sources=(), split="val", limit=7)
    report = run(told)
    assert (report.tasks, report.wanted, report.requests) == (7, 7, 21)
    # The head was trained where the recorded outcomes say who is best.
    assert report.reference_from == "the training tasks"
    assert run(told).requests == 21


def test_endpoints_names() -> None:
    first, second = endpoint_specs("http://host:1/", ("fugu", "a/b:c"), "sk-test-0123456789", taken=("fugu",))
    assert (first.name, first.model, first.url) == ("fugu-endpoint", "fugu", "http://host:1/v1")
    assert (second.name, second.model) == ("a-b-c", "a/b:c")
    with pytest.raises(ConfigError, match="base_url") as caught:
        endpoint_specs("host:1", ("fugu",), "sk-test-0123456789")
    assert "sk-test" not in caught.value.message


class Scripted:
    """A worker that fails as often as it is told to, then answers."""

    def __init__(self, fails: int = 0) -> None:
        self.name = "w"
        self.fails = fails
        self.calls = 0

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.calls += 1
        await asyncio.sleep(0.01)
        if self.calls <= self.fails:
            raise WorkerUnavailableError("gone", worker="w", retry_after=0.01)
        return ChatReply("w", "text", usage=Usage(1, 1), cost_usd=2.0, timing=Timing(total_s=3.0))

    def stream(self, request: ChatRequest) -> Any:
        raise NotImplementedError


def purse_of(folder: Path, **limits: Any) -> Purse:
    spec = WorkerSpec.model_validate(
        {
            "name": "w",
            "provider": "openai",
            "model": "w",
            "price": {"input": 0.0, "output": 1e6},
            "defaults": {"max_tokens": 3},
            "retry": {"attempts": 3},
        }
    )
    paid = PaidCalls(folder / "calls.sqlite")
    usd, requests = paid.spent
    return Purse(Budget(**limits, spent_usd=usd, spent_requests=requests), paid, {"w": spec}, {"w": "d"})


REQUEST = ChatRequest((Message("user", "hello"),))


async def test_equal_calls_are_paid_once_and_counted_each_time(tmp_path: Path) -> None:
    worker, meters = Scripted(), [Meter(), Meter()]
    purse = purse_of(tmp_path, usd=3.0)
    await asyncio.gather(*(MeteredWorker(worker, purse, meter).complete(REQUEST) for meter in meters))
    assert worker.calls == 1
    assert purse.paid.spent == (2.0, 1)
    assert [meter.cost_usd for meter in meters] == [2.0, 2.0]
    assert [meter.acted for meter in meters] == [["w"], ["w"]]
    # The time that was not taken this time is told, once.
    assert sum(meter.saved_s > 2.9 for meter in meters) == 1
    purse.paid.close()
    # Kept: known to the next run, which has nothing to spend.
    later, meter = purse_of(tmp_path, usd=0.0), Meter()
    chunks = [chunk async for chunk in MeteredWorker(worker, later, meter).stream(REQUEST)]
    assert chunks[-1].final is not None
    assert chunks[-1].final.text == "text"
    assert (worker.calls, meter.cost_usd, meter.refused) == (1, 2.0, False)


async def test_what_does_not_fit_is_refused_and_nothing_leaves(tmp_path: Path) -> None:
    worker, meter = Scripted(), Meter()
    purse = purse_of(tmp_path, usd=2.5)  # a call can cost 3
    with pytest.raises(BudgetReachedError, match="does not fit into the budget"):
        await MeteredWorker(worker, purse, meter).complete(REQUEST)
    assert (worker.calls, meter.refused, purse.paid.spent) == (0, True, (0.0, 0))


async def test_failures_are_tried_again_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.metering._SHORTEST_PAUSE", 0.01)
    purse = purse_of(tmp_path, requests=3)
    await MeteredWorker(Scripted(fails=2), purse, Meter()).complete(REQUEST)
    assert purse.paid.spent[1] == purse.budget.spent_requests == 3
    with pytest.raises(BudgetReachedError):
        await MeteredWorker(Scripted(), purse, Meter()).complete(REQUEST.with_(seed=1))


async def test_a_call_that_was_cut_off_counts_with_the_most_it_can_cost(tmp_path: Path) -> None:
    purse = purse_of(tmp_path, usd=10.0)
    running = asyncio.create_task(MeteredWorker(Scripted(), purse, Meter()).complete(REQUEST))
    await asyncio.sleep(0.005)
    assert purse.paid.spent == (3.0, 1)  # before anything came back
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    purse.paid.close()
    assert purse_of(tmp_path).paid.spent == (3.0, 1)


def test_mistakes_are_found_before_the_first_call(place: Path, tmp_path: Path, upstream: LoopbackProvider) -> None:
    def fails(error: type[Exception], match: str, **more: Any) -> None:
        with pytest.raises(error, match=match):
            run(settings(place, tmp_path, upstream, **more))
        assert upstream.total == 0
        assert not (tmp_path / "live").exists()

    fails(ConfigError, "give --config, a pool, or --url", config=None, checkpoints=())
    fails(ConfigError, "--url and --model go together", url="http://127.0.0.1:1")
    fails(ConfigError, "--checkpoint and --workers are about a pool", config=None, url="http://h", models=("fugu",))
    fails(ConfigError, "samples is 0", samples=0)
    fails(ConfigError, "--min-gain is about systems", checkpoints=(), min_gain=0.1)
    fails(ConfigError, "has no worker who", workers=("who",))
    fails(CheckpointError, "does not exist", checkpoints=(tmp_path / "none",))
    fails(ConfigError, "two systems are called fugu", checkpoints=(place / "roles.safetensors",) * 2)
    fails(DataError, "there are", split="nowhere")
    fails(DataError, "no source of tasks", sources=("nonsense",))
    other = replace(load_checkpoint(place / "head.safetensors"))
    info = replace(other.info, workers=("sums", "words", "else"))
    save_checkpoint(tmp_path / "else.safetensors", replace(other, info=info))
    fails(CheckpointError, "else", checkpoints=(tmp_path / "else.safetensors",))


def test_options_for_live_only_are_told(place: Path) -> None:
    command = ["eval", "--outcomes", str(place / "outcomes"), "--budget-usd", "1", "--tasks", "x"]
    result = CliRunner().invoke(fugu.app, command, env={"COLUMNS": "400"})
    assert (result.exit_code, result.output) == (
        2,
        "error: --tasks, --budget-usd: for a live evaluation; give --config or --url, too\n",
    )
