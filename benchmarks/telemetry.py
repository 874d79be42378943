"""What traces cost: the same server without them, with one request in a hundred traced, and with every request traced.

One loopback provider that answers at once stands behind all three; another loopback server takes the traces. Each round
measures every server at every concurrency in turn, so that what else the machine does falls on all alike; medians over
rounds are reported. Beside that, what a place that could begin a span costs where nothing is traced, in nanoseconds.

    python benchmarks/telemetry.py            about three minutes
    python benchmarks/telemetry.py --quick    within a minute

The last line is one JSON object, for example `rps_ratio_on_vs_off: {"1": …, "16": …}`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import timeit
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from actors.spans import current, span  # noqa: E402
from benchmarks.overhead import System, free_port, fugu_config, measure, running  # noqa: E402

CONCURRENCY = (1, 16)
SAMPLING = {"off": None, "one in 100": 0.01, "on": 1.0}


def idle_ns() -> dict[str, float]:
    """Nanoseconds, the least of five runs: to ask for the span around, and to enter and leave one that is not there."""

    def enter() -> None:
        with span("x"):
            pass

    count = 100_000
    return {
        name: round(min(timeit.repeat(what, number=count, repeat=5)) / count * 1e9, 1)
        for name, what in (("current", current), ("span", enter))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute: two rounds of a second")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    arguments = parser.parse_args()
    rounds, seconds = (2, 1.0) if arguments.quick else (arguments.rounds, arguments.seconds)
    folder = Path(tempfile.mkdtemp(prefix="fugu-telemetry-"))
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        ports = [free_port(), free_port()]
        for port in ports:
            command = [sys.executable, "-m", "benchmarks.load", "upstream", "--port", str(port)]
            log = folder / f"{port}.log"
            stack.enter_context(running(command, f"http://127.0.0.1:{port}/v1/models", log, {}))
        systems = []
        for name, sampling in SAMPLING.items():
            port = free_port()
            where = folder / name.replace(" ", "-")
            where.mkdir()
            config = fugu_config(where, f"http://127.0.0.1:{ports[0]}/v1", port, False)
            if sampling is not None:
                section = f"telemetry: {{endpoint: 'http://127.0.0.1:{ports[1]}', sampling: {sampling}}}\n"
                config.write_text(config.read_text() + section)
            command = [str(Path(sys.executable).parent / "fugu"), "serve", "--config", str(config)]
            ready = f"http://127.0.0.1:{port}/readyz"
            stack.enter_context(running(command, ready, where / "server.log", {}))
            systems.append(System(name, f"http://127.0.0.1:{port}/v1/chat/completions", "fugu"))
        for system in systems:
            measure(system, CONCURRENCY[-1], 3.0)  # warm
        for number in range(rounds):
            turned = systems[number % len(systems) :] + systems[: number % len(systems)]  # nobody is always the first
            for concurrency in CONCURRENCY:
                for system in turned:
                    samples.setdefault((system.name, concurrency), []).append(measure(system, concurrency, seconds))
    report(samples)


def report(samples: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    def median(name: str, concurrency: int, key: str) -> float:
        return statistics.median(sample[key] for sample in samples[name, concurrency])

    table = Table(title="Latency (ms) and requests per second, medians over rounds")
    for column in ("traces", "concurrency", "p50", "p99", "req/s"):
        table.add_column(column, justify="left" if column == "traces" else "right")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name in SAMPLING:
        for concurrency in CONCURRENCY:
            row = {key: round(median(name, concurrency, key), 3) for key in ("p50", "p99", "rps")}
            figures.setdefault(name, {})[str(concurrency)] = row
            table.add_row(name, str(concurrency), f"{row['p50']:.2f}", f"{row['p99']:.2f}", f"{row['rps']:,.0f}")
        table.add_section()
    Console().print(table)

    def ratio(name: str) -> dict[str, float]:
        pairs = {c: zip(samples[name, c], samples["off", c], strict=True) for c in CONCURRENCY}
        return {str(c): round(statistics.median(a["rps"] / b["rps"] for a, b in pairs[c]), 3) for c in CONCURRENCY}

    print(
        json.dumps(
            {
                "benchmark": "telemetry",
                "systems": figures,
                "rps_ratio_on_vs_off": ratio("on"),
                "rps_ratio_one_in_100_vs_off": ratio("one in 100"),
                "idle_ns": idle_ns(),
            }
        )
    )


if __name__ == "__main__":
    main()
