"""The Anthropic dialect: the exact request, by generation of the model, and its counts."""

from __future__ import annotations

from typing import Any

import pytest

from actors.adapters.anthropic import generation, request_body
from actors.adapters.base import Adapter, CallContext
from actors.config import WorkerSpec
from actors.errors import WorkerRejectedError
from actors.messages import (
    ChatRequest,
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

DIALECT = "anthropic"


def spec(model: str = "claude-sonnet-4-6", **changes: Any) -> WorkerSpec:
    return WorkerSpec.model_validate({"name": "w", "provider": "anthropic", "model": model, **changes})


def ask(**changes: Any) -> ChatRequest:
    return SIMPLE.with_(**changes)


RICH_BODY = {
    "model": "claude-sonnet-4-6",
    "max_tokens": 500,
    "system": "Be brief.\n\nAnswer in French.",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is in these?"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
                {"type": "image", "source": {"type": "url", "url": "https://example.com/a.jpg"}},
                {"type": "text", "text": "And the weather?"},
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "call_2", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "call_1",
                    "content": [{"type": "text", "text": '{"celsius": 21}'}],
                },
                {
                    "type": "tool_result",
                    "tool_use_id": "call_2",
                    "content": [{"type": "text", "text": "sunny"}],
                },
                {"type": "text", "text": "So?"},
            ],
        },
    ],
    "tools": [{"name": "weather", "description": "Current weather", "input_schema": SCHEMA, "strict": True}],
    "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    "output_config": {"effort": "medium", "format": {"type": "json_schema", "schema": SCHEMA}},
    "stop_sequences": ["END"],
    "temperature": 0.5,
    "top_k": 5,
    "metadata": {"user_id": "u1"},
}


def test_the_request_with_everything() -> None:
    body, dropped = request_body(spec(), RICH)
    assert body == RICH_BODY
    assert dropped == ["top_p", "seed", "logit_bias", "fugu_unknown"]


def test_generations() -> None:
    assert generation("claude-opus-4-7") == (4, 7)
    assert generation("claude-opus-4-20250514") == (4, 0)
    assert generation("claude-sonnet-4-5-20250929") == (4, 5)
    assert generation("claude-3-5-sonnet-20241022") == (3, 5)
    assert generation("anthropic.claude-haiku-4.5") == (4, 5)
    assert generation("kimi-k2") is None


@pytest.mark.parametrize(
    ("model", "expected", "dropped"),
    [
        ("claude-opus-4-8", {}, ["temperature", "top_p"]),
        ("claude-sonnet-4-5", {"temperature": 1.0}, ["top_p"]),
        ("claude-3-5-haiku-20241022", {"temperature": 1.0, "top_p": 0.5}, []),
        ("kimi-k2", {"temperature": 1.0, "top_p": 0.5}, []),
    ],
)
def test_sampling_by_generation(model: str, expected: dict[str, float], dropped: list[str]) -> None:
    body, gone = request_body(spec(model), ask(temperature=1.7, top_p=0.5))
    assert {name: body[name] for name in ("temperature", "top_p") if name in body} == expected
    assert gone == dropped


def test_accepts_wins_over_the_generation() -> None:
    body, dropped = request_body(spec("claude-opus-4-8", accepts=["temperature"]), ask(temperature=0.2))
    assert body["temperature"] == 0.2
    assert dropped == []


ADAPTIVE = {"type": "adaptive", "display": "summarized"}


