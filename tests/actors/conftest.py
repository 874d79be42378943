"""One loopback provider for the tests of a dialect."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.loopback import Behaviour, LoopbackProvider


@pytest.fixture(scope="module")
def shared() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as provider:
        yield provider


@pytest.fixture
def provider(shared: LoopbackProvider) -> LoopbackProvider:
    """With nothing left over from another test."""
    shared.clear()
    shared.default = Behaviour()
    return shared
