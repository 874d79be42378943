"""Two servers for the live tests, each started once: behind HAProxy with a trained router, and without either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.running import RunningServer

WORKERS = ("first", "second")
KEY = "serve-test-key-7f3a9c"
UPSTREAM_KEY = "upstream-secret-51d2e8"
IDLE = 4.0
"""Seconds that a provider may be silent in the middle of an answer."""


@pytest.fixture(scope="session", autouse=True)
def _own_state(state_dir: Path) -> None:
    """Keys and conversations of whoever runs the tests are not theirs to see."""


@pytest.fixture(scope="session")
def upstream() -> Iterator[LoopbackProvider]:
    """Stands for the provider of both servers; it wants the key that is in their environment."""
    with LoopbackProvider(api_key=UPSTREAM_KEY) as provider:
        yield provider


@pytest.fixture
def provider(upstream: LoopbackProvider) -> Iterator[LoopbackProvider]:
    """The upstream, with nothing left over from another test."""
    upstream.clear()
    upstream.default = Behaviour()
    yield upstream
    upstream.clear()


def tiny_checkpoint(folder: Path, workers: tuple[str, ...]) -> tuple[Path, Path]:
    """A backbone of random weights and a head with roles for it: (model folder, checkpoint)."""
    import torch

    from actors.model_files import resolve_model
    from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint
    from tests.orchestrator.tiny import DIMENSION, tiny_folder

    model = tiny_folder(folder / "backbone")
    files = resolve_model(str(model))
    info = CheckpointInfo(workers=workers, backbone=files.id, revision=files.revision, roles=True)
    weight = torch.randn(info.rows, DIMENSION, generator=torch.Generator().manual_seed(1))
    weight[len(workers) :] *= 0.2  # so that sampled roles differ
    save_checkpoint(folder / "head.safetensors", Checkpoint(info=info, weight=weight))
    return model, folder / "head.safetensors"


def worker(name: str, provider: LoopbackProvider, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "provider": "openai",
        "model": name,
        "base_url": provider.url_for("openai"),
        "api_key": "${UPSTREAM_KEY}",
        "retry": {"attempts": 1},
        "breaker": {"failures": 1000, "cooldown": 0.1},
        "timeout": {"idle": IDLE},
        **fields,
    }


@pytest.fixture(scope="session")
def with_haproxy(tmp_path_factory: pytest.TempPathFactory, upstream: LoopbackProvider) -> Iterator[RunningServer]:
    """Two gateways behind HAProxy, a router with a (random) head, a conductor, keys."""
    folder = tmp_path_factory.mktemp("haproxy")
    model, checkpoint = tiny_checkpoint(folder, WORKERS)
    config = {
        "workers": [worker(name, upstream, tags=[name], price={"input": 1, "output": 10}) for name in WORKERS],
        "router": {"backbone": str(model), "checkpoint": str(checkpoint), "timeout": 5, "max_tokens": 256},
        "conductor": {"worker": "second", "max_rounds": 1},
        "serve": {
            "api_keys": ["${SERVE_KEY}"],
            "gateway_replicas": {"min": 2, "max": 2},
            "keep_alive": 0.5,
            "max_body_bytes": 1_000_000,
            "drain": 5,
        },
    }
    with RunningServer(folder, config, environ={"SERVE_KEY": KEY, "UPSTREAM_KEY": UPSTREAM_KEY}) as server:
        yield server


@pytest.fixture(scope="session")
def without_haproxy(tmp_path_factory: pytest.TempPathFactory, upstream: LoopbackProvider) -> Iterator[RunningServer]:
    """One gateway behind Ray Serve's own proxy; workers in the order of the file."""
    folder = tmp_path_factory.mktemp("plain")
    config = {
        "workers": [worker(name, upstream) for name in WORKERS],
        "serve": {
            "api_keys": ["${SERVE_KEY}"],
            "keep_alive": 0.5,
            "max_body_bytes": 1_000_000,
            "drain": 5,
            "ha_proxy": False,
        },
    }
    with RunningServer(folder, config, environ={"SERVE_KEY": KEY, "UPSTREAM_KEY": UPSTREAM_KEY}) as server:
        yield server


@pytest.fixture(params=["with_haproxy", "without_haproxy"])
def server(request: pytest.FixtureRequest) -> RunningServer:
    """Each server in turn: what a test asks of one must hold for the other."""
    running: RunningServer = request.getfixturevalue(request.param)
    return running
