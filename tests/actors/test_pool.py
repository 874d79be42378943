"""The pool with real Ray actors and a loopback provider: deaths, races, limits over restarts, cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from actors.config import FuguConfig
from actors.errors import ConfigError, LimitReachedError, StreamBrokenError, WorkerUnavailableError
from actors.messages import ChatRequest, Message
from actors.pool import WorkerPool, grouped
from actors.provider import LimitWindow
from tests.loopback import Behaviour, LoopbackProvider

pytestmark = pytest.mark.ray

REQUEST = ChatRequest((Message("user", "What is the capital of France?"),), max_tokens=50)
SHORT = LimitWindow(window=2.0, slack=0.2)


@pytest.fixture
def upstream() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as provider:
        yield provider


def configured(upstream: LoopbackProvider, **more: Any) -> FuguConfig:
    worker = {
        "name": "w",
        "provider": "openai",
        "model": "m",
        "base_url": upstream.url_for("openai"),
        "api_key": "sk-test-0123456789abcdef",
        "retry": {"attempts": 1},
    }
    return FuguConfig.model_validate({"workers": [worker | more]})


@contextlib.asynccontextmanager
async def pool_of(config: FuguConfig, limits: LimitWindow | None = None) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool.connect(config, limits=limits)
    try:
        await pool.ready(60)
        yield pool
    finally:
        pool.shutdown()


def pid_of(pool: WorkerPool, worker: str = "w", shard: int = 0) -> int:
    """Of the process that an actor runs in, or will run in once it is there again."""
    begin = time.monotonic()
    while True:
        try:
            actor = ray.get_actor(pool._shards[worker][shard].name, namespace="fugu")
            return ray.get(actor.__ray_call__.remote(lambda _self: os.getpid()))  # type: ignore[no-any-return]
        except ActorUnavailableError:
            assert time.monotonic() - begin < 60, "the actor did not come back"
            time.sleep(0.1)


def kill_actor(pool: WorkerPool) -> None:
    os.kill(pid_of(pool), signal.SIGKILL)


async def until(condition: Any, seconds: float = 5.0) -> float:
    """Wait until it holds; the seconds that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "waited too long"
        await asyncio.sleep(0.01)
    return time.monotonic() - begin


def worst_window(stamps: list[float], window: float) -> int:
    return max(sum(1 for other in stamps if stamp <= other < stamp + window) for stamp in stamps)


async def test_a_call_and_a_stream(ray_session: None, upstream: LoopbackProvider) -> None:
    config = configured(upstream, price={"input": 1, "output": 2})
    async with pool_of(config) as pool:
        worker = pool.workers["w"]
        reply = await worker.complete(REQUEST)
        assert (reply.worker, reply.text) == ("w", "Hello from the loopback provider.")
        assert reply.cost_usd == pytest.approx((reply.usage.input_tokens + 2 * reply.usage.output_tokens) / 1e6)
        chunks = [chunk async for chunk in worker.stream(REQUEST)]
        assert "".join(chunk.text for chunk in chunks) == reply.text
        assert chunks[-1].final is not None
        assert chunks[-1].final.text == reply.text
        (status,) = await pool.status()
        assert (status.state, status.running, status.counters.successes) == ("closed", 0, 2)
        assert status.counters.usage.total_tokens > 0
        check = await pool.check("w")
        assert check.ok
        assert check.reply is not None


async def test_errors_are_raised_as_themselves(ray_session: None, upstream: LoopbackProvider) -> None:
    async with pool_of(configured(upstream, limits={"concurrency": 1, "max_wait": 0.2})) as pool:
        upstream.default = Behaviour(delay=5)
        running = asyncio.create_task(pool.workers["w"].complete(REQUEST))
        await until(lambda: upstream.total == 1)
        with pytest.raises(LimitReachedError) as caught:
            await pool.workers["w"].complete(REQUEST)
        assert caught.value.worker == "w"
        assert caught.value.retry_after is not None
        running.cancel()
        upstream.default = Behaviour(status=500)
        result = await pool.check("w")
        assert not result.ok
        assert isinstance(result.error, WorkerUnavailableError)


async def test_a_plain_call_survives_the_death_of_its_actor(ray_session: None, upstream: LoopbackProvider) -> None:
    async with pool_of(configured(upstream)) as pool:
        upstream.enqueue(Behaviour(never=True))
        call = asyncio.create_task(pool.workers["w"].complete(REQUEST))
        await until(lambda: upstream.total == 1)
        before = pid_of(pool)
        kill_actor(pool)
        reply = await asyncio.wait_for(call, 30)
        assert reply.text == "Hello from the loopback provider."
        assert upstream.total == 2
        assert pid_of(pool) != before


