"""A long run of mixed traffic with faults: does memory grow, does latency, does any request end as it must not?

    python benchmarks/soak.py            30 minutes at 20 requests per second
    python benchmarks/soak.py --quick    2 minutes at 8
    python benchmarks/soak.py --rate 0.5 --minutes 60 --warm 35    what grows with time alone, and for how long

The real server (`fugu serve`, HAProxy, a router with a tiny backbone, a key with an account, limits with a journal) in
front of two workers, OpenAI's and Anthropic's wire formats, whose provider is a process of its own on the loopback
interface. Chat, Responses and Messages in turn, half of them streamed; eight of ten ask for `fugu`, one for
`fugu-trinity`, one for `fugu-ultra`, whose conductor is one of the workers. `--faults` of the requests meet a provider
that resets, stalls, writes garbage, cuts its JSON or answers 429, 500 or 401 (`tests/faults.py`), a tenth are answered
slowly, a fiftieth of the callers go away.

Prints per process its memory after warm-up and at the end, added latency per window (total, of requests whose provider
answers at once, over a direct call), how every request ended, and what is still held when all are over. `--out` gets
`soak.json` and `soak.png`. Exits with 1 if a request hung, had no reply or wrong bytes, or a budget leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when it is run as a file

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from actors.journal import unsettled
from benchmarks.soak_figures import Growth, Memory, Window, draw, growth, sample, slope_with_interval, windows
from benchmarks.soak_load import BAD, Load, Target, drive
from serve.keys import KeyBook
from tests.serve.running import RunningServer

ROOT = Path(__file__).resolve().parent.parent
SEED = 7
START_SECONDS = 400.0
TOTAL_SECONDS = 60.0
REQUEST_SECONDS = 120.0
LEAKED_SECONDS = TOTAL_SECONDS + 30
"""A grant that is open for so long was never given back: nothing takes longer than `TOTAL_SECONDS` upstream."""
MODELS = (("fugu", 0.8), ("fugu-trinity", 0.1), ("fugu-ultra", 0.1))
WORKERS = {"first": "openai", "second": "anthropic"}


@dataclass(frozen=True, slots=True)
class Plan:
    """How long (seconds), how much, and from when on it counts (`warm`). `sample` and `window` are seconds."""

    seconds: float
    rate: float
    faults: float
    warm: float
    sample: float
    window: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 minutes at 8 requests per second")
    parser.add_argument("--minutes", type=float, help="how long (30)")
    parser.add_argument("--warm", type=float, help="from which minute on growth counts (5)")
    parser.add_argument("--rate", type=float, help="requests per second (20)")
    parser.add_argument("--faults", type=float, default=0.1, help="the share of the requests that fail upstream (0.1)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "soak")
    arguments = parser.parse_args()
    seconds = 60 * (arguments.minutes or (2 if arguments.quick else 30))
    rate = arguments.rate or (8 if arguments.quick else 20)
    short = seconds < 600
    plan = Plan(
        seconds,
        rate,
        arguments.faults,
        warm=60 * arguments.warm if arguments.warm else seconds / 2 if short else 300.0,
        sample=2.5 if short else 10.0,
        window=15.0 if short else 60.0,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fugu-soak-") as folder:
        report = soak(plan, Path(folder), arguments.out)
    (arguments.out / "soak.json").write_text(json.dumps(report, indent=1))
    print(json.dumps({key: report[key] for key in ("endings", "leaked", "largest_growth_percent", "p99_slope")}))
    if any(report["endings"].get(ending) for ending in BAD) or any(report["leaked"].values()):
        raise SystemExit(1)


def soak(plan: Plan, folder: Path, out: Path) -> dict[str, Any]:
    """Run it, print the tables, draw the picture; what was found."""
    state = folder / "state"
    key = create_key(state)
    with (
        provider(plan) as url,
        RunningServer(folder, configuration(folder, url), patience=START_SECONDS) as server,
    ):
        target = Target(server.url, key, url, SEED, plan.faults, MODELS)
        load, kept = Load(), dict[tuple[int, str], list[Memory]]()
        grants = Grants(state)
        asyncio.run(watched(server, target, load, kept, grants, plan))
        leaked = held(grants, state, load)
    grown = growth(kept, plan.warm, plan.seconds)
    latency = windows(load, plan.window, plan.warm)
    slope = None
    if len(latency) > 2:
        slope = slope_with_interval([each.at / 60 for each in latency], [each.p99 for each in latency])
    draw(out / "soak.png", kept, latency, grown, plan.warm)
    tell(plan, load, grown, latency, slope, leaked)
    return {
        "benchmark": "soak",
        "plan": asdict(plan),
        "sent": load.sent,
        "unsent": load.unsent,
        "endings": dict(load.endings()),
        "errors": dict(load.errors()),
        "models": {name: dict(Counter(each.ending for each in load.ended if each.model == name)) for name, _ in MODELS},
        "leaked": leaked,
        "largest_growth_percent": round(max((each.percent for each in grown), default=0.0), 2),
        "growth": [asdict(each) | {"percent": round(each.percent, 2)} for each in grown],
        "windows": [asdict(each) for each in latency],
        "p99_slope": slope,
        "memory": {f"{name} ({pid})": [asdict(each) for each in samples] for (pid, name), samples in kept.items()},
    }


def create_key(state: Path) -> str:
    """A key with an account, so that every request is metered; as a user makes it."""
    command = [sys.executable, str(ROOT / "fugu.py"), "keys", "create", "soak", "--tpm", "1000000000"]
    environment = {**os.environ, "FUGU_STATE": str(state)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise SystemExit(f"no key could be made: {done.stderr}")
    return done.stdout.strip()


@contextmanager
def provider(plan: Plan) -> Iterator[str]:
    """The provider of all workers in a process of its own; its OpenAI address."""
    command = [sys.executable, "-m", "tests.faults", "--share", str(plan.faults), "--seed", str(SEED)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.stdin.close()  # which ends it
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def configuration(folder: Path, upstream: str) -> dict[str, Any]:
    """Two workers in two wire formats, with limits that are kept on disk and never reached, a tiny router whose head
    plays roles, and a worker as the conductor."""
    from tests.orchestrator.tiny import tiny_folder

    backbone, head = tiny_folder(folder / "backbone"), folder / "head.safetensors"
    command = [
        sys.executable,
        "-m",
        "benchmarks.random_head",
        str(head),
        *WORKERS,
        "--backbone",
        str(backbone),
        "--roles",
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=180)
    common = {
        "api_key": "not-needed-here",
        "limits": {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "concurrency": 128},
        "price": {"input": 1.0, "output": 2.0},
        "timeout": {"connect": 5.0, "first_byte": 10.0, "idle": 10.0, "total": TOTAL_SECONDS},
        "retry": {"attempts": 2, "min_wait": 0.1, "max_wait": 1.0},
    }
    urls = {"openai": upstream, "anthropic": upstream.removesuffix("/v1")}
    workers = [
        {"name": name, "provider": kind, "model": "soak", "base_url": urls[kind], **common}
        for name, kind in WORKERS.items()
    ]
    router = {"backbone": str(backbone), "checkpoint": str(head), "max_tokens": 256}
    conductor = {"worker": "first", "style": "compact", "deadline": REQUEST_SECONDS / 2}
    serve = {"keep_alive": 1.0, "request_timeout": REQUEST_SECONDS}
    return {"workers": workers, "router": router, "conductor": conductor, "serve": serve}


async def watched(
    server: RunningServer,
    target: Target,
    load: Load,
    kept: dict[tuple[int, str], list[Memory]],
    grants: Grants,
    plan: Plan,
) -> None:
    """Drive the load, and look at the memory of the server's processes and at its grants until it is over."""
    driving = asyncio.create_task(drive(target, load, rate=plan.rate, seconds=plan.seconds))
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("soaking", total=plan.seconds)
        while (at := time.perf_counter() - began) < plan.seconds:
            tree = [server.process, *server.tree()]
            await asyncio.to_thread(sample, tree, at, kept)
            await asyncio.to_thread(grants.look, at)
            bad = sum(load.endings()[ending] for ending in BAD)
            told = f"{load.sent} sent, {load.running} under way, {bad} ended badly"
            progress.update(bar, completed=at, description=told)
            spent = time.perf_counter() - began - at
            done, _ = await asyncio.wait((driving,), timeout=max(0.1, plan.sample - spent))
            if done:
                break
            if server.process.poll() is not None or server.process.status() == psutil.STATUS_ZOMBIE:
                driving.cancel()
                raise SystemExit(f"fugu serve ended after {at:.0f} s:\n{server.text[-2000:]}")
    await driving


