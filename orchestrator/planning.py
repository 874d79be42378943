"""One try at a plan: what the writer is asked, and its answer within the budget."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.errors import DeadlineError
from actors.messages import ChatReply, ChatRequest, Worker
from actors.spending import told_to
from orchestrator.assign import Assign
from orchestrator.budget import Account, Clock
from orchestrator.conductor_prompt import Mistake, PromptSettings, Round, conductor_messages
from orchestrator.executor import ExecutorSettings
from orchestrator.plan_grammar import CHARACTERS_PER_TOKEN, plan_regex

RETRY_TEMPERATURE = 0.7
"""A second try at least this warm: at 0 it would be the first one again."""


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
    may use; `about` a line about a worker, for prompts that show names. With `assign` the conductor says what is to be
    done, and a router who does it."""

    names: tuple[str, ...]
    workers: Mapping[str, Worker]
    about: Mapping[str, str] = field(default_factory=dict)
    assign: Assign | None = None


def plan_request(
    request: ChatRequest,
    pool: Pool,
    settings: ConductorSettings,
    said: Sequence[Round],
    mistakes: Sequence[Mistake],
    *,
    allow_self: bool,
    round: int,
    attempt: int,
) -> ChatRequest:
    """What the writer is asked. A compact conductor never saw a mistake in its training: it only tries again."""
    prompt = replace(settings.prompt, allow_self=allow_self)
    told = mistakes if prompt.style == "paper" else ()
    number = round * (settings.retries + 1) + attempt
    seed = request.seed
    messages = conductor_messages(
        request.messages,
        pool.names,
        prompt,
        allowed=pool.workers.keys(),
        about=pool.about,
        tools=[tool.name for tool in request.tools],
        said=[*said, *told],
    )
    extra = {}
    if settings.structured:
        grammar = plan_regex(
            pool.names,
            allowed=pool.workers.keys(),
            max_steps=prompt.max_steps,
            allow_self=prompt.allow_self,
            allow_empty=bool(said),
            thought=prompt.style == "paper",
            characters=CHARACTERS_PER_TOKEN * settings.max_tokens,
        )
        extra = {"structured_outputs": {"regex": grammar}}
    return ChatRequest(
        messages,
        max_tokens=settings.max_tokens,
        temperature=max(settings.temperature, RETRY_TEMPERATURE) if attempt else settings.temperature,
        seed=seed if seed is None or not number else random.Random(f"{seed}/plan/{number}").getrandbits(31),
        sample_index=request.sample_index + attempt,
        extra=extra,
    )


async def written(writer: Worker, asked: ChatRequest, account: Account, clock: Clock) -> tuple[ChatReply, float]:
    """What the writer wrote, and the seconds that it took.

    Raises:
        FuguError: it could not answer, or the budget leaves too little.
    """
    grant = account.admit(writer.name, asked, shares=2)  # a plan is worth nothing without a step
    began = clock()
    reply: ChatReply | None = None
    failure: BaseException | None = None
    try:
        async with asyncio.timeout(account.seconds_left):
            with told_to(account.told_by(writer.name)):
                reply = await writer.complete(grant.request)
    except TimeoutError as error:
        failure = error
        raise DeadlineError("the request's time was over before a workflow was written") from None
    except BaseException as error:
        failure = error
        raise
    finally:
        account.settle(grant, reply, failure)
    return reply, clock() - began
