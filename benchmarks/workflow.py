"""What running a workflow adds to its critical path, with workers of simulated latency.

    python benchmarks/workflow.py [--quick]

Each request is a plan as text: it is parsed, run and answered. A worker sleeps a time drawn from the given range and
then says 4,000 characters, which the executor quotes to whoever may read them. The critical path is the slowest chain
of those drawn times, so that everything else counts as added: parsing, messages, the event loop and the overshoot of
sleeping itself, which is shown beside it (the same sleeps in bare asyncio). All requests of a round begin together.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from actors.messages import ChatReply, ChatRequest, Chunk, Message, Usage
from orchestrator.budget import Budget
from orchestrator.executor import RunEnded, execute, stream
from orchestrator.workflow import Step, Workflow, parse_workflow, render_workflow

POOL = ("a", "b", "c", "d", "e")
SHAPES = {
    "single": ((),),
    "chain": ((), (0,), (1,)),
    "parallel": ((), (), (), (0, 1, 2)),
    "tree": ((), (), (0, 1), (), (2, 3)),
}
ANSWER = "Some of it is <b>right</b>, and some of it is not. " * 80
QUERY = ChatRequest((Message("user", "How many letters has the longest river's name? " * 20),))
LATENCY_S = (0.1, 0.3)


@dataclass(frozen=True)
class Sleeper:
    """A worker that takes the given seconds."""

    name: str
    seconds: float

    async def complete(self, request: ChatRequest) -> ChatReply:
        await asyncio.sleep(self.seconds)
        return ChatReply(self.name, ANSWER, usage=Usage(1000, 1000), cost_usd=0.01)

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        began, pieces = time.perf_counter(), 20
        for number in range(pieces):
            # By the clock, so that the overshoots of many short sleeps do not add up.
            await asyncio.sleep(began + self.seconds * (number + 1) / pieces - time.perf_counter())
            yield Chunk(ANSWER[number * len(ANSWER) // pieces : (number + 1) * len(ANSWER) // pieces])
        yield Chunk(final=ChatReply(self.name, ANSWER, usage=Usage(1000, 1000), cost_usd=0.01))


@dataclass(frozen=True)
class Case:
    """One request: its plan as text, its workers (one per step) and its critical path in seconds."""

    text: str
    workflow: Workflow
    workers: dict[str, Sleeper]
    critical_path_s: float


def case(shape: str, generator: random.Random) -> Case:
    steps = tuple(Step(POOL[index], f"Do part {index} of it.", reads) for index, reads in enumerate(SHAPES[shape]))
    workflow = Workflow(steps)
    workers = {name: Sleeper(name, generator.uniform(*LATENCY_S)) for name in POOL}
    ends: list[float] = []
    for step in steps:
        ends.append(workers[step.worker].seconds + max((ends[i] for i in step.access), default=0.0))
    return Case(f"I split it.\n\n{render_workflow(workflow, POOL)}", workflow, workers, ends[-1])


async def orchestrated(one: Case) -> float:
    began = time.perf_counter()
    workflow = parse_workflow(one.text, POOL)
    run = await execute(QUERY, workflow, one.workers, ranking=POOL, budget=Budget(seconds=60, tokens=10**6, calls=50))
    assert run.complete
    return time.perf_counter() - began


async def streamed(one: Case) -> float:
    began = time.perf_counter()
    async for event in stream(QUERY, parse_workflow(one.text, POOL), one.workers, ranking=POOL):
        if isinstance(event, RunEnded):
            assert event.run.complete
    return time.perf_counter() - began


async def bare(one: Case) -> float:
    """The same sleeps and nothing else."""
    began = time.perf_counter()
    tasks: list[asyncio.Task[None]] = []

    async def step(seconds: float, reads: list[asyncio.Task[None]]) -> None:
        for read in reads:
            await read
        await asyncio.sleep(seconds)

    for each in one.workflow.steps:
        reads = [tasks[i] for i in each.access]
        tasks.append(asyncio.create_task(step(one.workers[each.worker].seconds, reads)))
    await tasks[-1]
    return time.perf_counter() - began


async def measure(shape: str, requests: int, rounds: int, generator: random.Random) -> dict[str, float]:
    """Medians over all requests of all rounds: milliseconds added per step of the critical path, and wall-clock over
    critical path; and this process's own CPU milliseconds per step, which a busy machine does not change."""
    added: list[float] = []
    busy_s = 0.0
    ratios: dict[str, list[float]] = {"orchestrated": [], "streamed": [], "bare": []}
    for _ in range(rounds):
        for name, way in (("bare", bare), ("orchestrated", orchestrated), ("streamed", streamed)):
            cases = [case(shape, generator) for _ in range(requests)]
            cpu_s = time.process_time()
            walls = await asyncio.gather(*map(way, cases))
            pairs = list(zip(walls, cases, strict=True))
            ratios[name] += [wall / one.critical_path_s for wall, one in pairs]
            if name == "orchestrated":
                busy_s += time.process_time() - cpu_s
                added += [(wall - one.critical_path_s) / one.workflow.depth for wall, one in pairs]
    ordered = sorted(ratios["orchestrated"])
    return {
        "added_ms_per_step": 1000 * statistics.median(added),
        "cpu_ms_per_step": 1000 * busy_s / (rounds * requests * len(SHAPES[shape])),
        "ratio": statistics.median(ordered),
        "ratio_p95": ordered[int(0.95 * (len(ordered) - 1))],
        "streamed_ratio": statistics.median(ratios["streamed"]),
        "bare_ratio": statistics.median(ratios["bare"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; within half a minute")
    options = parser.parse_args()
    generator = random.Random(0)
    table = Table(title=f"workflow over its critical path, steps of {LATENCY_S[0]:g} to {LATENCY_S[1]:g} s")
    for column in ("shape", "at once", "added ms/step", "CPU ms/step", "ratio", "p95", "streamed", "bare"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    results: dict[str, float] = {}
    gc.freeze()  # what was imported is not looked through again while the clock runs
    for shape in SHAPES:
        for requests in (1, 64):
            rounds = (5 if requests == 1 else 1) if options.quick else (20 if requests == 1 else 5)
            got = asyncio.run(measure(shape, requests, rounds, generator))
            table.add_row(
                shape,
                str(requests),
                f"{got['added_ms_per_step']:.2f}",
                f"{got['cpu_ms_per_step']:.2f}",
                *(f"{got[name]:.3f}" for name in ("ratio", "ratio_p95", "streamed_ratio", "bare_ratio")),
            )
            results |= {f"{shape}_{requests}_{name}": round(value, 4) for name, value in got.items()}
    Console(width=100).print(table)
    singles = [results[f"{shape}_1_added_ms_per_step"] for shape in SHAPES]
    manies = [results[f"{shape}_64_ratio"] for shape in SHAPES]
    print(f"at 1 request at most {max(singles):.2f} ms per step are added; at 64 at most {max(manies) - 1:.1%}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