class Grants:
    """The calls that the limiters have admitted, by their journals, which forget what is older than minutes. One that
    has not ended long after the longest timeout never will."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "limits"
        self._since: dict[tuple[Path, int], float] = {}
        self.leaked: set[tuple[Path, int]] = set()

    def look(self, at: float) -> int:
        """How many are open now (`at`, seconds)."""
        journals = sorted(self._folder.glob("*/*.log"))
        assert len(journals) == len(WORKERS), "every limiter keeps a journal"
        now = set()
        for path in journals:
            files = [each.read_bytes() for each in (path.with_suffix(".old"), path) if each.exists()]
            now |= {(path, key) for key in unsettled(files)}
        self._since = {each: self._since.get(each, at) for each in now}
        self.leaked |= {each for each, since in self._since.items() if at - since > LEAKED_SECONDS}
        return len(now)


def held(grants: Grants, state: Path, load: Load) -> dict[str, int]:
    """What is not given back once everything has ended: grants of the limiters, and requests that the account of the
    key lacks. A caller who left may have gone before the server knew of the request."""
    deadline = time.monotonic() + LEAKED_SECONDS
    book = KeyBook(state / "keys.sqlite")
    while True:
        loose = grants.look(0.0)
        [(_, used)] = book.list()
        missing = max(0, load.sent - load.endings()["left"] - used.requests, used.requests - load.sent)
        if not (loose or missing) or time.monotonic() > deadline:
            return {"grants": max(loose, len(grants.leaked)), "account": missing}
        time.sleep(1)


def tell(
    plan: Plan,
    load: Load,
    grown: list[Growth],
    latency: list[Window],
    slope: tuple[float, float, float] | None,
    leaked: dict[str, int],
) -> None:
    console = Console(width=max(Console().width, 110))
    table = Table(title=f"Memory (USS, MB): from {plan.warm / 60:g} to {plan.seconds / 60:g} minutes")
    for heading in ("process", "warm", "end", "growth", "of RSS", "MB per hour", "PSS at the end"):
        table.add_column(heading, justify="left" if heading == "process" else "right", no_wrap=True)
    for each in grown:
        grew = (f"{each.percent:+.1f}%", f"{each.resident:+.1f}%", f"{each.slope:+.1f}")
        table.add_row(each.process, f"{each.first:.1f}", f"{each.last:.1f}", *grew, f"{each.pss:.1f}")
    console.print(table)
    table = Table(title=f"Added latency, ms, in windows of {plan.window:g} s")
    for heading in ("minute", "requests", "p50", "p99"):
        table.add_column(heading, justify="right")
    for window in latency:
        table.add_row(f"{window.at / 60:.1f}", str(window.requests), f"{window.p50:.1f}", f"{window.p99:.1f}")
    console.print(table)
    if slope is not None:
        console.print(f"slope of p99: {slope[0]:+.2f} ms per minute (95%: {slope[1]:+.2f} to {slope[2]:+.2f})")
    table = Table(title=f"How {load.sent} requests ended" + (f" ({load.unsent} not sent)" if load.unsent else ""))
    table.add_column("ending")
    table.add_column("requests", justify="right")
    endings = load.endings()
    for ending in ("answered", "typed error", "left", *BAD):
        table.add_row(ending, str(endings[ending]))
    table.add_section()
    for name, count in leaked.items():
        table.add_row(f"leaked: {name}", str(count))
    console.print(table)
    console.print("errors: " + ", ".join(f"{count}x {name}" for name, count in load.errors().most_common(12)))


if __name__ == "__main__":
    main()
