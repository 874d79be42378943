"""What calls that came to nothing took: told, priced, and on the account of their key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import FuguConfig
from actors.errors import FuguError, ShapeError, StreamBrokenError, WorkerTimeoutError, WorkerUnavailableError
from actors.estimate import estimate_tokens, text_tokens
from actors.messages import ChatReply, ChatRequest, Chunk, Message, Usage
from actors.spending import Taken, tell, told_to
from orchestrator.budget import Account, Budget
from serve.api.health import Readiness
from serve.counted import Counted
from serve.gateway import Gateway
from serve.keys import KeyBook
from serve.prices import Prices
from serve.router import OrderDecider
from serve.trace import Spent, Trace
from tests.serve.test_gateway import USAGE, Scripted, events
from tests.serve.test_keys import body, client, made
from tests.serve.test_session import THREE, Plan, Player
from tests.serve.test_ultra import CHAIN, Ultra

ASKED = ChatRequest((Message("user", "what is it?"),))
READ = estimate_tokens(ASKED).input
CONFIG = FuguConfig.model_validate(
    {
        "workers": [
            {"name": name, "provider": "openai", "model": "m", "price": {"input": 1000.0, "output": 2000.0}}
            for name in ("a", "b")
        ]
    }
)


def price(usage: Usage) -> float:
    return (usage.input_tokens * 1000 + usage.output_tokens * 2000) / 1e6


class Paced:
    """Says its pieces, each `pace` seconds (of `Clock`) after the one before."""

    name = "a"

    def __init__(self, clock: Clock, *pieces: Chunk | FuguError, pace: float = 0.0) -> None:
        self.clock = clock
        self.pieces = pieces
        self.pace = pace

    async def complete(self, request: ChatRequest) -> ChatReply:
        reply: ChatReply | None = None
        async for chunk in self.stream(request):
            reply = chunk.final
        assert reply is not None
        return reply

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        for piece in self.pieces:
            self.clock.now += self.pace
            if isinstance(piece, FuguError):
                raise piece
            yield piece
        self.clock.now += self.pace
        await asyncio.Event().wait()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def counted(*pieces: Chunk | FuguError, pace: float = 0.0) -> tuple[Counted, Trace]:
    clock, trace = Clock(), Trace("id", 0.0)
    return Counted(Paced(clock, *pieces, pace=pace), trace, Prices(CONFIG), clock), trace


async def read(worker: Counted, request: ChatRequest = ASKED, pieces: int | None = None) -> None:
    """Read so many pieces and leave; all of them where None."""
    async with aclosing(worker.stream(request)) as chunks:  # type: ignore[type-var]
        left = pieces
        async for _ in chunks:
            left = None if left is None else left - 1
            if left == 0:
                return


@given(st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=9), st.data())
def test_a_stream_is_charged_with_what_was_received(words: list[str], data: st.DataObject) -> None:
    pieces = data.draw(st.integers(1, len(words)))
    worker, trace = counted(*(Chunk(word) for word in words))
    asyncio.run(read(worker, pieces=pieces))
    usage = Usage(READ, text_tokens("".join(words[:pieces])))
    assert trace.spent == [Spent(usage, pytest.approx(price(usage)), estimated=True)]


async def test_what_the_provider_has_said_goes_before_the_guess() -> None:
    told = Usage(700, 1, 600)
    worker, trace = counted(Chunk("three words here", usage=told), StreamBrokenError("cut", worker="a"))
    with pytest.raises(StreamBrokenError):
        await read(worker)
    assert trace.taken.usage == Usage(700, text_tokens("three words here"), 600)
    worker, trace = counted(Chunk("x", usage=Usage(700, 90, 0, 80)), StreamBrokenError("cut", worker="a"))
    with pytest.raises(StreamBrokenError):
        await read(worker)
    assert trace.taken.usage == Usage(700, 90, 0, 80)


async def test_silent_thinking_is_charged_within_the_bound_of_the_request() -> None:
    worker, trace = counted(Chunk("so"), Chunk(" it"), pace=3.0)
    await read(worker, pieces=2)
    assert trace.taken.usage == Usage(READ, 300 + 2), "three seconds before the first piece, and five letters"
    worker, trace = counted(Chunk("so"), pace=3.0)
    await read(worker, ASKED.with_(max_tokens=50), pieces=1)
    assert trace.taken.usage == Usage(READ, 50)


@pytest.mark.parametrize("streamed", [True, False])
async def test_who_hangs_up_before_anything_came_has_paid_for_the_question(streamed: bool) -> None:
    worker, trace = counted(pace=2.0)
    task = asyncio.create_task(read(worker) if streamed else _complete(worker))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trace.taken == Spent(Usage(READ, 200), pytest.approx(price(Usage(READ, 200))), True)


async def _complete(worker: Counted) -> None:
    await worker.complete(ASKED)


def _misshapen() -> ShapeError:
    error = ShapeError("no", worker="a")
    error.usage = Usage(40, 20)
    return error


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("error", "spent"),
    [
        (lambda: WorkerUnavailableError("down", worker="a"), []),
        (lambda: WorkerTimeoutError("no", phase="connect", worker="a"), []),
        (lambda: WorkerTimeoutError("no", phase="first_byte", worker="a"), [(Usage(READ, 100), True)]),
        (_misshapen, [(Usage(40, 20), False)]),
    ],
)
async def test_failures(streamed: bool, error: Callable[[], FuguError], spent: list[tuple[Usage, bool]]) -> None:
    worker, trace = counted(error(), pace=1.0)
    with pytest.raises(FuguError):
        await (read(worker) if streamed else worker.complete(ASKED))
    assert [(each.usage, each.estimated) for each in trace.spent] == spent
    assert trace.taken.usd == pytest.approx(sum(price(usage) for usage, _ in spent))


async def test_a_whole_answer_is_what_its_worker_says() -> None:
    reply = ChatReply("a", "yes", usage=USAGE, cost_usd=0.25)
    worker, trace = counted(Chunk("yes"), Chunk(final=reply), pace=9.0)
    await read(worker, pieces=2)
    assert trace.spent == [Spent(USAGE, 0.25)]
    worker, trace = counted(Chunk("yes"), Chunk(final=replace(reply, estimated=True)), pace=9.0)
    await read(worker, pieces=2)
    assert trace.spent == [Spent(USAGE, 0.25, estimated=True)]
    assert trace.estimated_usd == 0.25


class SecondTry(Paced):
    """Answers once an attempt has come to nothing, and a first answer had to be put right."""

    async def complete(self, request: ChatRequest) -> ChatReply:
        tell(Taken(Usage(30, 5), estimated=True))
        tell(Taken(Usage(40, 20), estimated=False, within=True))
        return ChatReply("a", "yes", usage=Usage(90, 30), cost_usd=price(Usage(90, 30)))


def _second_try(clock: Clock) -> Paced:
    return SecondTry(clock)


def _breaks(*pieces: Chunk | FuguError) -> Callable[[Clock], Paced]:
    return lambda clock: Paced(clock, *pieces, pace=1.0)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    "made_worker",
    [
        _breaks(WorkerUnavailableError("down", worker="a")),
        _breaks(WorkerTimeoutError("no", phase="first_byte", worker="a")),
        _breaks(Chunk("half of it"), StreamBrokenError("cut", worker="a")),
        _breaks(_misshapen()),
        _second_try,
    ],
)
async def test_a_budget_around_it_counts_what_the_trace_counts(
    streamed: bool, made_worker: Callable[[Clock], Paced]
) -> None:
    clock, trace = Clock(), Trace("id", 0.0)
    worker = Counted(made_worker(clock), trace, Prices(CONFIG), clock)
    account = Account(Budget(tokens=10_000, usd=100.0), price=lambda _name, read, written: price(Usage(read, written)))
    grant = account.admit("a", ASKED)
    reply = failure = None
    with told_to(account.told_by("a")):
        try:
            if streamed and made_worker is not _second_try:
                await read(worker)
            else:
                reply = await worker.complete(ASKED)
        except FuguError as error:
            failure = error
    account.settle(grant, reply, failure)
    assert account.tokens == trace.taken.usage.total_tokens
    assert account.usd == pytest.approx(trace.taken.usd)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    return tmp_path / "keys.sqlite"


def app_of(*workers: Any, decider: Any = None, **options: Any) -> Gateway:
    return Gateway(CONFIG, workers, decider or OrderDecider(["a", "b"]), Readiness({}), **options)


async def test_a_broken_answer_is_priced_and_told(path: Path) -> None:
    made(path)
    _, secret = made(path)
    http = client(app_of(Scripted("a", "half of it", StreamBrokenError("cut", worker="a")), Scripted("b")), secret)
    told = events(await http.post("/v1/chat/completions", json=body(stream=True, fugu={"trace": True})))[-2]
    read = estimate_tokens(ChatRequest((Message("user", "hello"),))).input
    written = told["fugu"]["usage"]["completion_tokens"]
    # The time that it was silent is short, and not nothing.
    assert text_tokens("half of it") <= written <= text_tokens("half of it") + 10
    usage = Usage(read, written)
    assert told["fugu"]["usage"]["prompt_tokens"] == read
    assert told["fugu"]["estimated"] is True
    assert told["fugu"]["cost_usd"] == pytest.approx(price(usage))
    used = KeyBook(path).list()[1][1]
    assert (used.requests, used.usage, used.unpriced) == (1, usage, 0)
    assert used.usd == used.estimated_usd == pytest.approx(price(usage))


WORDS = "words " * 30


class Endless:
    """Says some words and goes on for ever; `heard` is set when they were taken."""

    name = "a"

    def __init__(self) -> None:
        self.heard = asyncio.Event()

    async def complete(self, request: ChatRequest) -> ChatReply:
        raise AssertionError("it is streamed")

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        yield Chunk(WORDS)
        self.heard.set()
        await asyncio.Event().wait()


async def _left(http: httpx.AsyncClient, endless: Endless, fields: dict[str, Any]) -> int:
    """The status; 200 after hanging up on an answer that has begun."""
    endless.heard.clear()
    task = asyncio.create_task(http.post("/v1/chat/completions", json=fields))
    heard = asyncio.create_task(endless.heard.wait())
    done, _ = await asyncio.wait((task, heard), return_when=asyncio.FIRST_COMPLETED, timeout=10)
    heard.cancel()
    if task in done:
        return task.result().status_code
    task.cancel()
    await asyncio.wait((task,), timeout=10)
    return 200


@pytest.mark.parametrize("broken", ["by the worker", "by the caller"])
async def test_breaking_streams_does_not_save_a_budget(path: Path, broken: str) -> None:
    _, secret = made(path, monthly_usd=1.0)
    endless = Endless()
    breaks = Scripted("a", WORDS, StreamBrokenError("cut", worker="a"))
    http = client(app_of(breaks if broken == "by the worker" else endless, Scripted("b")), secret)
    read = estimate_tokens(ChatRequest((Message("user", "hello"),))).input
    each = price(Usage(read, text_tokens(WORDS)))
    fields = body(stream=True, max_tokens=70)
    answered = 0
    while answered * each < 1.0:
        if broken == "by the worker":
            response = await http.post("/v1/chat/completions", json=fields)
            status = response.status_code
        else:
            status = await _left(http, endless, fields)
        if status == 429:
            break
        answered += 1
    assert 1 < answered <= 1.0 / each
    ((_, used),) = KeyBook(path).list()
    assert answered * each * 0.999 <= used.usd <= 1.0
    assert used.estimated_usd == used.usd
    refused = await http.post("/v1/chat/completions", json=body(max_tokens=70))
    assert refused.json()["error"]["code"] == "insufficient_quota"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["fugu", "fugu-trinity", "fugu-ultra"])
async def test_the_caller_is_told_what_the_key_is_charged(path: Path, tmp_path: Path, model: str, stream: bool) -> None:
    """Also for a call that failed and cost something all the same, and whose place another worker took."""
    _, secret = made(path)
    apps = {
        "fugu": lambda: app_of(Scripted("a", _misshapen()), Scripted("b", "yes")),
        "fugu-trinity": lambda: app_of(
            Player("a", worker=_misshapen()),
            Player("b"),
            decider=Plan(("a", "worker"), ("b", "verifier")),
            no_roles=None,
        ),
        "fugu-ultra": lambda: Ultra(tmp_path, CHAIN, a=_misshapen()).app,
    }
    fields = body(model=model, fugu={"trace": True}, stream=stream)
    if stream:
        fields["stream_options"] = {"include_usage": True}
    response = await client(apps[model](), secret).post("/v1/chat/completions", json=fields)
    assert response.status_code == 200
    if stream:
        told = [event for event in events(response) if event != "[DONE]"]
        usage, trace = (next(each[name] for each in told if each.get(name)) for name in ("usage", "fugu"))
    else:
        usage, trace = response.json()["usage"], response.json()["fugu"]
    ((_, used),) = KeyBook(path).list()
    assert usage == trace["usage"]
    assert usage["total_tokens"] == used.usage.total_tokens
    read, written = usage["prompt_tokens_details"], usage["completion_tokens_details"]
    assert usage["prompt_tokens"] + read["orchestration_input_tokens"] == used.usage.input_tokens
    assert usage["completion_tokens"] + written["orchestration_output_tokens"] == used.usage.output_tokens
    assert read["orchestration_input_tokens"] >= 40, "what the one that failed read is in it"
    assert trace["cost_usd"] == pytest.approx(used.usd)
    assert used.usd > 0


async def test_calls_of_a_session_that_was_left(path: Path) -> None:
    _, secret = made(path)
    first, second = Player("a"), Player("b", wait=30)
    http = client(app_of(first, second, decider=Plan(*THREE), no_roles=None), secret)
    task = asyncio.create_task(http.post("/v1/chat/completions", json=body(model="fugu-trinity")))
    async with asyncio.timeout(10):
        await second.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ((_, used),) = KeyBook(path).list()
    assert used.requests == 1
    assert used.usage.input_tokens == 30 + estimate_tokens(second.requests[0]).input
    assert used.usd == pytest.approx(0.25 + used.estimated_usd)
    assert used.estimated_usd > 0


async def test_calls_of_a_workflow_that_broke(path: Path, tmp_path: Path) -> None:
    _, secret = made(path)
    ultra = Ultra(tmp_path, CHAIN, b="four BREAK")
    http = client(ultra.app, secret)
    told = events(await http.post("/v1/chat/completions", json=body(model="fugu-ultra", stream=True)))
    assert told[-2]["error"]["code"] == "stream_broken"
    ((_, used),) = KeyBook(path).list()
    # The plan and the first step were answered in full, for 0.25 each; the second step broke.
    last = Usage(estimate_tokens(ultra.b.requests[0]).input, used.usage.output_tokens - 20)
    assert used.usage.input_tokens == 200 + last.input_tokens
    assert last.output_tokens >= text_tokens("fou"), "its first piece"
    guessed = (last.input_tokens + 10 * last.output_tokens) / 1e6
    assert used.estimated_usd == pytest.approx(guessed)
    assert used.usd == pytest.approx(0.5 + guessed)


async def test_a_months_guesses_are_told(path: Path) -> None:
    key, _ = made(path)
    book = KeyBook(path)
    await book.settle(key, await book.admit(key, 1), Usage(1, 1), 0.5, estimated_usd=0.125)
    await book.settle(key, await book.admit(key, 1), Usage(1, 1), 0.25)
    await book.settle(key, await book.admit(key, 1), Usage(1, 1), 1.0, estimated_usd=1.0)
    ((_, used),) = KeyBook(path).list()
    assert (used.usd, used.estimated_usd) == (1.75, 1.125)
