"""What lies between the dialects and the engines: one request, and its answer as one stream of events.

    bytes → dialect → Job → engine (fugu | fugu-trinity | fugu-ultra) → Chunk, Chunk, …, Done → dialect → bytes

A dialect (chat completions, Responses, Messages) knows nothing of workers, an engine nothing of HTTP. A failure is a
`FuguError` raised by the engine's generator at whatever point it comes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors import spans
from actors.config import FuguConfig, RouterConfig
from actors.errors import ContextLengthError
from actors.estimate import estimate_tokens
from actors.messages import ChatReply, ChatRequest, Chunk, Usage, Worker
from orchestrator.dispatch import Resting, rank
from serve.auth import ANYONE, Caller
from serve.conductor import Knobs
from serve.counted import Counted
from serve.last_answers import Before, LastAnswers
from serve.prices import Prices
from serve.router import Choose, Decider, Question
from serve.trace import Choice, Trace
from serve.tracing import tell_choice

# English has 4 to 5; long runs of one sign have more.
_MOST_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller wants of the pool: from the body's `fugu` field and the `x-fugu-*` headers, together."""

    allowed: tuple[str, ...]
    seed: int | None
    choose: Choose
    trace: bool
    show_turns: bool | None
    knobs: Knobs = field(default_factory=Knobs)


@dataclass(frozen=True, slots=True)
class Job:
    """One request on its way. `model` is the served model; `stream`: pieces are wanted as they come, else one `Done`
    is enough. The engine fills `trace` as it goes. What is kept for it belongs to `caller`."""

    model: str
    request: ChatRequest
    wishes: Wishes
    trace: Trace
    stream: bool
    caller: Caller = ANYONE


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a complete answer. `reply` is the answer as the caller sees it; `visible` and `total` are its tokens:
    what the caller sees of them, and those of all calls, also of those that failed (they differ by the orchestration
    tokens). `cost_usd` is of all calls, None where a price is unknown; `told` the trace, where it was asked for."""

    reply: ChatReply
    visible: Usage
    total: Usage
    cost_usd: float | None
    told: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, reply: ChatReply, visible: Usage, trace: Trace, told: Mapping[str, Any] | None) -> Done:
        """With the total and the cost of the trace's calls: what the caller is told is what its key is charged."""
        taken = trace.taken
        return cls(reply, trace.visible(visible), taken.usage, taken.usd, told)


Event = Chunk | Done


class Engine(Protocol):
    """Answers jobs of one served model. The generator yields chunks without `final`, and `Done` as its last event;
    closing it, or cancelling the task that reads it, ends the calls in flight and frees their budget.

    Raises (the generator): FuguError.
    """

    def run(self, job: Job) -> AsyncGenerator[Event, None]: ...


class Deciding:
    """What engines share: the workers in use, in the order of the configuration, and the router that ranks them.
    `pinned` gives the same with another checkpoint."""

    def __init__(self, config: FuguConfig, workers: Sequence[Worker], decider: Decider) -> None:
        self.config = config
        self.workers: Mapping[str, Worker] = {worker.name: worker for worker in workers}
        self.prices = Prices(config)
        self.resting = Resting(time.monotonic)
        self.answers = LastAnswers(config)
        self._decider = decider
        self._pin: str | None = None
        self._contexts = {spec.name: spec.context for spec in config.active if spec.context is not None}

    @property
    def router(self) -> RouterConfig:
        return self.config.router

    async def choose(
        self,
        request: ChatRequest,
        wishes: Wishes,
        *,
        seed: int | None,
        roles: bool = False,
        before: Before | None = None,
    ) -> tuple[Choice, tuple[str, ...]]:
        """The router's choice, or who gave the answer `before`, and the names of the workers to try in order.

        Raises:
            ContextLengthError: the conversation is longer than the context of every worker that is allowed.
        """
        allowed, likely = self._long_enough(request, wishes.allowed)
        awake = self.resting.awake(likely)
        with spans.span("decision") as span:
            choice = await self._decider.choose(self._question(request, awake, seed, wishes, roles))
            if before is not None:
                choice = before.over(choice)
            tell_choice(span, choice)
        # Those that rest, or are likely too small, come last: everyone else has failed by then.
        return choice, rank(choice.worker, choice.probabilities, allowed, self.router.fallbacks)

    def counted(self, worker: Worker, trace: Trace, role: str | None = None) -> Worker:
        """The worker, whose calls are noted in the trace, in this role if they all have one."""
        return Counted(worker, trace, self.prices, role=role)

    def pinned(self, pin: str) -> Deciding:
        """Where the checkpoint of this pin decides."""
        other = copy(self)
        other._pin = pin
        return other

    def _question(
        self, request: ChatRequest, awake: Sequence[str], seed: int | None, wishes: Wishes, roles: bool
    ) -> Question:
        names = frozenset(awake)
        return Question(request.messages, names, seed, wishes.choose, roles, self._pin, spans.headers())

    def staying(self, worker: str) -> Choice:
        """The choice inside a tool loop: who asked for the tool."""
        choice = Choice(worker, {worker: 1.0}, "tool_loop")
        with spans.span("decision") as span:
            tell_choice(span, choice)
        return choice

    def _long_enough(self, request: ChatRequest, allowed: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The workers whose context may hold the request, and those of them that likely do, of whom one is chosen.

        By a lower bound of the conversation's length nobody who could answer is left out; by the estimate, which leans
        upward, and the answer that is asked for, the choice falls on nobody who would only say that it is too long.
        Where all are likely too small they are all asked: a worker that finds it too long says so, and the next comes.
        """
        if not self._contexts:
            return allowed, allowed
        least = sum(len(message.text) for message in request.messages) // _MOST_CHARACTERS_PER_TOKEN
        left = tuple(name for name in allowed if least < self._contexts.get(name, least + 1))
        if not left:
            longest = max(self._contexts[name] for name in allowed)
            raise ContextLengthError(
                f"messages: at least {least} tokens, which is more than the context of every worker allowed "
                f"(the longest holds {longest})",
                param="messages",
            )
        wanted = estimate_tokens(request).input + (request.max_tokens or 0)
        return left, tuple(name for name in left if wanted <= self._contexts.get(name, wanted)) or left
