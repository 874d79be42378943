"""Requests per second and p99 with 1, 2 and 4 gateway replicas, against ideal.

    python benchmarks/serve_scale.py [--quick]

`fugu serve` as a user starts it (HAProxy, no router), before an upstream that answers at once; 64 requests in flight.
Ideal is what as many copies of the first replica would carry while there are cores for them: replicas, HAProxy,
provider actor, upstream and load generator share this machine's, so that the last column says how many were busy. What
one replica carries and costs is the figure to plan with.

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
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when it is run as a file

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.overhead import System, free_port, fugu_config, measure, running

CONCURRENCY = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer measurements")
    quick = parser.parse_args().quick
    rounds, seconds = (2, 3.0) if quick else (5, 6.0)
    rows = [scaled(replicas, rounds, seconds) for replicas in (1, 2, 4)]
    cores = os.cpu_count() or 1
    table = Table("gateways", "requests/s", "of ideal", "p50, ms", "p99, ms", "cores busy")
    for row in rows:
        row["efficiency"] = row["rps"] / (rows[0]["rps"] * min(row["gateways"], cores))
        table.add_row(
            f"{row['gateways']:.0f}",
            f"{row['rps']:.0f}",
            f"{row['efficiency']:.0%}",
            f"{row['p50']:.1f}",
            f"{row['p99']:.1f}",
            f"{row['busy']:.2f} of {cores}",
        )
    Console().print(table)
    print(json.dumps({"concurrency": CONCURRENCY, "cores": cores, "gateways": rows}))


def scaled(replicas: int, rounds: int, seconds: float) -> dict[str, float]:
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
        stack.enter_context(running(command, f"{base}/readyz", folder / "fugu.log", {}))
        system = System("ours", f"{base}/v1/chat/completions", "fugu")
        measure(system, CONCURRENCY, seconds)  # connects and imports
        psutil.cpu_percent()
        found = [measure(system, CONCURRENCY, seconds) for _ in range(rounds)]
        busy = psutil.cpu_percent() / 100 * (os.cpu_count() or 1)
    return {
        "gateways": replicas,
        "busy": busy,
        **{key: statistics.median(each[key] for each in found) for key in ("rps", "p50", "p99")},
    }


if __name__ == "__main__":
    main()
