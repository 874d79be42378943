"""The soak of `benchmarks/soak.py`, shortened to what an ordinary run of the tests can wait for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_two_minutes_of_mixed_traffic_with_faults(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", "--minutes", "2", "--rate", "8", "--faults", "0.15"]
    # What the session sets for its own Ray is not for this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "soak.json").read_text())
    endings = report["endings"]
    assert sum(endings.values()) == report["sent"] == 960 - report["unsent"]
    assert set(endings) <= {"answered", "typed error", "left"}, endings
    assert endings["answered"] > 600, endings
    assert endings.get("typed error", 0) > 0, "faults were met"
    for model in ("fugu", "fugu-trinity", "fugu-ultra"):
        assert report["models"][model]["answered"] > 30, report["models"]
    assert report["leaked"] == {"grants": 0, "account": 0}
    names = " ".join(each["process"] for each in report["growth"])
    for process in ("Gateway", "Router", "ProviderActor", "haproxy", "raylet"):
        assert process in names, names
    for each in report["growth"]:
        # A minute after a start memory still settles; a leak of 20 kB per request would be 10 MB here.
        assert each["last"] - each["first"] < max(8.0, 0.1 * each["first"]), each
    assert report["windows"], "there is a latency"
    assert (tmp_path / "soak.png").stat().st_size > 10_000
