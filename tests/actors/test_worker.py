"""A worker's pipeline with a scripted adapter in virtual time: retries, timeouts, breaker, settlement, cache."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from actors.adapters.base import CallContext
from actors.config import WorkerSpec
from actors.errors import (
    CircuitOpenError,
    ContextLengthError,
    FuguError,
    LimitReachedError,
    ProtocolError,
    RateLimitedError,
    StreamBrokenError,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from actors.estimate import estimate_tokens
from actors.journal import Journal
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ToolCall, Usage
from actors.prices import price_of
from actors.worker import WorkerRuntime, prepare
from tests.actors.virtual import run_virtual

REQUEST = ChatRequest((Message("user", "hello"),), max_tokens=100)
ESTIMATE = estimate_tokens(REQUEST)
USAGE = Usage(10, 5, 4, 2)


@dataclass
class Step:
    """What the adapter does with one call: seconds until sent, until the answer, between chunks, and the end."""

    sending: float = 0.0
    thinking: float = 0.5
    pieces: Sequence[str] = ("Hel", "lo")
    between: float = 0.1
    error: Exception | None = None
    error_after: Exception | None = None
    headers: dict[str, str] = field(default_factory=dict)
    report: bool = True
    usage: Usage = USAGE
    ends: bool = True


class Scripted:
    """An adapter that follows a script; the last step repeats."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps) or [Step()]
        self.calls: list[ChatRequest] = []
        self.stamps: list[float] = []
        self.closed = 0

    def _next(self, request: ChatRequest) -> Step:
        self.calls.append(request)
        self.stamps.append(asyncio.get_running_loop().time() - 1000.0)
        return self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]

    async def complete(self, request: ChatRequest, context: CallContext) -> ChatReply:
        step = self._next(request)
        await asyncio.sleep(step.sending)
        if step.report:
            context.on_sent()
        await asyncio.sleep(step.thinking)
        if step.headers:
            context.on_headers(step.headers)
        if step.error is not None:
            raise step.error
        return ChatReply("?", "".join(step.pieces), usage=step.usage)

    async def stream(self, request: ChatRequest, context: CallContext) -> AsyncIterator[Chunk]:
        try:
            reply = await self.complete(request, context)
            for piece in self.steps[0].pieces if len(self.steps) == 1 else ("Hel", "lo"):
                yield Chunk(piece)
                await asyncio.sleep(self.steps[0].between)
            if self.steps[0].error_after is not None:
                raise self.steps[0].error_after
            if self.steps[0].ends:
                yield Chunk(final=reply)
        finally:
            self.closed += 1

    async def close(self) -> None:
        return None


def runtime(adapter: Scripted, seed: int = 0, **spec: Any) -> WorkerRuntime:
    fields: dict[str, Any] = {"name": "w", "provider": "openai", "model": "m"}
    clock = asyncio.get_running_loop().time
    return WorkerRuntime(WorkerSpec.model_validate(fields | spec), adapter, clock=clock, rng=random.Random(seed))


