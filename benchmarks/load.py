"""A cheap HTTP upstream and a cheap HTTP load generator, so that a benchmark measures what stands between them.

Both speak HTTP/1.1 over asyncio protocols without any framework: on one core the upstream answers, and the generator
sends, several thousand requests per second, an order of magnitude above every proxy measured with them.

    python -m benchmarks.load upstream --port 0     prints its port, answers every POST with one chat completion
    python -m benchmarks.load client URL …          prints one JSON object: rps, p50, p95, p99 (milliseconds), errors
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from urllib.parse import urlsplit

REPLY = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "bench",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15},
    }
).encode()

BODY = json.dumps(
    {"model": "MODEL", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
).encode()


class Upstream(asyncio.Protocol):
    """Answers each complete request at once with the same chat completion."""

    answer = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
        + str(len(REPLY)).encode()
        + b"\r\n\r\n"
        + REPLY
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (message := split_message(self.buffer)) is not None:
            self.buffer = message[1]
            self.transport.write(self.answer)


def split_message(buffer: bytes) -> tuple[bytes, bytes] | None:
    """(first whole HTTP message, rest), or None. Knows content-length and chunked bodies."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = buffer[:end].lower()
    at = head.find(b"content-length:")
    if at >= 0:
        length = int(head[at + 15 :].split(b"\r\n", 1)[0])
        stop = end + 4 + length
    elif b"transfer-encoding: chunked" in head:
        close = buffer.find(b"0\r\n\r\n", end + 4)
        if close < 0:
            return None
        stop = close + 5
    else:
        stop = end + 4
    return (buffer[:stop], buffer[stop:]) if len(buffer) >= stop else None


class Client(asyncio.Protocol):
    """One keep-alive connection that always has one request in flight; another takes its place where the server says
    that it will close it, as a proxy does that changes its configuration."""

    def __init__(
        self, connect: Callable[[Client], None], request: bytes, latencies: list[float], errors: list[str]
    ) -> None:
        self.connect = connect
        self.request = request
        self.latencies = latencies
        self.errors = errors
        self.buffer = b""
        self.running = True
        self.closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.closing = False
        self.send()

    def send(self) -> None:
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        message = split_message(self.buffer)
        if message is None:
            return
        whole, self.buffer = message
        self.latencies.append(time.perf_counter() - self.sent)
        if not whole.startswith(b"HTTP/1.1 200"):
            self.errors.append(whole[:200].decode("latin-1"))
        self.closing = b"\r\nconnection: close\r\n" in whole[: whole.find(b"\r\n\r\n") + 2].lower()
        if self.closing:
            self.transport.close()
        elif self.running:
            self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.running and self.closing:
            self.connect(self)
        elif self.running:
            self.errors.append("connection lost")


async def drive(url: str, model: str, concurrency: int, seconds: float, key: str) -> dict[str, object]:
    """Keep `concurrency` requests in flight for `seconds`; latencies in milliseconds."""
    parts = urlsplit(url)
    body = BODY.replace(b"MODEL", model.encode())
    head = (
        f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    latencies: list[float] = []
    errors: list[str] = []
    loop, host, port = asyncio.get_running_loop(), parts.hostname or "127.0.0.1", parts.port or 80
    connecting: set[asyncio.Task[object]] = set()

    def connect(client: Client) -> None:
        task = loop.create_task(loop.create_connection(lambda: client, host, port))
        connecting.add(task)
        task.add_done_callback(connecting.discard)

    clients = [Client(connect, head.encode() + body, latencies, errors) for _ in range(concurrency)]
    for client in clients:
        connect(client)
    await asyncio.gather(*connecting)
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    while not latencies and time.perf_counter() - start < seconds + 30:  # noqa: ASYNC110
        await asyncio.sleep(0.1)  # a slow system gets the time for its first answer
    elapsed = time.perf_counter() - start
    for client in clients:
        client.running = False
    await asyncio.gather(*connecting)
    for client in clients:
        client.transport.close()
    if not latencies:
        raise SystemExit(f"{url} answered nothing in {seconds:g} s")
    cuts = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else latencies * 99
    return {
        "rps": len(latencies) / elapsed,
        "p50": 1e3 * cuts[49],
        "p95": 1e3 * cuts[94],
        "p99": 1e3 * cuts[98],
        "requests": len(latencies),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
    }


async def upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("upstream")
    serve.add_argument("--port", type=int, default=0)
    client = commands.add_parser("client")
    client.add_argument("url")
    client.add_argument("--model", default="bench")
    client.add_argument("--key", default="none")
    client.add_argument("--concurrency", type=int, default=1)
    client.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    if arguments.command == "upstream":
        asyncio.run(upstream(arguments.port))
    else:
        result = asyncio.run(
            drive(arguments.url, arguments.model, arguments.concurrency, arguments.seconds, arguments.key)
        )
        json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
