"""OpenAI's Responses API at a worker: the exact request, sealed reasoning there and back, what a failure says."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from pydantic import TypeAdapter, ValidationError

from actors.adapters.base import Adapter, CallContext
from actors.adapters.openai_responses import request_body
from actors.config import WorkerSpec
from actors.errors import (
    ProtocolError,
    RateLimitedError,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from actors.messages import (
    ChatReply,
    ChatRequest,
    ImagePart,
    Message,
    RefusalPart,
    ResponseFormat,
    TextPart,
    Thought,
    ToolCall,
    ToolChoice,
    ToolSpec,
    Usage,
)
from tests.actors.dialects import KEY, PIXEL, RICH, SCHEMA, SIMPLE, drain
from tests.loopback import Behaviour, LoopbackProvider
from tests.loopback_dialects import SIGNATURE, frame

DIALECT = "responses"


def spec(**changes: Any) -> WorkerSpec:
    fields = {"name": "w", "provider": "openai", "api": "responses", "model": "gpt-5.5", "api_key": KEY}
    return WorkerSpec.model_validate({**fields, **changes})


def called(id: str, city: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": id, "name": "weather", "arguments": f'{{"city": "{city}"}}'}


def said(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text}


RICH_BODY = {
    "model": "gpt-5.5",
    "input": [
        said("system", "Be brief."),
        said("developer", "Answer in French."),
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "What is in these?"},
                {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "high"},
                {"type": "input_image", "image_url": "https://example.com/a.jpg", "detail": "auto"},
            ],
        },
        said("user", "And the weather?"),
        said("assistant", "Let me look."),
        called("call_1", "Paris"),
        called("call_2", "Rome"),
        {"type": "function_call_output", "call_id": "call_1", "output": '{"celsius": 21}'},
        {"type": "function_call_output", "call_id": "call_2", "output": "sunny"},
        said("user", "So?"),
    ],
    "store": False,
    "temperature": 0.5,
    "top_p": 0.9,
    "reasoning": {"effort": "medium"},
    "max_output_tokens": 500,
    "tools": [
        {
            "type": "function",
            "name": "weather",
            "description": "Current weather",
            "parameters": SCHEMA,
            "strict": True,
        }
    ],
    "parallel_tool_calls": False,
    "tool_choice": {"type": "function", "name": "weather"},
    "text": {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}},
    "user": "u1",
}
THOUGHT = Thought("The user wants the weather.", f"rs_1:{SIGNATURE}")
SILENT = Thought(signature=f"rs_2:{SIGNATURE}", redacted=True)


def test_the_request_with_everything() -> None:
    body, dropped = request_body(spec(), RICH)
    assert body == RICH_BODY
    assert dropped == ["top_k", "logit_bias", "fugu_unknown", "stop", "seed"]
    TypeAdapter(ResponseCreateParamsNonStreaming).validate_python(body)
    with pytest.raises(ValidationError):  # which that would notice
        TypeAdapter(ResponseCreateParamsNonStreaming).validate_python({**body, "tool_choice": {"type": 7}})


def test_what_is_not_given_is_not_sent_but_what_would_mean_something_else() -> None:
    request = SIMPLE.with_(tools=(ToolSpec("clock"),), tool_choice=ToolChoice("required"), max_tokens=3)
    body, dropped = request_body(spec(), request)
    assert body == {
        "model": "gpt-5.5",
        "input": [said("user", "Hello?")],
        "store": False,
        # Left out, `strict` is true; and OpenAI refuses a lower bound than this.
        "max_output_tokens": 16,
        "tools": [
            {"type": "function", "name": "clock", "parameters": {"type": "object", "properties": {}}, "strict": False}
        ],
        "tool_choice": "required",
    }
    assert dropped == []


def test_a_compatible_server_gets_what_it_accepts() -> None:
    server = spec(base_url="http://vllm:8000/v1", accepts=["top_k", "input", "background"])
    extra = {"top_k": 5, "input": "x", "background": True, "store": True, "verbosity": "low"}
    extra |= {"reasoning": {"summary": "auto", "effort": "low"}}
    request = RICH.with_(extra=extra, max_tokens=3, reasoning_effort="high", top_p=0.0)
    body, dropped = request_body(server, request)
    assert (body["top_k"], body["max_output_tokens"], body["store"]) == (5, 3, True)
    assert 0 < body["top_p"] < 0.001
    assert body["reasoning"] == {"summary": "auto", "effort": "high"}
    assert body["text"]["verbosity"] == "low"
    assert [item["role"] for item in body["input"][:2]] == ["system", "system"]
    assert "background" not in body
    assert dropped == ["input", "background", "stop", "seed"]


def test_json_of_any_form() -> None:
    body, _ = request_body(spec(), SIMPLE.with_(response_format=ResponseFormat("json_object")))
    assert body["text"] == {"format": {"type": "json_object"}}


def test_what_tools_show_and_that_they_failed() -> None:
    shown = (TextPart("Here:"), ImagePart("https://example.com/x.png"))
    messages = (
        Message("assistant", tool_calls=(ToolCall("c1", "look", "{}"), ToolCall("c2", "look", "{}"))),
        Message("tool", shown, tool_call_id="c1"),
        Message("tool", "no such file", tool_call_id="c2", failed=True),
        Message("tool", shown, tool_call_id="c3", failed=True),
    )
    body, _ = request_body(spec(), ChatRequest(messages))
    assert [item["type"] for item in body["input"]] == ["function_call"] * 2 + ["function_call_output"] * 3
    parts = [
        {"type": "input_text", "text": "Here:"},
        {"type": "input_image", "image_url": "https://example.com/x.png", "detail": "auto"},
    ]
    outputs = [item["output"] for item in body["input"][2:]]
    failed = "Error: the tool failed."
    assert outputs == [parts, f"{failed}\nno such file", [{"type": "input_text", "text": failed}, *parts]]


def test_what_an_assistant_said_goes_back_as_text() -> None:
    parts = (TextPart("Well,"), RefusalPart("no."))
    body, dropped = request_body(spec(), ChatRequest((Message("assistant", parts, name="bob"),)))
    assert body["input"] == [said("assistant", "Well,\nno.")]
    assert dropped == ["messages.name"]


def test_reasoning_goes_back_before_what_it_led_to() -> None:
    calls = (ToolCall("call_1", "weather", '{"city": "Paris"}'),)
    messages = (
        Message("user", "And the weather?"),
        Message("assistant", tool_calls=calls, thoughts=(Thought("hm", "of-another-vendor"), THOUGHT, SILENT)),
        Message("tool", "sunny", tool_call_id="call_1"),
        Message("assistant", thoughts=(THOUGHT,)),  # cut off: nothing follows it
    )
    body, _ = request_body(spec(), ChatRequest(messages))
    assert body["input"][1:] == [
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": THOUGHT.text}],
            "encrypted_content": SIGNATURE,
        },
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": SIGNATURE},
        called("call_1", "Paris"),
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ]
    TypeAdapter(ResponseCreateParamsNonStreaming).validate_python(body)


async def both(adapter: Adapter) -> ChatReply:
    """The reply, which is the same streamed."""
    plain = await adapter.complete(SIMPLE, CallContext())
    assert (await drain(adapter))[1] == plain
    return plain


async def test_reasoning_comes_sealed(provider: LoopbackProvider, adapter: Adapter) -> None:
    provider.default = Behaviour("Sunny.", reasoning=THOUGHT.text, usage=Usage(9, 4))
    reply = await both(adapter)
    assert (reply.reasoning, reply.thoughts) == (THOUGHT.text, (THOUGHT,))


async def test_reasoning_that_nobody_may_see(provider: LoopbackProvider, adapter: Adapter) -> None:
    item = {"id": "rs_2", "type": "reasoning", "summary": [], "encrypted_content": SIGNATURE}
    message = {"type": "message", "content": [{"type": "output_text", "text": "Yes."}]}
    response = {"status": "completed", "output": [item, message], "usage": None, "model": "gpt-5.5-2026"}
    provider.default = Behaviour(body=orjson.dumps(response))
    plain = await adapter.complete(SIMPLE, CallContext())
    assert (plain.reasoning, plain.thoughts, plain.text) == ("", (SILENT,), "Yes.")
    assert (plain.model, plain.usage) == ("gpt-5.5-2026", Usage())
    # A server that streams no pieces, and one that does not even say when an item is done.
    done = [
        {"type": "response.output_item.done", "output_index": index, "item": each}
        for index, each in enumerate((item, message))
    ]
    for events in (done, []):
        sent = b"".join(map(frame, [*events, {"type": "response.completed", "response": response}]))
        provider.default = Behaviour(body=sent, content_type="text/event-stream")
        assert (await drain(adapter))[1] == plain


async def test_summaries_of_several_parts(provider: LoopbackProvider, adapter: Adapter) -> None:
    parts = [{"type": "summary_text", "text": text} for text in ("First.", "Then.")]
    item = {"id": "rs_1", "type": "reasoning", "summary": parts, "encrypted_content": SIGNATURE}
    response = {"status": "completed", "output": [item]}
    provider.default = Behaviour(body=orjson.dumps(response))
    plain = await adapter.complete(SIMPLE, CallContext())
    assert plain.reasoning == plain.thoughts[0].text == "First.\n\nThen."
    where = {"output_index": 0, "item_id": "rs_1"}
    events = [
        {"type": f"response.reasoning_summary_{kind}", **where, "summary_index": index, **more}
        for index, part in enumerate(parts)
        for kind, more in (("part.added", {"part": {}}), ("text.delta", {"delta": part["text"]}))
    ]
    events += [{"type": "response.output_item.done", **where, "item": item}]
    events += [{"type": "response.completed", "response": response}]
    provider.default = Behaviour(body=b"".join(map(frame, events)), content_type="text/event-stream")
    assert (await drain(adapter))[1] == plain


async def test_refusals_and_cached_tokens(provider: LoopbackProvider, adapter: Adapter) -> None:
    usage = Usage(100, 20, 40, 5, cache_written_tokens=30)
    provider.default = Behaviour(refusal="I cannot help with that.", usage=usage)
    reply = await both(adapter)
    assert (reply.text, reply.refusal, reply.finish_reason) == ("", "I cannot help with that.", "refusal")
    assert reply.usage == usage


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": "server_error", "message": "engine fell over"}, WorkerUnavailableError),
        ({"code": "rate_limit_exceeded", "message": "slow down"}, RateLimitedError),
        ({"code": "vector_store_timeout", "message": "slow"}, WorkerTimeoutError),
        ({"code": "invalid_prompt", "message": "not this"}, WorkerRejectedError),
        ({"code": None, "message": "no reason"}, WorkerUnavailableError),
        (None, WorkerUnavailableError),
    ],
)
async def test_a_response_that_failed(
    provider: LoopbackProvider, adapter: Adapter, error: dict[str, Any] | None, kind: type[WorkerError]
) -> None:
    failed = {"status": "failed", "error": error, "output": []}
    bodies = [{"type": "response.failed", "response": failed}]
    if error is not None:
        bodies += [{"type": "error", **error}]
    for body in bodies:
        provider.default = Behaviour(body=frame(body), content_type="text/event-stream")
        with pytest.raises(kind, match=error and error["message"]):
            await drain(adapter)
    provider.default = Behaviour(body=orjson.dumps({**failed, "error": None}))
    with pytest.raises(WorkerUnavailableError):
        await adapter.complete(SIMPLE, CallContext())


@pytest.mark.parametrize(
    "event",
    [
        {"type": "response.output_text.delta", "delta": "x"},
        {"type": "response.function_call_arguments.delta", "output_index": 3, "delta": "{}"},
        {"type": "response.output_item.done", "output_index": 0, "item": 7},
        {"type": "response.completed", "response": {"status": "completed"}},
    ],
)
async def test_events_that_are_not_the_format(
    provider: LoopbackProvider, adapter: Adapter, event: dict[str, Any]
) -> None:
    provider.default = Behaviour(body=frame(event), content_type="text/event-stream")
    with pytest.raises(ProtocolError):
        await drain(adapter)


def test_it_is_of_openai_workers_only() -> None:
    with pytest.raises(ValidationError, match="openai workers only"):
        spec(provider="anthropic")