def virtual(test: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        run_virtual(test)

    run.__name__ = test.__name__
    return run


@virtual
async def test_a_reply_carries_name_cost_timing_and_attempts() -> None:
    worker = runtime(Scripted(Step(thinking=2)), price={"input": 2.0, "output": 10.0, "cached_input": 0.5})
    reply = await worker.complete(REQUEST)
    assert (reply.worker, reply.text, reply.attempts, reply.cached) == ("w", "Hello", 1, False)
    assert reply.cost_usd == pytest.approx((6 * 2 + 4 * 0.5 + 5 * 10) / 1e6)
    assert reply.timing.total_s == pytest.approx(2)
    assert reply.timing.queued_s == 0
    counters = worker.counters
    assert (counters.requests, counters.successes, counters.upstream_calls) == (1, 1, 1)
    assert counters.usage == USAGE
    assert counters.cost_usd == reply.cost_usd


@virtual
async def test_a_passing_failure_is_retried_with_growing_jittered_waits() -> None:
    adapter = Scripted(*[Step(thinking=0, error=WorkerUnavailableError("503"))] * 4, Step(thinking=0))
    worker = runtime(adapter, retry={"attempts": 5, "min_wait": 1, "max_wait": 6}, breaker={"failures": 9})
    assert (await worker.complete(REQUEST)).attempts == 5
    waits = [later - earlier for earlier, later in zip(adapter.stamps, adapter.stamps[1:], strict=False)]
    for wait, longest in zip(waits, (2, 4, 6, 6), strict=True):
        assert 1 <= wait <= longest + 0.01
    assert len({round(wait, 3) for wait in waits}) == 4
    assert worker.counters.retries == 4


@virtual
async def test_a_caller_who_counts_calls_can_forbid_retries() -> None:
    adapter = Scripted(*[Step(thinking=0, error=WorkerUnavailableError("503"))] * 9)
    worker = runtime(adapter, retry={"attempts": 5, "min_wait": 1, "max_wait": 6}, breaker={"failures": 9})
    for most, made in ((1, 1), (2, 3), (9, 8)):
        with pytest.raises(WorkerUnavailableError):
            await worker.complete(REQUEST.with_(max_attempts=most))
        assert len(adapter.calls) == made


@virtual
async def test_a_retry_never_comes_before_retry_after_and_holds_everyone() -> None:
    limited = RateLimitedError("slow down", retry_after=7)
    adapter = Scripted(Step(thinking=0, error=limited), Step(thinking=0))
    worker = runtime(adapter)
    first = asyncio.create_task(worker.complete(REQUEST))
    await asyncio.sleep(1)
    await worker.complete(REQUEST)
    await first
    assert adapter.stamps[0] == 0
    assert min(adapter.stamps[1:]) >= 7
    assert worker.status().state == "closed"


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (RateLimitedError("come back tomorrow", retry_after=3000), 1),
        (WorkerRejectedError("no such model"), 1),
        (ContextLengthError("too long"), 1),
        (ProtocolError("not JSON"), 3),
        (WorkerTimeoutError("slow", phase="first_byte"), 3),
    ],
)
def test_only_what_may_pass_is_retried(error: FuguError, attempts: int) -> None:
    async def main() -> None:
        adapter = Scripted(Step(error=error))
        with pytest.raises(type(error)) as caught:
            await runtime(adapter).complete(REQUEST)
        assert caught.value is error
        assert len(adapter.calls) == attempts

    run_virtual(main)


@virtual
async def test_no_retry_begins_after_the_total_time() -> None:
    adapter = Scripted(Step(thinking=2, error=WorkerUnavailableError("503")))
    worker = runtime(adapter, timeout={"total": 10}, retry={"attempts": 9, "min_wait": 3, "max_wait": 3})
    begin = asyncio.get_running_loop().time()
    with pytest.raises(WorkerUnavailableError):
        await worker.complete(REQUEST)
    assert asyncio.get_running_loop().time() - begin <= 10
    assert len(adapter.calls) == 2


@virtual
async def test_total_time_ends_a_call_and_counts_against_the_worker() -> None:
    worker = runtime(Scripted(Step(thinking=99)), timeout={"total": 3}, breaker={"failures": 1})
    with pytest.raises(WorkerTimeoutError, match="3 s in all") as caught:
        await worker.complete(REQUEST)
    assert (caught.value.phase, caught.value.worker) == ("total", "w")
    assert worker.status().running == 0
    with pytest.raises(CircuitOpenError):
        await worker.complete(REQUEST)


@virtual
async def test_the_breaker_ends_retries_and_ignores_what_callers_do_wrong() -> None:
    adapter = Scripted(*[Step(error=WorkerRejectedError("bad"))] * 6, Step(error=WorkerUnavailableError("down")))
    worker = runtime(adapter, breaker={"failures": 2, "cooldown": 30}, retry={"attempts": 5})
    for _ in range(6):
        with pytest.raises(WorkerRejectedError):
            await worker.complete(REQUEST)
    with pytest.raises(WorkerUnavailableError):
        await worker.complete(REQUEST)
    assert len(adapter.calls) == 8  # two of the five attempts, then the circuit was open
    with pytest.raises(CircuitOpenError) as caught:
        await worker.complete(REQUEST)
    assert caught.value.retry_after is not None
    assert not worker.status().healthy
    await asyncio.sleep(31)
    adapter.steps = [Step()]
    await worker.complete(REQUEST)
    assert worker.status().state == "closed"


