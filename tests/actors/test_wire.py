"""What every dialect must do alike, over real sockets: replies, streams, failures, cancelling."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from itertools import pairwise

import pytest

from actors.adapters.base import Adapter, CallContext
from actors.errors import (
    ConfigError,
    ProtocolError,
    RateLimitedError,
    StreamBrokenError,
    WorkerAuthError,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from actors.messages import ChatReply, ChatRequest, Message, ToolCall, Usage
from tests.actors.dialects import DIALECTS, KEY, RICH, SIMPLE, Told, adapter_for, drain
from tests.loopback import Behaviour, LoopbackProvider
from tests.loopback_dialects import Dialect

# Several calls at once.
MANY = RICH.with_(parallel_tool_calls=None)
FULL = Behaviour(
    text="Il fait beau à Paris — 21 °C.",
    reasoning="The user wants the weather.",
    tool_calls=(ToolCall("call_a", "weather", '{"city":"Paris"}'), ToolCall("call_b", "clock", "{}")),
    usage=Usage(input_tokens=100, output_tokens=50, cached_input_tokens=40, reasoning_tokens=20),
)


@pytest.fixture(scope="module")
def shared() -> Iterator[LoopbackProvider]:
    with LoopbackProvider(api_key=KEY) as provider:
        yield provider


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return request.param


@pytest.fixture
async def adapter(provider: LoopbackProvider, dialect: Dialect) -> AsyncIterator[Adapter]:
    made = adapter_for(provider, dialect)
    yield made
    await made.close()


def assert_full(reply: ChatReply, dialect: Dialect) -> None:
    assert reply.text == FULL.text
    assert reply.reasoning == FULL.reasoning
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [
        ("weather", '{"city":"Paris"}'),
        ("clock", "{}"),
    ]
    assert reply.finish_reason == "tool_calls"
    assert reply.usage == FULL.usage
    ids = [call.id for call in reply.tool_calls]
    if dialect == "gemini":
        assert all(id.startswith("call_") and len(id) <= 40 for id in ids)
        assert ids[0] != ids[1]
    else:
        assert ids == ["call_a", "call_b"]


async def test_plain(provider: LoopbackProvider, adapter: Adapter, dialect: Dialect) -> None:
    provider.default = FULL
    told = Told()
    assert_full(await adapter.complete(MANY, told.context), dialect)
    assert told.sent == 1
    assert len(told.headers) == 1
    assert "content-type" in told.headers[0]


async def test_stream(provider: LoopbackProvider, adapter: Adapter, dialect: Dialect) -> None:
    provider.default = Behaviour(**{**FULL.__dict__, "chunk_delay": 0.002})
    chunks, final = await drain(adapter, MANY)
    assert_full(final, dialect)
    assert len(chunks) > 8
    assert "".join(chunk.text for chunk in chunks) == FULL.text
    assert "".join(chunk.reasoning for chunk in chunks) == FULL.reasoning
    arguments: dict[int, str] = {}
    for delta in (delta for chunk in chunks for delta in chunk.tool_calls):
        assert (delta.index not in arguments) == (delta.id is not None and delta.name is not None)
        arguments[delta.index] = arguments.get(delta.index, "") + delta.arguments
    assert arguments == {0: '{"city":"Paris"}', 1: "{}"}


async def test_usage_comes_with_the_piece_before_which_it_was_told(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect
) -> None:
    provider.default = FULL
    chunks, _ = await drain(adapter)
    told = [chunk.usage for chunk in chunks if chunk.usage is not None]
    if dialect not in ("openai", "responses"):  # which tell it at the end
        assert (told[0].input_tokens, told[0].cached_input_tokens) == (100, 40)
        assert all(one != other for one, other in pairwise(told)), "and only where it is news"


async def test_plain_and_streamed_replies_are_equal(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect
) -> None:
    provider.default = FULL
    plain = await adapter.complete(MANY, CallContext())
    assert (await drain(adapter, MANY))[1] == plain


@pytest.mark.parametrize("seed", range(4))
async def test_any_split_of_the_bytes(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect, seed: int
) -> None:
    provider.default = Behaviour(**{**FULL.__dict__, "split": random.Random(seed).choice([1, 2, 3, 7, 31])})
    assert_full((await drain(adapter, MANY))[1], dialect)


async def test_connections_are_used_again(provider: LoopbackProvider, adapter: Adapter, dialect: Dialect) -> None:
    before = provider.connections
    provider.default = Behaviour(chunk_delay=0.005)
    for _ in range(3):
        await drain(adapter)
        await adapter.complete(SIMPLE, CallContext())
    assert provider.connections == before + 1


@pytest.mark.parametrize(
    ("finish", "expected"), [("stop", "stop"), ("length", "length"), ("content_filter", "content_filter")]
)
async def test_finish_reasons(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect, finish: str, expected: str
) -> None:
    provider.default = Behaviour(finish=finish)
    if (dialect, finish) == ("anthropic", "content_filter"):
        expected = "refusal"  # its only word for either
    assert (await adapter.complete(SIMPLE, CallContext())).finish_reason == expected
    assert (await drain(adapter))[1].finish_reason == expected


STATUSES: list[tuple[int, type[WorkerError], bool]] = [
    (400, WorkerRejectedError, False),
    (401, WorkerAuthError, False),
    (402, WorkerAuthError, False),
    (403, WorkerAuthError, False),
    (404, WorkerError, False),
    (408, WorkerTimeoutError, True),
    (409, WorkerUnavailableError, True),
    (413, WorkerRejectedError, False),
    (422, WorkerRejectedError, False),
    (429, RateLimitedError, True),
    (500, WorkerUnavailableError, True),
    (502, WorkerUnavailableError, True),
    (503, WorkerUnavailableError, True),
    (504, WorkerTimeoutError, True),
    (529, WorkerUnavailableError, True),
    (302, WorkerError, False),
]


@pytest.mark.parametrize(("status", "kind", "retryable"), STATUSES)
async def test_every_status(
    provider: LoopbackProvider,
    adapter: Adapter,
    dialect: Dialect,
    status: int,
    kind: type[WorkerError],
    retryable: bool,
) -> None:
    headers = {"location": f"{provider.url_for('openai')}/chat/completions", "retry-after": "7"}
    provider.default = Behaviour(status=status, error=f"no way, {KEY} said", headers=headers)
    told = Told()
    with pytest.raises(kind) as plain:
        await adapter.complete(SIMPLE, told.context)
    with pytest.raises(kind) as streamed:
        await drain(adapter)
    for error in (plain.value, streamed.value):
        assert type(error) is kind
        assert error.retryable is retryable
        assert error.worker == f"w-{dialect}"
        assert KEY not in str(error)
        assert status == 302 or "no way, *** said" in error.message
    assert told.sent == 1
    assert told.headers[0]["retry-after"] == "7"
    assert provider.total == 2
    if status in (429, 503):
        assert plain.value.retry_after == 7.0


async def test_a_wrong_key(provider: LoopbackProvider, dialect: Dialect) -> None:
    adapter = adapter_for(provider, dialect, api_key="sk-wrong-wrong-wrong")
    with pytest.raises(WorkerAuthError):
        await adapter.complete(SIMPLE, CallContext())
    await adapter.close()


async def test_an_error_body_that_is_no_json(provider: LoopbackProvider, adapter: Adapter, dialect: Dialect) -> None:
    provider.default = Behaviour(status=502, body=b"<html>Bad gateway</html>", content_type="text/html")
    with pytest.raises(WorkerUnavailableError, match=r"unavailable \(502\)$"):
        await adapter.complete(SIMPLE, CallContext())


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<html>hello</html>", "text/html"),
        (b"\xff\xfe garbage {", "application/json"),
        (b"[1, 2]", "application/json"),
        (b"{}", "application/json"),
        (b'{"choices": [5], "content": [5], "candidates": [5]}', "application/json"),
        (b'{"choices": 1, "content": 1, "candidates": 1}', "application/json"),
        (b"", "application/json"),
    ],
)
async def test_replies_that_are_not_the_format(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect, body: bytes, content_type: str
) -> None:
    provider.default = Behaviour(body=body, content_type=content_type)
    with pytest.raises(ProtocolError):
        await adapter.complete(SIMPLE, CallContext())
    with pytest.raises(ProtocolError):
        await drain(adapter)


@pytest.mark.parametrize("data", [b"data: {oops\n\n", b"data: 7\n\n", b"data: [{}]\n\n", b"data: {}\n\n"])
async def test_streams_that_are_not_the_format(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect, data: bytes
) -> None:
    provider.default = Behaviour(body=data, content_type="text/event-stream")
    with pytest.raises(ProtocolError):
        await drain(adapter)


async def test_an_error_reported_with_status_200(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect
) -> None:
    body = b'{"error": {"message": "slow down", "code": 429, "type": "rate_limit_error"}}'
    provider.default = Behaviour(body=body)
    with pytest.raises(RateLimitedError, match="slow down"):
        await adapter.complete(SIMPLE, CallContext())
    with pytest.raises(RateLimitedError, match="slow down"):
        await drain(adapter)


async def first_chunks(adapter: Adapter) -> tuple[str, WorkerError]:
    """The text that came, and the error that ended it."""
    text = ""
    try:
        async for chunk in adapter.stream(SIMPLE, CallContext()):
            text += chunk.text
    except WorkerError as error:
        return text, error
    raise AssertionError("the stream did not fail")


@pytest.mark.parametrize("how", ["rst", "fin", "half"])
async def test_a_stream_that_breaks(provider: LoopbackProvider, adapter: Adapter, dialect: Dialect, how: str) -> None:
    after = {"openai": 3, "responses": 6, "anthropic": 5, "gemini": 2}[dialect]
    provider.default = Behaviour(break_after=after, break_how=how, chunk_delay=0.01)  # type: ignore[arg-type]
    text, error = await first_chunks(adapter)
    assert text == "Hello from"
    assert type(error) is StreamBrokenError
    assert not error.retryable


@pytest.mark.parametrize("how", ["rst", "fin", "half"])
async def test_a_stream_that_breaks_before_its_first_chunk(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect, how: str
) -> None:
    provider.default = Behaviour(break_after=0, break_how=how)  # type: ignore[arg-type]
    text, error = await first_chunks(adapter)
    assert text == ""
    assert isinstance(error, WorkerUnavailableError)


@pytest.mark.parametrize("how", ["rst", "fin", "half"])
async def test_a_plain_reply_that_breaks(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect, how: str
) -> None:
    provider.default = Behaviour(break_after=20, break_how=how)  # type: ignore[arg-type]
    with pytest.raises(WorkerUnavailableError):
        await adapter.complete(SIMPLE, CallContext())


async def test_a_stream_without_its_end(provider: LoopbackProvider, adapter: Adapter, dialect: Dialect) -> None:
    provider.default = Behaviour(terminator=False, chunk_delay=0.002)
    text, error = await first_chunks(adapter)
    assert text == Behaviour.text
    assert type(error) is StreamBrokenError
    provider.default = Behaviour(terminator=False, text="")
    text, error = await first_chunks(adapter)
    assert type(error) is ProtocolError


async def test_an_error_inside_a_stream(provider: LoopbackProvider, adapter: Adapter, dialect: Dialect) -> None:
    begun = {"openai": 3, "responses": 6, "anthropic": 5, "gemini": 2}[dialect]
    provider.enqueue(
        Behaviour(error_after=begun, error="engine fell over", chunk_delay=0.01),
        Behaviour(error_after=0, error="engine fell over"),
    )
    text, error = await first_chunks(adapter)
    assert text == "Hello from"
    assert type(error) is StreamBrokenError
    assert "engine fell over" in error.message
    text, error = await first_chunks(adapter)
    assert text == ""
    assert type(error) is WorkerUnavailableError


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelling_closes_the_connection_within_a_second(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect, streamed: bool
) -> None:
    provider.default = Behaviour(never=True)
    told = Told()
    call = drain(adapter) if streamed else adapter.complete(SIMPLE, told.context)
    task = asyncio.ensure_future(call)
    assert await asyncio.to_thread(provider.wait_for, lambda: provider.in_flight == 1)
    task.cancel()
    asked = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(provider.wait_for, lambda: len(provider.disconnects) == 1)
    assert provider.disconnects[0].time - asked < 1.0
    assert provider.in_flight == 0
    assert streamed or told.sent == 1


async def test_closing_the_iterator_closes_the_connection(
    provider: LoopbackProvider, adapter: Adapter, dialect: Dialect
) -> None:
    provider.default = Behaviour(text="word " * 1000, chunk_delay=0.02)
    async with aclosing(adapter.stream(SIMPLE, CallContext())) as stream:  # type: ignore[type-var]
        async for _chunk in stream:
            break
    asked = time.monotonic()
    assert await asyncio.to_thread(provider.wait_for, lambda: len(provider.disconnects) == 1)
    assert provider.disconnects[0].time - asked < 1.0


@pytest.mark.parametrize(
    ("behaviour", "timeout", "phase"),
    [
        (Behaviour(never=True), {"first_byte": 0.2, "whole": 0.2}, "first_byte"),
        (Behaviour(delay=5), {"total": 0.2}, "total"),
    ],
)
async def test_time_is_bounded_before_the_first_byte(
    provider: LoopbackProvider, dialect: Dialect, behaviour: Behaviour, timeout: dict[str, float], phase: str
) -> None:
    provider.default = behaviour
    adapter = adapter_for(provider, dialect, timeout=timeout)
    began = time.monotonic()
    with pytest.raises(WorkerTimeoutError, match=r"no .*answer for 0\.2 s") as plain:
        await adapter.complete(SIMPLE, CallContext())
    with pytest.raises(WorkerTimeoutError) as streamed:
        await drain(adapter)
    assert plain.value.phase == streamed.value.phase == phase
    assert 0.4 <= time.monotonic() - began < 3
    assert await asyncio.to_thread(provider.wait_for, lambda: provider.in_flight == 0)
    await adapter.close()


@pytest.mark.parametrize("timeout", [{"first_byte": 0.2}, {"first_byte": 0.2, "whole": 3}])
async def test_an_answer_that_comes_whole_has_longer_until_its_first_byte(
    provider: LoopbackProvider, dialect: Dialect, timeout: dict[str, float]
) -> None:
    provider.default = Behaviour(text="it took its time", delay=0.5)
    adapter = adapter_for(provider, dialect, timeout=timeout)
    assert (await adapter.complete(SIMPLE, CallContext())).text == "it took its time"
    with pytest.raises(WorkerTimeoutError, match=r"no answer for 0\.2 s"):
        await drain(adapter)
    await adapter.close()


async def test_silence_inside_a_stream_is_bounded(provider: LoopbackProvider, dialect: Dialect) -> None:
    provider.default = Behaviour(text="a b c", chunk_delay=3)
    adapter = adapter_for(provider, dialect, timeout={"idle": 0.2})
    text, error = await first_chunks(adapter)
    # Gemini's first event carries text already; the others begin with one that does not.
    assert text == ("a" if dialect == "gemini" else "")
    assert isinstance(error, StreamBrokenError if dialect == "gemini" else WorkerTimeoutError)
    assert "the answer stopped for 0.2 s" in error.message
    await adapter.close()


async def test_the_whole_stream_is_bounded(provider: LoopbackProvider, dialect: Dialect) -> None:
    provider.default = Behaviour(text="a b c d e f g h i j k l m n", chunk_delay=0.1)
    adapter = adapter_for(provider, dialect, timeout={"total": 0.7})
    text, error = await first_chunks(adapter)
    assert text.startswith("a b")
    assert type(error) is StreamBrokenError
    assert "no complete answer for 0.7 s" in error.message
    await adapter.close()


async def test_nobody_listens(provider: LoopbackProvider, dialect: Dialect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    adapter = adapter_for(provider, dialect, base_url=f"http://127.0.0.1:{port}/v1")
    told = Told()
    with pytest.raises(WorkerUnavailableError, match=f"cannot connect to 127.0.0.1:{port}"):
        await adapter.complete(SIMPLE, told.context)
    assert told.sent == 0
    await adapter.close()


async def test_a_name_that_does_not_exist(provider: LoopbackProvider, dialect: Dialect) -> None:
    adapter = adapter_for(provider, dialect, base_url="http://no-such-host.invalid/v1")
    with pytest.raises(WorkerUnavailableError, match=r"cannot connect to no-such-host.invalid"):
        await adapter.complete(SIMPLE, CallContext())
    await adapter.close()


async def test_a_server_that_does_not_speak_http(provider: LoopbackProvider, dialect: Dialect) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 smtp.example.com ESMTP\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    adapter = adapter_for(provider, dialect, base_url=f"http://127.0.0.1:{port}/v1")
    with pytest.raises(WorkerUnavailableError):
        await adapter.complete(SIMPLE, CallContext())
    await adapter.close()
    server.close()


async def test_text_that_no_json_can_hold(adapter: Adapter, dialect: Dialect) -> None:
    request = ChatRequest(messages=(Message("user", "half a pair: \ud800"),))
    with pytest.raises(WorkerRejectedError, match="cannot be written as JSON"):
        await adapter.complete(request, CallContext())


async def test_a_key_with_a_line_break(provider: LoopbackProvider, dialect: Dialect) -> None:
    with pytest.raises(ConfigError, match="cannot be sent") as caught:
        adapter_for(provider, dialect, api_key=f"{KEY}\n")
    assert KEY not in str(caught.value)


async def test_headers_of_the_configuration(provider: LoopbackProvider, dialect: Dialect) -> None:
    adapter = adapter_for(provider, dialect, headers={"X-Team": "fish"})
    await adapter.complete(SIMPLE, CallContext())
    headers = provider.requests[-1].headers
    assert headers["x-team"] == "fish"
    assert headers["host"] == f"127.0.0.1:{provider.port}"
    assert headers["content-type"] == "application/json"
    assert "cookie" not in headers
    await adapter.close()


async def test_many_at_once_stay_within_the_concurrency(provider: LoopbackProvider, dialect: Dialect) -> None:
    provider.default = Behaviour(delay=0.02)
    adapter = adapter_for(provider, dialect, limits={"concurrency": 8})
    replies = await asyncio.gather(*(adapter.complete(SIMPLE, CallContext()) for _ in range(64)))
    assert {reply.text for reply in replies} == {Behaviour.text}
    assert provider.max_in_flight == 8
    await adapter.close()


async def test_a_large_image_arrives_whole(provider: LoopbackProvider, adapter: Adapter, dialect: Dialect) -> None:
    text = "x" * 3_000_000
    await adapter.complete(ChatRequest(messages=(Message("user", text),)), CallContext())
    assert text.encode() in provider.requests[-1].raw
