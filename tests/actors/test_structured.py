"""JSON that was asked for: checked, repaired once, never shown unchecked."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import WorkerSpec
from actors.errors import RequestError, ShapeError, StreamBrokenError, WorkerUnavailableError
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ResponseFormat, ToolCall
from actors.structured import Shape, native
from actors.worker import WorkerRuntime
from tests.actors.test_worker import USAGE, Scripted, Step

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
REQUEST = ChatRequest(
    (Message("system", "Be kind."), Message("user", "how many?")),
    max_tokens=100,
    response_format=ResponseFormat("json_schema", "count", SCHEMA, strict=True),
)


def runtime(adapter: Scripted, **fields: Any) -> WorkerRuntime:
    spec = {"name": "w", "provider": "openai", "model": "m", "base_url": "http://127.0.0.1:1", "retry": {"attempts": 1}}
    return WorkerRuntime(WorkerSpec.model_validate({**spec, **fields}), adapter)


def says(*texts: str) -> Scripted:
    return Scripted(*(Step(thinking=0.0, between=0.0, pieces=(text,)) for text in texts))


@pytest.mark.parametrize("text", ['{"n": 3}', '```json\n{"n": 3}\n```', '```\n{"n": 3}```'])
async def test_a_right_answer_passes_bare(text: str) -> None:
    adapter = says(text)
    reply = await runtime(adapter).complete(REQUEST)
    assert (reply.text, len(adapter.calls)) == ('{"n": 3}', 1)
    assert adapter.calls[0] == REQUEST


@pytest.mark.parametrize(
    ("text", "told"),
    [("three", "not valid JSON"), ('{"n": "3"}', "$.n: '3' is not of type 'integer'"), ("[]", "not of type 'object'")],
)
async def test_a_wrong_answer_is_repaired_once_and_both_are_paid(text: str, told: str) -> None:
    adapter = says(text, '{"n": 3}')
    price = {"input": 1.0, "output": 2.0}
    reply = await runtime(adapter, price=price).complete(REQUEST)
    assert (reply.text, reply.usage, reply.attempts) == ('{"n": 3}', USAGE + USAGE, 2)
    assert reply.cost_usd == pytest.approx(2 * (10 * 1.0 + 5 * 2.0) / 1e6)
    *before, answer, repair = adapter.calls[1].messages
    assert tuple(before) == REQUEST.messages
    assert (answer.role, answer.text) == ("assistant", text)
    assert told in repair.text


async def test_twice_wrong_is_an_error_that_quotes_nothing() -> None:
    adapter = says("three secrets")
    with pytest.raises(ShapeError) as caught:
        await runtime(adapter).complete(REQUEST)
    assert len(adapter.calls) == 2
    assert "secrets" not in caught.value.message
    assert caught.value.worker == "w"
    assert caught.value.usage == USAGE + USAGE, "both were paid"


async def test_a_caller_who_counts_calls_pays_for_one() -> None:
    adapter = says("three", '{"n": 3}')
    with pytest.raises(ShapeError):
        await runtime(adapter).complete(REQUEST.with_(max_attempts=1))
    assert len(adapter.calls) == 1


async def chunks_of(worker: WorkerRuntime) -> list[Chunk]:
    return [chunk async for chunk in worker.stream(REQUEST)]


async def test_nothing_unchecked_is_streamed() -> None:
    chunks = await chunks_of(runtime(says("three", '{"n": 3}')))
    assert "".join(chunk.text for chunk in chunks) == '{"n": 3}'
    assert chunks[-1].final is not None
    assert chunks[-1].final.attempts == 2


async def test_a_trusted_worker_streams_as_it_writes() -> None:
    right = Scripted(Step(pieces=('{"n"', ": 3}"), thinking=0.0, between=0.0))
    chunks = await chunks_of(runtime(right, base_url="https://api.openai.com/v1"))
    assert [chunk.text for chunk in chunks[:-1]] == ['{"n"', ": 3}"]
    wrong = Scripted(Step(pieces=("thr", "ee"), thinking=0.0, between=0.0))
    with pytest.raises(StreamBrokenError, match="not JSON") as caught:
        await chunks_of(runtime(wrong, base_url="https://api.openai.com/v1"))
    assert caught.value.usage == USAGE


async def test_a_repair_that_fails_does_not_hide_what_the_answer_took() -> None:
    adapter = Scripted(
        Step(thinking=0.0, between=0.0, pieces=("three",)), Step(error=WorkerUnavailableError("down"), thinking=0.0)
    )
    with pytest.raises(WorkerUnavailableError) as caught:
        await runtime(adapter).complete(REQUEST)
    assert caught.value.usage == USAGE


async def test_a_worker_without_the_field_is_told_in_words() -> None:
    adapter = says('{"n": 3}')
    reply = await runtime(adapter, provider="local", base_url=None).complete(REQUEST)
    assert reply.text == '{"n": 3}'
    kind, shape, question = adapter.calls[0].messages
    assert (kind, question) == REQUEST.messages
    assert orjson.dumps(SCHEMA).decode() in shape.text
    assert adapter.calls[0].response_format is None


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"type": "nonsense"}, "not valid"),
        ({"$ref": "http://127.0.0.1:9/other.json"}, "outside itself"),
        ({"$ref": "#"}, "too deeply"),
    ],
)
async def test_a_bad_schema_is_the_callers_fault_and_fetches_nothing(schema: dict[str, Any], what: str) -> None:
    adapter = says("{}")
    request = REQUEST.with_(response_format=ResponseFormat("json_schema", schema=schema))
    with pytest.raises(RequestError, match=what):
        await asyncio.wait_for(runtime(adapter).complete(request), 5)


@pytest.mark.parametrize(
    "reply",
    [
        ChatReply("w", '{"n"', finish_reason="length"),
        ChatReply("w", "I will not.", finish_reason="content_filter"),
        ChatReply("w", tool_calls=(ToolCall("c", "f", "{}"),), finish_reason="tool_calls"),
    ],
)
def test_what_is_no_whole_answer_is_not_judged(reply: ChatReply) -> None:
    assert REQUEST.response_format is not None
    assert Shape(REQUEST.response_format).read(reply) == (reply, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"provider": "openai"}, "trusted"),
        ({"provider": "openai", "base_url": "https://x.openai.azure.com"}, "trusted"),
        ({"provider": "openai", "base_url": "http://localhost:11434/v1"}, "sent"),
        ({"provider": "anthropic", "model": "claude-sonnet-4-6"}, "trusted"),
        ({"provider": "anthropic", "model": "claude-3-5-sonnet-20241022"}, "none"),
        ({"provider": "anthropic", "model": "glm"}, "sent"),
        ({"provider": "gemini"}, "trusted"),
        ({"provider": "vllm"}, "trusted"),
        ({"provider": "local"}, "none"),
    ],
)
def test_what_becomes_of_a_schema(fields: dict[str, Any], expected: str) -> None:
    assert native(WorkerSpec.model_validate({"name": "w", "model": "m", **fields})) == expected


@pytest.mark.parametrize(
    ("fields", "wanted", "expected"),
    [
        ({"provider": "openai"}, ResponseFormat("json_schema", schema=SCHEMA, strict=True), "trusted"),
        ({"provider": "openai"}, ResponseFormat("json_schema", schema=SCHEMA), "sent"),
        ({"provider": "openai"}, ResponseFormat("json_schema", schema={"type": "object"}, strict=True), "sent"),
        ({"provider": "openai"}, ResponseFormat("json_object"), "trusted"),
        (
            {"provider": "anthropic", "model": "claude-opus-4-8"},
            ResponseFormat("json_schema", schema=SCHEMA),
            "trusted",
        ),
        (
            {"provider": "anthropic", "model": "claude-opus-4-8"},
            ResponseFormat("json_schema", schema={"type": "integer", "minimum": 1}, strict=True),
            "none",
        ),
        ({"provider": "anthropic", "model": "claude-opus-4-8"}, ResponseFormat("json_object"), "none"),
        ({"provider": "anthropic", "model": "glm"}, ResponseFormat("json_object"), "none"),
        ({"provider": "gemini"}, ResponseFormat("json_object"), "trusted"),
    ],
)
def test_what_becomes_of_what_is_wanted(fields: dict[str, Any], wanted: ResponseFormat, expected: str) -> None:
    assert native(WorkerSpec.model_validate({"name": "w", "model": "m", **fields}), wanted) == expected


async def test_any_json_is_asked_of_claude_in_words_and_checked_before_it_is_streamed() -> None:
    adapter = says("three", '{"n": 3}')
    claude = runtime(adapter, provider="anthropic", model="claude-opus-4-8")
    asked = REQUEST.with_(response_format=ResponseFormat("json_object"))
    chunks = [chunk async for chunk in claude.stream(asked)]
    assert "".join(chunk.text for chunk in chunks) == '{"n": 3}'
    assert "one JSON object" in adapter.calls[0].messages[1].text


async def test_a_schema_that_is_not_held_to_is_checked_before_it_is_streamed() -> None:
    adapter = says("three", '{"n": 3}')
    asked = REQUEST.with_(response_format=ResponseFormat("json_schema", "count", SCHEMA, strict=False))
    chunks = [chunk async for chunk in runtime(adapter, base_url="https://api.openai.com/v1").stream(asked)]
    assert "".join(chunk.text for chunk in chunks) == '{"n": 3}'


@given(st.dictionaries(st.sampled_from("nxy"), st.one_of(st.integers(-5, 5), st.text(max_size=2)), max_size=2))
def test_exactly_what_satisfies_the_schema_passes(value: dict[str, Any]) -> None:
    assert REQUEST.response_format is not None
    reply = ChatReply("w", orjson.dumps(value).decode())
    _, wrong = Shape(REQUEST.response_format).read(reply)
    assert (wrong is None) == (set(value) == {"n"} and isinstance(value["n"], int))
    _, no_object = Shape(ResponseFormat("json_object")).read(reply)
    assert no_object is None
