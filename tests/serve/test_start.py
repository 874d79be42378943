"""`fugu serve` that cannot start says why in a line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve.environment import free_ports
from tests.serve.conftest import tiny_checkpoint
from tests.serve.running import REPOSITORY

WORKERS = [
    {"name": name, "provider": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"} for name in ("a", "b")
]


def fugu(*arguments: str, timeout: float = 90, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "fugu.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=REPOSITORY,
        env={**inherited, "COLUMNS": "300", **environ},
    )


def written(folder: Path, **config: Any) -> str:
    serve = {"port": free_ports(1)[0], **config.pop("serve", {})}
    path = folder / "fugu.yaml"
    path.write_text(json.dumps({"workers": WORKERS, "serve": serve, **config}))
    return str(path)


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_a_public_address_without_keys(tmp_path: Path) -> None:
    assert_refused(fugu("serve", "-c", written(tmp_path), "--host", "0.0.0.0"), "serve.api_keys is empty")


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(fugu("serve", "-c", written(tmp_path), "--port", str(port)), f"127.0.0.1:{port}", "--port")


def test_a_configuration_with_a_fault(tmp_path: Path) -> None:
    assert_refused(fugu("serve", "-c", written(tmp_path, router={"fallback": 1})), "router.fallback: unknown key")
    assert_refused(fugu("serve", "-c", str(tmp_path / "none.yaml")), "cannot read")


def test_no_key_at_all(tmp_path: Path) -> None:
    workers = [{**worker, "api_key": "${NO_SUCH_KEY}"} for worker in WORKERS]
    assert_refused(fugu("serve", "-c", written(tmp_path, workers=workers)), "no worker is left", "NO_SUCH_KEY")


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_checkpoint_of_another_pool(tmp_path: Path) -> None:
    model, checkpoint = tiny_checkpoint(tmp_path, ("a", "c"))
    router = {"backbone": str(model), "checkpoint": str(checkpoint), "max_tokens": 256}
    result = fugu("serve", "-c", written(tmp_path, router=router), timeout=150)
    assert_refused(result, "c", str(checkpoint))


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    worker = {"name": "a", "provider": "local", "model": "no/such-model"}
    assert_refused(fugu("serve", "-c", written(tmp_path, workers=[worker]), timeout=150), "no/such-model")


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_check_counts_failures(tmp_path: Path) -> None:
    workers = [*WORKERS, {**WORKERS[0], "name": "keyless", "api_key": "${NO_SUCH_KEY}"}]
    workers = [{**worker, "retry": {"attempts": 1}} for worker in workers]
    result = fugu("pool", "check", "-c", written(tmp_path, workers=workers), timeout=150)
    assert result.returncode == 1
    assert "NO_SUCH_KEY is not set" in result.stdout
    assert result.stdout.count("cannot connect") == 2


def test_help_has_examples() -> None:
    for command in (["serve"], ["ask"], ["pool", "check"]):
        assert "Examples" in fugu(*command, "--help").stdout