@pytest.mark.parametrize(
    ("model", "effort", "max_tokens", "thinking", "level", "bound"),
    [
        ("claude-opus-4-8", "xhigh", None, ADAPTIVE, "xhigh", 16384),
        ("claude-opus-4-8", "minimal", 100, ADAPTIVE, "low", 100),
        ("claude-opus-4-6", "xhigh", None, {"type": "adaptive"}, "high", 16384),
        ("claude-opus-4-6", "none", None, {"type": "disabled"}, None, 16384),
        ("claude-sonnet-4-5", "high", None, {"type": "enabled", "budget_tokens": 16384}, None, 24576),
        ("claude-sonnet-4-5", "high", 4096, {"type": "enabled", "budget_tokens": 2048}, None, 4096),
        ("claude-sonnet-4-5", "high", 2000, None, None, 2000),
        ("claude-3-5-sonnet-20241022", "high", None, None, None, 8192),
        ("claude-3-opus-20240229", "none", None, None, None, 4096),
        ("kimi-k2", "low", None, {"type": "enabled", "budget_tokens": 2048}, None, 10240),
    ],
)
def test_reasoning_by_generation(
    model: str, effort: str, max_tokens: int | None, thinking: Any, level: str | None, bound: int
) -> None:
    body, dropped = request_body(spec(model), ask(reasoning_effort=effort, max_tokens=max_tokens))
    assert body.get("thinking") == thinking
    assert body.get("output_config", {}).get("effort") == level
    assert body["max_tokens"] == bound
    assert dropped == (["reasoning_effort"] if thinking is None and effort != "none" else [])


def test_no_budget_inside_a_tool_loop_or_with_a_forced_tool() -> None:
    for loop in (RICH.messages, RICH.messages[:-1]):
        _, dropped = request_body(spec("claude-sonnet-4-5"), ask(messages=loop, reasoning_effort="high"))
        assert dropped == ["reasoning_effort"]
    over = (*RICH.messages, Message("assistant", "Fine."), Message("user", "Thanks."))
    body, dropped = request_body(spec("claude-sonnet-4-5"), ask(messages=over, reasoning_effort="high"))
    assert body["thinking"]["type"] == "enabled"
    forced = ask(tools=(ToolSpec("f"),), tool_choice=ToolChoice("required"), reasoning_effort="high")
    body, dropped = request_body(spec("claude-sonnet-4-5"), forced)
    assert body["tool_choice"] == {"type": "any"}
    assert dropped == ["reasoning_effort"]


SHOWN = {"type": "enabled", "budget_tokens": 4000}


@pytest.mark.parametrize(
    ("model", "asked", "sent", "dropped"),
    [
        ("claude-opus-4-8", SHOWN, ADAPTIVE, []),
        ("claude-opus-4-8", {"type": "adaptive"}, {"type": "adaptive"}, []),
        ("claude-opus-4-6", SHOWN, SHOWN, []),
        ("claude-haiku-4-5", {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 4096}, []),
        ("claude-haiku-4-5", SHOWN, SHOWN, []),
        ("claude-3-5-haiku-20241022", {"type": "adaptive"}, None, ["thinking"]),
        ("kimi-k2", {"type": "adaptive"}, {"type": "adaptive"}, []),
    ],
)
def test_the_callers_thinking_by_generation(model: str, asked: Any, sent: Any, dropped: list[str]) -> None:
    """The caller writes for a model of his own choice, and does not know which answers."""
    body, gone = request_body(spec(model), ask(max_tokens=8192, extra={"thinking": asked}))
    assert body.get("thinking") == sent
    assert gone == dropped


def test_thinking_and_effort_together() -> None:
    request = ask(max_tokens=8192, reasoning_effort="low", extra={"thinking": {"type": "adaptive"}})
    body, dropped = request_body(spec("claude-haiku-4-5"), request)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 2048}
    assert dropped == []


def test_strict_is_left_out_where_it_would_be_refused() -> None:
    bounded = {**SCHEMA, "properties": {"city": {"type": "string", "maxLength": 9}}}
    tools = (ToolSpec("f", parameters=SCHEMA, strict=True), ToolSpec("g", parameters=bounded, strict=True))
    body, dropped = request_body(spec("claude-sonnet-4-6"), ask(tools=tools))
    assert [tool.get("strict") for tool in body["tools"]] == [True, None]
    assert dropped == ["tools.strict"]


def test_what_the_dialect_cannot_express() -> None:
    request = ask(
        seed=1,
        stop=("\n", "END"),
        response_format=ResponseFormat("json_object"),
        extra={"service_tier": "flex", "logprobs": True, "thinking": {"type": "adaptive"}},
    )
    body, dropped = request_body(spec(), request)
    assert body["stop_sequences"] == ["END"]
    assert body["thinking"] == {"type": "adaptive"}
    assert dropped == ["stop", "seed", "response_format", "service_tier", "logprobs"]


