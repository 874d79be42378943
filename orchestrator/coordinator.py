"""A `fugu-trinity` session: up to K turns in which the router picks a worker and a role (TRINITY §3.2).

Pure asyncio over `actors.messages.Worker`. The decision comes from outside as a coroutine, so that serving asks the
batched router and training asks a candidate's head; both play exactly this loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from actors import spans
from actors.errors import AllWorkersFailedError, ContextLengthError, FuguError, WorkerError
from actors.messages import ChatReply, ChatRequest, Message, Usage, Worker
from orchestrator import roles
from orchestrator.roles import Role

MAX_TURNS = 5  # TRINITY §3.2: K = 5


class TurnDecision(Protocol):
    """The part of `orchestrator.router.Decision` that a turn needs."""

    @property
    def ranking(self) -> tuple[str, ...]: ...

    @property
    def role(self) -> str | None: ...


Decide = Callable[[tuple[Message, ...]], Awaitable[TurnDecision]]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: who acted as what and said what. `overridden` says that the Thinker before chose the role. `failed`
    names workers that were tried first and could not answer, with the error's code."""

    worker: str
    role: Role
    reply: ChatReply
    overridden: bool = False
    failed: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Session:
    """What happened, filled while the session runs. `response` is the latest Worker's reply, the session's answer;
    None if no Worker acted. `accepted` is the Verifier's last word. `broken` is the failure of a later turn, which
    ended the session with the response it had."""

    turns: list[Turn] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    response: ChatReply | None = None
    accepted: bool = False
    broken: AllWorkersFailedError | None = None

    @property
    def usage(self) -> Usage:
        """Tokens of all turns."""
        return sum((turn.reply.usage for turn in self.turns), Usage())

    @property
    def cost_usd(self) -> float | None:
        """Cost of all turns; None where one turn's price is unknown."""
        costs = [turn.reply.cost_usd for turn in self.turns]
        return None if None in costs else sum(cost for cost in costs if cost is not None)


async def play(
    request: ChatRequest,
    decide: Decide,
    workers: Mapping[str, Worker],
    *,
    max_turns: int = MAX_TURNS,
    fallbacks: int = 2,
    guard: bool = True,
    session: Session | None = None,
    on_turn: Callable[[Turn], None] = lambda _turn: None,
) -> Session:
    """Play one session until the Verifier accepts or `max_turns` are over.

    `guard` sees to it that there is an answer: it turns a Verifier that has nothing to verify, and whoever would have
    the last turn without a response, into a Worker. Without it such a Verifier ends the session with no response, as in
    the paper's training. Advisers get the request's sampling settings but neither its tools nor its response format,
    which belong to the answer. `session` may be given to watch what happens, `on_turn` to hear of each turn.

    Raises:
        AllWorkersFailedError: in some turn no worker could answer and there is no response yet. A later turn that
            fails ends the session with the response it has.
    """
    session = Session() if session is None else session
    suggestion: str | None = None
    suggested: Role | None = None
    query = request.messages
    for turns_left in range(max_turns, 0, -1):
        try:
            with spans.span(f"turn {max_turns - turns_left + 1}") as span:
                decision = await decide(roles.transcript(query, session.thoughts))
                role: Role = suggested or _role(decision)
                overridden, suggested = suggested is not None, None
                if session.response is None:
                    if role == "verifier" and not guard:
                        return session
                    if role == "verifier" or (guard and turns_left == 1):
                        role = "worker"
                if span is not None:
                    span.set({"fugu.turn.role": role, "fugu.turn.overridden": overridden})
                messages = _messages(role, query, session, suggestion)
                part = request.with_(messages=messages) if role == "worker" else _advisory(request, messages)
                turn = await _ask(part, role, decision.ranking[: fallbacks + 1], workers, overridden)
                if span is not None:
                    span.set({"fugu.worker": turn.worker})
        except AllWorkersFailedError as error:
            if session.response is None:
                raise
            session.broken = error
            return session
        session.turns.append(turn)
        on_turn(turn)
        text = turn.reply.text
        if role == "thinker":
            advice = roles.read_advice(text)
            if advice is not None:
                suggestion, suggested = advice.suggestion, advice.next_role
            continue
        suggestion = None
        if role == "worker":
            session.response = turn.reply
            if turn.reply.tool_calls:
                return session  # the caller has to run the tool before anybody can judge the answer
            session.thoughts.append(roles.read_idea(text))
            continue
        session.accepted = roles.read_verdict(text)
        if session.accepted:
            return session
    return session


def _role(decision: TurnDecision) -> Role:
    if decision.role == "thinker":
        return "thinker"
    return "verifier" if decision.role == "verifier" else "worker"


def _messages(role: Role, query: Sequence[Message], session: Session, suggestion: str | None) -> tuple[Message, ...]:
    response = session.response.text if session.response is not None else None
    if role == "thinker":
        return roles.thinker_messages(query, session.thoughts, response)
    if role == "verifier" and response is not None:
        return roles.verifier_messages(query, response)
    return roles.worker_messages(query, session.thoughts, suggestion)


def _advisory(request: ChatRequest, messages: tuple[Message, ...]) -> ChatRequest:
    return request.with_(messages=messages, tools=(), tool_choice=None, response_format=None, stop=())


async def _ask(
    request: ChatRequest, role: Role, ranking: Sequence[str], workers: Mapping[str, Worker], overridden: bool
) -> Turn:
    failures: dict[str, FuguError] = {}
    for name in ranking:
        try:
            reply = await workers[name].complete(request)
        except (WorkerError, ContextLengthError) as error:
            failures[name] = error
            continue
        failed = tuple((worker, error.code) for worker, error in failures.items())
        return Turn(name, role, reply, overridden, failed)
    raise AllWorkersFailedError(failures)
