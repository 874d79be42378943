"""Making the calls of a labelling as Ray tasks: each takes a batch of one worker's calls, makes them at the same time
through the provider's actor, grades the answers, and hands back each as soon as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.config import FuguConfig
from actors.errors import WorkerUnavailableError
from actors.pool import WorkerPool
from training.labelling import Call, Done, Submit, answer
from training.lost import streamed

# Of a CPU: a task mostly waits for workers; the rest is grading.
_CPUS = 0.2


def provider_actors() -> list[str]:
    """Names of the provider actors that run on the cluster now, whoever started them."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in found if actor["name"].startswith("fugu-provider:")]


def submitter(config: FuguConfig) -> Submit:
    """How `training.labelling` makes calls on the cluster this process is connected to."""
    shared = ray.put(config)

    async def submit(calls: Sequence[Call]) -> AsyncIterator[Done]:
        task: Any = answer_batch
        try:
            async with aclosing(streamed(task.remote(shared, list(calls)))) as ends:
                async for end in ends:
                    yield end
        except RayTaskError:
            raise  # a fault of ours
        except RayError as error:
            raise WorkerUnavailableError(f"the process that made the call is gone ({type(error).__name__})") from error

    return submit


@ray.remote(num_cpus=_CPUS, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD")
def answer_batch(config: FuguConfig, calls: Sequence[Call]) -> Iterator[Done]:
    """Never retried by Ray: a call that was made may have been paid for."""
    pool = WorkerPool.connect(config)
    with asyncio.Runner() as runner:
        ends: asyncio.Queue[Done] = asyncio.Queue()

        async def begin() -> list[asyncio.Task[None]]:
            return [asyncio.create_task(one(call)) for call in calls]

        async def one(call: Call) -> None:
            await ends.put(await answer(call, pool.workers[call.worker], pool.workers))

        running = runner.run(begin())
        for _ in running:
            yield runner.run(ends.get())
