"""The server's side of `actors.link`: serves the workers of one actor to the clients that connect."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any, Protocol

from actors.errors import FuguError, StreamBrokenError, WorkerError
from actors.link import CALL, CANCEL, HANDSHAKE_SECONDS, NONCE, STREAM, TAKEN, WINDOW, Endpoint, Framed, proof
from actors.messages import ChatReply, ChatRequest, Chunk
from actors.spans import under
from actors.spending import Note, told_to

if TYPE_CHECKING:
    from actors.otel import Telemetry

logger = logging.getLogger(__name__)

_COALESCE_SECONDS = 0.015
_STALLED_SECONDS = 300.0


class Runtime(Protocol):
    """What answers calls (`actors.worker.WorkerRuntime`)."""

    async def complete(self, request: ChatRequest) -> ChatReply: ...

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]: ...


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
        self.credit = WINDOW
        self.more = asyncio.Event()
        self.pending: list[Chunk] = []
        self.timer: asyncio.TimerHandle | None = None


class _ServerConnection(Framed):
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
        self._server_nonce = secrets.token_bytes(NONCE)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._streams: dict[int, _Stream] = {}
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connections.add(self)
        self._deadline = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self.drop)

    def handshake(self, buffer: bytearray) -> bool:
        assert self._transport is not None
        if len(buffer) < NONCE:
            return False
        received = bytes(buffer[:NONCE])
        del buffer[:NONCE]
        if not self._client_nonce:
            self._client_nonce = received
            answer = proof(self._token, b"server", received, self._server_nonce)
            self._transport.write(self._server_nonce + answer)
            return True
        expected = proof(self._token, b"client", self._client_nonce, self._server_nonce)
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
