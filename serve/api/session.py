"""`fugu-trinity`: a session of Thinker, Worker and Verifier behind one answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from actors.config import RouterConfig
from actors.errors import FuguError
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ToolCallDelta, Usage, Worker
from orchestrator.coordinator import Session, Turn, play
from orchestrator.dispatch import Attempt, rank
from orchestrator.roles import answer_text
from serve.api.job import Deciding, Done, Event, Job
from serve.sticky import Marks, marked_chunk, marked_reply
from serve.trace import Call, Choice, Trace
from serve.translate import usage_body

TRINITY = "fugu-trinity"

# Asks the router about a transcript: (transcript, seed) → its choice and the workers to try, in order.
Ask = Callable[[tuple[Message, ...], int | None], Awaitable[tuple[Choice, tuple[str, ...]]]]


class TrinityEngine:
    """See `serve.api.job.Engine`."""

    def __init__(self, deciding: Deciding) -> None:
        self._deciding = deciding
        self._marks = Marks(deciding.workers)

    async def run(self, job: Job) -> AsyncGenerator[Event, None]:
        deciding, wishes = self._deciding, job.wishes
        request, asker = self._marks.restore(job.request)
        before = await deciding.answers.before(request, job.caller.id)

        async def ask(transcript: tuple[Message, ...], seed: int | None) -> tuple[Choice, tuple[str, ...]]:
            if asker in wishes.allowed and not playing.choices:
                # The result of a tool goes to who asked for it; from the next turn on the router decides again.
                choice = replace(deciding.staying(asker), role="worker")
                return choice, rank(asker, {}, wishes.allowed, deciding.router.fallbacks)
            # A second Worker is there for what the first could not do.
            last = before if playing.session.response is None else None
            asked = request.with_(messages=transcript)
            return await deciding.choose(asked, wishes, seed=seed, roles=True, before=last)

        workers = {name: deciding.counted(worker, job.trace) for name, worker in deciding.workers.items()}
        playing = Playing(request, ask, workers, deciding.router, wishes.seed, job.trace)
        if not job.stream:
            reply = await playing.run()
            if wishes.show_turns:
                reply = replace(reply, reasoning=playing.turns_text() + reply.reasoning)
            yield await self._done(playing, reply, job)
            return
        async with aclosing(playing.stream(show_turns=bool(wishes.show_turns))) as chunks:
            async for chunk in chunks:
                worker = chunk.final.worker if chunk.final is not None else ""
                yield marked_chunk(replace(chunk, final=None), worker)
                if chunk.final is not None:
                    yield await self._done(playing, chunk.final, job)

    async def _done(self, playing: Playing, reply: ChatReply, job: Job) -> Done:
        await self._deciding.answers.remember(playing.request, reply, reply.worker, job.caller.id)
        told = playing.told(reply) if job.wishes.trace else None
        reply = marked_reply(reply, reply.worker)
        return Done.of(reply, playing.visible(), job.trace, told)


@dataclass(frozen=True, slots=True)
class Decided:
    """A turn's decision as the coordinator takes it."""

    ranking: tuple[str, ...]
    role: str | None


