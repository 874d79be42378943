"""The evolution engine with workers of simulated latency: what the optimiser costs, how full it keeps the workers, and
how many calls the cache and common random numbers save.

    python benchmarks/evolution.py [--quick]

Everything is the real engine (Ray tasks, sessions with roles, the call store) but for the models: a worker sleeps for a
log-normal time that its request decides, and transcripts get features from their hash instead of a backbone.

efficiency   `W` sessions at once; ideal is the wall time of the same sessions on `W` slots that are refilled at once
             (in the same order), efficiency is ideal / measured. Every session asks for calls of its own: nothing is
             saved here.
overhead     share of a generation (32 candidates of 10,240 numbers, 16 tasks) that is not spent playing it.
calls        to reach the same validation reward: tasks drawn for each candidate by itself and every call paid (the loop
             of the papers), against common random numbers with a call store. Medians over seeds.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import heapq
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from actors.messages import ChatReply, ChatRequest, Chunk, Message, Timing, Worker
from orchestrator.head import Checkpoint, CheckpointInfo
from training.calls import CallStore, Key
from training.evolution import Settings
from training.fanout import Context, FanOut, Group
from training.generations import Course, Spent, evolve
from training.live import LivePlayer
from training.outcomes import Task
from training.players import RecordedPlayer
from training.players import Table as Known
from training.policy import Policy
from training.rollout import Draw, Rollouts, SessionSettings

Vector = NDArray[np.float64]
WORKERS = tuple(f"worker-{number}" for number in range(7))
DIMENSION = 1024
ROLES_SESSION = SessionSettings("fugu-trinity", max_turns=3, choose="sample")


@dataclass(frozen=True)
class Simulated:
    """A worker that takes its time and knows some things, both decided by what it is asked."""

    name: str
    latency: float

    async def complete(self, request: ChatRequest) -> ChatReply:
        asked = request.messages[-1].text
        rng = np.random.default_rng(int(hashlib.sha256(f"{self.name}{request.fingerprint()}".encode()).hexdigest(), 16))
        seconds = self.latency * float(rng.lognormal(-0.125, 0.5)) if self.latency else 0.0
        await asyncio.sleep(seconds)
        if "Begin with the single word ACCEPT" in asked:
            text = "ACCEPT" if rng.random() < 0.5 else "REVISE"
        elif "Do not solve the task" in asked:
            text = "<suggestion>Look closely.</suggestion><next>worker</next>"
        else:
            text = "x" if rng.random() < 0.5 else "y"
        return ChatReply(self.name, text, timing=Timing(total_s=seconds))

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        yield Chunk(final=await self.complete(request))


@dataclass(frozen=True)
class SimulatedPool:
    latency: float

    def __call__(self) -> Mapping[str, Worker]:
        return {name: Simulated(name, self.latency) for name in WORKERS}


@ray.remote(num_cpus=0)
class SimulatedStates:
    async def states(self, transcripts: Sequence[tuple[Message, ...]]) -> NDArray[np.float32]:
        seeds = [int(hashlib.sha256(repr(one).encode()).hexdigest()[:16], 16) for one in transcripts]
        return np.array([np.random.default_rng(seed).standard_normal(DIMENSION, np.float32) for seed in seeds])


def made_tasks(count: int, prefix: str) -> list[Task]:
    return [Task(f"{prefix}{n}", f"task {prefix} {n}", "x", "d", "s", "train", "exact") for n in range(count)]


def context(latency: float, states: Any, *, by_worker: bool = False) -> Context:
    settings = SessionSettings() if by_worker else ROLES_SESSION
    return Context(WORKERS, settings, SimulatedPool(latency), {}, None if by_worker else states, by_worker=by_worker)


def ideal(durations: Sequence[float], slots: int) -> float:
    """Wall time of these sessions, begun in this order, on slots that take the next one at once. The order matters: who
    is long and begins late decides the end, and a shuffle of them can take a tenth more or less."""
    free = [0.0] * slots
    for seconds in durations:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def efficiency(latency: float, states: Any, *, slots: int, sessions: int, lanes: int) -> dict[str, float]:
    tasks = made_tasks(sessions, f"e{slots}-")
    durations = dict.fromkeys((task.task_id for task in tasks), 0.0)

    def note(answers: Sequence[tuple[str, Key, ChatReply]]) -> None:
        for task_id, _, reply in answers:
            durations[task_id] += reply.timing.total_s

    rng = np.random.default_rng(slots)
    groups = [Group(task, 0, rng.random((3, 2)), ((n, 0),)) for n, task in enumerate(tasks)]
    heads = np.zeros((1, len(WORKERS) + 3, DIMENSION))
    fan_out = FanOut(context(latency, states), slots, lanes, lambda _task: {}, note)
    # A run starts its actors once, not in each generation.
    fan_out.play(heads, [replace(groups[0], players=((-1, 0),))])
    durations.update(dict.fromkeys(durations, 0.0))
    began, cpu = time.perf_counter(), time.process_time()
    episodes = fan_out.play(heads, groups)
    wall = time.perf_counter() - began
    best = ideal(list(durations.values()), slots)
    return {
        "slots": slots,
        "sessions": sessions,
        "turns": statistics.mean(episode.turns for episode in episodes.values()),
        "wall_s": wall,
        "ideal_s": best,
        "efficiency": best / wall,
        "driver_cpu_share": (time.process_time() - cpu) / wall,
    }


def rate(lanes: int, rollouts: int) -> float:
    """Rollouts per second that the engine carries when workers take no time: 32 candidates to a task."""
    tasks = made_tasks(rollouts // 32, "r")
    groups = [
        Group(task, 0, np.zeros((1, 2)), tuple((n * 32 + c, c % len(WORKERS)) for c in range(32)))
        for n, task in enumerate(tasks)
    ]
    fan_out = FanOut(context(0.0, None, by_worker=True), 1024, lanes, lambda _task: {}, lambda _answers: None)
    fan_out.play(None, groups[:2])
    began = time.perf_counter()
    fan_out.play(None, groups)
    return len(groups) * 32 / (time.perf_counter() - began)


class Timed(LivePlayer):
    """Counts the seconds spent playing."""

    seconds = 0.0

    def play(self, thetas: Vector, drawn: Draw) -> Rollouts:
        began = time.perf_counter()
        try:
            return super().play(thetas, drawn)
        finally:
            self.seconds += time.perf_counter() - began

    def validate(self, theta: Vector) -> Rollouts:
        began = time.perf_counter()
        try:
            return super().validate(theta)
        finally:
            self.seconds += time.perf_counter() - began


def overhead(latency: float, states: Any, *, generations: int, lanes: int, folder: Path) -> dict[str, float]:
    """A real run on simulated workers: everything that is not playing is the optimiser's, the state's and ours."""
    info = CheckpointInfo(WORKERS, "none", "none", roles=True)
    policy = Policy(Checkpoint(info, torch.zeros(info.rows, DIMENSION)))
    train, held = made_tasks(200, "t"), made_tasks(16, "v")
    store = CallStore(folder / "calls.sqlite")
    fan_out = FanOut(context(latency, states), 256, lanes, store.of, store.add)
    hidden = torch.zeros(len(train), DIMENSION), torch.zeros(len(held), DIMENSION)
    player = Timed(policy, (train, hidden[0]), (held, hidden[1]), ROLES_SESSION, fan_out, store)
    course = Course(Settings(), generations=generations, size=16, turns=3, validate_every=generations)
    began = time.perf_counter()
    found = evolve(player, policy.vector(), course, folder / "state.pkl", identity={})
    wall = time.perf_counter() - began
    rows = found.history
    store.close()
    return {
        "numbers": policy.size,
        "generations": generations,
        "generation_s": wall / generations,
        "optimiser_s": statistics.mean(row["optimiser_s"] for row in rows),
        "overhead": 1 - player.seconds / wall,
        "rollouts": sum(row["rollouts"] for row in rows),
        "calls": store.calls,
        "naive_calls": sum(row["naive_calls"] for row in rows),
    }


class Counting(RecordedPlayer):
    """Common random numbers, every (task, worker) paid once."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.paid: set[tuple[str, int, int]] = set()

    def play(self, thetas: Vector, drawn: Draw) -> Rollouts:
        return self._count(super().play(thetas, drawn), "t", drawn.tasks)

    def validate(self, theta: Vector) -> Rollouts:
        rollouts = super().validate(theta)
        return self._count(rollouts, "v", np.arange(rollouts.reward.shape[1]))

    def spent(self) -> Spent:
        return Spent(len(self.paid))

    def _count(self, rollouts: Rollouts, which: str, tasks: NDArray[np.int64]) -> Rollouts:
        workers = rollouts.chosen.argmax(-1)
        for line in workers:
            self.paid.update((which, int(task), int(worker)) for task, worker in zip(tasks, line, strict=True))
        return rollouts


