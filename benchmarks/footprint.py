"""What serving the default pool takes: seconds until ready, resident memory of every process, time of one answer.

    python benchmarks/footprint.py [--config configs/embedded.yaml]

Memory is proportional set size: a page that several processes share is counted once. Prints a table and, as its last
line, one JSON object with `ready_s`, `pss_mb` and `answer_s` (the median of a few short answers, one at a time).
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from serve.environment import free_ports

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "embedded.yaml")
    parser.add_argument("--quick", action="store_true", help="the same; it takes less than a minute")
    arguments = parser.parse_args()
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).parent / "fugu"), "serve", "--config", str(arguments.config)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        with httpx.Client(base_url=url, timeout=120) as client:
            ready = wait_ready(client, process, began)
            answers = [ask(client, number) for number in range(5)]
        rows = memory(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)
    table = Table(title=f"{arguments.config.name}: ready after {ready:.1f} s")
    table.add_column("process")
    table.add_column("PSS, MB", justify="right")
    for name, megabytes in rows:
        table.add_row(name, f"{megabytes:.0f}")
    total = sum(megabytes for _, megabytes in rows)
    table.add_section()
    table.add_row("all", f"{total:.0f}")
    Console().print(table)
    answer = statistics.median(answers)
    print(json.dumps({"ready_s": round(ready, 1), "pss_mb": round(total), "answer_s": round(answer, 2)}))


def wait_ready(client: httpx.Client, process: subprocess.Popen[bytes], began: float) -> float:
    while time.perf_counter() - began < 300:
        if process.poll() is not None:
            raise SystemExit(f"fugu serve ended with {process.returncode}")
        try:
            if client.get("/readyz").status_code == 200:
                return time.perf_counter() - began
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("fugu serve was not ready within 300 s")


def ask(client: httpx.Client, number: int) -> float:
    began = time.perf_counter()
    question = f"What is {number} + 4?"
    body = {"model": "fugu", "messages": [{"role": "user", "content": question}], "max_tokens": 16}
    client.post("/v1/chat/completions", json=body).raise_for_status()
    return time.perf_counter() - began


def memory(pid: int) -> list[tuple[str, float]]:
    """(short command, megabytes) of the process and all that it started, largest first."""
    top = psutil.Process(pid)
    rows = []
    for each in (top, *top.children(recursive=True)):
        try:
            command = each.cmdline() or [each.name()]
            name = next((part for part in command if part.startswith("ray::")), Path(command[0]).name)
            script = next((Path(part).name for part in command[1:] if part.endswith(".py")), "")
            rows.append((f"{name} {script}".strip(), each.memory_full_info().pss / 1e6))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return sorted(rows, key=lambda row: -row[1])


if __name__ == "__main__":
    main()
