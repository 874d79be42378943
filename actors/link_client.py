"""The client's side of `actors.link`: a connection to one actor, which the calls of an event loop share."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from typing import Any, cast

from actors.link import CALL, CANCEL, HANDSHAKE_SECONDS, NONCE, PING, STREAM, TAKEN, TELL_AFTER, Endpoint, Framed, proof
from actors.messages import ChatReply, ChatRequest, Chunk
from actors.spending import Note, Taken, listener

logger = logging.getLogger(__name__)

_PING_SECONDS = 10.0


class LinkLostError(ConnectionError):
    """The connection ended with calls on it: the actor died, or hangs, or its machine is gone."""


class Link(Framed):
    """A client's connection. It belongs to the event loop it was made on; many calls share it."""

    def __init__(self, token: bytes) -> None:
        super().__init__()
        self._token = token
        self._client_nonce = secrets.token_bytes(NONCE)
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._replies: dict[int, asyncio.Future[ChatReply]] = {}
        self._readers: dict[int, _Reader] = {}
        self._notes: dict[int, Note] = {}
        self._next_id = 1
        self._pinger: asyncio.TimerHandle | None = None
        self._pinged_at: float | None = None
        self.lost = False

    @classmethod
    async def connect(cls, endpoint: Endpoint, timeout: float = HANDSHAKE_SECONDS) -> Link:
        """Connect and prove each other. Raises OSError or TimeoutError."""
        async with asyncio.timeout(timeout):
            loop = asyncio.get_running_loop()
            _, link = await loop.create_connection(lambda: cls(endpoint.token), endpoint.host, endpoint.port)
            try:
                await link._ready
            except BaseException:
                link.drop()
                raise
        return link

    @property
    def running(self) -> int:
        """Calls on this connection that are not over."""
        return len(self._replies) + len(self._readers)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._client_nonce)

    def handshake(self, buffer: bytearray) -> bool:
        assert self._transport is not None
        if len(buffer) < 2 * NONCE:
            return False
        server_nonce, answer = bytes(buffer[:NONCE]), bytes(buffer[NONCE : 2 * NONCE])
        del buffer[: 2 * NONCE]
        if not hmac.compare_digest(answer, proof(self._token, b"server", self._client_nonce, server_nonce)):
            self.drop()
            return False
        self._transport.write(proof(self._token, b"client", self._client_nonce, server_nonce))
        self.trusted = True
        self._ready.set_result(None)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._pinger is not None:
            self._pinger.cancel()
        error = LinkLostError("the connection to the provider actor was lost")
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._replies.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
        for reader in self._readers.values():
            reader.put(error)

    def received(self, message: tuple[Any, ...]) -> None:
        call, what = message
        if isinstance(what, Taken):
            if call in self._notes:
                self._notes[call](what)
            return
        reader = self._readers.get(call)
        if reader is not None:
            reader.put(what)
            return
        future = self._replies.get(call)
        if future is None or future.done():
            return
        if isinstance(what, ChatReply):
            future.set_result(what)
        else:
            future.set_exception(what)

    async def complete(self, worker: str, request: ChatRequest, headers: Mapping[str, str] | None = None) -> ChatReply:
        """Raises `actors.errors.FuguError`s and LinkLostError. Cancelling it cancels the call in the actor."""
        call = self._begin()
        future = self._replies[call] = asyncio.get_running_loop().create_future()
        self.send((CALL, call, worker, request, headers))
        try:
            return await future
        except asyncio.CancelledError:
            self.send((CANCEL, call))
            raise
        finally:
            del self._replies[call]
            self._notes.pop(call, None)

    async def stream(
        self, worker: str, request: ChatRequest, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """As `complete`; closing the iterator cancels the call in the actor."""
        call = self._begin()
        reader = self._readers[call] = _Reader()
        self.send((STREAM, call, worker, request, headers))
        over, taken = False, 0
        try:
            while not over:
                what = await reader.get()
                if isinstance(what, Exception):
                    over = True
                    raise what
                over = what[-1].final is not None
                for chunk in what:
                    yield chunk
                taken += 1
                if taken == TELL_AFTER:
                    self.send((TAKEN, call, taken))
                    taken = 0
        finally:
            del self._readers[call]
            self._notes.pop(call, None)
            if not over:
                self.send((CANCEL, call))

    def _begin(self) -> int:
        if self.lost:
            raise LinkLostError("the connection to the provider actor was lost")
        if self._pinger is None:
            self._schedule_ping()
        call = self._next_id
        self._next_id += 1
        note = listener()
        if note is not None:
            self._notes[call] = note
        return call

    def _schedule_ping(self) -> None:
        self._pinger = asyncio.get_running_loop().call_later(_PING_SECONDS, self._ping)

    def _ping(self) -> None:
        """While calls run, make sure that the other side still lives: a process can hang with its socket open."""
        self._pinger = None
        if not self.running:
            self._pinged_at = None
            return
        if self._pinged_at is not None and self._heard_at < self._pinged_at:
            silent_for = asyncio.get_running_loop().time() - self._pinged_at
            if silent_for > 3 * _PING_SECONDS:
                logger.warning("the provider actor has not answered for %.0f s", silent_for)
                self.drop()
                return
        else:
            self._pinged_at = asyncio.get_running_loop().time()
            self.send((PING,))
        self._schedule_ping()

    async def close(self) -> None:
        with contextlib.suppress(OSError):
            self.drop()


class _Reader:
    """The batches of one stream that have arrived and were not read yet."""

    __slots__ = ("_arrived", "_batches")

    def __init__(self) -> None:
        self._batches: deque[Any] = deque()
        self._arrived: asyncio.Future[None] | None = None

    def put(self, what: Any) -> None:
        self._batches.append(what)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def get(self) -> Any:
        while not self._batches:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        return self._batches.popleft()