@virtual
async def test_our_own_limit_is_not_retried() -> None:
    adapter = Scripted(Step(thinking=50))
    worker = runtime(adapter, limits={"concurrency": 1, "max_wait": 5})
    first = asyncio.create_task(worker.complete(REQUEST))
    await asyncio.sleep(0)
    begin = asyncio.get_running_loop().time()
    with pytest.raises(LimitReachedError):
        await worker.complete(REQUEST)
    assert asyncio.get_running_loop().time() - begin == pytest.approx(5)
    first.cancel()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_provider_that_tells_no_usage_is_not_free(streamed: bool) -> None:
    async def main() -> None:
        worker = runtime(
            Scripted(Step(usage=Usage(), pieces=("12345", "6"))), price={"input": 1000.0, "output": 2000.0}
        )
        if streamed:
            [reply] = [chunk.final async for chunk in worker.stream(REQUEST) if chunk.final is not None]
        else:
            reply = await worker.complete(REQUEST)
        assert reply.estimated
        assert reply.usage == Usage(ESTIMATE.input, 2), "six letters"
        assert reply.cost_usd == pytest.approx((1000 * ESTIMATE.input + 2000 * 2) / 1e6)
        assert worker.status().counters.usage == reply.usage

    run_virtual(main)


LIMITS = {"requests_per_minute": 100, "tokens_per_minute": 10_000}


async def used_after(step: Step, cancel_after: float | None = None, stream: bool = False) -> tuple[int, int, int]:
    """(requests, tokens, calls running) that one call leaves behind, a tenth of a second after its end."""
    worker = runtime(Scripted(step), limits=LIMITS, retry={"attempts": 1})

    async def call() -> None:
        if stream:
            async for _ in worker.stream(REQUEST):
                pass
        else:
            await worker.complete(REQUEST)

    task = asyncio.create_task(call())
    if cancel_after is not None:
        await asyncio.sleep(cancel_after)
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.1)
    status = worker.status()
    return status.requests_used, status.tokens_used, status.running


def test_settlement() -> None:
    unavailable = WorkerUnavailableError("x")
    for stream in (False, True):

        async def main(stream: bool = stream) -> None:
            assert await used_after(Step(), stream=stream) == (1, 15, 0)
            no_usage = Step(usage=Usage(), pieces=("12345", "6"))
            assert await used_after(no_usage, stream=stream) == (1, ESTIMATE.input + 2, 0)
            # Never sent: all of it comes back, be it refused or cancelled.
            assert await used_after(Step(report=False, error=unavailable), stream=stream) == (0, 0, 0)
            assert await used_after(Step(sending=5), cancel_after=1, stream=stream) == (0, 0, 0)
            # Sent: the request stays, the tokens of the answer that never came do not.
            assert await used_after(Step(error=unavailable), stream=stream) == (1, ESTIMATE.input, 0)
            assert await used_after(Step(thinking=5), cancel_after=1, stream=stream) == (1, ESTIMATE.input, 0)
            # After a timeout the provider may still be writing.
            slow = WorkerTimeoutError("x", phase="first_byte")
            assert await used_after(Step(error=slow), stream=stream) == (1, ESTIMATE.total, 0)

        run_virtual(main)


@virtual
async def test_a_transport_that_reports_late_is_still_counted() -> None:
    class Late(Scripted):
        async def complete(self, request: ChatRequest, context: CallContext) -> ChatReply:
            try:
                return await super().complete(request, context)
            finally:
                asyncio.get_running_loop().call_later(0.01, context.on_sent)

    worker = runtime(Late(Step(sending=5)), limits=LIMITS)
    task = asyncio.create_task(worker.complete(REQUEST))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.sleep(0.1)
    assert worker.status().requests_used == 1
    assert worker.status().running == 0


@virtual
async def test_headers_reach_the_limiter() -> None:
    adapter = Scripted(Step(headers={"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9s"}))
    worker = runtime(adapter, limits=LIMITS)
    await worker.complete(REQUEST)
    await worker.complete(REQUEST)
    assert adapter.stamps[1] - adapter.stamps[0] >= 9