class Naive(RecordedPlayer):
    """Every candidate draws its own tasks, and every call is paid."""

    calls = 0

    def play(self, thetas: Vector, drawn: Draw) -> Rollouts:
        rng = np.random.default_rng([5, *drawn.tasks.tolist()])
        lines = []
        for theta in thetas:
            tasks = rng.choice(self.tasks, size=len(drawn.tasks), replace=False)
            lines.append(super().play(theta[None], Draw(tasks, drawn.samples, drawn.uniforms)))
        self.calls += len(thetas) * len(drawn.tasks)
        parts = (np.concatenate([getattr(one, name) for one in lines]) for name in ("reward", "turns", "cost_usd"))
        return Rollouts(*parts, np.concatenate([one.chosen for one in lines]))

    def validate(self, theta: Vector) -> Rollouts:
        rollouts = super().validate(theta)
        self.calls += rollouts.played
        return rollouts

    def spent(self) -> Spent:
        return Spent(self.calls)


def saved(seed: int, generations: int, folder: Path) -> dict[str, float]:
    """Calls to the validation reward that both reach: the lower of the two best ones."""
    rng = np.random.default_rng(seed)
    dimension, kinds, train, held = 48, 24, 400, 200
    centres, strength = rng.normal(size=(kinds, dimension)), rng.beta(0.7, 0.7, size=(kinds, len(WORKERS)))
    kind = rng.integers(kinds, size=train + held)
    features = torch.from_numpy(centres[kind] + 0.7 * rng.normal(size=(train + held, dimension))).float()
    scores = (rng.random((train + held, len(WORKERS))) < strength[kind]).astype(float)
    policy = Policy(Checkpoint(CheckpointInfo(WORKERS, "none", "none"), torch.zeros(len(WORKERS), dimension)))
    known = Known(scores, np.full_like(scores, math.nan))
    parts = [(features[rows], known.part(rows)) for rows in (np.arange(train), np.arange(train, train + held))]
    course = Course(Settings(sigma=0.1, seed=seed + 1), generations=generations, size=16, validate_every=5)
    runs = {}
    for name, kind_of in (("ours", Counting), ("naive", Naive)):
        player = kind_of(policy, *parts)
        found = evolve(player, policy.vector(), course, folder / f"{name}{seed}.pkl", identity={})
        runs[name] = [(row["calls"], row["validation"]) for row in found.history if row["validation"] is not None]
    target = min(max(value for _, value in run) for run in runs.values())
    calls = {name: next(calls for calls, value in run if value >= target) for name, run in runs.items()}
    return {"target": target, "ours": calls["ours"], "naive": calls["naive"], "ratio": calls["naive"] / calls["ours"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute on an idle machine")
    arguments = parser.parse_args()
    console, quick, latency = Console(), arguments.quick, 1.0
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as work:
            lanes = max(2, os.cpu_count() or 1)
            simulated: Any = SimulatedStates
            states = simulated.remote()
            carried = rate(lanes, 2048 if quick else 16384)  # starts the lanes' processes too
            shapes = ((32, 128), (256, 1024)) if quick else ((16, 160), (64, 640), (256, 2560))
            rows = [efficiency(latency, states, slots=w, sessions=count, lanes=lanes) for w, count in shapes]
            generation = overhead(latency, states, generations=1 if quick else 4, lanes=lanes, folder=Path(work))
    finally:
        ray.shutdown()
    with tempfile.TemporaryDirectory() as work:
        seeds = range(3 if quick else 10)
        runs = [saved(seed, 40 if quick else 60, Path(work)) for seed in seeds]
    ratio = statistics.median(run["ratio"] for run in runs)

    table = Table("", "", title=f"evolution engine, simulated workers of {latency:g} s on average")
    for row in rows:
        label = f"{row['slots']:.0f} sessions at once, {row['sessions']:.0f} in all, {row['turns']:.1f} turns"
        table.add_row(label, f"{row['efficiency']:.1%} of ideal ({row['ideal_s']:.2f} s in {row['wall_s']:.2f} s)")
    table.add_row("rollouts per second, workers without latency", f"{carried:.0f}")
    asking = f"ask and tell {generation['optimiser_s']:.3f} s"
    spent = f"{generation['overhead']:.2%} of {generation['generation_s']:.2f} s ({asking})"
    table.add_row(f"overhead of a generation, {generation['numbers']:.0f} numbers", spent)
    per = f"{statistics.median(r['naive'] for r in runs):.0f} to {statistics.median(r['ours'] for r in runs):.0f}"
    table.add_row("calls to equal validation reward, single turn", f"{per}: {ratio:.1f}x fewer")
    console.print(table)
    figures = {"efficiency": rows, "rollouts_per_s": carried, "generation": generation, "calls": runs, "saved": ratio}
    print(json.dumps({"benchmark": "evolution", "latency_s": latency, **figures}))


if __name__ == "__main__":
    main()
