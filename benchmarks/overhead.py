"""What a gateway adds: latency and requests per second of ours beside a plain proxy and the LiteLLM proxy.

One loopback provider that answers at once stands behind all of them. Each round measures every system at every
concurrency in turn, so that what else the machine does falls on all alike; medians over rounds are reported, and
"added" is a system's latency minus that of direct calls in the same round. LiteLLM gets a virtual environment of its
own (made on first use under the cache folder) and is measured with one worker process, its default, and with two,
one per core of a small machine. Routing on decides with a real backbone on every request, which on a CPU costs a
whole forward pass; `benchmarks/decision.py` compares that decision with the bare pass.

    python benchmarks/overhead.py            about ten minutes
    python benchmarks/overhead.py --quick    within a minute: two rounds, ours and LiteLLM with one worker

The last line is one JSON object, for example `added_p50_ratio_vs_litellm: {"1": …, "16": …, "64": …}`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
LITELLM = "litellm[proxy]==1.106.2"
KEY = "sk-benchmark-0123456789abcdef0123456789abcdef"
CONCURRENCY = (1, 16, 64)

PLAIN_PROXY = """
import httpx, os
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
client = httpx.AsyncClient(limits=httpx.Limits(max_connections=256, max_keepalive_connections=256))
async def relay(request):
    reply = await client.post(os.environ["UPSTREAM"] + "/chat/completions", content=await request.body(),
                              headers={"content-type": "application/json"})
    return Response(reply.content, reply.status_code, media_type="application/json")
app = Starlette(routes=[Route("/v1/chat/completions", relay, methods=["POST"])])
"""


@dataclass(frozen=True)
class System:
    name: str
    url: str
    model: str = "bench"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], ready_url: str | None, log: Path, env: dict[str, str]) -> Iterator[int]:
    """The command in a process group of its own until the block ends. Waits until `ready_url` answers, and not with 404
    or 5xx."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=sink, cwd=ROOT, env={**os.environ, **env}, start_new_session=True
        )
        try:
            if ready_url is not None:
                wait_for(ready_url, process, log)
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError as error:
            # Serve's own proxy answers 404 as long as it knows of no application.
            if error.code < 500 and error.code != 404:
                return
            time.sleep(0.3)
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise SystemExit(f"{url} was not ready within {seconds:g} s:\n{log.read_text()[-2000:]}")


def litellm_command(folder: Path, cache: Path, upstream: str, port: int, workers: int) -> list[str]:
    venv = cache / "litellm-1.106.2"
    if not (venv / "done").exists():
        print(f"making a virtual environment for {LITELLM} in {venv} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin/pip"), "install", "-q", LITELLM], check=True)
        (venv / "done").touch()
    config = folder / "litellm.yaml"
    config.write_text(
        "model_list:\n"
        f'  - model_name: bench\n    litellm_params: {{model: openai/bench, api_base: "{upstream}", api_key: none}}\n'
    )
    command = [str(venv / "bin/litellm"), "--config", str(config), "--host", "127.0.0.1"]
    return [*command, "--port", str(port), "--num_workers", str(workers)]


def fugu_config(folder: Path, upstream: str, port: int, routing: bool) -> Path:
    """A pool of one (routing off), or of two behind the embedded backbone and a random head (routing on)."""
    names = ["one", "two"] if routing else ["one"]
    workers = "".join(
        f"  - {{name: {name}, provider: openai, model: bench, base_url: '{upstream}', api_key: none-needed, "
        "limits: {concurrency: 256}}\n"
        for name in names
    )
    router = ""
    if routing:
        checkpoint = folder / "random.safetensors"
        subprocess.run([sys.executable, "-m", "benchmarks.random_head", str(checkpoint), *names], check=True, cwd=ROOT)
        router = f"router: {{checkpoint: '{checkpoint}'}}\n"
    path = folder / f"fugu-{'on' if routing else 'off'}.yaml"
    path.write_text(f"workers:\n{workers}{router}serve: {{port: {port}}}\n")
    return path


