"""The Conductor: a language model writes a workflow, the workflow is run, and it may look at the result and plan again
(Conductor §3; Fugu report §3.2).

Pure asyncio over `actors.messages.Worker`. Whoever can answer a chat can write plans: a model of its own, or any
worker of the pool, prompted and untrained. What it writes is data: a plan that does not parse is told back and written
again, and when that comes to nothing the best single worker is asked. A step that the conductor gives to itself is a
conducted request of its own, on the same account. Training asks `conductor_messages`, parses and executes the same.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ToolCallDelta, Usage, Worker
from orchestrator import access, memory
from orchestrator.budget import Account, Budget, Clock, Resource
from orchestrator.conducted import Conducted as Conducted
from orchestrator.conducted import ConductEvent, FellBack, Kept, Planned, PlanRound, Rejected, Stepped, Writing
from orchestrator.conductor_prompt import Mistake as Mistake
from orchestrator.conductor_prompt import PromptSettings as PromptSettings
from orchestrator.conductor_prompt import PromptStyle as PromptStyle
from orchestrator.conductor_prompt import Round as Round
from orchestrator.conductor_prompt import conductor_messages as conductor_messages
from orchestrator.conductor_prompt import quote
from orchestrator.executor import ExecutorSettings, execute
from orchestrator.memory import Paused, Resumed
from orchestrator.plan_grammar import CHARACTERS_PER_TOKEN, plan_regex
from orchestrator.roles import with_note
from orchestrator.run import Run, StepChunk, StepEvent, StepResult
from orchestrator.workflow import SELF, Step, Workflow, parse_workflow, render_workflow

RETRY_TEMPERATURE = 0.7
"""A second try at least this warm: at 0 it would be the first one again."""

_BARE = "Answer the question."
_EARLIER = (
    "An earlier attempt at the whole task came to the following, which was found wanting. Use what is right in it:"
)


@dataclass(frozen=True, slots=True)
class ConductorSettings:
    """`max_rounds`: how often it may plan, its result in view (1: once). `max_depth`: how deep a step may be given to
    the conductor itself (0: not at all). `retries`: further tries at a plan that parses. `structured`: the writer
    decodes under a grammar (`structured_outputs`, as vLLM names it), so that every plan parses."""

    prompt: PromptSettings = field(default_factory=PromptSettings)
    max_rounds: int = 1
    max_depth: int = 0
    retries: int = 2
    temperature: float = 0.2
    max_tokens: int = 1024
    structured: bool = False
    executor: ExecutorSettings = field(default_factory=ExecutorSettings)


@dataclass(frozen=True, slots=True)
class Pool:
    """The workers as a conductor numbers them: `names` is the whole pool, in order; `workers` those that this request
    may use; `about` a line about a worker, for prompts that show names."""

    names: tuple[str, ...]
    workers: Mapping[str, Worker]
    about: Mapping[str, str] = field(default_factory=dict)


async def conduct(
    request: ChatRequest,
    writer: Worker,
    pool: Pool,
    ranking: Sequence[str],
    settings: ConductorSettings | None = None,
    *,
    budget: Budget | Account | None = None,
    on_event: Callable[[ConductEvent], None] = lambda _event: None,
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
    `stream_last`: pieces of the answer come as events, where it is certain that they are the answer's. `conducted` may
    be given to watch what happens.

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
        stream_last,
        may_pause,
        Conducted() if conducted is None else conducted,
        clock,
    )
    await conducting.through(resumed)
    return conducting.conducted


@dataclass(slots=True)
class _Conducting:
    """One conducted request under way. `shown`: pieces of an answer have gone out, so no other answer may follow."""

    request: ChatRequest
    writer: Worker
    pool: Pool
    ranking: Sequence[str]
    settings: ConductorSettings
    account: Account
    on_event: Callable[[ConductEvent], None]
    stream_last: bool
    may_pause: bool
    conducted: Conducted
    clock: Clock
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
                this.workflow, this.bare, this.resumed = _continued(resumed.paused), resumed.paused.bare, True
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
            if this.bare or run.answer is None or run.out_of is not None:
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
                    reply, seconds = await self._write(self._asked(this, mistakes[-1:], attempt))
                    workflow = self._read(reply)
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

    def _asked(self, this: PlanRound, mistakes: Sequence[Mistake], attempt: int) -> ChatRequest:
        """What the writer is asked. A compact conductor never saw a mistake in its training: it only tries again."""
        settings = self.settings
        prompt = replace(settings.prompt, allow_self=self._may_recurse)
        told = mistakes if prompt.style == "paper" else ()
        number = this.number * (settings.retries + 1) + attempt
        seed = self.request.seed
        messages = conductor_messages(
            self.request.messages,
            self.pool.names,
            prompt,
            allowed=self.pool.workers.keys(),
            about=self.pool.about,
            tools=[tool.name for tool in self.request.tools],
            said=[*self.said, *told],
        )
        extra = {}
        if settings.structured:
            grammar = plan_regex(
                self.pool.names,
                allowed=self.pool.workers.keys(),
                max_steps=prompt.max_steps,
                allow_self=prompt.allow_self,
                allow_empty=bool(self.said),
                thought=prompt.style == "paper",
                characters=CHARACTERS_PER_TOKEN * settings.max_tokens,
            )
            extra = {"structured_outputs": {"regex": grammar}}
        return ChatRequest(
            messages,
            max_tokens=settings.max_tokens,
            temperature=max(settings.temperature, RETRY_TEMPERATURE) if attempt else settings.temperature,
            seed=seed if seed is None or not number else random.Random(f"{seed}/plan/{number}").getrandbits(31),
            sample_index=self.request.sample_index + attempt,
            extra=extra,
        )

    async def _write(self, asked: ChatRequest) -> tuple[ChatReply, float]:
        """What the writer wrote, and the seconds that it took.

        Raises:
            FuguError: it could not answer, or the budget leaves too little.
        """
        grant = self.account.admit(self.writer.name, asked, shares=2)  # a plan is worth nothing without a step
        began = self.clock()
        reply: ChatReply | None = None
        failure: BaseException | None = None
        try:
            async with asyncio.timeout(self.account.seconds_left):
                reply = await self.writer.complete(grant.request)
        except TimeoutError as error:
            failure = error
            raise DeadlineError("the request's time was over before a workflow was written") from None
        except BaseException as error:
            failure = error
            raise
        finally:
            self.account.settle(grant, reply, failure)
        return reply, self.clock() - began

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
        workers: dict[str, Worker] = dict(self.pool.workers)
        if self._may_recurse:
            workers[SELF] = _Nested(self, this)
        certain = this.bare or this.number + 1 >= self.settings.max_rounds

        def tell(event: StepEvent) -> None:
            if isinstance(event, StepChunk) and (event.chunk.text or event.chunk.reasoning):
                self.shown = True
            self.on_event(Stepped(self.conducted.depth, this.number, event))

        def prepare(index: int, request: ChatRequest) -> ChatRequest:
            return self._prepared(this, index, request, resumed)

        this.run = await execute(
            self.request,
            workflow,
            workers,
            ranking=self.ranking,
            settings=self.settings.executor,
            budget=self.account,
            on_event=tell,
            stream_last=self.stream_last and certain,
            done={} if resumed is None else _finished(resumed.paused),
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
        if self.request.tools and this.workflow.steps[index].worker != SELF:
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
        assert this.workflow is not None
        id = memory.new_pause_id()
        before = {} if resumed is None else {each.step: each.said for each in resumed.paused.waiting}
        waiting, outputs = [], {}
        for result in run.steps:
            if result.reply is not None and result.reply.tool_calls:
                waiting.append(memory.waiting_for(id, result.index, result.reply, before.get(result.index, ())))
            elif result.reply is not None:
                outputs[result.index] = memory.Output(result.worker or result.step.worker, result.reply.text)
            elif result.skipped == "failed":
                outputs[result.index] = memory.Output(result.step.worker, None)
        earlier = () if resumed is None else (*resumed.paused.earlier, resumed.paused.id)
        paused = Paused(id, this.workflow, tuple(waiting), outputs, this.bare, tuple(self.said), earlier)
        self.conducted.paused = paused
        asking = [step.reply for step in run.steps if step.reply is not None and step.reply.tool_calls]
        last = run.steps[-1].reply
        self.conducted.answer = ChatReply(
            worker=" and ".join(dict.fromkeys(reply.worker for reply in asking)),
            # What an inner agent says beside its calls is not for the caller.
            text="" if last is None else last.text,
            tool_calls=paused.open_calls,
            finish_reason="tool_calls",
            usage=sum((reply.usage for reply in asking), Usage()),
        )


def _resource(error: BudgetError | DeadlineError) -> Resource:
    if isinstance(error, DeadlineError):
        return "seconds"
    return cast(Resource, (error.param or "").removeprefix("budget."))


def _continued(paused: Paused) -> Workflow:
    """The paused workflow, its waiting steps in the hands of those who asked for the tools."""
    asked = {waiting.step: waiting.worker for waiting in paused.waiting}
    steps = [replace(step, worker=asked.get(i, step.worker)) for i, step in enumerate(paused.workflow.steps)]
    return Workflow(tuple(steps))


def _finished(paused: Paused) -> dict[int, StepResult]:
    """What was done before the pause, at no cost to this request."""
    results = {}
    for index, output in paused.outputs.items():
        step = paused.workflow.steps[index]
        if output.text is None:
            results[index] = StepResult(index, step, skipped="failed")
        else:
            reply = ChatReply(output.worker, output.text, attempts=0, cost_usd=0.0, cached=True)
            results[index] = StepResult(index, step, output.worker, reply)
    return results


@dataclass(slots=True)
class _Nested:
    """The conductor as a worker of its own workflow."""

    parent: _Conducting
    round: PlanRound

    @property
    def name(self) -> str:
        return SELF

    async def complete(self, request: ChatRequest) -> ChatReply:
        parent = self.parent
        nested = Conducted(parent.conducted.depth + 1)
        self.round.nested.append(nested)
        messages = tuple(each for each in request.messages if each != Message("system", access.SYSTEM))
        began = parent.clock()
        try:
            await conduct(
                request.with_(messages=messages),
                parent.writer,
                parent.pool,
                parent.ranking,
                replace(parent.settings, max_rounds=1),
                budget=parent.account,
                on_event=parent.on_event,
                conducted=nested,
                clock=parent.clock,
            )
        except AllWorkersFailedError as error:
            raise WorkerUnavailableError(f"its workflow came to nothing: {error.message}", worker=SELF) from None
        assert nested.answer is not None
        return replace(
            nested.answer,
            worker=SELF,
            usage=nested.usage,
            cost_usd=nested.cost_usd,
            attempts=nested.calls,
            timing=replace(nested.answer.timing, total_s=parent.clock() - began),
        )

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        reply = await self.complete(request)
        calls = tuple(ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(reply.tool_calls))
        yield Chunk(reply.text, reply.reasoning, calls)
        yield Chunk(final=reply)
