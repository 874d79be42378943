"""The way of calls into a provider actor: one authenticated stream connection per client process and actor.

Ray starts, names, finds and restarts the actors and hands out their address; the calls themselves do not go through
it. A call costs less than a tenth of the CPU of a Ray actor call this way (`benchmarks/link.py`), and so does every
piece of a stream. It also gives what a call between actors does not: a client that dies is noticed at once, because
the kernel closes its connection, and a slow reader holds back the writer.

A frame is a length (4 bytes, big-endian) and a pickle. Pickles can run code, so before the first frame both sides
prove with an HMAC that they hold the actor's token, which is made afresh by every actor and travels through Ray only;
nothing but fixed-length bytes is read until then. As with Ray's own connections, the network is trusted not to read
along.

    client → server   (CALL | STREAM, id, worker, request, headers)   (CANCEL, id)   (TAKEN, id, batches)   (PING,)
    server → client   (id, ChatReply | FuguError)   (id, (Chunk, …))   (id, Taken)   (0, None)

`headers` are those of the trace that a call is part of, None where it is not traced.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import pickle
import secrets
import socket
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from actors.errors import FuguError, StreamBrokenError, WorkerError
from actors.messages import ChatReply, ChatRequest, Chunk
from actors.spans import under
from actors.spending import Note, Taken, listener, told_to

if TYPE_CHECKING:
    from actors.otel import Telemetry

logger = logging.getLogger(__name__)

CALL, STREAM, CANCEL, TAKEN, PING = range(5)

_NONCE = 32
_HANDSHAKE_SECONDS = 5.0
_PING_SECONDS = 10.0
_COALESCE_SECONDS = 0.015
_LARGEST_FRAME = 1 << 29
# A stream may be this many batches ahead of its reader; the reader tells after every few that it has taken them.
_WINDOW = 64
_TELL_AFTER = 8
_STALLED_SECONDS = 300.0


class LinkLostError(ConnectionError):
    """The connection ended with calls on it: the actor died, or hangs, or its machine is gone."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an actor listens. `token` is secret and not shown."""

    host: str
    port: int
    token: bytes = field(repr=False)


class Runtime(Protocol):
    """What answers calls (`actors.worker.WorkerRuntime`)."""

    async def complete(self, request: ChatRequest) -> ChatReply: ...

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]: ...


def _proof(token: bytes, side: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    return hmac.digest(token, side + client_nonce + server_nonce, hashlib.sha256)


class _Framed(asyncio.Protocol):
    """Cuts the stream of bytes into what `_take` asks for, then into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self.trusted = False
        self._heard_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        buffer = self._buffer
        buffer += data
        while not self.trusted:
            if not self.handshake(buffer):
                return None
        start = 0
        while len(buffer) - start >= 4:
            end = start + 4 + int.from_bytes(buffer[start : start + 4], "big")
            if end - start > _LARGEST_FRAME:
                return self.drop()
            if len(buffer) < end:
                break
            self.received(pickle.loads(memoryview(buffer)[start + 4 : end]))
            start = end
        if start:
            del buffer[:start]
        return None

    def handshake(self, buffer: bytearray) -> bool:
        """Go on with the handshake. False when more bytes are needed or the peer was dropped."""
        raise NotImplementedError

    def received(self, message: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def send(self, message: tuple[Any, ...]) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        data = pickle.dumps(message, protocol=5)
        self._transport.write(len(data).to_bytes(4, "big") + data)

    def drop(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice within half a minute that the other machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # macOS calls the idle time TCP_KEEPALIVE and lacks the last one.
    for names, value in ((("TCP_KEEPIDLE", "TCP_KEEPALIVE"), 10), (("TCP_KEEPINTVL",), 5), (("TCP_KEEPCNT",), 4)):
        option = next((getattr(socket, name) for name in names if hasattr(socket, name)), None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)


# Server


class LinkServer:
    """Serves the workers of one actor, by name, to whoever holds the token. `telemetry` makes the spans of calls that
    are traced."""

    def __init__(self, runtimes: dict[str, Runtime], telemetry: Telemetry | None = None) -> None:
        self._runtimes = runtimes
        self._telemetry = telemetry
        self._token = secrets.token_bytes(32)
        self._server: asyncio.Server | None = None
        self._connections: set[_ServerConnection] = set()

    async def start(self, host: str) -> Endpoint:
        """Listen on a free port of `host`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connection, host, 0)
        return Endpoint(host, self._server.sockets[0].getsockname()[1], self._token)

    @property
    def connected(self) -> int:
        """Connections that are open; a call runs on one of them."""
        return len(self._connections)

    def _connection(self) -> _ServerConnection:
        return _ServerConnection(self._runtimes, self._token, self._connections, self._telemetry)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.drop()


class _Stream:
    """What the server knows of a running stream: how far ahead of its reader it may be."""

    __slots__ = ("credit", "more", "pending", "timer")

    def __init__(self) -> None:
        self.credit = _WINDOW
        self.more = asyncio.Event()
        self.pending: list[Chunk] = []
        self.timer: asyncio.TimerHandle | None = None