async def test_a_call_that_may_be_made_once_is_not_made_again(ray_session: None, upstream: LoopbackProvider) -> None:
    async with pool_of(configured(upstream)) as pool:
        upstream.default = Behaviour(never=True)
        once = REQUEST.with_(max_attempts=1)
        call = asyncio.create_task(pool.workers["w"].complete(once))
        reading = asyncio.ensure_future(anext(pool.workers["w"].stream(once)))
        await until(lambda: upstream.total == 2)
        kill_actor(pool)
        for task in (call, reading):
            with pytest.raises(WorkerUnavailableError, match="died during"):
                await asyncio.wait_for(task, 10)
        assert upstream.total == 2


async def test_an_actor_that_dies_every_time_is_given_up(ray_session: None, upstream: LoopbackProvider) -> None:
    async with pool_of(configured(upstream)) as pool:
        upstream.default = Behaviour(never=True)
        call = asyncio.create_task(pool.workers["w"].complete(REQUEST))
        for deaths in (1, 2):
            await until(lambda deaths=deaths: upstream.total == deaths, 30)
            kill_actor(pool)
        with pytest.raises(WorkerUnavailableError, match="twice"):
            await asyncio.wait_for(call, 30)


async def test_a_stream_survives_before_its_first_chunk_and_breaks_after(
    ray_session: None, upstream: LoopbackProvider
) -> None:
    async with pool_of(configured(upstream)) as pool:
        upstream.enqueue(Behaviour(never=True))
        chunks = pool.workers["w"].stream(REQUEST)
        first = asyncio.ensure_future(anext(chunks))
        await until(lambda: upstream.total == 1)
        kill_actor(pool)
        assert (await asyncio.wait_for(first, 30)).text
        assert [chunk async for chunk in chunks][-1].final is not None

        upstream.enqueue(Behaviour(text="word " * 100, chunk_delay=0.2))
        texts = []

        async def read() -> None:
            async for chunk in pool.workers["w"].stream(REQUEST):
                texts.append(chunk.text)

        reading = asyncio.create_task(read())
        await until(lambda: len(texts) >= 2)
        kill_actor(pool)
        with pytest.raises(StreamBrokenError, match="in the middle"):
            await asyncio.wait_for(reading, 5)
        assert upstream.total == 3  # nothing was asked again


@ray.remote(num_cpus=0)
def connect_and_call(config: FuguConfig, limits: LimitWindow, calls: int, at: float) -> tuple[list[int], int]:
    """A gateway in a process of its own: the pids of the actors it found, and how many of its calls succeeded."""

    async def main() -> tuple[list[int], int]:
        await asyncio.sleep(max(0.0, at - time.time()))
        pool = WorkerPool.connect(config, limits=limits)
        await pool.ready(60)
        results = await asyncio.gather(
            *(pool.workers["w"].complete(REQUEST) for _ in range(calls)), return_exceptions=True
        )
        pids = [pid_of(pool, shard=shard) for shard in range(len(pool._shards["w"]))]
        return pids, sum(not isinstance(result, BaseException) for result in results)

    return asyncio.run(main())


async def test_racing_processes_start_each_actor_once(ray_session: None, upstream: LoopbackProvider) -> None:
    config = configured(upstream, shards=2)
    at = time.time() + 3
    found = await asyncio.gather(*(connect_and_call.remote(config, LimitWindow(), 1, at) for _ in range(4)))
    assert len({tuple(pids) for pids, _ in found}) == 1
    assert len(set(found[0][0])) == 2
    assert all(succeeded == 1 for _, succeeded in found)
    WorkerPool.connect(config).shutdown()


@pytest.mark.parametrize("shards", [1, 3])
async def test_no_window_is_exceeded_by_two_gateways_across_a_death(
    ray_session: None, upstream: LoopbackProvider, shards: int
) -> None:
    limit = 10
    limits = {"requests_per_minute": limit, "tokens_per_minute": 100_000, "concurrency": 100, "max_wait": 30}
    config = configured(upstream, limits=limits, shards=shards)
    async with pool_of(config, SHORT) as pool:
        gateways = [connect_and_call.remote(config, SHORT, 20, 0.0) for _ in range(2)]
        await until(lambda: upstream.total >= limit + 2, 30)
        kill_actor(pool)
        done = await asyncio.wait_for(asyncio.gather(*gateways), 60)
        stamps = [request.arrival for request in upstream.requests]
        assert sum(succeeded for _, succeeded in done) == 40
        assert len(stamps) >= 40
        assert worst_window(stamps, SHORT.window) <= limit
        # And it is used: a limiter that admitted half as much would take twice as long.
        assert max(stamps) - min(stamps) < 2 * (len(stamps) / limit) * (SHORT.window + SHORT.slack)


async def test_tokens_stay_within_the_window(ray_session: None, upstream: LoopbackProvider) -> None:
    limits = {"tokens_per_minute": 300, "max_wait": 30}
    async with pool_of(configured(upstream, limits=limits), SHORT) as pool:
        replies = await asyncio.gather(*(pool.workers["w"].complete(REQUEST) for _ in range(12)))
        tokens = max(reply.usage.total_tokens for reply in replies)
        stamps = [request.arrival for request in upstream.requests]
        assert worst_window(stamps, SHORT.window) * tokens <= 300


