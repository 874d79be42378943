"""`fugu-ultra`: a workflow that the Conductor writes, behind one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from actors.errors import FuguError, NoWorkerAllowedError, RequestError
from actors.messages import ChatReply, ChatRequest, Chunk, ToolCallDelta, Worker
from orchestrator import memory
from orchestrator.assign import Assign, Conversation
from orchestrator.budget import Account
from orchestrator.conducted import Conducted, ConductEvent, Stepped
from orchestrator.conductor import Pool, conduct
from orchestrator.dispatch import Attempt, rank
from orchestrator.events import Events
from orchestrator.memory import Resumed
from orchestrator.run import Run, StepChunk
from serve.api import ultra_view
from serve.api.job import Deciding, Done, Event, Job
from serve.conductor import Conducting
from serve.sticky import Marks
from serve.store import Kept, Store
from serve.trace import Choice

ULTRA = "fugu-ultra"
WORKFLOW = "workflow"
"""The kind of value that a paused workflow is kept as."""


class UltraEngine:
    """See `serve.api.job.Engine`. Workflows that wait for the caller's tools are kept in `store`."""

    def __init__(self, deciding: Deciding, conducting: Conducting, store: Store) -> None:
        self._deciding = deciding
        self._conducting = conducting
        self._store = store
        self._marks = Marks(deciding.workers)

    async def run(self, job: Job) -> AsyncGenerator[Event, None]:
        request, _ = self._marks.restore(job.request)
        workers = self._workers(job)
        found = await self._decided(request, job)
        job.trace.choice, ranking = found
        assign = self._assign(job, request.messages, found) if self._conducting.config.assign == "router" else None
        resumed = await self._resumed(request, job.caller.id)
        answering = _Answering(
            job,
            request.with_(asides=()),
            replace(self._conducting, writer=self._deciding.counted(self._conducting.writer, job.trace, "plan")),
            Pool(self._conducting.names, workers, self._conducting.about, assign),
            ranking,
            resumed,
        )
        show = job.wishes.show_turns is not False
        told: list[str] = []
        streamed: list[Chunk] = []
        async for event in answering.events():
            piece = _piece(event)
            if piece is not None:
                streamed.append(piece)
                if job.stream:
                    yield piece
            elif show and (line := ultra_view.shown(event)):
                told.append(line)
                # Not after the answer has begun: clients take what comes last for the answer.
                if job.stream and not streamed:
                    yield Chunk(reasoning=line)
        reply = await self._kept(answering)
        if job.stream:
            yield _rest(reply, streamed)
        elif told:
            reply = replace(reply, reasoning="".join(told) + reply.reasoning)
        yield answering.done(reply)

    def _workers(self, job: Job) -> dict[str, Worker]:
        names, known = self._conducting.names, self._deciding.workers
        allowed = [name for name in names if name in job.wishes.allowed]
        workers = {name: self._deciding.counted(known[name], job.trace, "step") for name in allowed}
        if not workers:
            raise NoWorkerAllowedError(
                f"fugu: the constraints leave no worker that the conductor knows; those are {', '.join(names)}",
                param="fugu",
            )
        return workers

    def _assign(self, job: Job, whole: Conversation, found: tuple[Choice, tuple[str, ...]]) -> Assign:
        """The router's best worker for each conversation, all asked at the same time; what it `found` for the whole
        one is known. Where it cannot be reached, the order of the file would decide, which knows less than the
        plan."""

        async def best(conversation: Conversation, allowed: frozenset[str]) -> str | None:
            asked = job.request.with_(messages=conversation)
            choice, ranked = found if conversation == whole else await self._decided(asked, job)
            names = () if choice.source == "order" else ranked
            return next((name for name in names if name in allowed), None)

        async def assign(conversations: Sequence[Conversation], allowed: frozenset[str]) -> Sequence[str | None]:
            return await asyncio.gather(*(best(each, allowed) for each in conversations))

        return assign

    async def _decided(self, request: ChatRequest, job: Job) -> tuple[Choice, tuple[str, ...]]:
        """The router's choice, and all that are allowed as it ranks them."""
        wishes = job.wishes
        choice, _ = await self._deciding.choose(request, wishes, seed=wishes.seed)
        job.trace.decisions.append(choice)
        return choice, rank(choice.worker, choice.probabilities, wishes.allowed, len(wishes.allowed))

    async def _resumed(self, request: ChatRequest, owner: str) -> Resumed | None:
        """The workflow whose tools the conversation ends with the results of.

        Raises:
            WorkflowGoneError: it is not known, or no longer.
            RequestError: one of its calls has no result.
        """
        messages, asides = request.messages, request.asides
        id = memory.awaited(messages, asides)
        if id is None:
            return None
        text = await self._store.get(WORKFLOW, id, owner)
        try:
            if text is None:
                raise memory.gone(id)
            return memory.resume(memory.from_text(id, text.decode()), messages, asides)
        except RequestError:
            # Somebody said more than the results: that is planned anew where it cannot go on.
            if len(messages) - 1 in asides:
                return None
            raise

    async def _kept(self, answering: _Answering) -> ChatReply:
        """The answer; where it asks the caller for tools, the workflow is kept before anybody hears of them."""
        conducted = answering.conducted
        assert conducted.answer is not None
        if conducted.paused is not None:
            kept = Kept(WORKFLOW, conducted.paused.id, memory.to_text(conducted.paused).encode())
            owner = answering.job.caller.id
            await self._store.put((kept,), owner, seconds=self._conducting.config.memory_ttl)
        return conducted.answer


