"""Three nodes on one machine: what dies costs what was running on it, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(660)]

ROOT = Path(__file__).resolve().parents[2]


def reported(folder: Path, part: str) -> dict[str, Any]:
    """What happened, in a process of its own: the session's Ray is another."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cluster.three_nodes", str(folder), part]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reported(tmp_path_factory.mktemp("serve"), "serve")


@pytest.mark.parametrize("lost", ["driver", "node"])
def test_what_is_lost_in_a_generation_changes_nothing(lost: str, tmp_path: Path) -> None:
    """A node that runs rollouts; or the driver, after which the command is given again."""
    if lost == "driver" and not os.environ.get("FUGU_CLUSTER_TESTS"):
        pytest.skip("takes minutes: set FUGU_CLUSTER_TESTS=1; a driver on one machine is killed in tests/training")
    evolve = reported(tmp_path, lost)["evolve"]
    disturbed = evolve[lost]
    assert disturbed["in_flight"] >= 4, "sessions were under way"
    assert 1 <= disturbed["generations_done"] < 3
    assert disturbed.get("exit", -signal.SIGKILL) == -signal.SIGKILL
    assert len(disturbed["history"]) == 3
    for row, undisturbed in zip(disturbed["history"], evolve["undisturbed"]["history"], strict=True):
        # Dollars are added up in the order in which answers come; what a driver paid before it died is paid.
        usd = row.pop("usd"), undisturbed["usd"]
        assert lost == "driver" or usd[0] == pytest.approx(usd[1], rel=1e-9)
        assert row == {name: value for name, value in undisturbed.items() if name != "usd"}
    assert disturbed["same_checkpoint"]


def test_everything_is_where_it_belongs(report: dict[str, Any]) -> None:
    placed, serving = report["placed"]["actors"], report["placed"]["serving"]
    assert placed["ProviderActor"] == [serving] * 2
    replicas = {name: nodes for name, nodes in placed.items() if name.startswith("ServeReplica")}
    assert sum(map(len, replicas.values())) == 3
    assert {node for nodes in replicas.values() for node in nodes} == {serving}


def test_another_checkpoint_without_a_failed_request(report: dict[str, Any]) -> None:
    update = report["update"]
    assert update["during"]
    assert Counter(update["during"]) == {"answered": len(update["during"])}
    assert update["replicas_kept"], "no replica was started anew"
    before, after, tried = ([each["worker"] for each in update[when]] for when in ("before", "after", "tried"))
    assert all(old != new for old, new in zip(before, after, strict=True))
    sources = [each["source"] for each in update["tried"]]
    assert set(sources) == {"head", "canary"}
    for source, old, new, now in zip(sources, before, after, tried, strict=True):
        assert now == (new if source == "canary" else old)


@pytest.mark.parametrize(
    "what",
    [
        "ray::ProviderActor",
        "ray::ServeReplica:fugu:Router",
        "ray::ServeReplica:fugu:Gateway",
        "ray::ServeController",
        "node",
    ],
)
def test_requests_in_flight_end_well_or_typed(report: dict[str, Any], what: str) -> None:
    told = report["kills"][what]
    assert told["in_flight"] >= 10
    assert len(told["ended"]) == 24
    bad = [each for each in told["ended"] if each["ended"] not in ("answered", "typed")]
    assert not bad, "every request ends, with an answer or with one of our errors"
    answered = sum(each["ended"] == "answered" for each in told["ended"])
    if what in ("ray::ServeReplica:fugu:Router", "ray::ServeController", "ray::ProviderActor"):
        assert answered == 24, "nobody need notice"
    assert report["after"]["ended"] == "answered", "it goes on after all that"
