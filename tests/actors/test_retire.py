"""The actors of a configuration that another one took the place of: they end, and disturb nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from actors.config import FuguConfig
from actors.messages import ChatRequest, Message
from actors.pool import WorkerPool
from tests.loopback import Behaviour, LoopbackProvider

pytestmark = pytest.mark.ray

REQUEST = ChatRequest((Message("user", "What is the capital of France?"),), max_tokens=50)
# Of its own: the session's other actors are not told to end.
NAMESPACE = "retiring"
AFTER = 0.5


@pytest.fixture
def upstream() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as provider:
        yield provider


def pool_of(upstream: LoopbackProvider, namespace: str = NAMESPACE, **worker: Any) -> WorkerPool:
    base = {"name": "w", "provider": "openai", "model": "m", "base_url": upstream.url_for("openai")}
    return WorkerPool.connect(FuguConfig.model_validate({"workers": [base | worker]}), namespace=namespace)


def names(namespace: str = NAMESPACE) -> set[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    return {each["name"] for each in found if each["namespace"] == namespace}


def name_of(pool: WorkerPool) -> str:
    return pool._shards["w"][0].name


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_the_old_actor_ends_once_nothing_uses_it(ray_session: None, upstream: LoopbackProvider) -> None:
    old, elsewhere = pool_of(upstream), pool_of(upstream, "elsewhere")
    new = pool_of(upstream, timeout={"connect": 4})
    try:
        await asyncio.gather(*(pool.ready(60) for pool in (old, elsewhere, new)))
        assert names() == {name_of(old), name_of(new)}
        upstream.default = Behaviour(delay=4 * AFTER)
        running = asyncio.create_task(old.workers["w"].complete(REQUEST))
        await until(lambda: upstream.total == 1)
        new.retire_others(AFTER)
        new.retire_others(AFTER)  # by each gateway
        reply = await running
        assert reply.text == "Hello from the loopback provider.", "a call that runs is not cut off"
        await asyncio.sleep(2 * AFTER)
        assert names() == {name_of(old), name_of(new)}, "who is connected still uses it"
        # The last process that was configured so goes away.
        link = old._shards["w"][0].current
        assert link is not None
        await link.close()
        await until(lambda: names() == {name_of(new)})
        assert names("elsewhere") == {name_of(elsewhere)}
        upstream.default = Behaviour()
        # Whoever wants it again after all gets one.
        assert (await old.workers["w"].complete(REQUEST)).text == reply.text
        assert names() == {name_of(old), name_of(new)}
        assert (await new.workers["w"].complete(REQUEST)).text == reply.text
    finally:
        for pool in (old, new, elsewhere):
            pool.shutdown()
    assert not names()


async def test_who_releases_a_pool_leaves_it_to_whoever_else_uses_it(
    ray_session: None, upstream: LoopbackProvider
) -> None:
    started, joined = pool_of(upstream), pool_of(upstream)
    try:
        await asyncio.gather(started.ready(60), joined.ready(60))
        link, other = (pool._shards["w"][0].current for pool in (started, joined))
        assert link is not None
        assert other is not None
        started.release(AFTER)
        await link.close()
        await asyncio.sleep(3 * AFTER)
        assert names() == {name_of(joined)}
        assert (await joined.workers["w"].complete(REQUEST)).text
        await other.close()
        await until(lambda: not names())
        started.release(AFTER)  # there is nothing left to tell
    finally:
        joined.shutdown()


async def test_one_that_nobody_ever_called_ends_too(ray_session: None, upstream: LoopbackProvider) -> None:
    old, new = pool_of(upstream), pool_of(upstream, timeout={"connect": 3})
    try:
        await new.ready(60)
        new.retire_others(AFTER)
        await until(lambda: names() == {name_of(new)})
    finally:
        for pool in (old, new):
            pool.shutdown()
