"""The commands for a cluster; in the last tests with machines that this one makes (tests/cluster/machines.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import fugu
from actors.errors import ClusterError, ConfigError
from serve import cluster
from tests.cluster import head_restart, machines

ROOT = Path(__file__).resolve().parents[2]
ONPREM = ROOT / "cluster" / "onprem.yaml"
# What may pass until a program that makes machines has ended.
SECONDS = 600.0


def ended(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(fugu.app, list(arguments), env={"COLUMNS": "200", "FUGU_CLUSTER": ""})
    return result.exit_code, " ".join((result.output + result.stderr).split())


@pytest.mark.parametrize("command", ["up", "deploy", "submit", "status", "down"])
def test_help_has_examples(command: str) -> None:
    code, output = ended(command, "--help")
    assert code == 0
    assert "Examples:" in output
    assert f"fugu {command}" in output.split("Examples:")[1]


def test_a_file_that_is_not_there() -> None:
    for command in ("up", "down"):
        code, output = ended(command, "none.yaml")
        assert code == 2
        assert "cannot read none.yaml" in output


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"provider": None}, "it has no provider"),
        ({"max_workes": 3}, "max_workes"),
        ({"auth": {"ssh_usr": "me"}}, r"auth: .*ssh_usr"),
        ({"file_mounts": {"~/fugu/x": "nowhere/x"}}, "there is no nowhere/x"),
        ({"available_node_types": {"a": {}}}, "available_node_types"),
    ],
)
def test_a_wrong_file_is_told_before_anything_starts(tmp_path: Path, change: dict[str, object], what: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(ONPREM.read_text()) | change))
    with pytest.raises(ConfigError, match=what) as caught:
        cluster.check_file(path)
    assert str(path) in caught.value.message


def test_a_right_file() -> None:
    assert cluster.check_file(ONPREM)["provider"]["type"] == "local"


@pytest.mark.skipif(importlib.util.find_spec("boto3") is not None, reason="the package is installed")
def test_the_clouds_package_is_named() -> None:
    code, output = ended("up", str(ROOT / "cluster.yaml"))
    assert code == 2
    assert "pip install boto3" in output


def test_down_asks_first() -> None:
    result = CliRunner().invoke(fugu.app, ["down", str(ONPREM)], input="n\n")
    assert result.exit_code == 1
    assert "End the cluster" in result.output


def test_a_job_is_called_after_its_command() -> None:
    assert cluster._words(["train", "evolve", "--out", "x"]) == ["fugu", "train", "evolve"]
    assert cluster._words(["label", "--tasks", "x"]) == ["fugu", "label"]
    with pytest.raises(ConfigError, match="cannot be the name"):
        cluster.submit(ONPREM, ["label"], "a name; rm")
    with pytest.raises(ConfigError, match="nothing to submit"):
        cluster.submit(ONPREM, [])


def test_what_fails_says_which_step() -> None:
    with pytest.raises(ClusterError, match=r"the step failed \(exit code 3\)"):
        cluster._run(["sh", "-c", "exit 3"], "the step")
    with pytest.raises(ClusterError, match=r"the step: not done after 0.2 s"):
        cluster._run(["sleep", "5"], "the step", seconds=0.2)


def test_emitting_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    worker = {"name": "a", "provider": "openai", "model": "a", "api_key": "sk-written-out"}
    path.write_text(yaml.safe_dump({"workers": [worker]}))
    code, output = ended("serve", "-c", str(path), "--emit-serve-config")
    assert code == 1
    assert "workers.a.api_key" in output
    assert "written-out" not in output.replace("is written out", "")


@pytest.mark.ray
@pytest.mark.timeout(SECONDS + 60)
def test_up_submit_deploy_down_for_real() -> None:
    reason = machines.why_not()
    if reason is not None:
        pytest.skip(reason)
    code, output = ran("tests.cluster.local_up")
    assert code == 0, output[-4000:]
    assert "== nothing of Ray is left" in output


@pytest.mark.ray
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("kind", head_restart.KINDS)
def test_the_head_dies_and_comes_back(kind: str) -> None:
    reason = head_restart.why_not(kind)
    usual = "rocksdb" if head_restart.why_not("redis") else "redis"
    if kind != usual and not os.environ.get("FUGU_CLUSTER_TESTS"):
        reason = f"takes minutes, and {usual} was tried: set FUGU_CLUSTER_TESTS=1"
    if reason is not None:
        pytest.skip(reason)
    code, output = ran("tests.cluster.head_restart", kind)
    assert code == 0, output[-4000:]


@pytest.mark.ray
@pytest.mark.timeout(SECONDS + 60)
def test_what_waits_makes_the_cluster_grow() -> None:
    reason = machines.why_not()
    if reason is not None:
        pytest.skip(reason)
    code, output = ran("tests.cluster.growing")
    assert code == 0, output[-4000:]
    report = json.loads(output.splitlines()[-1])
    assert report["before"] == {"nodes": 1, "egress": 0, "rollout": 0}
    assert report["most"]["egress"] == 1
    assert report["most"]["rollout"] >= 2, "lanes that wait are asked for together"
    assert report["most"]["nodes"] == 1 + report["most"]["egress"] + report["most"]["rollout"]
    assert (report["generations"], report["written"]) == (2, True)


def ran(module: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a program that makes machines; none of them outlives the time that it has."""
    command = [sys.executable, "-m", module, *arguments]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            # With `unshare`, everything in its namespaces ends.
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait(30)
        out.seek(0)
        return code, out.read()
