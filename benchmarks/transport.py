"""CPU per call to a provider: ours, httpx's own transport and httpx's client, against a loopback provider that
answers at once. Prints a table and, as its last line, one JSON object.

    python -m benchmarks.transport [--quick]

What counts is the CPU time of this process, since it bounds how many calls one provider actor can carry; the
provider runs in a process of its own. `ratio` is httpx's client over ours.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

import httpx
import orjson
from rich.console import Console
from rich.table import Table

from actors.adapters.base import CallContext
from actors.adapters.openai import OpenAIAdapter
from actors.config import WorkerSpec
from actors.messages import ChatRequest, Message
from actors.transport import AiohttpTransport, make_transport

BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]})
HEADERS = {"content-type": "application/json", "authorization": "Bearer none"}
CONNECTIONS = httpx.Limits(max_connections=64, max_keepalive_connections=64)

Call = Callable[[], Awaitable[object]]


async def cpu_per_call(call: Call, concurrency: int, calls: int) -> float:
    """Microseconds of this process's CPU per call, after a few calls to warm up."""

    async def worker(share: int) -> None:
        for _ in range(share):
            await call()

    await asyncio.gather(*(worker(2) for _ in range(concurrency)))
    began = time.process_time()
    await asyncio.gather(*(worker(calls // concurrency) for _ in range(concurrency)))
    return (time.process_time() - began) / (calls // concurrency * concurrency) * 1e6


def over(transport: httpx.AsyncBaseTransport, url: httpx.URL) -> Call:
    timeout = {"timeout": {"connect": 5, "read": 30, "write": 30, "pool": 30}}

    async def call() -> None:
        request = httpx.Request("POST", url, headers=HEADERS, content=BODY, extensions=timeout)
        response = await transport.handle_async_request(request)
        await response.aread()

    return call


async def measure(port: int, calls: int) -> dict[str, dict[int, float]]:
    base = f"http://127.0.0.1:{port}/v1"
    url = httpx.URL(f"{base}/chat/completions")
    spec = WorkerSpec.model_validate(
        {"name": "w", "provider": "openai", "model": "m", "base_url": base, "limits": {"concurrency": 64}}
    )
    request = ChatRequest(messages=(Message("user", "hello"),))
    ours = AiohttpTransport(max_connections=64)
    theirs = httpx.AsyncHTTPTransport(limits=CONNECTIONS)
    adapter = OpenAIAdapter(spec, make_transport(spec))

    async def streamed() -> None:
        async for _ in adapter.stream(request, CallContext()):
            pass

    async with httpx.AsyncClient(limits=CONNECTIONS) as client:
        ways: dict[str, Call] = {
            "our transport": over(ours, url),
            "our adapter, plain": lambda: adapter.complete(request, CallContext()),
            "our adapter, streamed": streamed,
            "httpx transport": over(theirs, url),
            "httpx client": lambda: client.post(url, content=BODY, headers=HEADERS),
        }
        figures: dict[str, dict[int, float]] = {}
        for name, call in ways.items():
            figures[name] = {level: await cpu_per_call(call, level, calls) for level in (1, 16, 64)}
    await ours.aclose()
    await theirs.aclose()
    await adapter.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU per call to a provider")
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    calls = 512 if parser.parse_args().quick else 4096
    command = [sys.executable, "-m", "tests.loopback", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as provider:
        try:
            assert provider.stdout is not None
            figures = asyncio.run(measure(int(provider.stdout.readline()), calls))
        finally:
            provider.terminate()
    table = Table(title="CPU per call, µs")
    for column in ("", "1 at once", "16", "64"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.0f}" for value in row.values()))
    Console().print(table)
    ratios = {
        f"cpu_ratio_httpx_client_c{level}": round(figures["httpx client"][level] / cost, 2)
        for level, cost in figures["our transport"].items()
    }
    flat = {
        f"{name.replace(', ', '_').replace(' ', '_')}_us_c{level}": round(value)
        for name, row in figures.items()
        for level, value in row.items()
    }
    print(orjson.dumps({**flat, **ratios}).decode())


if __name__ == "__main__":
    main()
