"""Workflows over real wires: three providers' dialects on the loopback server, limits, retries and cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from actors.messages import Usage
from actors.worker import WorkerRuntime
from orchestrator.budget import Account, Budget
from orchestrator.executor import RunEnded, StepChunk, execute, stream
from orchestrator.workflow import Workflow
from tests.actors.dialects import DIALECTS, MODELS, adapter_for, spec_for
from tests.loopback import Behaviour, LoopbackProvider
from tests.orchestrator.playing import QUERY, plan

PRICE = {"input": 1.0, "output": 10.0}


class Wired(WorkerRuntime):
    """A worker in this process, where serving has it in an actor."""

    @property
    def name(self) -> str:
        return self.spec.name


@pytest.fixture
def provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as running:
        yield running


@asynccontextmanager
async def wired(provider: LoopbackProvider) -> AsyncIterator[dict[str, Wired]]:
    workers: dict[str, Wired] = {}
    for dialect in DIALECTS:
        fields = {"name": dialect, "price": PRICE, "retry": {"attempts": 2, "min_wait": 0.001, "max_wait": 0.002}}
        workers[dialect] = Wired(spec_for(provider, dialect, **fields), adapter_for(provider, dialect, **fields))
    try:
        yield workers
    finally:
        for worker in workers.values():
            await worker.close()


def sent(provider: LoopbackProvider, dialect: str) -> str:
    return next(request.raw.decode() for request in provider.requests if request.dialect == dialect)


async def test_a_workflow_over_three_dialects(provider: LoopbackProvider) -> None:
    said = {"openai": "the Nile MARK0", "anthropic": "the Congo MARK1", "gemini": "four letters"}
    for dialect, text in said.items():
        provider.by_model[MODELS[dialect]] = Behaviour(text, usage=Usage(100, 10))  # type: ignore[index]
    async with wired(provider) as workers:
        run = await execute(QUERY, plan(("openai", ()), ("anthropic", (0,)), ("gemini", (1,))), workers)
    assert run.answered().text == "four letters"
    assert "MARK0" in sent(provider, "anthropic")
    assert "MARK1" in sent(provider, "gemini")
    assert "MARK0" not in sent(provider, "gemini")
    assert run.usage == Usage(300, 30)
    assert run.cost_usd == pytest.approx((300 * 1.0 + 30 * 10.0) / 1e6)


async def test_a_provider_that_is_down_is_retried_and_then_replaced(provider: LoopbackProvider) -> None:
    provider.by_model[MODELS["openai"]] = Behaviour(status=503)
    async with wired(provider) as workers:
        account = Account(Budget(calls=6))
        flow = plan(("openai", ()), ("gemini", (0,)))
        run = await execute(QUERY, flow, workers, ranking=("openai", "anthropic"), budget=account)
    assert [step.worker for step in run.steps] == ["anthropic", "gemini"]
    assert [(name, error.code) for name, error in run.steps[0].failures] == [("openai", "worker_unavailable")]
    assert provider.total == 4  # twice in vain, once each for the others
    assert provider.total <= account.calls <= 6


async def test_calls_are_limited_on_the_wire(provider: LoopbackProvider) -> None:
    provider.default = Behaviour(status=503)
    async with wired(provider) as workers:
        run = await execute(
            QUERY, plan(("openai", ()), ("gemini", (0,))), workers, ranking=DIALECTS, budget=Budget(calls=3)
        )
    assert run.answer is None
    assert run.out_of == "calls"
    assert provider.total <= 3


async def test_the_last_step_streams(provider: LoopbackProvider) -> None:
    provider.by_model[MODELS["anthropic"]] = Behaviour("It is four letters long.")
    async with wired(provider) as workers:
        events = [event async for event in stream(QUERY, plan(("openai", ()), ("anthropic", (0,))), workers)]
    assert "".join(event.chunk.text for event in events if isinstance(event, StepChunk)) == "It is four letters long."
    assert [request.stream for request in provider.requests] == [False, True]
    ended = events[-1]
    assert isinstance(ended, RunEnded)
    assert ended.run.complete


async def listen(flow: Workflow, workers: dict[str, Wired]) -> None:
    async for _ in stream(QUERY, flow, workers):
        pass


@pytest.mark.parametrize("streaming", [False, True])
async def test_cancelling_ends_every_call_at_the_provider(provider: LoopbackProvider, streaming: bool) -> None:
    provider.default = Behaviour(never=True)
    async with wired(provider) as workers:
        flow = plan(("openai", ()), ("anthropic", ()), ("gemini", ()), ("openai", (0, 1, 2)))
        task = asyncio.create_task(listen(flow, workers) if streaming else execute(QUERY, flow, workers))
        assert await asyncio.to_thread(provider.wait_for, lambda: provider.in_flight == 3)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(provider.wait_for, lambda: len(provider.disconnects) == 3)
        assert time.monotonic() - began < 2
        assert [worker.limiter.running for worker in workers.values()] == [0] * len(DIALECTS)