@virtual
async def test_stream_passes_chunks_and_a_completed_final() -> None:
    worker = runtime(Scripted(Step(thinking=2)), price={"input": 1, "output": 1})
    chunks = [chunk async for chunk in worker.stream(REQUEST)]
    assert [chunk.text for chunk in chunks] == ["Hel", "lo", ""]
    final = chunks[-1].final
    assert final is not None
    assert (final.worker, final.cost_usd) == ("w", pytest.approx(15e-6))
    assert final.timing.first_byte_s == pytest.approx(2)
    assert final.timing.total_s == pytest.approx(2.2)
    assert (worker.counters.successes, worker.counters.cancelled) == (1, 0)


@virtual
async def test_stream_is_retried_before_the_first_chunk_only() -> None:
    adapter = Scripted(Step(error=WorkerUnavailableError("503")), Step())
    chunks = [chunk async for chunk in runtime(adapter).stream(REQUEST)]
    assert chunks[-1].final is not None
    assert chunks[-1].final.attempts == 2
    assert adapter.closed == 2

    adapter = Scripted(Step(error_after=WorkerUnavailableError("reset")))
    seen = []

    async def read() -> None:
        async for chunk in runtime(adapter).stream(REQUEST):
            seen.append(chunk.text)

    with pytest.raises(StreamBrokenError, match="reset"):
        await read()
    assert seen == ["Hel", "lo"]
    assert len(adapter.calls) == 1


@virtual
async def test_streams_that_end_wrongly_say_so() -> None:
    with pytest.raises(ProtocolError, match="before it began"):
        async for _ in runtime(Scripted(Step(pieces=(), ends=False)), retry={"attempts": 1}).stream(REQUEST):
            pass
    with pytest.raises(StreamBrokenError, match="before it was complete"):
        async for _ in runtime(Scripted(Step(ends=False))).stream(REQUEST):
            pass
    with pytest.raises(StreamBrokenError, match="2 s in all"):
        async for _ in runtime(Scripted(Step(between=5)), timeout={"total": 2}).stream(REQUEST):
            pass


@virtual
async def test_closing_a_stream_closes_the_upstream_and_counts_what_was_written() -> None:
    adapter = Scripted(Step(pieces=("x" * 60, "y" * 60)))
    worker = runtime(adapter, limits=LIMITS)
    stream = worker.stream(REQUEST)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    assert adapter.closed == 1
    status = worker.status()
    assert (status.requests_used, status.tokens_used, status.running) == (1, ESTIMATE.input + 30, 0)
    assert worker.counters.cancelled == 1
    assert status.state == "closed"


@virtual
async def test_a_fault_of_ours_shows_its_kind_and_nothing_else() -> None:
    worker = runtime(Scripted(Step(error=KeyError("the user's secret prompt"))), retry={"attempts": 1})
    with pytest.raises(WorkerError, match=r"internal error \(KeyError\)") as caught:
        await worker.complete(REQUEST)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@virtual
async def test_equal_requests_share_a_call_and_its_cost_is_counted_once() -> None:
    adapter = Scripted(Step())
    worker = runtime(adapter, cache={"entries": 10, "ttl": 60}, price={"input": 1, "output": 1})
    replies = await asyncio.gather(*(worker.complete(REQUEST) for _ in range(4)))
    assert len(adapter.calls) == 1
    assert [reply.cached for reply in replies] == [False, True, True, True]
    assert [reply.cost_usd for reply in replies] == [pytest.approx(15e-6), 0.0, 0.0, 0.0]
    assert worker.counters.cost_usd == pytest.approx(15e-6)
    assert (worker.counters.requests, worker.counters.cached, worker.counters.successes) == (4, 3, 4)
    await worker.complete(REQUEST.with_(sample_index=1))
    await worker.complete(REQUEST.with_(temperature=0.5))
    assert len(adapter.calls) == 3
    chunks = [chunk async for chunk in worker.stream(REQUEST)]
    assert ([chunk.text for chunk in chunks], len(adapter.calls)) == (["Hello", ""], 3)
    assert chunks[-1].final is not None
    assert chunks[-1].final.cached


