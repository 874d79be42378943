"""The fallback rule, over workers whose behaviour each test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import (
    AllWorkersFailedError,
    AuthenticationError,
    CircuitOpenError,
    ContextLengthError,
    FuguError,
    ProtocolError,
    RateLimitedError,
    StreamBrokenError,
    WorkerRejectedError,
    WorkerUnavailableError,
)
from actors.messages import ChatReply, ChatRequest, Chunk, Message
from orchestrator import dispatch
from orchestrator.dispatch import Attempt, Record, Resting, rank

REQUEST = ChatRequest(messages=(Message("user", "hello"),))


class Clock:
    """Each reading is one second after the last."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Scripted:
    """Says the given things in order; an error among them is raised at its place."""

    def __init__(self, name: str, *script: str | FuguError, final: bool = True, wait: float = 0.0) -> None:
        self.name = name
        self.script = script
        self.final = final
        self.wait = wait
        self.calls = 0
        self.cancelled = 0
        self.closed = 0

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.calls += 1
        try:
            await asyncio.sleep(self.wait)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        for item in self.script:
            if isinstance(item, FuguError):
                raise item
        return ChatReply(worker=self.name, text="".join(str(item) for item in self.script))

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        self.calls += 1
        said = ""
        try:
            for item in self.script:
                if isinstance(item, FuguError):
                    raise item
                said += item
                yield Chunk(text=item)
                await asyncio.sleep(self.wait)
            if self.final:
                yield Chunk(final=ChatReply(worker=self.name, text=said))
        except GeneratorExit:
            self.closed += 1
            raise
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def collect(workers: Sequence[Scripted], record: Record) -> tuple[list[str], ChatReply | None]:
    texts, final = [], None
    async for chunk in dispatch.stream(workers, REQUEST, record=record, clock=Clock()):
        texts.append(chunk.text)
        final = chunk.final
    return texts, final


def refused(name: str) -> WorkerUnavailableError:
    return WorkerUnavailableError(f"{name} is down", worker=name)


@pytest.mark.parametrize(
    "error",
    [
        refused("a"),
        RateLimitedError("busy", retry_after=3),
        WorkerRejectedError("no images"),
        ContextLengthError("too long"),
        CircuitOpenError("rests", retry_after=9),
    ],
)
async def test_failure_before_the_first_byte_moves_on(error: FuguError) -> None:
    for run in ("complete", "stream"):
        record = Record()
        workers = (Scripted("a", error), Scripted("b", "x", "y"))
        if run == "complete":
            reply = await dispatch.complete(workers, REQUEST, record=record, clock=Clock())
            assert reply.text == "xy"
        else:
            texts, final = await collect(workers, record)
            assert texts == ["x", "y", ""]
            assert final is not None
            assert final.text == "xy"
        assert [(a.worker, a.error) for a in record.attempts] == [("a", error), ("b", None)]
        assert record.worker == "b"


async def test_a_success_asks_nobody_else() -> None:
    second = Scripted("b", "never")
    record = Record()
    reply = await dispatch.complete((Scripted("a", "hi"), second), REQUEST, record=record, clock=Clock())
    assert (reply.worker, second.calls) == ("a", 0)
    assert record.attempts == [Attempt("a", 1.0, 1.0, 0.0)]


@pytest.mark.parametrize("run", ["complete", "stream"])
async def test_all_failed_names_each_reason(run: str) -> None:
    workers = (
        Scripted("a", RateLimitedError("busy", worker="a", retry_after=7)),
        Scripted("b", RateLimitedError("busier", worker="b", retry_after=3)),
    )
    record = Record()
    ask = (
        dispatch.complete(workers, REQUEST, record=record, clock=Clock())
        if run == "complete"
        else collect(workers, record)
    )
    with pytest.raises(AllWorkersFailedError) as caught:
        await ask
    assert caught.value.http_status == 429
    assert caught.value.retry_after == 3
    assert list(caught.value.failures) == ["a", "b"]
    assert "a: busy; b: busier" in caught.value.message
    assert record.worker is None
    assert len(record.attempts) == 2


async def test_too_long_for_every_worker_is_the_callers_fault() -> None:
    workers = (Scripted("a", ContextLengthError("a: 10 > 5")), Scripted("b", ContextLengthError("b: 10 > 8")))
    with pytest.raises(ContextLengthError, match="b: 10 > 8"):
        await dispatch.complete(workers, REQUEST, record=Record(), clock=Clock())


