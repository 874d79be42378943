"""The Conductor: a language model writes a workflow, the workflow is run, and it may look at the result and plan again
(Conductor §3; Fugu report §3.2).

Pure asyncio over `actors.messages.Worker`. Whoever can answer a chat can write plans: a model of its own, or any
worker of the pool, prompted and untrained. What it writes is data: a plan that does not parse is told back and written
again, and when that comes to nothing the best single worker is asked. A step that the conductor gives to itself is a
conducted request of its own, on the same account. Training asks `conductor_messages`, parses and executes the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from actors import spans
from actors.errors import (
    AllWorkersFailedError,
    BudgetError,
    ContextLengthError,
    DeadlineError,
    FuguError,
    PlanError,
    WorkerError,
    WorkerUnavailableError,
)
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ToolCallDelta, Worker
from orchestrator import access, memory, pausing
from orchestrator.assign import assigned, conversations, is_whole
from orchestrator.budget import Account, Budget, Clock, Resource
from orchestrator.conducted import Conducted as Conducted
from orchestrator.conducted import ConductEvent, FellBack, Kept, Planned, PlanRound, Rejected, Stepped, Writing
from orchestrator.conductor_prompt import Mistake as Mistake
from orchestrator.conductor_prompt import PromptSettings as PromptSettings
from orchestrator.conductor_prompt import PromptStyle as PromptStyle
from orchestrator.conductor_prompt import Round as Round
from orchestrator.conductor_prompt import conductor_messages as conductor_messages
from orchestrator.conductor_prompt import quote
from orchestrator.events import Events, Room, always_room
from orchestrator.executor import ended, execute
from orchestrator.memory import Paused, Resumed
from orchestrator.planning import ConductorSettings as ConductorSettings
from orchestrator.planning import Pool as Pool
from orchestrator.planning import plan_request, written
from orchestrator.roles import with_note
from orchestrator.run import Run, StepChunk, StepEvent
from orchestrator.workflow import SELF, Step, Workflow, parse_workflow, render_workflow

_BARE = "Answer the question."
_EARLIER = (
    "An earlier attempt at the whole task came to the following, which was found wanting. Use what is right in it:"
)


async def conduct(
    request: ChatRequest,
    writer: Worker,
    pool: Pool,
    ranking: Sequence[str],
    settings: ConductorSettings | None = None,
    *,
    budget: Budget | Account | None = None,
    on_event: Callable[[ConductEvent], None] = lambda _event: None,
    room: Room = always_room,
    stream_last: bool = False,
    may_pause: bool = False,
    resumed: Resumed | None = None,
    conducted: Conducted | None = None,
    clock: Clock = time.monotonic,
) -> Conducted:
    """Answer `request` by workflows that `writer` writes.

    `ranking` is the router's: the best single worker first, asked when no plan comes about, and the order in which
    others try a failed step. With `may_pause` every step may call the request's tools; the result then has `paused`,
    and goes on from there with `resumed` once the caller has their results. Without it no step is told of tools.
    `stream_last`: pieces of the answer come as events, where it is certain that they are the answer's; after each it
    waits for `room`. `conducted` may be given to watch what happens.

    Raises:
        FuguError: there is no answer at all: the error of the last attempt (BudgetError, DeadlineError,
            AllWorkersFailedError); or one broke off after pieces of it had gone out (StreamBrokenError).
    """
    account = budget if isinstance(budget, Account) else Account(budget or Budget(), clock=clock)
    conducting = _Conducting(
        request if may_pause else request.with_(tools=(), tool_choice=None, parallel_tool_calls=None),
        writer,
        pool,
        ranking,
        settings or ConductorSettings(),
        account,
        on_event,
        room,
        stream_last,
        may_pause,
        Conducted() if conducted is None else conducted,
        clock,
        memory.new_pause_id(),
    )
    await conducting.through(resumed)
    return conducting.conducted


@dataclass(slots=True)
class _Conducting:
    """One conducted request under way, or a step of one (`path` leads to it; all that wait for tools in one request do
    so under one `pause_id`). `nested` are the workflows of its own steps that wait. `shown`: pieces of an answer have
    gone out, so no other answer may follow."""

    request: ChatRequest
    writer: Worker
    pool: Pool
    ranking: Sequence[str]
    settings: ConductorSettings
    account: Account
    on_event: Callable[[ConductEvent], None]
    room: Room
    stream_last: bool
    may_pause: bool
    conducted: Conducted
    clock: Clock
    pause_id: str
    path: tuple[int, ...] = ()
    nested: dict[int, Paused] = field(default_factory=dict)
    said: list[Round] = field(default_factory=list)
    shown: bool = False

    async def through(self, resumed: Resumed | None) -> None:
        conversation = self.request.messages
        if resumed is not None:
            self.request = self.request.with_(messages=resumed.base)
            self.said = list(resumed.paused.rounds)
        error: FuguError | None = None
        for number in range(len(self.said), max(self.settings.max_rounds, len(self.said) + 1)):
            this = PlanRound(number)
            self.conducted.rounds.append(this)
            if resumed is not None:
                this.workflow, this.bare, this.resumed = pausing.continued(resumed.paused), resumed.paused.bare, True
            else:
                await self._plan(this)
            if this.workflow is None:  # kept, or nothing was written but there is an answer already
                break
            run = await self._run(this, resumed)
            if not this.bare and run.answer is None and not run.waiting and run.out_of is None and not self.shown:
                error = run.error
                self._fall_back(this, "no step of the workflow could answer")
                self.request = self.request.with_(messages=conversation)
                this = PlanRound(number, bare=True, workflow=self._bare(), reason=this.reason)
                self.conducted.rounds.append(this)
                resumed = None
                run = await self._run(this, resumed)
            error = run.error or error
            if run.waiting and self.may_pause:
                self._pause(this, run, resumed)
                return
            resumed = None
            self.conducted.out_of = run.out_of
            if run.answer is not None and (run.complete or self.conducted.answer is None):
                self.conducted.answer = run.answer
            if not this.planned or run.answer is None or run.out_of is not None:
                break
            self.said.append(Round(self._written(this), run.answer.text))
        if self.shown and isinstance(error, AllWorkersFailedError):
            raise list(error.failures.values())[-1]  # the worker whose answer broke off after its first piece
        if self.conducted.answer is None or (self.shown and error is not None):
            raise error or AllWorkersFailedError({})

    # Planning ----------------------------------------------------------------------------------------------------

    async def _plan(self, this: PlanRound) -> None:
        """Have a workflow written; without one, the best single worker's, unless there is an answer already."""
        mistakes: list[Mistake] = []
        for attempt in range(self.settings.retries + 1):
            try:
                with spans.span("plan") as span:
                    if span is not None:
                        depth = self.conducted.depth
                        span.set(
                            {"fugu.plan.round": this.number + 1, "fugu.plan.depth": depth, "fugu.plan.try": attempt + 1}
                        )
                    reply, seconds = await self._write(this, mistakes[-1:], attempt)
                    workflow = await self._assigned(this, self._read(reply))
                    if span is not None:
                        span.set({"fugu.plan.steps": len(workflow.steps), "fugu.plan.topology": workflow.topology})
            except (WorkerError, ContextLengthError, BudgetError, DeadlineError) as error:
                if self.said and isinstance(error, BudgetError | DeadlineError):
                    self.conducted.out_of = _resource(error)
                return self._without_plan(this, f"the conductor could not answer: {error.message}")
            except PlanError as error:
                this.writings.append(Writing(reply, seconds, error))
                left = self.settings.retries - attempt
                self.on_event(Rejected(self.conducted.depth, this.number, error.message, left))
                mistakes.append(Mistake(reply.text, error.message))
                continue
            this.writings.append(Writing(reply, seconds))
            if not workflow.steps:
                this.kept = True
                self.on_event(Kept(self.conducted.depth, this.number))
                return None
            this.workflow = workflow
            self.on_event(Planned(self.conducted.depth, this.number, workflow, seconds))
            return None
        return self._without_plan(this, f"no workflow in {self.settings.retries + 1} tries: {mistakes[-1].reason}")

    def _read(self, reply: ChatReply) -> Workflow:
        """Raises:
        PlanError: what was written is no workflow of this pool.
        """
        return parse_workflow(
            reply.text,
            self.pool.names,
            allowed=self.pool.workers.keys(),
            max_steps=self.settings.prompt.max_steps,
            allow_self=self._may_recurse,
            allow_empty=bool(self.said),
        )

    async def _assigned(self, this: PlanRound, workflow: Workflow) -> Workflow:
        """The workflow in the hands of whom the router names, where one assigns."""
        assign = self.pool.assign
        if assign is None or not workflow.steps:
            return workflow
        this.bare = is_whole(workflow)
        asked = conversations(workflow, self.request.messages)
        return assigned(workflow, await assign(asked, frozenset(self.pool.workers)) if asked else ())

    async def _write(self, this: PlanRound, mistakes: Sequence[Mistake], attempt: int) -> tuple[ChatReply, float]:
        asked = plan_request(
            self.request,
            self.pool,
            self.settings,
            self.said,
            mistakes,
            allow_self=self._may_recurse,
            round=this.number,
            attempt=attempt,
        )
        return await written(self.writer, asked, self.account, self.clock)

    @property
    def _may_recurse(self) -> bool:
        return self.conducted.depth < self.settings.max_depth

    def _without_plan(self, this: PlanRound, reason: str) -> None:
        if self.said:
            this.reason = reason  # the answer that there is stands
        else:
            self._fall_back(this, reason)
            this.bare, this.workflow = True, self._bare()

    def _fall_back(self, this: PlanRound, reason: str) -> None:
        this.reason = reason
        self.on_event(FellBack(self.conducted.depth, this.number, reason))

    def _bare(self) -> Workflow:
        best = next((name for name in self.ranking if name in self.pool.workers), next(iter(self.pool.workers)))
        return Workflow((Step(best, _BARE),))

    def _written(self, this: PlanRound) -> str:
        """The plan as the conductor sees it again: its own words, or the lists where another process read those."""
        assert this.workflow is not None
        return this.writings[-1].reply.text if this.writings else render_workflow(this.workflow, self.pool.names)

    # Running -----------------------------------------------------------------------------------------------------

    async def _run(self, this: PlanRound, resumed: Resumed | None) -> Run:
        workflow = this.workflow
        assert workflow is not None
        self.nested.clear()

        def itself(index: int) -> Worker:
            return _Nested(self, this, index, None if resumed is None else resumed.nested.get(index))

        certain = not this.planned or this.number + 1 >= self.settings.max_rounds

        def tell(event: StepEvent) -> None:
            if isinstance(event, StepChunk) and (event.chunk.text or event.chunk.reasoning):
                self.shown = True
            self.on_event(Stepped(self.conducted.depth, this.number, event))

        def prepare(index: int, request: ChatRequest) -> ChatRequest:
            return self._prepared(this, index, request, resumed)

        this.run = await execute(
            self.request,
            workflow,
            self.pool.workers,
            # What may name itself is settled when a plan is read; one that waits has been.
            itself=itself,
            ranking=self.ranking,
            settings=self.settings.executor,
            budget=self.account,
            on_event=tell,
            room=self.room,
            stream_last=self.stream_last and certain,
            done={} if resumed is None else pausing.finished(resumed.paused),
            prepare=prepare,
            clock=self.clock,
        )
        return this.run

    def _prepared(self, this: PlanRound, index: int, request: ChatRequest, resumed: Resumed | None) -> ChatRequest:
        """A step's request with what is beyond its access list: the answer of the round before, the caller's tools, and
        what it did with those."""
        assert this.workflow is not None
        messages = self.request.messages if this.bare else request.messages
        told = self.said and not this.bare and self.settings.executor.steps == "full"
        if told and len(this.workflow.steps[index].access) == index:
            # The first step, and those that read ["all"] (Conductor §3.2).
            earlier = access.escape(quote("earlier_answer", self.said[-1].result))
            messages = with_note(messages, f"{_EARLIER}\n{earlier}", system=None)
        if self.request.tools:
            # That a tool must be called binds who answers; that none may, everybody.
            choice = self.request.tool_choice
            binds = index == len(this.workflow.steps) - 1 or (choice is not None and choice.mode == "none")
            request = request.with_(
                tools=self.request.tools,
                tool_choice=choice if binds else None,
                parallel_tool_calls=self.request.parallel_tool_calls,
            )
        history = () if resumed is None else resumed.histories.get(index, ())
        return request.with_(messages=(*messages, *history))

    def _pause(self, this: PlanRound, run: Run, resumed: Resumed | None) -> None:
        paused = pausing.pause(
            run,
            self.pause_id,
            self.path,
            bare=this.bare,
            rounds=self.said,
            nested=self.nested,
            resumed=resumed,
        )
        self.conducted.paused = paused
        self.conducted.answer = pausing.asking(run, paused)


