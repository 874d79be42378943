"""Evolution's rollouts over 1, 2, 4 and 8 nodes, and what their measured costs say about 1,000.

    python benchmarks/scale.py [--quick]

The nodes are raylets on this machine with CPUs that only Ray counts; workers sleep for a log-normal time (mean 5 s,
less with --quick), and everything else is the real engine: a lane per node, sessions, results over Ray to the driver.
All nodes share this machine's cores, so that the offered load must stay below what those can carry.

efficiency    ideal / measured wall time; ideal is the same sessions in the same order on as many slots that take the
              next one at once. What is left is waiting that the engine causes.
driver, nodes CPU seconds per rollout: of the driver's process, and of everything that runs on the nodes.
rate          rollouts per second when workers take no time: what the engine carries on these cores.
projection    for 1,000 nodes of 8 cores: the rate at which the driver has used up a core, and the sessions at once and
              nodes that this is at a mean latency of 5 s.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Also when it is run as a file; lanes import it, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from actors.messages import ChatReply
from benchmarks.evolution import WORKERS, context, ideal, made_tasks
from training.calls import Key
from training.fanout import FanOut, Group

CANDIDATES = 32
NODE_CPUS = 8
MEAN_SECONDS = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sessions that take less time")
    quick = parser.parse_args().quick
    sizes = (1, 2, 4, 8)
    latency, slots = (2.0, 64) if quick else (MEAN_SECONDS, 256)
    rows = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        for nodes in sizes:
            while len(cluster.worker_nodes) < nodes:
                cluster.add_node(num_cpus=1, resources={"rollout": 1000})
            cluster.wait_for_nodes()
            rows.append(
                {"nodes": nodes, **_loaded(nodes, latency, slots * nodes, 3 if quick else 4), **_unloaded(nodes)}
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    told = {"latency_s": latency, "nodes": rows, "projection": projection(rows)}
    Console().print(table(rows))
    for name, value in told["projection"].items():
        print(f"{name:>32}  {value:,.4g}")
    print(json.dumps(told))


def _loaded(nodes: int, latency: float, slots: int, rounds: int) -> dict[str, float]:
    """`rounds` sessions for each slot, no two alike, so that nothing is saved."""
    tasks = made_tasks(slots * rounds, f"s{nodes}-")
    durations = dict.fromkeys((task.task_id for task in tasks), 0.0)

    def note(answers: Sequence[tuple[str, Key, ChatReply]]) -> None:
        for task_id, _, reply in answers:
            if task_id in durations:  # not those that warm up
                durations[task_id] += reply.timing.total_s

    groups = [Group(task, 0, np.zeros((1, 2)), ((n, n % len(WORKERS)),)) for n, task in enumerate(tasks)]
    fan_out = _fan_out(latency, slots, nodes, note)
    _warm(fan_out, nodes)
    before, began = _cpu_seconds(), time.perf_counter()
    fan_out.play(None, groups)
    wall = time.perf_counter() - began
    used = {kind: seconds - before.get(kind, 0.0) for kind, seconds in _cpu_seconds().items()}
    count = len(groups)
    return {
        "in_flight": slots,
        "rollouts": count,
        "wall_s": wall,
        "per_second": count / wall,
        "efficiency": ideal(list(durations.values()), slots) / wall,
        "driver_cores": used["driver"] / wall,
        "driver_ms": 1000 * used["driver"] / count,
        "node_ms": 1000 * used["lane"] / count,
        "ray_ms": 1000 * used["ray"] / count,
        "driver_mb": psutil.Process().memory_info().rss / 1e6,
    }


def _unloaded(nodes: int) -> dict[str, float]:
    """Workers that take no time, `CANDIDATES` sessions to a task; and a generation that has nothing but its lanes."""
    tasks = made_tasks(200, "r")
    groups = [
        Group(task, 0, np.zeros((1, 2)), tuple((n * CANDIDATES + c, c % len(WORKERS)) for c in range(CANDIDATES)))
        for n, task in enumerate(tasks)
    ]
    fan_out = _fan_out(0.0, 1024, nodes, lambda _answers: None)
    _warm(fan_out, nodes)
    before, began = time.process_time(), time.perf_counter()
    fan_out.play(None, groups)
    wall, cpu = time.perf_counter() - began, time.process_time() - before
    empty = [replace(group, players=group.players[:1]) for group in groups[:nodes]]
    starts = []
    for _ in range(5):
        began = time.perf_counter()
        fan_out.play(None, empty)
        starts.append(time.perf_counter() - began)
    count = len(groups) * CANDIDATES
    return {"rate": count / wall, "rate_driver_ms": 1000 * cpu / count, "round_s": statistics.median(starts)}


def _fan_out(latency: float, slots: int, lanes: int, note: Any) -> FanOut:
    where = {"rollout": 0.001}
    return FanOut(context(latency, None, by_worker=True), slots, lanes, lambda _task: {}, note, where)


def _warm(fan_out: FanOut, nodes: int) -> None:
    """Processes are started once in a run, not in each generation."""
    groups = [Group(task, 0, np.zeros((1, 2)), ((n, 0),)) for n, task in enumerate(made_tasks(4 * nodes, "w"))]
    for _ in range(2):
        fan_out.play(None, groups)


def _cpu_seconds() -> dict[str, float]:
    """Of this process, of the lanes', and of Ray's own."""
    found = {"driver": time.process_time(), "lane": 0.0, "ray": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            times, title = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        found["lane" if title.startswith("ray::") and "Agent" not in title else "ray"] += times.user + times.system
    return found


def projection(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """From the largest cluster that was measured."""
    last = rows[-1]
    driver = 1000 / last["driver_ms"]
    node = NODE_CPUS * 1000 / last["node_ms"]
    return {
        "driver_rollouts_per_s": driver,
        "driver_rollouts_per_s_batched": 1000 / last["rate_driver_ms"],
        "sessions_at_once": driver * MEAN_SECONDS,
        "node_rollouts_per_s": node,
        "nodes_that_fill_the_driver": driver / node,
        "rollouts_per_node_s_at_1000": driver / 1000,
        "round_s_at_1000_lanes": last["round_s"] * 1000 / last["nodes"],
    }


def table(rows: Sequence[dict[str, float]]) -> Table:
    shown = Table(
        "nodes", "in flight", "rollouts/s", "efficiency", "driver, cores", "driver, MB", "ms driver", "ms node"
    )
    for row in rows:
        shown.add_row(
            f"{row['nodes']}",
            f"{row['in_flight']}",
            f"{row['per_second']:.0f}",
            f"{row['efficiency']:.1%}",
            f"{row['driver_cores']:.2f}",
            f"{row['driver_mb']:.0f}",
            f"{row['driver_ms']:.2f}",
            f"{row['node_ms']:.2f}",
        )
    return shown


if __name__ == "__main__":
    main()
