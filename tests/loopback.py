"""A provider on the loopback interface that speaks four wire formats for real, and misbehaves when told to.

    with LoopbackProvider() as provider:
        provider.enqueue(Behaviour(status=429, headers={"retry-after": "2"}), Behaviour(text="fine now"))
        ...                                   # call provider.url_for("openai"), "anthropic" or "gemini"
        assert provider.requests[-1].body["model"] == "m"

The server runs in a thread with an event loop of its own, on plain asyncio protocols: it can reset,
half-close and fall silent, which a polite HTTP library would not. As a program, `python -m tests.loopback
--port 0` prints its port.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from actors.messages import ToolCall, Usage
from tests.loopback_dialects import (
    Answer,
    Behaviour,
    Dialect,
    Recorded,
    detect,
    error_body,
    error_event,
    fault,
)

__all__ = ["Behaviour", "Disconnect", "LoopbackProvider", "Recorded", "ToolCall", "Usage"]

_MAX_HEAD = 64 * 1024
_BASES: Mapping[Dialect, str] = {"openai": "/v1", "responses": "/v1", "anthropic": "", "gemini": "/v1beta"}


@dataclass(frozen=True)
class Disconnect:
    """A client that went away before its answer was complete; `time` is `time.monotonic()` seconds."""

    time: float
    request: Recorded


class LoopbackProvider:
    """See the module docstring. A behaviour is what `chooses` says of the request, where that is set, else taken from
    the queue, else by model name, else the default.

    `api_key` makes every request need that key, given the way its dialect gives it. `requests`,
    `disconnects`, `in_flight` and `max_in_flight` may be read from any thread; `record=False` only counts.
    """

    def __init__(
        self,
        default: Behaviour | None = None,
        *,
        api_key: str | None = None,
        record: bool = True,
        port: int = 0,
    ) -> None:
        self.default = default or Behaviour()
        self.by_model: dict[str, Behaviour] = {}
        self.chooses: Callable[[Recorded], Behaviour] | None = None
        self.api_key = api_key
        self.record = record
        self.port = port
        self.requests: list[Recorded] = []
        self.disconnects: list[Disconnect] = []
        self.connections = 0
        self.total = 0
        self.in_flight = 0
        self.max_in_flight = 0
        self._queue: deque[Behaviour] = deque()
        self._open: set[_Connection] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def url_for(self, dialect: Dialect) -> str:
        """The `base_url` of a worker of this dialect."""
        return f"http://127.0.0.1:{self.port}" + _BASES[dialect]

    def enqueue(self, *behaviours: Behaviour) -> None:
        """Treat the next requests so, one behaviour each, in order of arrival."""
        self._queue.extend(behaviours)

    def clear(self) -> None:
        """Forget queued behaviours and everything recorded."""
        self._queue.clear()
        self.by_model.clear()
        self.chooses = None
        self.requests.clear()
        self.disconnects.clear()
        self.total, self.max_in_flight = 0, self.in_flight

    def wait_for(self, condition: Any, timeout: float = 5.0) -> bool:
        """Poll `condition()` until it is true; False after `timeout` seconds. Blocks: not for event loops."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def __enter__(self) -> LoopbackProvider:
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="loopback", daemon=True)
        self._thread.start()
        if not started.wait(10):
            raise RuntimeError("the loopback provider did not start")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, started: threading.Event) -> None:
        loop = self._loop = asyncio.new_event_loop()
        listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self.port = listener.getsockname()[1]
        server = loop.run_until_complete(loop.create_server(lambda: _Connection(self), sock=listener))
        started.set()
        try:
            loop.run_forever()
        finally:
            server.close()
            for connection in list(self._open):
                connection.drop()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=5))
            loop.close()

    def _choose(self, request: Recorded) -> Behaviour:
        if self.chooses is not None:
            return self.chooses(request)
        if self._queue:
            return self._queue.popleft()
        return self.by_model.get(request.model, self.default)

    def _key_is_right(self, request: Recorded) -> bool:
        if self.api_key is None:
            return True
        header = {"anthropic": "x-api-key", "gemini": "x-goog-api-key"}.get(request.dialect or "", "authorization")
        expected = f"Bearer {self.api_key}" if header == "authorization" else self.api_key
        return request.headers.get(header) == expected