async def test_cancelling_reaches_the_provider_within_a_second_and_refunds(
    ray_session: None, upstream: LoopbackProvider
) -> None:
    limits = {"requests_per_minute": 100, "tokens_per_minute": 10_000}
    async with pool_of(configured(upstream, limits=limits)) as pool:
        upstream.default = Behaviour(never=True)
        call = asyncio.create_task(pool.workers["w"].complete(REQUEST))
        await until(lambda: upstream.total == 1)
        (during,) = await pool.status()
        call.cancel()
        await until(lambda: len(upstream.disconnects) == 1, 1.0)
        (after,) = await pool.status()
        assert (during.running, after.running, after.requests_used) == (1, 0, 1)
        assert after.tokens_used == during.tokens_used - 50  # the answer that was not written
        assert after.counters.cancelled == 1

        upstream.default = Behaviour(text="word " * 200, chunk_delay=0.05)
        stream = pool.workers["w"].stream(REQUEST)
        await anext(stream)
        await stream.aclose()
        await until(lambda: len(upstream.disconnects) == 2, 1.0)
        assert upstream.in_flight == 0


async def test_a_client_process_that_dies_cancels_its_calls(ray_session: None, upstream: LoopbackProvider) -> None:
    @ray.remote(num_cpus=0)
    class Gateway:
        async def call(self, config: FuguConfig) -> None:
            await WorkerPool.connect(config).workers["w"].complete(REQUEST)

    config = configured(upstream)
    async with pool_of(config):
        upstream.default = Behaviour(never=True)
        gateway = Gateway.remote()  # type: ignore[attr-defined]
        gateway.call.remote(config)
        await until(lambda: upstream.in_flight == 1, 30)
        ray.kill(gateway)
        await until(lambda: len(upstream.disconnects) == 1, 2.0)


async def test_equal_requests_of_a_caching_worker_are_made_once(ray_session: None, upstream: LoopbackProvider) -> None:
    async with pool_of(configured(upstream, cache={})) as pool:
        upstream.default = Behaviour(delay=0.3)
        replies = await asyncio.gather(*(pool.workers["w"].complete(REQUEST) for _ in range(8)))
        assert upstream.total == 1
        assert sorted(reply.cached for reply in replies) == [False] + [True] * 7
        assert (await pool.check("w")).ok
        assert upstream.total == 2  # a check is a real call


async def test_shutdown_ends_its_own_actors_only(ray_session: None, upstream: LoopbackProvider) -> None:
    async with pool_of(configured(upstream)) as kept:
        other = configured(upstream, timeout={"total": 77})
        async with pool_of(other) as gone:
            assert gone._shards["w"][0].name != kept._shards["w"][0].name
            name = gone._shards["w"][0].name
        with pytest.raises(ValueError):
            ray.get_actor(name, namespace="fugu")
        assert (await kept.workers["w"].complete(REQUEST)).text


async def test_a_pool_brings_back_actors_that_someone_else_ended(ray_session: None, upstream: LoopbackProvider) -> None:
    config = configured(upstream)
    async with pool_of(config) as pool:
        await pool.workers["w"].complete(REQUEST)
        WorkerPool.connect(config).shutdown()
        assert (await pool.workers["w"].complete(REQUEST)).text


async def test_a_worker_that_cannot_start_says_why(ray_session: None, tmp_path: Path) -> None:
    worker = {"name": "w", "provider": "replay", "model": "m", "outcomes": str(tmp_path)}
    pool = WorkerPool.connect(FuguConfig.model_validate({"workers": [worker]}))
    try:
        with pytest.raises(ConfigError, match="not a folder of recorded outcomes"):
            await pool.ready(60)
        (status,) = await pool.status()
        assert status.state == "down"
        assert not status.healthy
        assert not (await pool.check("w")).ok
    finally:
        pool.shutdown()


async def test_a_pool_works_from_several_event_loops(ray_session: None, upstream: LoopbackProvider) -> None:
    async with pool_of(configured(upstream)) as pool:
        await pool.workers["w"].complete(REQUEST)
        reply = await asyncio.to_thread(asyncio.run, pool.workers["w"].complete(REQUEST))
        assert reply.text
        await pool.workers["w"].complete(REQUEST)
        await asyncio.to_thread(asyncio.run, pool.workers["w"].complete(REQUEST))
        assert len(pool._shards["w"][0]._connections) == 2  # that of the first closed loop is gone


def test_local_workers_on_one_model_share_an_actor() -> None:
    workers = [
        {"name": "a", "provider": "local", "model": "m"},
        {"name": "b", "provider": "local", "model": "m", "system": "step by step"},
        {"name": "c", "provider": "local", "model": "other"},
        {"name": "d", "provider": "openai", "model": "m"},
        {"name": "e", "provider": "openai", "model": "m"},
    ]
    groups = grouped(FuguConfig.model_validate({"workers": workers}).active)
    assert [[spec.name for spec in group] for group in groups] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_the_pool_does_not_load_torch() -> None:
    program = "import sys, actors.pool; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