class _ServerConnection(_Framed):
    def __init__(
        self,
        runtimes: dict[str, Runtime],
        token: bytes,
        connections: set[_ServerConnection],
        telemetry: Telemetry | None,
    ) -> None:
        super().__init__()
        self._runtimes = runtimes
        self._telemetry = telemetry
        self._token = token
        self._connections = connections
        self._client_nonce = b""
        self._server_nonce = secrets.token_bytes(_NONCE)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, _Stream] = {}
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections.add(self)
        self._deadline = asyncio.get_running_loop().call_later(_HANDSHAKE_SECONDS, self.drop)

    def handshake(self, buffer: bytearray) -> bool:
        assert self._transport is not None
        if len(buffer) < _NONCE:
            return False
        received = bytes(buffer[:_NONCE])
        del buffer[:_NONCE]
        if not self._client_nonce:
            self._client_nonce = received
            answer = _proof(self._token, b"server", received, self._server_nonce)
            self._transport.write(self._server_nonce + answer)
            return True
        expected = _proof(self._token, b"client", self._client_nonce, self._server_nonce)
        if not hmac.compare_digest(received, expected):
            self.drop()
            return False
        if self._deadline is not None:
            self._deadline.cancel()
        self.trusted = True
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._connections.discard(self)
        for task in self._tasks.values():
            task.cancel()

    def received(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        if kind in (CALL, STREAM):
            _, call, worker, request, headers = message
            serve = self._complete if kind == CALL else self._stream
            traced = None if headers is None or self._telemetry is None else self._telemetry.joined(headers)
            with under(traced):  # a task keeps the span that is around when it is made
                self._tasks[call] = asyncio.get_running_loop().create_task(serve(call, worker, request))
        elif kind == CANCEL:
            task = self._tasks.get(message[1])
            if task is not None:
                task.cancel()
        elif kind == TAKEN:
            stream = self._streams.get(message[1])
            if stream is not None:
                stream.credit += message[2]
                stream.more.set()
        else:
            self.send((0, None))

    def _tell(self, call: int) -> Note:
        return lambda taken: self.send((call, taken))

    async def _complete(self, call: int, worker: str, request: ChatRequest) -> None:
        try:
            with told_to(self._tell(call)):
                reply = await self._runtimes[worker].complete(request)
            self.send((call, reply))
        except Exception as error:
            self.send((call, as_fugu_error(error, worker)))
        finally:
            del self._tasks[call]

    async def _stream(self, call: int, worker: str, request: ChatRequest) -> None:
        stream = self._streams[call] = _Stream()
        chunks = self._runtimes[worker].stream(request)
        loop = asyncio.get_running_loop()
        begun = False
        try:
            with told_to(self._tell(call)):
                chunk = await anext(chunks, None)
            while chunk is not None:
                stream.pending.append(chunk)
                if not begun or chunk.final is not None:
                    begun = True
                    self._flush(call, stream)
                elif stream.timer is None:
                    stream.timer = loop.call_later(_COALESCE_SECONDS, self._flush, call, stream)
                while stream.credit <= 0:
                    stream.more.clear()
                    async with asyncio.timeout(_STALLED_SECONDS):
                        await stream.more.wait()
                chunk = await anext(chunks, None)
        except TimeoutError:
            error = StreamBrokenError(f"the reader took nothing for {_STALLED_SECONDS:g} s", worker=worker)
            self.send((call, error))
        except Exception as error:
            self._flush(call, stream)
            self.send((call, as_fugu_error(error, worker)))
        finally:
            if stream.timer is not None:
                stream.timer.cancel()
            del self._tasks[call], self._streams[call]
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()

    def _flush(self, call: int, stream: _Stream) -> None:
        if stream.timer is not None:
            stream.timer.cancel()
            stream.timer = None
        if stream.pending:
            stream.credit -= 1
            self.send((call, merge(stream.pending)))
            stream.pending = []


def as_fugu_error(error: Exception, worker: str) -> FuguError:
    """An error that may be shown; of a fault of ours only the kind is."""
    if isinstance(error, FuguError):
        return error
    logger.error("worker %s: internal error (%s)", worker, type(error).__name__)
    return WorkerError(f"internal error ({type(error).__name__})", worker=worker)


def merge(chunks: list[Chunk]) -> tuple[Chunk, ...]:
    """The same stream in as few chunks as keep the order of text, reasoning and tool calls."""
    merged: list[Chunk] = []
    for chunk in chunks:
        last = merged[-1] if merged else None
        if last is not None and _kind(last) == _kind(chunk) is not None:
            merged[-1] = Chunk(
                last.text + chunk.text,
                last.reasoning + chunk.reasoning,
                last.tool_calls + chunk.tool_calls,
                usage=chunk.usage or last.usage,
                refusal=last.refusal + chunk.refusal,
            )
        else:
            merged.append(chunk)
    return tuple(merged)


def _kind(chunk: Chunk) -> str | None:
    """Which one thing a chunk carries; None if several, or the end."""
    kinds = [name for name in ("text", "reasoning", "tool_calls", "refusal", "final") if getattr(chunk, name)]
    return kinds[0] if len(kinds) == 1 and kinds[0] != "final" else None


# Client


class Link(_Framed):
    """A client's connection. It belongs to the event loop it was made on; many calls share it."""

    def __init__(self, token: bytes) -> None:
        super().__init__()
        self._token = token
        self._client_nonce = secrets.token_bytes(_NONCE)
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._replies: dict[int, asyncio.Future[ChatReply]] = {}
        self._readers: dict[int, _Reader] = {}
        self._notes: dict[int, Note] = {}
        self._next_id = 1
        self._pinger: asyncio.TimerHandle | None = None
        self._pinged_at: float | None = None
        self.lost = False

    @classmethod
    async def connect(cls, endpoint: Endpoint, timeout: float = _HANDSHAKE_SECONDS) -> Link:
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
        if len(buffer) < 2 * _NONCE:
            return False
        server_nonce, answer = bytes(buffer[:_NONCE]), bytes(buffer[_NONCE : 2 * _NONCE])
        del buffer[: 2 * _NONCE]
        if not hmac.compare_digest(answer, _proof(self._token, b"server", self._client_nonce, server_nonce)):
            self.drop()
            return False
        self._transport.write(_proof(self._token, b"client", self._client_nonce, server_nonce))
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
                if taken == _TELL_AFTER:
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
