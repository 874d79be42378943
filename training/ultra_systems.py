"""Ways of answering that `fugu-ultra` is measured against, and itself: each may call the pool as it likes.

Those without a conductor ask the pool's best worker more than once, or several workers and one of them to conclude:
self-consistency (Wang et al. 2022), a fixed panel with a judge, mixture of agents (Wang et al. 2024). Each is given the
number of calls that it may make.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.messages import ChatReply, ChatRequest, Message, Worker
from orchestrator.assign import Assign, Conversation
from orchestrator.conductor import Conducted, ConductorSettings, Pool, conduct
from orchestrator.conductor_prompt import quote
from training.deciding import Decider
from training.grading import final_answer, normalise
from training.systems import System


@dataclass(frozen=True)
class Told:
    """An answer, and where a conductor planned it, what became of that."""

    reply: ChatReply
    conducted: Conducted | None = None


Ask = Callable[[ChatRequest, Mapping[str, Worker]], Awaitable[Told]]


@dataclass(frozen=True)
class Contestant:
    """A way of answering under a name. `calls` is how many it makes at most, None where it decides."""

    name: str
    ask: Ask
    calls: int | None = None


def alone(worker: str) -> Contestant:
    """One worker, once."""

    async def ask(request: ChatRequest, workers: Mapping[str, Worker]) -> Told:
        return Told(await workers[worker].complete(request))

    return Contestant(worker, ask, 1)


def as_system(system: System) -> Contestant:
    """A router's system."""

    async def ask(request: ChatRequest, workers: Mapping[str, Worker]) -> Told:
        return Told(await system.ask(request, workers))

    return Contestant(system.name, ask)


def self_consistency(worker: str, calls: int, *, temperature: float = 0.7) -> Contestant:
    """The answer that one worker gives most often; of equals the one that came first."""

    async def ask(request: ChatRequest, workers: Mapping[str, Worker]) -> Told:
        seeds = range(calls)
        replies = await asyncio.gather(
            *(
                workers[worker].complete(
                    request.with_(temperature=temperature, seed=(request.seed or 0) * calls + n, sample_index=n)
                )
                for n in seeds
            )
        )
        answers = [normalise(final_answer(reply.text)) for reply in replies]
        most = max(Counter(answers).values())
        return Told(
            next(reply for reply, answer in zip(replies, answers, strict=True) if answers.count(answer) == most)
        )

    return Contestant(f"{worker}, {calls} votes", ask, calls)


def panel(members: Sequence[str], judge: str) -> Contestant:
    """Every member answers; the judge reads all answers and concludes."""

    async def ask(request: ChatRequest, workers: Mapping[str, Worker]) -> Told:
        replies = await asyncio.gather(*(workers[name].complete(request) for name in members))
        return Told(await workers[judge].complete(_with_answers(request, replies)))

    return Contestant(f"panel of {len(members)} + judge", ask, len(members) + 1)


def mixture_of_agents(members: Sequence[str], layers: int, last: str) -> Contestant:
    """Members answer in layers, each layer reading the answers of the one before; the last worker concludes."""

    async def ask(request: ChatRequest, workers: Mapping[str, Worker]) -> Told:
        replies: Sequence[ChatReply] = ()
        for _ in range(layers):
            asked = _with_answers(request, replies)
            replies = await asyncio.gather(*(workers[name].complete(asked) for name in members))
        return Told(await workers[last].complete(_with_answers(request, replies)))

    return Contestant(f"mixture of agents {len(members)}x{layers} + 1", ask, len(members) * layers + 1)


def conducted(
    name: str,
    writer: str,
    numbers: Sequence[str],
    settings: ConductorSettings,
    *,
    ranking: Sequence[str],
    without: Sequence[str] = (),
    assign: Assign | None = None,
) -> Contestant:
    """What a conductor makes of the pool but for the workers `without`. `numbers` are the workers in the order of its
    training; `ranking` says whom a request goes to without a plan; with `assign` a router says who does a step."""

    async def ask(request: ChatRequest, workers: Mapping[str, Worker]) -> Told:
        left = {one: workers[one] for one in numbers if one in workers and one not in without}
        pool = Pool(tuple(numbers), left, assign=assign)
        best = [one for one in ranking if one not in without]
        found = await conduct(request, workers[writer], pool, best, settings)
        assert found.answer is not None, "a conducted request has an answer or raises"
        return Told(found.answer, found)

    return Contestant(name, ask)


def assigner(decider: Decider) -> Assign:
    """The best workers by a router of this process."""

    async def assign(conversations: Sequence[Conversation], allowed: frozenset[str]) -> Sequence[str | None]:
        decisions = await asyncio.gather(*(decider(conversation, allowed) for conversation in conversations))
        return [decision.worker for decision in decisions]

    return assign


def _with_answers(request: ChatRequest, replies: Sequence[ChatReply]) -> ChatRequest:
    """The request with others' answers before it is asked again."""
    if not replies:
        return request
    answers = "\n".join(quote("answer", reply.text) for reply in replies)
    *before, last = request.messages
    text = f"{last.text}\n\nOthers answered:\n{answers}\n\nWhich answer is right? Reply with the right answer only."
    return request.with_(messages=(*before, Message("user", text)))
