"""The course of a labelling: which call is made when, what its end means, and when to stop. No Ray, no files.

Every worker has a queue of its own, so that a slow one holds nobody up. Until each worker has answered once, each is
asked one thing at a time: a pool with a worker that cannot answer costs a few calls, not a budget.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from actors.errors import (
    CircuitOpenError,
    DataError,
    FuguError,
    GradingError,
    RateLimitedError,
    RequestError,
    WorkerAuthError,
    WorkerError,
    WorkerRejectedError,
    WorkerUnavailableError,
)
from actors.messages import ChatReply, ChatRequest
from training.grading import graded
from training.journal import Journal, Key, Sample, task_digest
from training.judge import Judge, JudgeError
from training.outcomes import Task
from training.spending import Budget, after_failure

# A worker that fails this often in a row will not get better by being asked more.
FAILURES_IN_A_ROW = 5
# The same for graders: what cannot be graded should not be paid for.
UNGRADED_IN_A_ROW = 20
# Under a budget no worker gets further ahead of the slowest than this many calls, so that tasks are labelled whole.
LEAD = 64
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Whoever is told to come back later than this (a quota used up for the day) is told to run again later.
_LONGEST_WAIT = 600.0


class Answers(Protocol):
    """The part of `actors.messages.Worker` that labelling needs."""

    @property
    def name(self) -> str: ...

    async def complete(self, request: ChatRequest) -> ChatReply: ...


@dataclass(frozen=True, slots=True)
class Call:
    """One thing to do: ask a worker (`request`), or only grade what it once said (`paid`). `most` is what it can cost
    at the utmost, its judge included: USD and upstream requests. `place` is its position in the whole order."""

    task: Task
    worker: str
    sample: int
    request: ChatRequest
    paid: Sample | None = None
    most: tuple[float, int] = (0.0, 1)
    place: int = 0
    tries: int = 0

    @property
    def key(self) -> Key:
        return self.task.task_id, self.worker, self.sample


@dataclass(frozen=True, slots=True)
class Done:
    """How a call ended: with a sample (perhaps one that could not be graded), or with the worker's error."""

    call: Call
    sample: Sample | None = None
    error: FuguError | None = None


Submit = Callable[[Sequence[Call]], AsyncIterator[Done]]


async def answer(call: Call, worker: Answers, judges: Mapping[str, Judge]) -> Done:
    """Make a call and grade what comes back. Raises nothing but CancelledError."""
    sample = call.paid
    if sample is None:
        try:
            reply = await worker.complete(call.request)
        except FuguError as error:
            return Done(call, error=error)
        sample = Sample(
            task_id=call.task.task_id,
            worker=call.worker,
            sample=call.sample,
            score=None,
            response=reply.text,
            input_tokens=reply.usage.input_tokens,
            output_tokens=reply.usage.output_tokens,
            cost_usd=reply.cost_usd,
            latency_s=reply.timing.total_s,
            task_digest=task_digest(call.task),
            requests=reply.attempts,
        )
    try:
        found = await graded(call.task, sample.response, judges)
    except GradingError as error:
        usd, requests = (error.cost_usd or 0.0, error.requests) if isinstance(error, JudgeError) else (0.0, 0)
        return Done(call, replace(sample, score=None, error=error.message, grading_usd=usd, grading_requests=requests))
    return Done(
        call,
        replace(
            sample,
            score=found.score,
            error="",
            grading_usd=found.cost_usd or 0.0,
            grading_requests=found.requests,
        ),
    )