def _resource(error: BudgetError | DeadlineError) -> Resource:
    if isinstance(error, DeadlineError):
        return "seconds"
    return cast(Resource, (error.param or "").removeprefix("budget."))


@dataclass(slots=True)
class _Nested:
    """The conductor as the worker of a step of its own workflow. Its tools are the caller's, as every step's are: where
    its workflow waits for one, so does the step."""

    parent: _Conducting
    round: PlanRound
    step: int
    resumed: Resumed | None

    @property
    def name(self) -> str:
        return SELF

    async def complete(self, request: ChatRequest) -> ChatReply:
        return await self._answer(request, self.parent.on_event, always_room, stream=False)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """The pieces of its own last step, as they come."""
        pieces: Events[Chunk] = Events()
        depth = self.parent.conducted.depth + 1

        def tell(event: ConductEvent) -> None:
            if isinstance(event, Stepped) and isinstance(event.event, StepChunk) and event.depth == depth:
                # Its calls go out at the end, under ids of ours.
                pieces.put(replace(event.event.chunk, tool_calls=(), final=None))
            else:
                self.parent.on_event(event)

        answering = asyncio.create_task(self._answer(request, tell, pieces.room, stream=True))
        answering.add_done_callback(lambda _: pieces.close())
        streamed = ""
        try:
            while (piece := await pieces.read()) is not None:
                streamed += piece.text
                yield piece
            reply = answering.result()
        finally:
            await ended([answering])
        calls = tuple(ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(reply.tool_calls))
        yield Chunk(reply.text.removeprefix(streamed), "" if streamed else reply.reasoning, calls)
        yield Chunk(final=reply)

    async def _answer(
        self, request: ChatRequest, tell: Callable[[ConductEvent], None], room: Room, *, stream: bool
    ) -> ChatReply:
        parent = self.parent
        nested = Conducted(parent.conducted.depth + 1)
        self.round.nested.append(nested)
        messages = tuple(each for each in request.messages if each != Message("system", access.SYSTEM))
        began = parent.clock()
        conducting = _Conducting(
            request.with_(messages=messages),
            parent.writer,
            parent.pool,
            parent.ranking,
            replace(parent.settings, max_rounds=1),
            parent.account,
            tell,
            room,
            stream,
            parent.may_pause,
            nested,
            parent.clock,
            parent.pause_id,
            (*parent.path, self.step),
        )
        try:
            await conducting.through(None if self.resumed is None else replace(self.resumed, base=messages))
        except AllWorkersFailedError as error:
            raise WorkerUnavailableError(f"its workflow came to nothing: {error.message}", worker=SELF) from None
        assert nested.answer is not None
        if nested.paused is not None:
            parent.nested[self.step] = nested.paused
        return replace(
            nested.answer,
            worker=SELF,
            usage=nested.usage,
            cost_usd=nested.cost_usd,
            attempts=nested.calls,
            timing=replace(nested.answer.timing, total_s=parent.clock() - began),
        )