async def test_too_long_for_one_and_down_the_other_is_not() -> None:
    workers = (Scripted("a", ContextLengthError("too long")), Scripted("b", refused("b")))
    with pytest.raises(AllWorkersFailedError) as caught:
        await dispatch.complete(workers, REQUEST, record=Record(), clock=Clock())
    assert caught.value.http_status == 502


async def test_failure_after_the_first_byte_propagates_and_repeats_nothing() -> None:
    broken = StreamBrokenError("reset", worker="a")
    second = Scripted("b", "again")
    record = Record()
    workers = (Scripted("a", "one", broken), second)
    chunks = dispatch.stream(workers, REQUEST, record=record, clock=Clock())
    assert (await anext(chunks)).text == "one"
    with pytest.raises(StreamBrokenError) as caught:
        await anext(chunks)
    assert caught.value is broken
    assert second.calls == 0
    assert record.attempts[0].error is broken
    assert record.attempts[0].first_byte_s == 1.0


async def test_a_stream_without_a_final_chunk_is_broken() -> None:
    with pytest.raises(StreamBrokenError, match="a ended its answer"):
        await collect((Scripted("a", "one", final=False),), Record())


async def test_an_empty_stream_moves_on() -> None:
    record = Record()
    texts, _ = await collect((Scripted("a", final=False), Scripted("b", "x")), record)
    assert texts == ["x", ""]
    assert isinstance(record.attempts[0].error, ProtocolError)


async def test_other_errors_are_not_swallowed() -> None:
    second = Scripted("b", "x")
    with pytest.raises(AuthenticationError):
        await dispatch.complete(
            (Scripted("a", AuthenticationError("no")), second), REQUEST, record=Record(), clock=Clock()
        )
    assert second.calls == 0


async def test_cancelling_reaches_the_worker_and_asks_nobody_else() -> None:
    slow, second = Scripted("a", "x", wait=30), Scripted("b", "y")
    task = asyncio.create_task(dispatch.complete((slow, second), REQUEST, record=Record(), clock=Clock()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (slow.cancelled, second.calls) == (1, 0)


async def test_closing_the_stream_closes_the_workers() -> None:
    worker = Scripted("a", "x", "y", wait=0.0)
    chunks = dispatch.stream((worker,), REQUEST, record=Record(), clock=Clock())
    assert (await anext(chunks)).text == "x"
    await chunks.aclose()
    assert worker.closed == 1


async def test_cancelling_while_streaming_reaches_the_worker() -> None:
    worker = Scripted("a", "x", "y", wait=30)

    async def read() -> None:
        async for _ in dispatch.stream((worker,), REQUEST, record=Record(), clock=Clock()):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.cancelled == 1


names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True)


@given(names, st.data(), st.integers(0, 8))
def test_rank_is_a_prefix_of_a_falling_order(allowed: list[str], data: st.DataObject, fallbacks: int) -> None:
    probabilities = {name: data.draw(st.floats(0, 1)) for name in allowed}
    first = data.draw(st.sampled_from(allowed))
    order = rank(first, probabilities, allowed, fallbacks)
    assert order[0] == first
    assert len(order) == min(len(allowed), fallbacks + 1)
    assert len(set(order)) == len(order)
    rest = [probabilities[name] for name in order[1:]]
    assert rest == sorted(rest, reverse=True)
    left_out = set(allowed) - set(order)
    assert all(probabilities[name] <= min(rest, default=1.0) for name in left_out if rest)


def test_rank_without_a_decision_keeps_the_order_of_the_file() -> None:
    assert rank(None, {}, ["c", "a", "b"], 1) == ("c", "a")


def test_rank_never_names_a_worker_that_is_not_allowed() -> None:
    assert rank("z", {"a": 0.1, "b": 0.9, "z": 1.0}, ["a", "b"], 5) == ("b", "a")


def test_a_resting_worker_is_left_out_until_its_time() -> None:
    now = [100.0]
    resting = Resting(lambda: now[0])
    record = Record([Attempt("a", 0, 0, error=CircuitOpenError("rests", retry_after=30))])
    resting.learn(record)
    assert resting.awake("ab") == ("b",)
    assert resting.awake("a") == ("a",), "when every one rests, one has to say so"
    now[0] = 130.0
    assert resting.awake("ab") == ("a", "b")


def test_an_answer_wakes_a_resting_worker() -> None:
    resting = Resting(lambda: 0.0)
    resting.learn(Record([Attempt("a", 0, 0, error=CircuitOpenError("rests", retry_after=30))]))
    resting.learn(Record([Attempt("a", 0, 0)]))
    assert resting.awake("ab") == ("a", "b")