@dataclass(slots=True)
class _Answering:
    """One request from its ranking to its answer."""

    job: Job
    request: ChatRequest
    conducting: Conducting
    pool: Pool
    ranking: tuple[str, ...]
    resumed: Resumed | None
    conducted: Conducted = field(default_factory=Conducted)
    first_piece: float | None = None
    """When the answer's first piece came, on the trace's clock."""

    async def events(self) -> AsyncGenerator[ConductEvent, None]:
        """What happens, as it does. Closing it ends the calls in flight.

        Raises:
            FuguError: there is no answer.
        """
        told: Events[ConductEvent] = Events()
        task = asyncio.create_task(self._conduct(told))
        task.add_done_callback(lambda _: told.close())
        try:
            while (event := await told.read()) is not None:
                if self.first_piece is None and _piece(event) is not None:
                    self.first_piece = time.perf_counter()
                yield event
            task.result()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, FuguError):
                await task
            self._note()

    async def _conduct(self, told: Events[ConductEvent]) -> None:
        knobs = self.job.wishes.knobs
        seed = self.request.seed if self.request.seed is not None else self.job.wishes.seed
        await conduct(
            self.request.with_(seed=seed),
            self.conducting.writer,
            self.pool,
            self.ranking,
            self.conducting.settings(knobs),
            budget=Account(self.conducting.budget(knobs), price=self.conducting.price),
            on_event=told.put,
            room=told.room,
            stream_last=self.job.stream,
            may_pause=True,
            resumed=self.resumed,
            conducted=self.conducted,
        )

    def done(self, reply: ChatReply) -> Done:
        conducted = self.conducted
        told = self._told(reply) if self.job.wishes.trace else None
        return Done.of(reply, conducted.visible, self.job.trace, told)

    def _told(self, reply: ChatReply) -> dict[str, Any]:
        trace = self.job.trace
        trace.record.worker = reply.worker
        now = time.perf_counter()
        body = trace.body(reply, now, self.conducted.visible)
        # Nothing of an answer is said before the plan; one that is not streamed comes at the end.
        body["timings"]["first_byte_s"] = round((self.first_piece or now) - trace.started, 6)
        if self.conducting.budget(self.job.wishes.knobs).usd is not None:
            unpriced = self.conducting.unpriced(self.pool.workers)
            body["warnings"] += [f"budget_usd: the price of {name} is not known" for name in unpriced]
        return body | {
            "role": None,
            "conductor": self.conducting.writer.name,
            "upstream_calls": self.conducted.calls,
        }

    def _note(self) -> None:
        """Put into the trace what happened, whether it came to an answer or not."""
        self.job.trace.workflow = ultra_view.told(self.conducted)
        if self.conducted.answer is not None and self.conducted.paused is None:
            self.job.trace.record.worker = self.conducted.answer.worker
        for each in self.conducted.rounds:
            if each.run is not None:
                self.job.trace.record.attempts += _attempts(each.run)


def _attempts(run: Run) -> list[Attempt]:
    attempts = []
    for step in run.steps:
        started = step.started_s or 0.0
        attempts += [Attempt(name, started, 0.0, error=error) for name, error in step.failures]
        if step.reply is not None and step.started_s is not None and step.worker is not None:
            attempts.append(Attempt(step.worker, started, step.seconds, step.reply.timing.first_byte_s))
    return attempts


def _piece(event: ConductEvent) -> Chunk | None:
    """The piece of the answer that an event brings; calls of tools come at the end, under ids of ours."""
    if isinstance(event, Stepped) and isinstance(event.event, StepChunk) and event.depth == 0:
        return replace(event.event.chunk, tool_calls=(), final=None)
    return None


def _rest(reply: ChatReply, streamed: Sequence[Chunk]) -> Chunk:
    """What of the answer has not been streamed."""
    text, refusal = "".join(each.text for each in streamed), "".join(each.refusal for each in streamed)
    calls = tuple(ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(reply.tool_calls))
    left = Chunk(reply.text.removeprefix(text), tool_calls=calls, refusal=reply.refusal.removeprefix(refusal))
    return left if text or refusal else replace(left, reasoning=reply.reasoning, thoughts=reply.thoughts)