class _Connection(asyncio.Protocol):
    """One client connection: requests are answered one after the other, each in a task."""

    def __init__(self, provider: LoopbackProvider) -> None:
        self._provider = provider
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._current: Recorded | None = None
        self._broken_by_us = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # asyncio sets it only on sockets made with an explicit protocol number; without, two writes take 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._provider.connections += 1
        self._provider._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._provider._open.discard(self)
        left = self._current
        self._end()
        if left is not None and not self._broken_by_us:
            self._provider.disconnects.append(Disconnect(time.monotonic(), left))
        if self._task is not None:
            self._task.cancel()

    def _end(self) -> None:
        """The current request, if there is one, is no longer in flight."""
        if self._current is not None:
            self._current = None
            self._provider.in_flight -= 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._next()

    def drop(self) -> None:
        self._broken_by_us = True
        self._transport.abort()

    def _next(self) -> None:
        if self._task is None and (request := self._parse()) is not None:
            self._task = asyncio.get_running_loop().create_task(self._serve(request))

    def _parse(self) -> Recorded | None:
        """Take one whole request from the buffer, or None while it is incomplete."""
        end = self._buffer.find(b"\r\n\r\n", 0, _MAX_HEAD)
        if end < 0:
            return None
        line, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (item.partition(":") for item in lines)}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            taken = _dechunk(self._buffer, end + 4)
            if taken is None:
                return None
            raw, used = taken
        else:
            used = end + 4 + int(headers.get("content-length", "0"))
            if len(self._buffer) < used:
                return None
            raw = bytes(self._buffer[end + 4 : used])
        del self._buffer[:used]
        method, target, _ = line.split(" ", 2)
        path, _, query = target.partition("?")
        dialect, model, stream = detect(path)
        try:
            body = orjson.loads(raw) if raw else None
        except orjson.JSONDecodeError:
            body = None
        if dialect != "gemini" and isinstance(body, dict):
            model, stream = str(body.get("model", "")), body.get("stream") is True
        provider = self._provider
        provider.total += 1
        arrival = time.monotonic()
        return Recorded(provider.total, method, path, query, headers, body, raw, arrival, dialect, model, stream)

    async def _serve(self, request: Recorded) -> None:
        provider = self._provider
        self._current = request
        provider.in_flight += 1
        provider.max_in_flight = max(provider.max_in_flight, provider.in_flight)
        if provider.record:
            provider.requests.append(request)
        try:
            await self._answer(request)
        finally:
            self._end()
            self._task = None
        if not self._transport.is_closing():
            self._next()

    async def _answer(self, request: Recorded) -> None:
        behaviour = self._provider._choose(request)
        if request.method == "GET" and request.path == "/healthz":
            return self._plain(200, b'{"status":"ok"}', behaviour)
        if not self._provider._key_is_right(request):
            behaviour = Behaviour(status=401, error="Incorrect API key provided.")
        elif (wrong := fault(request)) is not None and behaviour.status == 200:
            behaviour = Behaviour(status=404 if request.dialect is None else 400, error=wrong)
        if behaviour.delay:
            await asyncio.sleep(behaviour.delay)
        if behaviour.never:
            await asyncio.get_running_loop().create_future()
        if behaviour.status != 200:
            body = behaviour.body or orjson.dumps(error_body(request.dialect, behaviour.status, behaviour))
            return self._plain(behaviour.status, body, behaviour)
        if behaviour.body is not None:
            return self._plain(200, behaviour.body, behaviour)
        answer = Answer.make(request, behaviour)
        if not request.stream:
            return self._plain(200, answer.plain(), behaviour)
        return await self._stream(answer)

    def _plain(self, status: int, body: bytes, behaviour: Behaviour) -> None:
        head = {
            "content-type": behaviour.content_type or "application/json",
            "content-length": str(len(body)),
        }
        sent = body if behaviour.break_after is None else body[: behaviour.break_after]
        self._transport.write(_head(status, {**head, **behaviour.headers}) + sent)
        if behaviour.break_after is not None:
            self._break(behaviour)
        elif behaviour.close:
            self._broken_by_us = True
            self._transport.close()

    async def _stream(self, answer: Answer) -> None:
        behaviour = answer.behaviour
        head = {"content-type": behaviour.content_type or "text/event-stream", "cache-control": "no-cache"}
        self._transport.write(_head(200, {**head, "transfer-encoding": "chunked", **behaviour.headers}))
        frames = answer.events()
        if behaviour.error_after is not None:
            frames = [*frames[: behaviour.error_after], error_event(answer.request.dialect, behaviour)]
        paced = behaviour.chunk_delay or behaviour.split is not None
        if not paced and behaviour.break_after is None and behaviour.stall_after is None:
            data = b"".join(frames)
            body = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            self._transport.write(body + b"0\r\n\r\n")
        else:
            for number, data in enumerate(frames):
                if number == behaviour.break_after:
                    return self._break(behaviour)
                if number == behaviour.stall_after:
                    await asyncio.get_running_loop().create_future()
                if number and behaviour.chunk_delay:
                    await asyncio.sleep(behaviour.chunk_delay)
                size = behaviour.split or len(data)
                for start in range(0, len(data), size):
                    piece = data[start : start + size]
                    self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    if behaviour.split:
                        await asyncio.sleep(0)
            if behaviour.break_after is not None:
                return self._break(behaviour)
            self._transport.write(b"0\r\n\r\n")
        if behaviour.close:
            self._broken_by_us = True
            self._transport.close()
        return None

    def _break(self, behaviour: Behaviour) -> None:
        self._broken_by_us = True
        if behaviour.break_how == "half":
            self._transport.write_eof()
        elif behaviour.break_how == "fin":
            self._transport.close()
        else:
            # What was written must leave first: a reset discards the peer's unread data, so wait a moment.
            asyncio.get_running_loop().call_later(0.05, self._reset)

    def _reset(self) -> None:
        raw = self._transport.get_extra_info("socket")
        if raw is not None and raw.fileno() >= 0:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()


def _head(status: int, headers: dict[str, str]) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = "Overloaded"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} {phrase}\r\n{lines}\r\n".encode("latin-1")


def _dechunk(buffer: bytearray, start: int) -> tuple[bytes, int] | None:
    """The body of a chunked request that begins at `start`, and where it ends; None while incomplete."""
    body = bytearray()
    while True:
        end = buffer.find(b"\r\n", start)
        if end < 0:
            return None
        size = int(bytes(buffer[start:end]).partition(b";")[0], 16)
        start = end + 2
        if len(buffer) < start + size + 2:
            return None
        body += buffer[start : start + size]
        start += size + 2
        if size == 0:
            return bytes(body), start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--text", default=Behaviour.text, help="what to answer")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before the first byte")
    parser.add_argument("--chunk-delay", type=float, default=0.0, help="seconds between streamed chunks")
    parser.add_argument("--api-key", default=None, help="the key every request must bring")
    given = parser.parse_args()
    behaviour = Behaviour(text=given.text, delay=given.delay, chunk_delay=given.chunk_delay)
    with LoopbackProvider(behaviour, api_key=given.api_key, record=False, port=given.port) as provider:
        print(provider.port, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
