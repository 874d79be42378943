"""What it costs to reach a provider actor: an ordinary Ray actor call beside our own connection (`actors.link`).

    python -m benchmarks.link [--quick]

Both carry the same request to a Ray actor that answers at once, and back. In each round both are measured at every
concurrency in turn; medians over rounds are reported. CPU is of both processes together, per call: on a small machine
that is what bounds a gateway. The last line is one JSON object; `cpu_ratio` is Ray's CPU over ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from actors.link import Endpoint
from actors.link_client import Link
from actors.link_server import LinkServer
from actors.messages import ChatReply, ChatRequest, Chunk, Message

REQUEST = ChatRequest((Message("user", "What is the capital of France? " * 10),))
CONCURRENCY = (1, 16, 64)

Call = Callable[[], Awaitable[object]]


class Answers:
    """A worker that answers at once."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        return ChatReply("w", "Paris")

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        yield Chunk(final=await self.complete(request))


@ray.remote(num_cpus=0)
class Actor:
    """The same worker behind both ways."""

    async def endpoint(self) -> Endpoint:
        self._server = LinkServer({"w": Answers()})
        return await self._server.start("127.0.0.1")

    async def complete(self, worker: str, request: ChatRequest) -> ChatReply:
        return await Answers().complete(request)

    async def cpu_seconds(self) -> float:
        return time.process_time()


async def measure(
    call: Callable[[], Awaitable[object]], actor: object, concurrency: int, calls: int
) -> dict[str, float]:
    """Calls per second, median latency and CPU of both processes, the latter two in milliseconds per call."""
    latencies: list[float] = []

    async def caller(share: int) -> None:
        for _ in range(share):
            begin = time.perf_counter()
            await call()
            latencies.append(time.perf_counter() - begin)

    there = await actor.cpu_seconds.remote()  # type: ignore[attr-defined]
    here, begin = time.process_time(), time.perf_counter()
    await asyncio.gather(*(caller(calls // concurrency) for _ in range(concurrency)))
    wall, here = time.perf_counter() - begin, time.process_time() - here
    there = await actor.cpu_seconds.remote() - there  # type: ignore[attr-defined]
    return {
        "calls_per_s": len(latencies) / wall,
        "p50_ms": statistics.median(latencies) * 1e3,
        "cpu_ms": (here + there) / len(latencies) * 1e3,
    }


async def run(rounds: int, calls: int) -> dict[str, dict[str, dict[str, float]]]:
    actor = Actor.remote()  # type: ignore[attr-defined]
    link = await Link.connect(await actor.endpoint.remote())
    ways: dict[str, Call] = {
        "ray": lambda: actor.complete.remote("w", REQUEST),
        "link": lambda: link.complete("w", REQUEST),
    }
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    for number in track(range(rounds + 1), "rounds", transient=True):
        for concurrency in CONCURRENCY:
            for name, call in ways.items():
                sample = await measure(call, actor, concurrency, calls)
                if number:  # the first round warms up
                    samples.setdefault((name, concurrency), []).append(sample)
    await link.close()
    return {
        name: {
            str(concurrency): {
                figure: statistics.median(sample[figure] for sample in samples[name, concurrency])
                for figure in samples[name, concurrency][0]
            }
            for concurrency in CONCURRENCY
        }
        for name in ways
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        figures = asyncio.run(run(2, 600) if arguments.quick else run(7, 2000))
    finally:
        ray.shutdown()
    ratios = {c: figures["ray"][c]["cpu_ms"] / figures["link"][c]["cpu_ms"] for c in figures["ray"]}
    table = Table("way", "at once", "calls/s", "p50 ms", "CPU ms per call", title="reaching a provider actor")
    for name, by_concurrency in figures.items():
        for concurrency, row in by_concurrency.items():
            cells = [f"{row['calls_per_s']:.0f}", f"{row['p50_ms']:.2f}", f"{row['cpu_ms']:.3f}"]
            table.add_row(name, concurrency, *cells)
    Console().print(table)
    print(json.dumps({"benchmark": "link", "cpu_ratio": ratios, **figures}))


if __name__ == "__main__":
    main()
