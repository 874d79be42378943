"""Fixtures of the whole suite: one Ray per test session, the recorded outcomes, the embedded model."""

from __future__ import annotations

import os

# Read when ray is first imported, so they stand before every other import.
os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Time says nothing on a shared machine. In CI the examples are the same on every run; by hand they are new ones.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("shared"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "shared")

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """What all test files import is a million objects, which stay. To look through them for garbage again and again
    would stop this process, in which servers and their clients run, for most of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this session's actors keep their state, apart from the user's own."""
    folder = tmp_path_factory.mktemp("state")
    before = os.environ.get("FUGU_STATE")
    os.environ["FUGU_STATE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["FUGU_STATE"]
    else:
        os.environ["FUGU_STATE"] = before


@pytest.fixture(scope="session")
def ray_session(state_dir: Path) -> Iterator[None]:
    """The one Ray of the session (four logical CPUs, ten of the resource "bench", no dashboard, namespace "fugu"). Its
    processes inherit the environment as it is now, the state folder with it."""
    import ray

    more = {"resources": {"bench": 10}, "include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=4, namespace="fugu", **more)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def reasoning_gym_dir() -> Path:
    """Recorded outcomes of eleven models, which lie beside the repository; skips where they do not."""
    folder = REPOSITORY.parent / "shared" / "data" / "reasoning_gym"
    if not (folder / "outcomes.parquet").exists():
        pytest.skip(f"the recorded outcomes are not at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _embedded_model_is_set_up(request: pytest.FixtureRequest) -> None:
    """A test marked `model` needs the embedded model in the cache; without it, skip and say how to get it."""
    if request.node.get_closest_marker("model") is None:
        return
    from actors.errors import ConfigError
    from actors.model_files import resolve_model

    try:
        resolve_model("SmolLM2-135M-Instruct", progress=False)
    except ConfigError as error:
        pytest.skip(f"the embedded model is not set up (`make setup` does it): {error}")