def test_tool_calls_in_the_past_need_tools() -> None:
    request = ChatRequest(
        messages=(
            Message("user", "x"),
            Message("assistant", tool_calls=(ToolCall("a.b:1", "f", "not json"),)),
            Message("tool", "", tool_call_id="a.b:1"),
        )
    )
    body, _ = request_body(spec(), request)
    assert body["tools"] == [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]
    assert body["tool_choice"] == {"type": "none"}
    use, result = body["messages"][1]["content"][0], body["messages"][2]["content"][0]
    assert use["input"] == {"arguments": "not json"}
    assert use["id"] == result["tool_use_id"] == "a_b_1"
    assert "content" not in result


@pytest.mark.parametrize("text", ["", "Well, first you "])
async def test_refusals(provider: LoopbackProvider, adapter: Adapter, text: str) -> None:
    provider.default = Behaviour(text=text, refusal="This would do harm.")
    for reply in (await adapter.complete(SIMPLE, CallContext()), (await drain(adapter))[1]):
        assert (reply.text, reply.refusal, reply.finish_reason) == (text, "This would do harm.", "refusal")


def test_a_refusal_in_a_conversation_is_text_here() -> None:
    said = Message("assistant", (TextPart("Well."), RefusalPart("No.")))
    body, _ = request_body(spec(), ask(messages=(Message("user", "?"), said, Message("user", "why?"))))
    assert [block["text"] for block in body["messages"][1]["content"]] == ["Well.", "No."]


def test_conversations_the_api_would_refuse() -> None:
    only_system = ChatRequest(messages=(Message("system", "Say hi."),))
    body, _ = request_body(spec(), only_system)
    assert body["messages"] == [{"role": "user", "content": [{"type": "text", "text": "Say hi."}]}]
    assert "system" not in body
    prefill = ChatRequest(messages=(Message("user", "x"), Message("user", ""), Message("assistant", "So: \n")))
    body, _ = request_body(spec(), prefill)
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant"]
    assert body["messages"][1]["content"] == [{"type": "text", "text": "So:"}]


async def test_what_arrives(provider: LoopbackProvider, adapter: Adapter) -> None:
    await adapter.complete(SIMPLE, CallContext())
    await drain(adapter)
    plain, streamed = provider.requests
    assert plain.path == "/v1/messages"
    assert plain.headers["x-api-key"] == KEY
    assert plain.headers["anthropic-version"] == "2023-06-01"
    assert "authorization" not in plain.headers
    assert streamed.body == {**plain.body, "stream": True}


async def test_tokens_written_to_the_cache_are_input(provider: LoopbackProvider, adapter: Adapter) -> None:
    usage = b'{"input_tokens":3,"cache_creation_input_tokens":20,"cache_read_input_tokens":100,"output_tokens":9}'
    provider.default = Behaviour(
        body=b'{"type":"message","content":[{"type":"redacted_thinking","data":"x"},{"type":"text","text":"hi"}],'
        b'"stop_reason":"end_turn","usage":' + usage + b"}"
    )
    reply = await adapter.complete(SIMPLE, CallContext())
    assert reply.text == "hi"
    assert reply.usage == Usage(input_tokens=123, output_tokens=9, cached_input_tokens=100, cache_written_tokens=20)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_kept_for_an_hour_is_told_apart(
    provider: LoopbackProvider, adapter: Adapter, stream: bool
) -> None:
    provider.default = Behaviour(text="hi", usage=Usage(123, 9, 100, cache_written_tokens=20, cache_hour_tokens=15))
    reply = (await drain(adapter))[1] if stream else await adapter.complete(SIMPLE, CallContext())
    assert reply.usage == provider.default.usage


async def test_error_types_inside_a_stream(provider: LoopbackProvider, adapter: Adapter) -> None:
    provider.default = Behaviour(error_after=0, error_code="invalid_request_error", error="prompt is too long")
    with pytest.raises(WorkerRejectedError, match="prompt is too long"):
        await drain(adapter)