@dataclass(slots=True)
class Playing:
    """One session from its request to its answer. `choices` has one entry per turn, as the router decided it."""

    request: ChatRequest
    ask: Ask
    workers: Mapping[str, Worker]
    config: RouterConfig
    seed: int | None
    trace: Trace
    session: Session = field(default_factory=Session)
    choices: list[Choice] = field(default_factory=list)

    async def run(self, on_turn: Callable[[Turn], None] = lambda _turn: None) -> ChatReply:
        """Play, and return the answer as the caller sees it. Cancelling it ends the call in flight.

        Raises:
            FuguError: no worker could answer, or (without the guard) no Worker acted.
        """
        began = time.perf_counter()
        watched = {name: _Watched(worker, self.trace, began) for name, worker in self.workers.items()}
        try:
            await play(
                self.request,
                self._decide,
                watched,
                max_turns=self.config.max_turns,
                fallbacks=self.config.fallbacks,
                guard=self.config.guard,
                session=self.session,
                on_turn=on_turn,
            )
        finally:
            self._note()
        response = self.session.response
        if response is None:
            raise FuguError("the session ended without an answer; router.guard: true sees to it that there is one")
        return replace(response, text=answer_text(response.text))

    async def stream(self, *, show_turns: bool) -> AsyncGenerator[Chunk, None]:
        """The answer, which comes whole at the end; before it, if asked for, a piece of reasoning for each turn. The
        last chunk carries `final`."""
        turns: asyncio.Queue[Turn | None] = asyncio.Queue()
        playing = asyncio.create_task(self.run(turns.put_nowait))
        playing.add_done_callback(lambda _: turns.put_nowait(None))
        try:
            while (turn := await turns.get()) is not None:
                if show_turns:
                    yield Chunk(reasoning=_shown(turn))
            reply = playing.result()
        finally:
            playing.cancel()
            with suppress(asyncio.CancelledError, FuguError):
                await playing
        calls = (
            ToolCallDelta(index, call.id, call.name, call.arguments) for index, call in enumerate(reply.tool_calls)
        )
        yield Chunk(reply.text, reply.reasoning, tuple(calls), reply, reply.thoughts, refusal=reply.refusal)

    def visible(self) -> Usage:
        """What the first call read and what the answering call wrote; the rest is orchestration (Fugu's usage
        object)."""
        turns = self.session.turns
        first = turns[0].reply.usage if turns else Usage()
        last = self.session.response.usage if self.session.response else Usage()
        return replace(first, output_tokens=last.output_tokens, reasoning_tokens=last.reasoning_tokens)

    def turns_text(self) -> str:
        """What `stream` shows of the turns, at once."""
        return "".join(map(_shown, self.session.turns))

    def told(self, reply: ChatReply) -> dict[str, Any]:
        """The trace of a session that came to its end."""
        turns = self.session.turns
        body = self.trace.body(reply, time.perf_counter(), self.visible())
        # Nothing of an answer is said before its last check.
        body["timings"] |= {
            "decision_s": round(sum(choice.seconds for choice in self.choices), 6),
            "queued_s": round(sum(turn.reply.timing.queued_s for turn in turns), 6),
            "first_byte_s": body["timings"]["total_s"],
        }
        if self.session.broken is not None:
            body["warnings"].append(f"turn {len(turns) + 1}: {self.session.broken.message}; the answer so far stands")
        return body | {
            "role": "worker",
            "accepted": self.session.accepted,
            "upstream_calls": sum(turn.reply.attempts for turn in turns),
            "cached": all(turn.reply.cached for turn in turns),
        }

    async def _decide(self, transcript: tuple[Message, ...]) -> Decided:
        number = len(self.choices)
        # A turn of its own draw, and all of them the same when the request comes again.
        seed = self.seed if self.seed is None or not number else random.Random(f"{self.seed}/{number}").getrandbits(62)
        choice, ranking = await self.ask(transcript, seed)
        self.choices.append(choice)
        self.trace.decisions.append(choice)
        return Decided(ranking, choice.role or self._role())

    def _role(self) -> str:
        """Where the router did not answer and so named no role: an answer, then its check."""
        last = self.session.turns[-1].role if self.session.turns else None
        return "verifier" if last == "worker" else "worker"

    def _note(self) -> None:
        """Put into the trace what happened: the turns, who gave the answer, and how that turn was decided."""
        turns = list(zip(self.session.turns, self.choices, strict=False))  # a turn that failed was decided, too
        self.trace.turns = [_turn(turn, choice) for turn, choice in turns]
        self.trace.calls += [Call(turn.worker, turn.role, choice.domain) for turn, choice in turns]
        acted = [index for index, turn in enumerate(self.session.turns) if turn.reply is self.session.response]
        if acted:
            self.trace.record.worker = self.session.turns[acted[-1]].worker
            self.trace.choice = self.choices[acted[-1]]
        elif self.choices:
            self.trace.choice = self.choices[-1]


class _Watched:
    """A worker whose calls are noted."""

    def __init__(self, worker: Worker, trace: Trace, began: float) -> None:
        self.name = worker.name
        self._worker = worker
        self._trace = trace
        self._began = began

    async def complete(self, request: ChatRequest) -> ChatReply:
        started = time.perf_counter()
        try:
            reply = await self._worker.complete(request)
        except FuguError as error:
            self._note(started, None, error)
            raise
        self._note(started, reply.timing.queued_s + reply.timing.first_byte_s, None)
        return reply

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        return self._worker.stream(request)

    def _note(self, started: float, first_byte: float | None, error: FuguError | None) -> None:
        seconds = time.perf_counter() - started
        self._trace.record.attempts.append(Attempt(self.name, started - self._began, seconds, first_byte, error))


def _shown(turn: Turn) -> str:
    """A turn for the reader: advice and verdicts in full; an answer only by who gave it, since the last follows."""
    said = "" if turn.role == "worker" else f"\n{turn.reply.text.strip()}"
    return f"[{turn.role}: {turn.worker}]{said}\n\n"


def _turn(turn: Turn, choice: Choice) -> dict[str, Any]:
    return {
        "worker": turn.worker,
        "role": turn.role,
        "overridden": turn.overridden,
        "failed": [{"worker": name, "code": code} for name, code in turn.failed],
        "source": choice.source,
        "probabilities": dict(choice.probabilities),
        "decision_s": round(choice.seconds, 6),
        "seconds": round(turn.reply.timing.total_s, 6),
        "usage": usage_body(turn.reply.usage),
        "cost_usd": turn.reply.cost_usd,
        "cached": turn.reply.cached,
        "warnings": list(choice.warnings),
    }
