"""The course of a labelling in virtual time: who waits for whom, when it stops, what is counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.config import WorkerSpec
from actors.errors import (
    CircuitOpenError,
    DataError,
    FuguError,
    LimitReachedError,
    RateLimitedError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from actors.messages import ChatRequest, Message
from tests.actors.virtual import run_virtual
from training.journal import Journal, Sample, opened, task_digest
from training.labelling import Call, Done, Labelling, Lane
from training.outcomes import Task
from training.spending import Budget, after_failure, most_usd

TASKS = [Task(f"t{n}", f"What is {n}?", str(n), "d", "s", "train", "number") for n in range(40)]
Script = Callable[[Call, int], FuguError | float]


def call_of(task: Task, worker: str, place: int, **more: Any) -> Call:
    return Call(task, worker, 0, ChatRequest((Message("user", task.prompt),)), place=place, **more)


def sample_of(call: Call, score: float | None = 1.0, usd: float = 0.1) -> Sample:
    task = call.task
    return Sample(
        task.task_id, call.worker, call.sample, score, "a", 1, 1, usd, 0.1, task_digest(task), "e" * (not score)
    )


class Upstream:
    """Calls end as scripted: by (call, how manieth of this worker) → an error, or the seconds that it takes."""

    def __init__(self, script: Script, score: float | None = 1.0) -> None:
        self.script, self.score = script, score
        self.made: list[tuple[float, Call]] = []
        self.running: dict[str, int] = {}
        self.most: dict[str, int] = {}

    async def submit(self, calls: Sequence[Call]) -> AsyncIterator[Done]:
        tasks = [asyncio.create_task(self.one(call)) for call in calls]
        for end in asyncio.as_completed(tasks):
            yield await end

    async def one(self, call: Call) -> Done:
        name = call.worker
        self.made.append((asyncio.get_running_loop().time(), call))
        self.running[name] = self.running.get(name, 0) + 1
        self.most[name] = max(self.most.get(name, 0), self.running[name])
        how = self.script(call, sum(made.worker == name for _, made in self.made))
        await asyncio.sleep(how if isinstance(how, float) else 0.01)
        self.running[name] -= 1
        return Done(call, error=how) if isinstance(how, FuguError) else Done(call, sample_of(call, self.score))


def play(
    folder: Path, upstream: Upstream, lanes: Sequence[Lane], count: int = 40, budget: Budget | None = None, **more: Any
) -> Labelling:
    """Label `count` tasks with all lanes; returns the labelling after its end."""
    place = 0
    for task in TASKS[:count]:
        for lane in lanes:
            place += 1
            lane.queue.append(call_of(task, lane.worker, place, **more))

    async def main() -> Labelling:
        with opened(folder) as journal:
            labelling = Labelling({lane.worker: lane for lane in lanes}, journal, budget or Budget(), upstream.submit)
            try:
                await labelling.run()
            except DataError as error:
                labelling.fatal = error
            return labelling

    return run_virtual(main)


def test_nobody_waits_for_a_slow_worker_once_all_have_answered(tmp_path: Path) -> None:
    upstream = Upstream(lambda call, _: 10.0 if call.worker == "slow" else 0.1)
    play(tmp_path, upstream, [Lane("slow", 4, 2), Lane("fast", 4, 2)])
    assert upstream.most == {"slow": 4, "fast": 4}
    times = {name: [at for at, call in upstream.made if call.worker == name] for name in ("slow", "fast")}
    begin = times["slow"][0]
    assert [at - begin for at in times["fast"][:2]] == [0, pytest.approx(10.0)]  # one each, until both have answered
    assert times["fast"][-1] - begin < 12
    assert len(times["fast"]) == len(times["slow"]) == 40


def test_under_a_budget_nobody_gets_far_ahead(tmp_path: Path) -> None:
    upstream = Upstream(lambda call, _: 10.0 if call.worker == "slow" else 0.01)
    lanes = [Lane("slow", 1), Lane("fast", 4)]
    for lane in lanes:
        lane.proven = True
    far = [Task(f"f{n}", f"And {n}?", "1", "d", "s", "train", "number") for n in range(400)]
    for place, task in enumerate(far):
        for lane in lanes:
            lane.queue.append(call_of(task, lane.worker, place * 2, most=(1.0, 1)))
    play(tmp_path, upstream, lanes, count=0, budget=Budget(requests=150))
    made = [call.worker for _, call in upstream.made]
    assert len(made) == 150
    ahead = 0
    for index in range(len(made)):
        ahead = max(ahead, made[: index + 1].count("fast") - made[: index + 1].count("slow"))
    assert 20 < ahead <= 66


@pytest.mark.parametrize("limit", [0, 1, 5, 39, 40, 41])
def test_held_and_spent_never_pass_the_limit(tmp_path: Path, limit: int) -> None:
    upstream = Upstream(lambda _call, n: WorkerUnavailableError("500") if n % 3 == 0 else 0.1 * (n % 7))
    lane = Lane("a", 8, 4, tries=2, patience=100.0)
    labelling = play(tmp_path, upstream, [lane], budget=Budget(requests=limit))
    assert len(upstream.made) == limit
    assert labelling.budget.spent_requests == limit
    assert labelling.budget.held_requests == 0
    assert "does not fit" in labelling.stopped


def test_money_in_flight_is_held_at_the_most_it_can_cost(tmp_path: Path) -> None:
    upstream = Upstream(lambda _call, _n: 1.0)  # each costs 0.1 in the end
    lane = Lane("a", 40, 1, proven=True)
    labelling = play(tmp_path, upstream, [lane], budget=Budget(usd=2.0), most=(0.5, 1))
    assert upstream.most["a"] == 4
    assert len(upstream.made) == 16  # 1.6 spent, and 0.5 more would not fit
    assert labelling.budget.spent_usd == pytest.approx(1.6)


def test_a_short_outage_is_waited_for_with_one_call_at_a_time(tmp_path: Path) -> None:
    def script(_call: Call, _n: int) -> FuguError | float:
        now = asyncio.get_running_loop().time() - begin[0]
        return WorkerUnavailableError("503") if 5 <= now < 40 else 1.0

    begin: list[float] = []
    upstream = Upstream(script)
    original = upstream.one

    async def one(call: Call) -> Done:
        begin or begin.append(asyncio.get_running_loop().time())
        return await original(call)

    upstream.one = one  # type: ignore[method-assign]
    lane = Lane("a", 4, 2, tries=10, patience=100.0)
    labelling = play(tmp_path, upstream, [lane])
    assert labelling.fatal is None
    assert lane.samples == 40
    during = [at - begin[0] for at, _ in upstream.made if 6 < at - begin[0] < 40]
    assert 2 <= len(during) <= 8


@pytest.mark.parametrize(
    ("error", "calls", "says"),
    [
        (WorkerUnavailableError("on fire"), (5, 13), "failed .* times in a row: on fire"),
        (WorkerRejectedError("unknown field"), (5, 8), "failed 5 times in a row: unknown field"),
        (RateLimitedError("quota", retry_after=7200), (1, 4), "failed at once: quota"),
        (FuguError("oops"), (1, 4), "worker a: oops"),
    ],
)
def test_a_worker_that_broke_ends_the_run(tmp_path: Path, error: FuguError, calls: tuple[int, int], says: str) -> None:
    upstream = Upstream(lambda _call, n: 0.1 if n <= 4 else error)
    labelling = play(tmp_path, upstream, [Lane("a", 4, 2, tries=99, patience=0.0)])
    with pytest.raises(DataError, match=says):
        raise labelling.fatal or AssertionError("it did not end")
    assert calls[0] <= len(upstream.made) - 4 <= calls[1]


def test_waiting_for_the_own_limit_is_no_failure_of_the_call(tmp_path: Path) -> None:
    upstream = Upstream(lambda _call, n: LimitReachedError("wait", retry_after=3) if n % 2 else 0.5)
    lane = Lane("a", 1, 1, tries=1, patience=100.0)
    labelling = play(tmp_path, upstream, [lane], count=5)
    assert (lane.samples, lane.failed, lane.requests) == (5, 0, 5)
    assert labelling.errors == []


def test_graders_that_never_work_end_the_run_and_what_was_paid_is_kept(tmp_path: Path) -> None:
    upstream = Upstream(lambda _call, _n: 0.1, score=None)
    labelling = play(tmp_path, upstream, [Lane("a", 1)])
    assert "20 answers in a row could not be graded" in str(labelling.fatal)
    assert len(labelling.journal.samples) == 20


def test_what_was_in_flight_at_a_kill_counts_with_the_most_it_can_cost(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.asked(("t0", "a", 0), 0.5, 1)
        journal.sample(sample_of(call_of(TASKS[0], "a", 1)), 0.1, 1)
        journal.asked(("t1", "a", 0), 0.5, 1)
        journal.failed(("t1", "a", 0), 0.0, 1, "x")
        journal.asked(("t2", "a", 0), 0.5, 4)
    with opened(tmp_path) as journal:
        assert (journal.usd, journal.requests) == (pytest.approx(0.6), 6)
        # Graded again: only the judge is paid for.
        again = sample_of(call_of(TASKS[0], "a", 1), None)
        journal.sample(again, 0.2, 3)
        usd, requests = journal.usd, journal.requests
    lines = [json.loads(line) for line in (tmp_path / "label.jsonl").read_text().splitlines()]
    lines[-1] |= {"grading_usd": 0.2, "grading_requests": 3}
    (tmp_path / "label.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with opened(tmp_path) as journal:
        assert (journal.usd, journal.requests) == (pytest.approx(usd), requests)


@pytest.mark.parametrize("score", ["NaN", "Infinity", "1.5", "-0.1", '"high"'])
def test_a_journal_with_an_impossible_score_is_refused(tmp_path: Path, score: str) -> None:
    with opened(tmp_path) as journal:
        journal.sample(sample_of(call_of(TASKS[0], "a", 1)), 0.0, 1)
    path = tmp_path / "label.jsonl"
    path.write_text(path.read_text().replace('"score": 1.0', f'"score": {score}'))
    with pytest.raises(DataError, match=r"label\.jsonl: line 1 is not a labelling record"), opened(tmp_path) as _:
        pass


def test_the_most_a_call_can_cost() -> None:
    spec = WorkerSpec.model_validate(
        {"name": "a", "provider": "openai", "model": "m", "price": {"input": 1, "output": 10}, "system": "Be brief."}
    )
    request = ChatRequest((Message("user", "日本"),), max_tokens=100)
    assert most_usd(request, spec) == pytest.approx(((6 + 32) + (9 + 32) + 100 * 10) / 1e6)
    assert after_failure(LimitReachedError("x"), 5.0) == after_failure(CircuitOpenError("x"), 5.0) == (0.0, 0)
    assert after_failure(RateLimitedError("x"), 5.0) == (0.0, 1)
    assert after_failure(WorkerTimeoutError("x", phase="connect"), 5.0) == (0.0, 1)
    assert after_failure(WorkerTimeoutError("x", phase="total"), 5.0) == (5.0, 1)


def test_the_journal_is_one_per_folder(tmp_path: Path) -> None:
    with opened(tmp_path) as first, pytest.raises(DataError, match="written by another process"), opened(tmp_path):
        assert isinstance(first, Journal)
