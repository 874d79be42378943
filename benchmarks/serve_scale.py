"""Requests per second and p99 with 1, 2 and 4 gateway replicas, against ideal.

    python benchmarks/serve_scale.py [--quick]

`fugu serve` as a user starts it (HAProxy, no router), before an upstream that answers at once; 16 requests in flight
for each gateway, for with a fixed number one gateway alone would also pay for the longer queue. HAProxy, provider
actor, upstream, load generator and all replicas run on this machine, whose cores one replica and its neighbours fill.
So each gateway is held to a share of a core (by a control group: root on Linux), small enough that four of them leave
the others what they need: then gateways are what is scarce, as on a cluster, and ideal is so many times the first one's
rate. The first row is a gateway that is not held: what one carries and costs is the figure to plan with. Where nothing
can be held, the rows show what sharing the cores costs.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when it is run as a file

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.overhead import System, free_port, fugu_config, measure, running

CONCURRENCY = 16
"""Requests in flight for each gateway."""
SHARE = 0.12
"""Of a core, for each gateway that is held."""
_PERIOD_US = 100_000  # a quota below a slice of the kernel's (5 ms) is lost to whichever idle thread takes it
GATEWAY = "ray::ServeReplica:fugu:Gateway"
GROUPS = Path("/sys/fs/cgroup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer measurements")
    parser.add_argument("--share", type=float, default=SHARE, help=f"of a core, for each gateway ({SHARE})")
    arguments = parser.parse_args()
    rounds, seconds = (2, 3.0) if arguments.quick else (5, 6.0)
    share = arguments.share if can_hold() else None
    if share is None:
        print("gateways cannot be held to a share of a core here: they share all of them", file=sys.stderr)
    rows = [scaled(1, None, rounds, seconds)] if share is not None else []
    rows += [scaled(replicas, share, rounds, seconds) for replicas in (1, 2, 4)]
    first = next(row for row in rows if row["share"] == (share or 0.0))
    table = Table("gateways", "cores each", "requests/s", "of ideal", "p50, ms", "p99, ms", "cores busy")
    for row in rows:
        same = row["share"] == first["share"]
        row["efficiency"] = row["rps"] / (first["rps"] * row["gateways"]) if same else 1.0
        table.add_row(
            f"{row['gateways']:.0f}",
            f"{row['share']:g}" if row["share"] else "any",
            f"{row['rps']:.0f}",
            f"{row['efficiency']:.0%}" if same else "",
            f"{row['p50']:.1f}",
            f"{row['p99']:.1f}",
            f"{row['busy']:.2f} of {os.cpu_count()}",
        )
    Console().print(table)
    print(json.dumps({"concurrency_each": CONCURRENCY, "cores": os.cpu_count(), "gateways": rows}))


def scaled(replicas: int, share: float | None, rounds: int, seconds: float) -> dict[str, float]:
    folder = Path(tempfile.mkdtemp(prefix="fugu-serve-scale-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        upstream_port, port = free_port(), free_port()
        upstream = f"http://127.0.0.1:{upstream_port}/v1"
        command = [sys.executable, "-m", "benchmarks.load", "upstream", "--port", str(upstream_port)]
        stack.enter_context(running(command, f"{upstream}/models", folder / "upstream.log", {}))
        config = fugu_config(folder, upstream, port, routing=False)
        bounds = f"gateway_replicas: {{min: {replicas}, max: {replicas}}}"
        config.write_text(config.read_text().replace(f"port: {port}", f"port: {port}, {bounds}"))
        command = [str(Path(sys.executable).parent / "fugu"), "serve", "--config", str(config)]
        base = f"http://127.0.0.1:{port}"
        server = stack.enter_context(running(command, f"{base}/readyz", folder / "fugu.log", {}))
        gateways = _gateways(server, replicas)
        if share is not None:
            for pid in gateways:
                stack.enter_context(held(pid, share))
        system = System("ours", f"{base}/v1/chat/completions", "fugu")
        measure(system, CONCURRENCY * replicas, seconds)  # connects and imports
        psutil.cpu_percent()
        found = [measure(system, CONCURRENCY * replicas, seconds) for _ in range(rounds)]
        busy = psutil.cpu_percent() / 100 * (os.cpu_count() or 1)
    return {
        "gateways": replicas,
        "share": share or 0.0,
        "busy": busy,
        **{key: statistics.median(each[key] for each in found) for key in ("rps", "p50", "p99")},
    }


def _gateways(server: int, replicas: int) -> list[int]:
    """Their processes, of the server with this id."""
    deadline = time.monotonic() + 60
    while True:
        found = []
        for process in psutil.Process(server).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(GATEWAY):
                    found.append(process.pid)
        if len(found) == replicas:
            return found
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(found)} of {replicas} gateways were found")
        time.sleep(0.2)


def can_hold() -> bool:
    try:
        with held(None, 0.5):
            return True
    except OSError:
        return False


@contextmanager
def held(pid: int | None, share: float) -> Iterator[None]:
    """Give a process at most this share of a core, while the block runs.

    Raises:
        OSError: control groups cannot be made here.
    """
    first = (GROUPS / "cpu").is_dir()  # the first version has a tree for each kind of thing that is controlled
    root = GROUPS / "cpu" if first else GROUPS
    group = root / f"fugu-{os.getpid()}-{pid or 0}"
    group.mkdir()
    try:
        quota = int(_PERIOD_US * share)
        if first:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {_PERIOD_US}")
        if pid is not None:
            (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        if pid is not None:
            with suppress(OSError):  # it has ended by now
                (root / "cgroup.procs").write_text(str(pid))
        _remove(group)


def _remove(group: Path) -> None:
    """A group is gone once its processes are; those that end take a moment."""
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
