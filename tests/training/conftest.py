from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors.messages import Usage
from tests.loopback import Behaviour, LoopbackProvider


@pytest.fixture
def upstream() -> Iterator[LoopbackProvider]:
    """A provider of models that know some words (`tests.training.test_live.speaks`)."""
    # Here, so that tests which need neither do not import Ray.
    from tests.training.test_live import speaks

    with LoopbackProvider(Behaviour(text=speaks, usage=Usage(10, 20))) as provider:
        yield provider