@dataclass
class Lane:
    """One worker's part. `batch` calls are handed over at a time, `concurrency` run at most. `tries` bounds how often a
    call is made that failed in a way that may pass; `patience` are the seconds without any success after which a
    failing worker ends the run."""

    worker: str
    concurrency: int
    batch: int = 1
    tries: int = 1
    patience: float = 0.0
    queue: deque[Call] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)
    proven: bool = False
    failing: int = 0
    failing_since: float = 0.0
    ready_at: float = 0.0
    samples: int = 0
    failed: int = 0
    ungraded: int = 0
    usd: float = 0.0
    requests: int = 0

    def room(self) -> int:
        """How many calls may be handed over now. While the worker fails, one call at a time finds out whether it still
        does. Otherwise room is saved up until a whole batch fits."""
        if self.failing:
            return 0 if self.running else 1
        free = self.concurrency - len(self.running)
        wanted = min(self.batch, len(self.queue))
        return wanted if free >= wanted else 0


@dataclass
class Labelling:
    """See the module docstring. `stopped` says why it ended before all was done; `errors` are (task, worker, what)."""

    lanes: Mapping[str, Lane]
    journal: Journal
    budget: Budget
    submit: Submit
    on_sample: Callable[[Sample], None] = lambda _sample: None
    on_change: Callable[[], None] = lambda: None
    stopped: str = ""
    fatal: DataError | None = None
    errors: list[tuple[str, str, str]] = field(default_factory=list)
    _ungraded_in_a_row: int = 0
    _events: asyncio.Queue[tuple[Lane, Done] | BaseException] = field(default_factory=asyncio.Queue)
    _batches: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Until all calls have ended, or there is a reason to stop; what is running then still comes to its end.

        Raises:
            DataError: a worker, or the graders, do not work; says which and why.
        """
        try:
            while True:
                pause = self._start()
                if not self._in_flight() and pause is None:
                    break
                try:
                    async with asyncio.timeout(pause):
                        event = await self._events.get()
                except TimeoutError:
                    continue
                if isinstance(event, BaseException):
                    raise event
                self._ended(*event)
                self.on_change()
        finally:
            for batch in self._batches:
                batch.cancel()
            await asyncio.gather(*self._batches, return_exceptions=True)
            # What has come in is paid for, however this ends.
            while not self._events.empty():
                if isinstance(event := self._events.get_nowait(), tuple):
                    self._ended(*event)
        if self.fatal is not None:
            raise self.fatal

    def _in_flight(self) -> bool:
        return any(lane.running for lane in self.lanes.values())

    def _start(self) -> float | None:
        """Hand over what can be; the seconds after which to look again, None to wait for an end."""
        if self.stopped or self.fatal is not None:
            return None
        now = asyncio.get_running_loop().time()
        everyone = all(lane.proven or not (lane.queue or lane.running) for lane in self.lanes.values())
        pauses, short = [], False
        slowest = min((self._next_place(lane) for lane in self.lanes.values() if lane.queue or lane.running), default=0)
        bounded = self.budget.usd is not None or self.budget.requests is not None
        for lane in self.lanes.values():
            while lane.queue:
                room = lane.room() if everyone else int(not lane.running and not lane.proven)
                if room == 0 or (bounded and lane.queue[0].place > slowest + LEAD * len(self.lanes)):
                    break
                if lane.ready_at > now:
                    pauses.append(lane.ready_at - now)
                    break
                batch = self._take(lane, room)
                if not batch:
                    short = True
                    break
                self._hand_over(lane, batch)
        if short and not self._in_flight() and not pauses:
            self.stopped = f"the next call does not fit into the budget: {self.budget.describe()} used"
            return None
        return min(pauses, default=None)

    def _next_place(self, lane: Lane) -> int:
        return min((*lane.running, *(call.place for call in list(lane.queue)[:1])))

    def _take(self, lane: Lane, room: int) -> list[Call]:
        """The next calls of a queue, as many as the budget holds."""
        batch: list[Call] = []
        while lane.queue and len(batch) < room and self.budget.hold(*lane.queue[0].most):
            batch.append(lane.queue.popleft())
        return batch

    def _hand_over(self, lane: Lane, batch: Sequence[Call]) -> None:
        for call in batch:
            if call.most[1]:
                self.journal.asked(call.key, *call.most)
            lane.running.add(call.place)
        task = asyncio.get_running_loop().create_task(self._follow(lane, batch))
        self._batches.add(task)
        task.add_done_callback(self._batches.discard)

    async def _follow(self, lane: Lane, batch: Sequence[Call]) -> None:
        left = {call.key: call for call in batch}
        try:
            async with aclosing(self.submit(batch)) as ends:  # type: ignore[type-var]
                async for done in ends:
                    call = left.pop(done.call.key)
                    self._events.put_nowait((lane, replace(done, call=call)))
            if left:
                raise DataError("a batch ended before its calls did")
        except WorkerUnavailableError as error:
            # The process that made the calls is gone; nobody knows how far they got.
            for call in left.values():
                self._events.put_nowait((lane, Done(call, error=error)))
        except Exception as error:
            self._events.put_nowait(error)

    def _ended(self, lane: Lane, done: Done) -> None:
        lane.running.discard(done.call.place)
        if done.sample is not None:
            self._answered(lane, done.call, done.sample)
        else:
            assert done.error is not None
            self._failed(lane, done.call, done.error)

    def _answered(self, lane: Lane, call: Call, sample: Sample) -> None:
        lane.proven, lane.failing, lane.ready_at = True, 0, 0.0
        usd, requests = sample.grading_usd, sample.grading_requests
        if call.paid is None:
            usd += sample.cost_usd or 0.0
            requests += sample.requests
        self.budget.settle(call.most, usd, requests)
        self.journal.sample(sample, usd, requests)
        lane.usd += usd
        lane.requests += requests
        lane.samples += 1
        if sample.score is None:
            lane.ungraded += 1
            self._ungraded_in_a_row += 1
            self.errors.append((sample.task_id, sample.worker, sample.error))
            if self._ungraded_in_a_row >= UNGRADED_IN_A_ROW and self.fatal is None:
                self.fatal = DataError(
                    f"{UNGRADED_IN_A_ROW} answers in a row could not be graded (they are kept): {sample.error}"
                )
        else:
            self._ungraded_in_a_row = 0
        self.on_sample(sample)

    def _failed(self, lane: Lane, call: Call, error: FuguError) -> None:
        usd, requests = after_failure(error, call.most[0])
        self.budget.settle(call.most, usd, requests)
        self.journal.failed(call.key, usd, requests, error.code)
        lane.usd += usd
        lane.requests += requests
        if not isinstance(error, (WorkerError, RequestError)):
            self.fatal = self.fatal or DataError(f"worker {lane.worker}: {error.message}")
            return
        now = asyncio.get_running_loop().time()
        if lane.failing == 0:
            lane.failing_since = now
        lane.failing += 1
        waiting = isinstance(error, (RateLimitedError, CircuitOpenError))
        if waiting or (error.retryable and call.tries + 1 < lane.tries):
            # Not the call's fault, or not known to be: it is made again.
            lane.queue.appendleft(call if waiting else replace(call, tries=call.tries + 1))
        else:
            lane.failed += 1
            self.errors.append((call.task.task_id, lane.worker, error.message))
        if not isinstance(error, (WorkerRejectedError, RequestError)) and lane.patience:
            pause = min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2 ** min(lane.failing - 1, 10))
            lane.ready_at = max(lane.ready_at, now + max(pause, error.retry_after or 0.0))
        patience = 0.0 if not lane.proven and not waiting else lane.patience
        hopeless = lane.failing >= FAILURES_IN_A_ROW and now - lane.failing_since >= patience
        hopeless = hopeless or isinstance(error, WorkerAuthError) or (error.retry_after or 0.0) > _LONGEST_WAIT
        if hopeless and self.fatal is None:
            times = f"{lane.failing} times in a row" if lane.failing > 1 else "at once"
            self.fatal = DataError(f"worker {lane.worker} failed {times}: {error.message}")