@virtual
async def test_a_streamed_reply_is_kept_and_a_broken_one_is_not() -> None:
    adapter = Scripted(Step(error_after=StreamBrokenError("reset")))
    worker = runtime(adapter, cache={})
    with pytest.raises(StreamBrokenError):
        async for _ in worker.stream(REQUEST):
            pass
    adapter.steps = [Step()]
    assert [chunk.text async for chunk in worker.stream(REQUEST)] == ["Hel", "lo", ""]
    assert (await worker.complete(REQUEST)).cached
    assert len(adapter.calls) == 2


@virtual
async def test_shards_share_every_limit_exactly() -> None:
    limits = {"requests_per_minute": 10, "tokens_per_minute": 1001, "concurrency": 7}
    spec = WorkerSpec.model_validate({"name": "w", "provider": "openai", "model": "m", "limits": limits, "shards": 4})
    parts = [WorkerRuntime(spec, Scripted(), shard=shard).status() for shard in range(4)]
    assert [part.requests_limit for part in parts] == [3, 3, 2, 2]
    assert sum(part.tokens_limit or 0 for part in parts) == 1001
    assert sum(part.concurrency for part in parts) == 7
    whole = parts[0]
    for part in parts[1:]:
        whole.add(part)
    assert (whole.requests_limit, whole.tokens_limit, whole.concurrency, whole.shards) == (10, 1001, 7, 4)


@pytest.mark.parametrize(("reconstructed", "used"), [(False, 0), (True, 100)])
def test_a_restarted_actor_without_its_journal_waits_for_a_window(
    tmp_path: Path, reconstructed: bool, used: int
) -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        limits = LIMITS | {"max_wait": 90}
        spec = WorkerSpec.model_validate({"name": "w", "provider": "openai", "model": "m", "limits": limits})
        journal = Journal(tmp_path / "0-of-1.log", span=61.0, wall=clock)
        adapter = Scripted()
        worker = WorkerRuntime(spec, adapter, clock=clock, journal=journal, reconstructed=reconstructed)
        assert worker.status().requests_used == used
        await worker.complete(REQUEST)
        assert adapter.stamps[0] == pytest.approx(61 if reconstructed else 0, abs=0.01)
        await worker.close()

    run_virtual(main)


def test_prepare_puts_the_workers_system_text_after_the_callers() -> None:
    spec = WorkerSpec.model_validate(
        {
            "name": "w", "provider": "openai", "model": "m", "system": "be brief",
            "defaults": {"temperature": 0.2, "max_tokens": 50},
        }
    )  # fmt: skip
    own, asked = Message("system", "you are a cat"), Message("user", "hi")
    assert prepare(ChatRequest((own, asked)), spec).messages == (own, Message("system", "be brief"), asked)
    assert prepare(ChatRequest((asked,)), spec).messages == (Message("system", "be brief"), asked)
    prepared = prepare(ChatRequest((asked,), temperature=0.0), spec)
    assert (prepared.temperature, prepared.max_tokens, prepared.top_p) == (0.0, 50, None)


def test_price_without_a_cached_price_counts_cached_input_in_full() -> None:
    spec = WorkerSpec.model_validate(
        {"name": "w", "provider": "openai", "model": "m", "price": {"input": 3, "output": 9}}
    )
    assert spec.price is not None
    assert price_of(Usage(100, 10, 50, 5), spec.price) == pytest.approx((100 * 3 + 10 * 9) / 1e6)


@virtual
async def test_tool_calls_from_the_cache_stream_whole() -> None:
    class Caller(Scripted):
        async def complete(self, request: ChatRequest, context: CallContext) -> ChatReply:
            reply = await super().complete(request, context)
            return ChatReply(reply.worker, tool_calls=(ToolCall("1", "f", "{}"),), finish_reason="tool_calls")

    worker = runtime(Caller(Step()), cache={})
    await worker.complete(REQUEST)
    first, last = [chunk async for chunk in worker.stream(REQUEST)]
    assert (first.tool_calls[0].id, first.tool_calls[0].name, first.tool_calls[0].arguments) == ("1", "f", "{}")
    assert last.final is not None
    assert last.final.finish_reason == "tool_calls"
