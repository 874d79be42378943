"""A router in this process as measuring and training ask it: about many conversations at once, and about the same ones
again, with other workers to choose from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.messages import Message
from orchestrator.router import Decision, Router

Conversation = tuple[Message, ...]

# What is asked of the backbone waits this long (seconds) for others to join.
_GATHER = 0.003
# Conversations in one pass, of like length; more would only take memory.
_AT_ONCE = 64


class Rankings:
    """What a router says of conversations. Each is read once, many in one pass: the head's word on a part of the pool
    is its word on the whole pool without the others (`Decision.among`)."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._known: dict[Conversation, Decision] = {}

    def known(self, conversation: Conversation, allowed: frozenset[str]) -> Decision | None:
        """The decision between `allowed`, where this conversation has been read.

        Raises:
            NoWorkerAllowedError: none of them is a worker of this head.
        """
        decision = self._known.get(conversation)
        return None if decision is None else decision.among(allowed)

    def read(self, conversations: Sequence[Conversation]) -> None:
        """Read what is not known yet.

        Raises:
            RequestError: a conversation is empty.
        """
        new = [talk for talk in dict.fromkeys(conversations) if talk not in self._known]
        new.sort(key=lambda talk: sum(len(message.text) for message in talk))
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            decisions = self.router.decide(part, [None] * len(part), [None] * len(part))
            self._known.update(zip(part, decisions, strict=True))

    def decide(self, conversations: Sequence[Conversation], allowed: Sequence[frozenset[str]]) -> list[Decision]:
        """One decision per conversation, between the workers that it allows.

        Raises:
            NoWorkerAllowedError, RequestError: as `known` and `read`.
        """
        self.read(conversations)
        return [self._known[talk].among(names) for talk, names in zip(conversations, allowed, strict=True)]


class Decider:
    """`Rankings` for asyncio: conversations that are asked about at nearly the same time are read together."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._rankings = Rankings(router)
        self._waiting: list[tuple[Conversation, asyncio.Future[None]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def __call__(self, conversation: Conversation, allowed: frozenset[str]) -> Decision:
        """Raises:
        NoWorkerAllowedError, RequestError: as `Rankings.decide`.
        """
        decision = self._rankings.known(conversation, allowed)
        while decision is None:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((conversation, future))
            if self._sender is None:
                self._sender = asyncio.create_task(self._send())
            await future
            decision = self._rankings.known(conversation, allowed)
        return decision

    async def _send(self) -> None:
        await asyncio.sleep(_GATHER)
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                await self._read(waiting)
        finally:
            self._sender = None

    async def _read(self, waiting: Sequence[tuple[Conversation, asyncio.Future[None]]]) -> None:
        try:
            await asyncio.to_thread(self._rankings.read, [conversation for conversation, _ in waiting])
        except Exception as error:
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for _, future in waiting:
            if not future.done():
                future.set_result(None)
