"""One loopback provider for the tests of a dialect."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from actors.adapters.base import Adapter
from tests.actors.dialects import adapter_for
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


@pytest.fixture
async def adapter(provider: LoopbackProvider, request: pytest.FixtureRequest) -> AsyncIterator[Adapter]:
    """Of the dialect that the module is about (its `DIALECT`)."""
    made = adapter_for(provider, request.module.DIALECT)
    yield made
    await made.close()
