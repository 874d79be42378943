"""Run a workflow: every step as soon as what it reads is there, so that the critical path is the latency.

Pure asyncio over `actors.messages.Worker`. A failed step goes to the next best worker, then is left out or ends the
run, by policy; a budget that runs out ends it with the best answer so far; cancelling `execute` (or closing `stream`)
cancels every call in flight and leaves no task behind. What workers write is only ever quoted, never read as a plan.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from actors import spans
from actors.errors import AllWorkersFailedError, BudgetError, DeadlineError, FuguError, WorkerUnavailableError
from actors.estimate import estimate_tokens, text_tokens
from actors.messages import ChatReply, ChatRequest, Usage, Worker
from actors.spending import told_to
from orchestrator import dispatch
from orchestrator.access import StepStyle
from orchestrator.access import step_messages as step_messages
from orchestrator.budget import Account, Budget, Clock, Grant, Resource
from orchestrator.events import Events, Room, always_room
from orchestrator.run import Run as Run
from orchestrator.run import RunEnded as RunEnded
from orchestrator.run import Skipped as Skipped
from orchestrator.run import StepChunk as StepChunk
from orchestrator.run import StepEnded as StepEnded
from orchestrator.run import StepEvent as StepEvent
from orchestrator.run import StepResult as StepResult
from orchestrator.run import StepStarted as StepStarted
from orchestrator.workflow import SELF, Workflow

GRACE_S = 5.0  # how long a cancelled call may take to end before it is left to itself

# A step's request as it will be sent, with the step's position: memory adds a tool history or tools here.
Prepare = Callable[[int, ChatRequest], ChatRequest]


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """`on_failure`: whether a step that no worker could do is left out, its readers being told, or ends the run.
    `fallbacks`: how many further workers may try a step. `steps`: how a step is told (`access.step_messages`)."""

    on_failure: Literal["skip", "fail"] = "skip"
    fallbacks: int = 2
    steps: StepStyle = "full"


async def execute(
    request: ChatRequest,
    workflow: Workflow,
    workers: Mapping[str, Worker],
    *,
    itself: Callable[[int], Worker] | None = None,
    ranking: Sequence[str] = (),
    settings: ExecutorSettings = ExecutorSettings(),
    budget: Budget | Account | None = None,
    on_event: Callable[[StepEvent], None] = lambda _event: None,
    room: Room = always_room,
    stream_last: bool = False,
    done: Mapping[int, StepResult] | None = None,
    prepare: Prepare = lambda _index, request: request,
    clock: Clock = time.monotonic,
) -> Run:
    """Run `workflow` on `request`.

    A step gets the request's sampling settings; its tools, response format and stop sequences belong to the answer and
    so to the last step, unless `prepare` says otherwise. A step that no other reads on the way to the answer is not
    run. A step whose worker fails goes to the next of `ranking`. `itself` makes the Conductor the worker of a step that
    its plan gives to itself (`workflow.SELF`); it counts what it spends in the same `Account`. `done` are results of an
    earlier run of the same workflow, which are taken as they are. `on_event` is called in the order in which things
    happen; with `stream_last` also for each piece of the last step's answer, and from its first piece on that step is
    not tried again; after each piece the step waits for `room`.

    Returns a `Run` in every case but cancellation and a fault of this program; `Run.answered` raises the typed error of
    a run without an answer. An empty workflow has no steps and no answer.
    """
    account = budget if isinstance(budget, Account) else Account(budget or Budget(), clock=clock)
    running = _Running(
        request,
        workflow,
        workers,
        itself,
        ranking,
        settings,
        account,
        on_event,
        room,
        stream_last,
        prepare,
        clock,
        clock(),
        {**(done or {})},
    )
    return await running.through()


async def stream(
    request: ChatRequest,
    workflow: Workflow,
    workers: Mapping[str, Worker],
    *,
    ranking: Sequence[str] = (),
    settings: ExecutorSettings = ExecutorSettings(),
    budget: Budget | Account | None = None,
    done: Mapping[int, StepResult] | None = None,
    prepare: Prepare = lambda _index, request: request,
    clock: Clock = time.monotonic,
) -> AsyncGenerator[StepEvent | RunEnded, None]:
    """`execute` as events, the last step's answer piece by piece, ending with `RunEnded`. Closing the generator cancels
    every call in flight. Who reads slowly slows the answer down."""
    events: Events[StepEvent] = Events()
    task = asyncio.create_task(
        execute(
            request,
            workflow,
            workers,
            ranking=ranking,
            settings=settings,
            budget=budget,
            on_event=events.put,
            room=events.room,
            stream_last=True,
            done=done,
            prepare=prepare,
            clock=clock,
        )
    )
    task.add_done_callback(lambda _task: events.close())
    try:
        while (event := await events.read()) is not None:
            yield event
        yield RunEnded(task.result())
    finally:
        await ended([task])


@dataclass(slots=True)
class _Asked:
    """A call in flight: whom, and what of a streamed answer was passed on."""

    worker: str
    started_s: float
    request: ChatRequest
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    shown: bool = False


@dataclass(slots=True)
class _Running:
    """One run under way."""

    request: ChatRequest
    workflow: Workflow
    workers: Mapping[str, Worker]
    itself: Callable[[int], Worker] | None
    ranking: Sequence[str]
    settings: ExecutorSettings
    account: Account
    on_event: Callable[[StepEvent], None]
    room: Room
    stream_last: bool
    prepare: Prepare
    clock: Clock
    began: float
    results: dict[int, StepResult]
    asked: dict[int, _Asked] = field(default_factory=dict)
    admitted: set[int] = field(default_factory=set)
    out_of: Resource | None = None
    error: FuguError | None = None

    @property
    def last(self) -> int:
        return len(self.workflow.steps) - 1

    async def through(self) -> Run:
        needed = self.workflow.needed
        for index, step in enumerate(self.workflow.steps):
            if index not in needed and index not in self.results:
                self.results[index] = StepResult(index, step, skipped="unread")
        running: dict[asyncio.Task[StepResult], int] = {}
        try:
            while self.last >= 0 and self.last not in self.results and not self._over():
                for index in sorted(needed - self.results.keys() - set(running.values())):
                    if self._ready(index):
                        running[asyncio.create_task(self._step(index))] = index
                if not running:
                    break
                finished, _ = await asyncio.wait(
                    running, timeout=self.account.seconds_left, return_when=asyncio.FIRST_COMPLETED
                )
                if not finished:
                    self._ran_out(DeadlineError("the request's time was over before the workflow ended"))
                for task in sorted(finished, key=running.__getitem__):
                    self._ended(task.result())
                    del running[task]
        finally:
            await ended(running)
        for task, index in running.items():
            self._ended(self._cut(index) if task.cancelled() or not task.done() else task.result())
        return self._run()

    def _over(self) -> bool:
        """No further step may start and none is waited for."""
        return self.out_of == "seconds" or (self.settings.on_failure == "fail" and self.error is not None)

    def _ready(self, index: int) -> bool:
        """All that the step reads is there, and nobody it reads waits for a tool."""
        reads = [self.results.get(i) for i in self.workflow.steps[index].access]
        return all(read is not None and not _waits(read) for read in reads)

    def _ended(self, result: StepResult) -> None:
        self.results[result.index] = result
        if result.skipped == "failed" and (self.settings.on_failure == "fail" or result.index == self.last):
            shown = result.index in self.asked and self.asked[result.index].shown
            self.error = result.failures[-1][1] if shown else AllWorkersFailedError(dict(result.failures))
        self.on_event(StepEnded(result))

    def _ran_out(self, error: BudgetError | DeadlineError) -> None:
        resource = (error.param or "").removeprefix("budget.")
        self.out_of = cast(Resource, resource) if isinstance(error, BudgetError) else "seconds"
        self.error = self.error or error

    def _now(self) -> float:
        return self.clock() - self.began

    async def _step(self, index: int) -> StepResult:
        with spans.span(f"step {index + 1}") as span:
            result = await self._tried(index)
            if span is not None:
                step = result.step
                asked = {"fugu.step.subtask": step.subtask} if span.content else {}
                reads = [i + 1 for i in step.access]
                told = {"fugu.worker": result.worker, "fugu.step.reads": reads, "fugu.step.skipped": result.skipped}
                span.set({"fugu.step.planned_worker": step.worker, **told, **asked})
                if result.skipped == "failed":
                    span.fail(AllWorkersFailedError(dict(result.failures)))
        return result

    async def _tried(self, index: int) -> StepResult:
        step = self.workflow.steps[index]
        request = self._request(index)
        started = self._now()
        failures: list[tuple[str, FuguError]] = []

        def result(worker: str | None, reply: ChatReply | None, skipped: Skipped | None) -> StepResult:
            return StepResult(index, step, worker, reply, started, self._now(), tuple(failures), skipped)

        for attempt, name in enumerate(self._candidates(step.worker), 1):
            if name not in self.workers and (name != SELF or self.itself is None):
                failures.append((name, WorkerUnavailableError(f"{name} is not in the pool", worker=name)))
                continue
            try:
                grant = self._admit(index, name, request)
            except (BudgetError, DeadlineError) as error:
                self._ran_out(error)
                return result(None, None, "budget")
            asked = self.asked[index] = _Asked(name, started, request if grant is None else grant.request)
            self.on_event(StepStarted(index, name, attempt, self._now()))
            try:
                return result(name, await self._call(index, asked, grant), None)
            except FuguError as error:
                failures.append((name, error))
            if asked.shown:  # what the caller has seen stands, and nobody begins it again
                break
        return result(None, None, "failed")

    def _candidates(self, first: str) -> list[str]:
        others = [name for name in self.ranking if name != first and name in self.workers]
        return [first, *others[: self.settings.fallbacks]]

    def _request(self, index: int) -> ChatRequest:
        request, steps = self.request, self.workflow.steps
        # A step that is written twice is meant to be answered twice, whatever a cache or a fixed seed says.
        twins = steps[:index].count(steps[index])
        request = request.with_(
            messages=step_messages(request, self.workflow, index, self._outputs(), self.settings.steps),
            sample_index=request.sample_index + twins,
            seed=None if request.seed is None else request.seed + twins,
        )
        if index != self.last:
            request = request.with_(tools=(), tool_choice=None, parallel_tool_calls=None, response_format=None, stop=())
        return self.prepare(index, request)

    def _outputs(self) -> dict[int, str | None]:
        return {
            index: result.reply.text if result.reply is not None else None for index, result in self.results.items()
        }

    def _admit(self, index: int, worker: str, request: ChatRequest) -> Grant | None:
        """None for the Conductor itself, whose calls are admitted one by one."""
        if worker == SELF:
            return None
        self.admitted.add(index)
        others = self.workflow.needed - self.results.keys() - self.admitted
        return self.account.admit(worker, request, shares=1 + len(others))

    def _worker(self, index: int, name: str) -> Worker:
        return self.itself(index) if name == SELF and self.itself is not None else self.workers[name]

    async def _call(self, index: int, asked: _Asked, grant: Grant | None) -> ChatReply:
        """The worker's reply; the account learns what the call took, however it ends."""
        reply: ChatReply | None = None
        failure: BaseException | None = None
        try:
            # The Conductor itself tells of its own calls, each to its account.
            with nullcontext() if grant is None else told_to(self.account.told_by(asked.worker)):
                if self.stream_last and index == self.last:
                    reply = await self._streamed(index, asked)
                else:
                    reply = await self._worker(index, asked.worker).complete(asked.request)
            return reply
        except BaseException as error:
            failure = error
            raise
        finally:
            if grant is not None:
                self.account.settle(grant, reply, failure)

    async def _streamed(self, index: int, asked: _Asked) -> ChatReply:
        worker = self._worker(index, asked.worker)
        pieces = dispatch.stream((worker,), asked.request, record=dispatch.Record(), clock=self.clock)
        async with aclosing(pieces):
            try:
                async for chunk in pieces:
                    asked.shown |= bool(chunk.text or chunk.refusal or chunk.reasoning or chunk.tool_calls)
                    asked.text.append(chunk.text)
                    asked.reasoning.append(chunk.reasoning)
                    self.on_event(StepChunk(index, chunk))
                    if chunk.final is not None:
                        return chunk.final
                    await self.room()
            except AllWorkersFailedError as error:
                raise error.failures.get(asked.worker, error) from None
        raise AssertionError("a stream that ends without a final chunk has raised")

    def _cut(self, index: int) -> StepResult:
        """The result of a step that was ended from outside; what it had said of the answer stands."""
        step, asked = self.workflow.steps[index], self.asked.get(index)
        if asked is None:
            return StepResult(index, step, skipped="cut")
        reply = None
        text, reasoning = "".join(asked.text), "".join(asked.reasoning)
        if text:
            usage = Usage(estimate_tokens(asked.request).input, text_tokens(text) + text_tokens(reasoning))
            cost = self.account.price(asked.worker, usage)
            reply = ChatReply(asked.worker, text, reasoning, finish_reason="length", usage=usage, cost_usd=cost)
        return StepResult(index, step, asked.worker, reply, asked.started_s, self._now(), skipped="cut")

    def _run(self) -> Run:
        waiting = tuple(index for index, result in sorted(self.results.items()) if _waits(result))
        for index, step in enumerate(self.workflow.steps):
            if index not in self.results:
                skipped: Skipped = "waiting" if waiting and not self._over() else "cut"
                self.results[index] = StepResult(index, step, skipped=skipped)
        steps = tuple(self.results[index] for index in range(len(self.workflow.steps)))
        answer = steps[-1].reply if steps else None
        error = self.error if answer is None else None
        ended_by_failure = self.settings.on_failure == "fail" and error is not None and self.out_of is None
        shown = self.last in self.asked and self.asked[self.last].shown
        # Half an answer that was seen is not followed by another one.
        if answer is None and not waiting and not shown and not ended_by_failure:
            answer = self._best_so_far(steps)
        return Run(self.workflow, steps, answer, self._now(), self.out_of, error, waiting)

    def _best_so_far(self, steps: Sequence[StepResult]) -> ChatReply | None:
        """The reply that builds on the most, of equals the one by the best worker."""
        levels = {index: level for level, wave in enumerate(self.workflow.waves()) for index in wave}
        ranks = {name: rank for rank, name in enumerate(self.ranking)}
        answers = [step for step in steps if step.reply is not None and step.reply.text.strip()]
        best = max(
            answers,
            key=lambda step: (levels[step.index], -ranks.get(step.worker or "", len(ranks)), step.index),
            default=None,
        )
        return best.reply if best is not None else None


def _waits(result: StepResult) -> bool:
    return result.reply is not None and bool(result.reply.tool_calls)


async def ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel what still runs and see it end."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=GRACE_S)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # looked at, so that nobody is told that it never was
