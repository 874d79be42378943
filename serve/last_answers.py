"""Who gave a conversation's last answer, so that it stays there unless another is better by `router.stay_margin`.

Switching loses what the last worker's provider has of the conversation in its prompt cache, so the margin counts for as
much of the prompt as would be read from there: nothing where it is short, or where the provider said that it keeps
nothing. Such a cache lives minutes: after `router.stay_seconds` there is nothing to lose.

An answer is known by a digest of its caller, its words and the question's, in a small SQLite file of the state folder
that the gateways of a machine share. Where it is not known, or the file cannot be read, the router's choice stands.
With a margin of 0 there is no file, and nothing is read or written.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import orjson

from actors.config import FuguConfig
from actors.estimate import estimate_tokens
from actors.journal import state_dir
from actors.messages import ChatReply, ChatRequest, Message, Usage
from serve.store import Kept, SqliteStore, Store
from serve.trace import Choice

log = logging.getLogger("fugu.gateway")

ANSWER = "answer"
_FILE = "answers.sqlite"
_REMEMBERED = 16384
# An answer waits no longer for the file than what is saved by it.
_WAIT_SECONDS = 0.5
# OpenAI, Anthropic and Gemini keep no shorter prompt (platform documentation, "Prompt caching").
_SHORTEST = 1024


@dataclass(frozen=True, slots=True)
class Before:
    """The worker of a conversation's last answer, and by how much another must be better now."""

    worker: str
    margin: float

    def over(self, choice: Choice) -> Choice:
        """The choice, or to stay. A Thinker's turn is none of the answer's."""
        worker = stay(choice.worker, self.worker, choice.probabilities, self.margin)
        if worker == choice.worker or choice.role == "thinker":
            return choice
        return replace(choice, worker=worker, source="stay")


class LastAnswers:
    """Of the conversations of the last `router.stay_seconds`. `open_store` gives what remembers them."""

    def __init__(self, config: FuguConfig, open_store: Callable[[], Store] | None = None) -> None:
        self._margin = config.router.stay_margin
        self._seconds = config.router.stay_seconds
        # Anthropic keeps what it is asked to keep, and tells how much; the others keep all that is long enough.
        self._tells = frozenset(spec.name for spec in config.active if spec.provider == "anthropic")
        self._store = (open_store or _shared)() if self._margin else None

    async def before(self, request: ChatRequest, owner: str) -> Before | None:
        """Who gave the last answer of this conversation, where it was lately and its provider keeps some of it."""
        if self._store is None:
            return None
        at = next((at for at, each in enumerate(request.messages[::-1], 1) if each.role == "assistant"), None)
        if at is None:
            return None
        last = len(request.messages) - at
        key = _digest(owner, _asked(request.messages[:last]), request.messages[last].text)
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                packed = await self._store.get(ANSWER, key, owner)
        except (sqlite3.Error, TimeoutError) as error:
            log.warning("who gave the last answer could not be read: %s", type(error).__name__)
            return None
        if packed is None:
            return None
        worker, held = orjson.loads(packed)
        return Before(worker, self._margin * min(1.0, held / max(1, estimate_tokens(request).input)))

    async def remember(self, request: ChatRequest, reply: ChatReply, worker: str, owner: str) -> None:
        """Note who answered. An answer of our own cache left nothing with a provider."""
        if self._store is None or reply.cached:
            return
        held = int(estimate_tokens(request).input * held_part(reply.usage, told=worker in self._tells))
        if not held:
            return
        kept = Kept(ANSWER, _digest(owner, _asked(request.messages), reply.text), orjson.dumps([worker, held]))
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                await self._store.put([kept], owner, seconds=self._seconds)
        except (sqlite3.Error, TimeoutError) as error:
            log.warning("who gave the last answer could not be kept: %s", type(error).__name__)


def _shared() -> Store:
    return SqliteStore(state_dir() / _FILE, most=_REMEMBERED)


def held_part(usage: Usage, *, told: bool) -> float:
    """The part (0..1) of a call's prompt that its provider keeps now. `told`: its usage says so."""
    if usage.input_tokens < _SHORTEST:
        return 0.0
    return (usage.cached_input_tokens + usage.cache_written_tokens) / usage.input_tokens if told else 1.0


def stay(chosen: str | None, before: str | None, probabilities: Mapping[str, float], margin: float) -> str | None:
    """The worker to ask first: the one before, unless the chosen one is better by more than the margin."""
    if before is None or chosen is None or before not in probabilities:
        return chosen
    return chosen if probabilities.get(chosen, 0.0) - probabilities[before] > margin else before


def _asked(messages: Sequence[Message]) -> str:
    return next((message.text for message in reversed(messages) if message.role == "user"), "")


def _digest(owner: str, asked: str, answered: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (owner, asked, answered.strip()):
        told = part.encode("utf-8", "surrogatepass")
        digest.update(len(told).to_bytes(8, "big") + told)
    return digest.hexdigest()