def measure(system: System, concurrency: int, seconds: float) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.load", "client", system.url, "--model", system.model]
    command += ["--key", KEY, "--concurrency", str(concurrency), "--seconds", str(seconds)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds + 60, check=False)
    if result.returncode:
        raise SystemExit(f"{system.name}: {result.stderr.strip()}")
    measured: dict[str, float] = json.loads(result.stdout)
    if measured["errors"]:
        raise SystemExit(f"{system.name}: {measured['errors']} errors, first: {measured['first_error']}")
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within a minute (LiteLLM set up beforehand)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="per measurement")
    parser.add_argument("--skip-litellm", action="store_true")
    parser.add_argument("--skip-routing", action="store_true")
    arguments = parser.parse_args()
    rounds, seconds = (2, 1.0) if arguments.quick else (arguments.rounds, arguments.seconds)
    routing = not (arguments.quick or arguments.skip_routing)
    cache = Path(os.environ.get("FUGU_CACHE", Path.home() / ".cache" / "fugu")) / "benchmarks"
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fugu-overhead-"))
    samples: dict[tuple[str, int], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        upstream_port = free_port()
        upstream = f"http://127.0.0.1:{upstream_port}/v1"
        stack.enter_context(
            running(
                [sys.executable, "-m", "benchmarks.load", "upstream", "--port", str(upstream_port)],
                f"{upstream}/models",
                folder / "upstream.log",
                {},
            )
        )
        systems = [System("direct", f"{upstream}/chat/completions")]

        def add(name: str, command: list[str], port: int, ready: str, env: dict[str, str]) -> None:
            base = f"http://127.0.0.1:{port}"
            stack.enter_context(running(command, base + ready, folder / f"{name}.log", env))
            model = "fugu" if name.startswith("ours") else "bench"
            systems.append(System(name, f"{base}/v1/chat/completions", model))

        (folder / "plain_proxy.py").write_text(PLAIN_PROXY)
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "plain_proxy:app", "--app-dir", str(folder)]
        command += ["--port", str(port), "--log-level", "warning"]
        if not arguments.quick:
            add("uvicorn proxy", command, port, "/v1/chat/completions", {"UPSTREAM": upstream})
        if not arguments.skip_litellm:
            for workers in (1,) if arguments.quick else (1, 2):
                port = free_port()
                command = litellm_command(folder, cache, upstream, port, workers)
                env = {
                    "LITELLM_MASTER_KEY": KEY,
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                    "LITELLM_LOG": "ERROR",
                }
                add(f"litellm x{workers}", command, port, "/health/liveliness", env)
        for on in (False, True) if routing else (False,):
            port = free_port()
            config = fugu_config(folder, upstream, port, on)
            command = [str(Path(sys.executable).parent / "fugu"), "serve", "--config", str(config)]
            add(f"ours, routing {'on' if on else 'off'}", command, port, "/readyz", {})

        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("warming up", total=len(systems) * (2 + rounds * len(CONCURRENCY)))
            for system in systems:
                # Some proxies import, connect and cache on their first requests, for seconds.
                for concurrency in (1, 64):
                    measure(system, concurrency, 4.0)
                    progress.advance(task)
            progress.update(task, description="measuring")
            for _ in range(rounds):
                for concurrency in CONCURRENCY:
                    for system in systems:
                        measured = measure(system, concurrency, seconds)
                        samples.setdefault((system.name, concurrency), []).append(measured)
                        progress.advance(task)
        report(systems, samples)


def report(systems: list[System], samples: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    def median(name: str, concurrency: int, key: str) -> float:
        return statistics.median(sample[key] for sample in samples[name, concurrency])

    def added(name: str, concurrency: int, key: str) -> float:
        pairs = zip(samples[name, concurrency], samples["direct", concurrency], strict=True)
        return statistics.median(mine[key] - direct[key] for mine, direct in pairs)

    table = Table(title="Added latency (ms) and requests per second, medians over rounds")
    for column in ("system", "concurrency", "added p50", "added p95", "added p99", "req/s"):
        table.add_column(column, justify="left" if column == "system" else "right")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for system in systems:
        for concurrency in CONCURRENCY:
            row = {key: round(added(system.name, concurrency, key), 3) for key in ("p50", "p95", "p99")}
            row["rps"] = round(median(system.name, concurrency, "rps"), 1)
            figures.setdefault(system.name, {})[str(concurrency)] = row
            cells = (f"{row[key]:.2f}" for key in ("p50", "p95", "p99"))
            table.add_row(system.name, str(concurrency), *cells, f"{row['rps']:,.0f}")
        table.add_section()
    Console().print(table)
    result: dict[str, object] = {"benchmark": "overhead", "systems": figures}
    ours = figures["ours, routing off"]
    for name, suffix in (("litellm x1", "litellm"), ("litellm x2", "litellm_2_workers")):
        if name in figures:
            result[f"added_p50_ratio_vs_{suffix}"] = {
                c: round(ours[c]["p50"] / figures[name][c]["p50"], 3) for c in ours
            }
            result[f"rps_ratio_vs_{suffix}"] = {c: round(ours[c]["rps"] / figures[name][c]["rps"], 2) for c in ours}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
