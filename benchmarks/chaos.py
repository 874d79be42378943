"""A killer among a served pool and an evolution: does anything end as it must not?

    python benchmarks/chaos.py            10 minutes, 4 requests per second, a kill every 20 s
    python benchmarks/chaos.py --quick    2 minutes

A cluster of a head and four nodes on this machine (`ray.cluster_utils.Cluster`): two serve a pool with a router and
hold the provider actors, two play rollouts. Requests in all dialects come in, and evolutions run one after the other in
a driver of their own, through the same provider actors and limits. Every 20 s a random process is killed: an actor
(provider, Serve's controller, the evolution's queue or backbone), a replica (gateway, router) or a node as a whole,
which is then replaced. The head is not among them (`tests/cluster/head_restart.py`).

wrong         answers that are not the ones the upstream gave to this question, or are none of their dialect
untyped       requests that ended without an answer and without one of our errors
cut           streams that broke with the process that wrote them, a gateway's; nothing can end such a stream well
hung          requests without an end
outcomes      episodes that an evolution lost, and evolutions that did not end as the same one undisturbed, to the bit
exceeded      requests in the fullest minute of a provider, as it counted them, and calls at once, above their limits

Exits with 1 if one of these is not zero (streams may be cut where a gateway or its node was killed meanwhile). The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Also when it is run as a file; lanes import it, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.soak_load import Ended, Load, Target, drive
from tests.cluster import three_nodes as nodes  # sets up Ray, which nothing here imports earlier
from tests.faults import behaviour_of
from tests.loopback import Behaviour, LoopbackProvider, Recorded

ROOT = Path(__file__).resolve().parents[1]
SEED = 11
PER_MINUTE, AT_ONCE = 300, 16
"""The limits of each worker: low enough that evolutions use them up."""
SERVING = {"num_cpus": 4, "resources": {"egress": 1000, "serve": 1000}}
PLAYING = {"num_cpus": 1, "resources": {"rollout": 1000}}
ACTORS = ("ProviderActor", "ServeController", "GroupQueue", "StatesActor")
GATEWAY = "ServeReplica:fugu:Gateway"
REPLICAS = ("ServeReplica:fugu:Router", GATEWAY)
EVOLUTION_SECONDS = 400.0
_NOTICE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Kill:
    """What ended, and when (`time.perf_counter`)."""

    at: float
    kind: str
    what: str


@dataclass
class Upstream:
    """One worker's provider, which counts as a provider counts: when requests arrived, and how many were there at
    once."""

    provider: LoopbackProvider
    slow: bool = True
    arrived: list[float] = field(default_factory=list)

    def answer(self, request: Recorded) -> Behaviour:
        self.arrived.append(time.monotonic())
        if "request " in json.dumps(request.body["messages"]):
            return behaviour_of(SEED, 0.0, request)
        from tests.training.test_live import speaks

        return Behaviour(text=speaks(request), delay=0.15 if self.slow else 0.0)

    @property
    def fullest(self) -> int:
        """The most requests in any minute."""
        most, window = 0, deque[float]()
        for at in sorted(self.arrived):
            window.append(at)
            while window[0] <= at - 60.0:
                window.popleft()
            most = max(most, len(window))
        return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 minutes")
    parser.add_argument("--minutes", type=float, help="how long (10)")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second (4)")
    parser.add_argument("--every", type=float, default=20.0, help="seconds from one kill to the next (20)")
    parser.add_argument("--seed", type=int, default=SEED, help="of what is killed")
    arguments = parser.parse_args()
    seconds = 60 * (arguments.minutes or (2 if arguments.quick else 10))
    with tempfile.TemporaryDirectory(prefix="fugu-chaos-") as folder:
        report = chaos(Path(folder), seconds, arguments.rate, arguments.every, random.Random(arguments.seed))
    tell(report)
    print(json.dumps(report))
    if any(report["zero"].values()):
        raise SystemExit(1)


def chaos(folder: Path, seconds: float, rate: float, every: float, rng: random.Random) -> dict[str, Any]:
    nodes.prepared(folder)
    import ray
    from ray.cluster_utils import Cluster

    from tests.training.problems import world

    world(folder / "outcomes")
    nodes.backbone(folder)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    load, kills = Load(), list[Kill]()
    with ExitStack() as stack:
        stack.callback(cluster.shutdown)
        stack.callback(ray.shutdown)
        alive = [(kind, cluster.add_node(**kind)) for kind in (SERVING, SERVING, PLAYING, PLAYING)]
        ray.init(address=cluster.address, namespace="fugu", log_to_driver=False, logging_level="ERROR")
        upstreams = {name: stack.enter_context(upstream()) for name in nodes.WORKERS}
        workers = configured(folder, upstreams)
        url = stack.enter_context(nodes.served(folder, workers[:2]))
        log("served; the evolution begins")
        driver = stack.enter_context(driven(folder, cluster.address))
        waited_for(folder / "evolution0" / "router.evolve" / "history.jsonl", driver)
        log(f"load and kills for {seconds:g} s")
        over, began = threading.Event(), time.perf_counter()
        target = Target(url, nodes.KEY, None, SEED, 0.0)
        driving = threading.Thread(target=drive_until, args=(target, load, rate, seconds, over), daemon=True)
        driving.start()
        # Here, because Ray's nodes can only be started from a process's main thread.
        kill_in_turn(cluster, alive, over, every, rng, kills)
        (folder / "stop").touch()
        log("the evolution that runs goes on to its end")
        ended = driver.wait(EVOLUTION_SECONDS)
        after = nodes.until_it_answers(url)["ended"]
        fullest = {name: each.fullest for name, each in upstreams.items()}
        at_once = {name: each.provider.max_in_flight for name, each in upstreams.items()}
        for each in upstreams.values():
            each.slow = False
        log("the same evolutions, undisturbed")
        evolved = compared(folder)
        text = (folder / "evolution.log").read_text()[-3000:] if ended else ""
    cut, untyped = without_an_end(load.ended, kills, began)
    endings = load.endings()
    wrong = [f"{each.ending}: {each.error}" for each in load.ended if each.ending == "wrong bytes"]
    nameless = [
        f"{each.ending}: {each.path} {each.error} {each.at:.1f} s, {each.seconds:.1f} s long" for each in untyped
    ]
    killed = [f"{kill.what} at {kill.at - began:.1f} s" for kill in kills if untyped]
    over_limit = [max(0, fullest[name] - PER_MINUTE) + max(0, at_once[name] - AT_ONCE) for name in upstreams]
    return {
        "benchmark": "chaos",
        "seconds": seconds,
        "kills": dict(Counter(kill.kind for kill in kills)),
        "killed": dict(Counter(kill.what for kill in kills)),
        "requests": load.sent,
        "unsent": load.unsent,
        "right": endings["answered"],
        "typed": dict(load.errors() - Counter(each.error for each in load.ended if each.ending != "typed error")),
        "left": endings["left"],
        "cut": len(cut),
        "answers_after": after,
        "evolutions": len(evolved),
        "fullest_minute": fullest,
        "most_at_once": at_once,
        "evolution_error": text,
        "examples": [*wrong[:5], *nameless[:5], *killed],
        "zero": {
            "wrong": endings["wrong bytes"],
            "untyped": len(untyped),
            "hung": endings["hung"] + load.running,
            "outcomes": sum(evolved) + (ended != 0) + (not evolved),
            "exceeded": sum(over_limit),
            "silent_after": int(after != "answered"),
        },
    }


@contextmanager
def upstream() -> Iterator[Upstream]:
    with LoopbackProvider(record=False) as provider:
        made = Upstream(provider)
        provider.chooses = made.answer
        yield made


def configured(folder: Path, upstreams: dict[str, Upstream]) -> list[dict[str, Any]]:
    """config.yaml, the pool with its limits, and twin.yaml, the same without; the workers of the first."""
    common = {
        "provider": "openai",
        "price": {"input": 1.0, "output": 10.0},
        "retry": {"attempts": 2},
        "timeout": {"connect": 5, "first_byte": 60, "total": 140},
    }
    limits = {"requests_per_minute": PER_MINUTE, "concurrency": AT_ONCE, "max_wait": 120}
    workers = [
        {"name": name, "model": name, "base_url": each.provider.url_for("openai"), **common}
        for name, each in upstreams.items()
    ]
    limited = [{**each, "limits": limits} for each in workers]
    (folder / "config.yaml").write_text(yaml.safe_dump({"workers": limited}))
    (folder / "twin.yaml").write_text(yaml.safe_dump({"workers": workers}))
    return limited


# --- what dies ---


def drive_until(target: Target, load: Load, rate: float, seconds: float, over: threading.Event) -> None:
    """The whole load; `over` is set when it has ended."""
    try:
        asyncio.run(drive(target, load, rate=rate, seconds=seconds))
    finally:
        over.set()


def kill_in_turn(
    cluster: Any,
    alive: list[tuple[dict[str, Any], Any]],
    over: threading.Event,
    every: float,
    rng: random.Random,
    kills: list[Kill],
) -> None:
    while not over.wait(every):
        kind = rng.choice(("actor", "replica", "node"))
        if kind == "node":
            place = rng.randrange(len(alive))
            like, node = alive[place]
            what = "node that serves" if like is SERVING else "node that plays"
            kills.append(Kill(time.perf_counter(), kind, what))
            cluster.remove_node(node, allow_graceful=False)
            log(f"killed a {what}")
            alive[place] = like, cluster.add_node(**like)
            continue
        found = {title: nodes.processes(f"ray::{title}") for title in (ACTORS if kind == "actor" else REPLICAS)}
        title = rng.choice([title for title, running in found.items() if running] or [""])
        if not title:
            log(f"no {kind} to kill")
            continue
        kills.append(Kill(time.perf_counter(), kind, title))
        rng.choice(found[title]).kill()
        log(f"killed {title}")


def without_an_end(ended: Sequence[Ended], kills: Sequence[Kill], began: float) -> tuple[list[Ended], list[Ended]]:
    """Requests whose connection broke: streams that were cut together with a gateway, and the others."""
    gone = [kill.at - began for kill in kills if kill.what in (GATEWAY, "node that serves")]
    cut, untyped = [], []
    for each in ended:
        if each.ending != "no reply":
            continue
        until = each.at + each.seconds + 1.0
        with_it = any(each.at - _NOTICE_SECONDS <= at <= until for at in gone)
        (cut if each.stream and each.error == "ClientPayloadError" and with_it else untyped).append(each)
    return cut, untyped


# --- evolutions ---


@contextmanager
def driven(folder: Path, address: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "benchmarks.chaos", "evolve", str(folder), address]
    with (folder / "evolution.log").open("wb") as out:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()


def evolutions(folder: Path, address: str) -> None:
    """The driver: one evolution after the other until it is told to stop."""
    import ray

    ray.init(address=address, namespace="fugu", log_to_driver=False, logging_level="ERROR")
    number = 0
    while not (folder / "stop").exists():
        nodes.evolve(folder, f"evolution{number}", seed=number + 1)
        (folder / f"evolution{number}" / "ended").touch()
        number += 1


def compared(folder: Path) -> list[int]:
    """Of each evolution that ended, what it lost: excluded episodes, rows that differ, the checkpoint."""
    found = []
    while (folder / f"evolution{len(found)}" / "ended").exists():
        number = len(found)
        nodes.evolve(folder, f"twin{number}", seed=number + 1, config="twin.yaml")
        rows, same = (_rows(folder / f"{name}{number}") for name in ("evolution", "twin"))
        lost = sum(row["excluded"] for row in rows) + abs(len(rows) - len(same))
        lost += sum(_but_usd(one) != _but_usd(other) for one, other in zip(rows, same, strict=False))
        heads = [folder / f"{name}{number}" / "router.safetensors" for name in ("evolution", "twin")]
        lost += nodes.content(heads[0]) != nodes.content(heads[1])
        if lost:
            log(f"evolution {number} lost {lost}: {rows} where undisturbed {same}")
        found.append(lost)
    return found


def _rows(out: Path) -> list[dict[str, Any]]:
    from tests.training.test_evolve import repeatable

    return repeatable(out / "router.evolve" / "history.jsonl")


def _but_usd(row: dict[str, Any]) -> dict[str, Any]:
    # Dollars are added up in the order in which answers come.
    return {name: round(value, 9) if name == "usd" else value for name, value in row.items()}


def waited_for(path: Path, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + EVOLUTION_SECONDS
    while not path.exists():
        if driver.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the evolution did not begin: {(path.parents[2] / 'evolution.log').read_text()[-3000:]}")
        time.sleep(0.2)


_BEGAN = time.monotonic()


def log(text: str) -> None:
    print(f"{time.monotonic() - _BEGAN:6.0f} s  {text}", file=sys.stderr, flush=True)


def tell(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['seconds']:g} s with {sum(report['kills'].values())} kills", show_header=False)
    table.add_row("killed", ", ".join(f"{count}x {what}" for what, count in report["killed"].items()))
    table.add_row("requests", f"{report['requests']}, {report['left']} of whose callers went away")
    table.add_row("answered, right", str(report["right"]))
    table.add_row("typed errors", ", ".join(f"{count}x {name}" for name, count in report["typed"].items()) or "0")
    table.add_row("cut with their gateway", str(report["cut"]))
    table.add_row("evolutions", str(report["evolutions"]))
    for name in ("fullest_minute", "most_at_once"):
        limit = PER_MINUTE if name == "fullest_minute" else AT_ONCE
        told = ", ".join(f"{worker} {count}" for worker, count in report[name].items())
        table.add_row(name.replace("_", " "), f"{told} of {limit}")
    table.add_section()
    for name, count in report["zero"].items():
        table.add_row(name.replace("_", " "), str(count))
    console = Console(width=max(Console().width, 110))
    console.print(table)
    for each in report["examples"]:
        console.print(each, markup=False)
    if report["evolution_error"]:
        console.print(report["evolution_error"], markup=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["evolve"]:
        evolutions(Path(sys.argv[2]), sys.argv[3])
    else:
        main()
