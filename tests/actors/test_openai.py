"""The OpenAI dialect: the exact request, and what compatible servers do differently."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from actors.adapters.base import Adapter, CallContext
from actors.adapters.openai import request_body
from actors.config import WorkerSpec
from actors.errors import ProtocolError, WorkerAuthError
from actors.messages import (
    ChatRequest,
    ImagePart,
    Message,
    RefusalPart,
    ResponseFormat,
    TextPart,
    ToolCall,
    ToolChoice,
    ToolSpec,
    Usage,
)
from tests.actors.dialects import KEY, PIXEL, RICH, SCHEMA, SIMPLE, drain
from tests.loopback import Behaviour, LoopbackProvider

DIALECT = "openai"


def spec(**changes: Any) -> WorkerSpec:
    fields = {"name": "w", "provider": "openai", "model": "gpt-5.5", "api_key": KEY}
    return WorkerSpec.model_validate({**fields, **changes})


def tool_call(id: str, city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": f'{{"city": "{city}"}}'}
    return {"id": id, "type": "function", "function": function}


RICH_BODY = {
    "model": "gpt-5.5",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Answer in French."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is in these?"},
                {
                    "type": "image_url",
                    "image_url": {"url": f"data:image/png;base64,{PIXEL}", "detail": "high"},
                },
                {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}},
            ],
        },
        {"role": "user", "content": "And the weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [tool_call("call_1", "Paris"), tool_call("call_2", "Rome")],
        },
        {"role": "tool", "content": '{"celsius": 21}', "tool_call_id": "call_1"},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_2"},
        {"role": "user", "content": "So?"},
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 7,
    "stop": ["END"],
    "reasoning_effort": "medium",
    "max_completion_tokens": 500,
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "Current weather",
                "parameters": SCHEMA,
                "strict": True,
            },
        }
    ],
    "parallel_tool_calls": False,
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "place", "schema": SCHEMA, "strict": True},
    },
    "user": "u1",
    "logit_bias": {"1": 2},
}


def test_the_request_with_everything() -> None:
    body, dropped = request_body(spec(), RICH)
    assert body == RICH_BODY
    assert dropped == ["top_k", "fugu_unknown"]


def test_a_compatible_server_gets_what_it_accepts() -> None:
    server = spec(base_url="http://vllm:8000/v1", accepts=["top_k", "n", "stream"], max_tokens_field="max_tokens")
    request = RICH.with_(extra={"top_k": 5, "n": 3, "stream": True, "messages": []})
    body, dropped = request_body(server, request)
    assert body["top_k"] == 5
    assert body["max_tokens"] == 500
    assert "max_completion_tokens" not in body
    assert [message["role"] for message in body["messages"][:2]] == ["system", "system"]
    assert dropped == ["n", "stream", "messages"]


def test_what_tools_show_and_that_they_failed() -> None:
    """A `tool` message takes text only, and has no field for a failure."""
    calls = tuple(ToolCall(f"c{i}", "look", "{}") for i in range(2))
    shown = ImagePart(f"data:image/png;base64,{PIXEL}")
    messages = (
        Message("user", "?"),
        Message("assistant", tool_calls=calls),
        Message("tool", (TextPart("a cat"), shown), tool_call_id="c0"),
        Message("tool", "no such file", tool_call_id="c1", failed=True),
        Message("assistant", tool_calls=(ToolCall("c2", "look", "{}"),)),
        Message("tool", (shown,), tool_call_id="c2"),
    )
    body, dropped = request_body(spec(), ChatRequest(messages))
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    told = {"role": "user", "content": [{"type": "text", "text": "The images that the tools returned:"}, picture]}
    assert body["messages"][2:5] == [
        {"role": "tool", "content": "a cat", "tool_call_id": "c0"},
        {"role": "tool", "content": "Error: the tool failed.\nno such file", "tool_call_id": "c1"},
        told,
    ]
    assert body["messages"][6:] == [{"role": "tool", "content": "", "tool_call_id": "c2"}, told]
    assert dropped == []


@pytest.mark.parametrize(
    ("url", "schema", "sent"),
    [
        ("https://api.openai.com/v1", SCHEMA, True),
        ("https://api.openai.com/v1", {"type": "object", "properties": {"city": {"type": "string"}}}, None),
        ("http://vllm:8000/v1", {"type": "object", "properties": {"city": {"type": "string"}}}, True),
    ],
)
def test_strict_is_left_out_where_it_would_be_refused(url: str, schema: Any, sent: bool | None) -> None:
    request = ChatRequest(
        SIMPLE.messages,
        tools=(ToolSpec("f", parameters=schema, strict=True),),
        response_format=ResponseFormat("json_schema", "r", schema, True),
    )
    body, dropped = request_body(spec(base_url=url), request)
    assert body["tools"][0]["function"].get("strict") is sent
    assert body["response_format"]["json_schema"].get("strict") is sent
    assert dropped == ([] if sent else ["tools.strict"])


def test_nothing_is_sent_that_was_not_given() -> None:
    body, dropped = request_body(spec(), SIMPLE)
    assert body == {"model": "gpt-5.5", "messages": [{"role": "user", "content": "Hello?"}]}
    assert dropped == []


@pytest.mark.parametrize("mode", ["auto", "none", "required"])
def test_tool_choice_and_empty_content(mode: Any) -> None:
    request = ChatRequest(
        messages=(Message("user", "x"), Message("assistant", tool_calls=(ToolCall("c", "f", "{}"),))),
        tools=(ToolSpec("f"),),
        tool_choice=ToolChoice(mode),
        response_format=ResponseFormat("json_object"),
    )
    body, _ = request_body(spec(), request)
    assert body["tool_choice"] == mode
    assert body["tools"] == [{"type": "function", "function": {"name": "f"}}]
    assert body["messages"][1]["content"] is None
    assert body["response_format"] == {"type": "json_object"}


async def test_what_arrives(provider: LoopbackProvider, adapter: Adapter) -> None:
    await adapter.complete(SIMPLE, CallContext())
    await drain(adapter)
    plain, streamed = provider.requests
    assert plain.path == "/v1/chat/completions"
    assert plain.headers["authorization"] == f"Bearer {KEY}"
    assert plain.body == {"model": "gpt-5.5", "messages": [{"role": "user", "content": "Hello?"}]}
    assert streamed.body == {**plain.body, "stream": True, "stream_options": {"include_usage": True}}


async def test_refusals(provider: LoopbackProvider, adapter: Adapter) -> None:
    provider.default = Behaviour(refusal="I cannot help with that.")
    for reply in (await adapter.complete(SIMPLE, CallContext()), (await drain(adapter))[1]):
        assert (reply.text, reply.refusal) == ("", "I cannot help with that.")
        assert reply.finish_reason == "refusal"


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://api.openai.com/v1", {"type": "refusal", "refusal": "no"}),
        ("http://127.0.0.1:1/v1", {"type": "text", "text": "no"}),
    ],
)
def test_a_refusal_goes_back_as_one_where_it_is_known(url: str, sent: dict[str, str]) -> None:
    spec = WorkerSpec(name="w", provider="openai", model="m", base_url=url)
    said = Message("assistant", (RefusalPart("no"),))
    body, _ = request_body(spec, ChatRequest((Message("user", "?"), said, Message("user", "why?"))))
    assert body["messages"][1] == {"role": "assistant", "content": [sent]}


def stream_of(*events: Any) -> Behaviour:
    data = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)
    return Behaviour(body=data + b"data: [DONE]\n\n", content_type="text/event-stream")


def delta(finish: str | None = None, **said: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": said, "finish_reason": finish}]}


async def test_tool_calls_without_index_or_id(provider: LoopbackProvider, adapter: Adapter) -> None:
    def call(name: str | None, arguments: Any) -> dict[str, Any]:
        return delta(tool_calls=[{"function": {"name": name, "arguments": arguments}}])

    provider.default = stream_of(call("f", '{"a"'), call(None, ":1}"), call("g", {"b": 2}), delta("stop"))
    reply = (await drain(adapter))[1]
    assert [(c.name, c.arguments) for c in reply.tool_calls] == [("f", '{"a":1}'), ("g", '{"b":2}')]
    assert reply.finish_reason == "tool_calls"
    assert len({c.id for c in reply.tool_calls}) == 2
    assert (await drain(adapter))[1].tool_calls == reply.tool_calls


async def test_a_tool_call_without_a_name(provider: LoopbackProvider, adapter: Adapter) -> None:
    provider.default = stream_of(delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]))
    with pytest.raises(ProtocolError, match="no name"):
        await drain(adapter)


async def test_reasoning_under_its_names(provider: LoopbackProvider, adapter: Adapter) -> None:
    thoughts = [{"type": "thinking", "thinking": [{"type": "text", "text": "c"}]}, {"type": "text", "text": "!"}]
    provider.default = stream_of(
        delta(reasoning_content="a"),
        delta(reasoning="b", reasoning_content="b"),
        delta(content=thoughts),
        delta("stop"),
    )
    reply = (await drain(adapter))[1]
    assert (reply.reasoning, reply.text) == ("abc", "!")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
            Usage(10, 5),
        ),
        (
            {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_cache_hit_tokens": 4},
            Usage(10, 5, 4),
        ),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "total_tokens": 22,
                "completion_tokens_details": {"reasoning_tokens": 7},
                "prompt_tokens_details": None,
            },
            Usage(10, 12, 0, 7),
        ),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 6},
            },
            Usage(10, 5, 4, cache_written_tokens=6),
        ),
        ({"prompt_tokens": None, "completion_tokens": -3}, Usage()),
        (None, Usage()),
    ],
)
async def test_usage_of_compatible_servers(
    provider: LoopbackProvider, adapter: Adapter, usage: Any, expected: Usage
) -> None:
    provider.default = stream_of({**delta("stop", content="x"), "usage": usage})
    assert (await drain(adapter))[1].usage == expected


async def test_a_used_up_account_is_no_rate_limit(provider: LoopbackProvider, adapter: Adapter) -> None:
    provider.default = Behaviour(status=429, error="check your plan", error_code="insufficient_quota")
    with pytest.raises(WorkerAuthError, match="check your plan"):
        await adapter.complete(SIMPLE, CallContext())


async def test_events_of_one_read_leave_as_one_chunk(provider: LoopbackProvider, adapter: Adapter) -> None:
    provider.default = Behaviour(text="word " * 50)
    chunks, _ = await drain(adapter)
    assert len(chunks) <= 3


def test_images_need_no_detail() -> None:
    request = ChatRequest(messages=(Message("user", (ImagePart("https://example.com/x.png"),)),))
    part = request_body(spec(), request)[0]["messages"][0]["content"][0]
    assert part == {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
