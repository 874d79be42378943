"""`fugu status` from another process, on the Ray of a server that runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import psutil
import pytest

from tests.serve.conftest import WORKERS
from tests.serve.running import REPOSITORY, RunningServer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def test_what_serves_and_decides(with_haproxy: RunningServer) -> None:
    lines = {process.pid: " ".join(process.cmdline()) for process in with_haproxy.tree()}
    pid, address = next((pid, at[1]) for pid, line in lines.items() if (at := re.search(r"--gcs-address=(\S+)", line)))
    # Only who has the server's token is told anything.
    environ = psutil.Process(pid).environ() | {"COLUMNS": "200"}
    command = [sys.executable, str(REPOSITORY / "fugu.py"), "status", "--address", address]
    done = subprocess.run(
        command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = set(done.stdout.split())
    assert "1 nodes" in done.stdout
    assert {"fugu", "RUNNING", "Gateway", "Router", "HEALTHY", *WORKERS} <= words
    checkpoint = json.loads(with_haproxy.config.read_text())["router"]["checkpoint"]
    assert f"router: {checkpoint}\n" in done.stdout
