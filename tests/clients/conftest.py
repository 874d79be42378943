"""One server for the clients, its workers on a loopback provider in three wire formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.coding import make_repository
from tests.clients.server import ClientServer
from tests.loopback import Behaviour, LoopbackProvider


@pytest.fixture(scope="session")
def _provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as provider:
        yield provider


@pytest.fixture
def provider(_provider: LoopbackProvider) -> Iterator[LoopbackProvider]:
    _provider.clear()
    _provider.default = Behaviour()
    yield _provider
    _provider.clear()


@pytest.fixture(scope="session")
def server(_provider: LoopbackProvider, state_dir: Path) -> Iterator[ClientServer]:
    with ClientServer(_provider) as server:
        yield server


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path)
