"""`POST /v1/messages` as Anthropic's own client sees it, over workers whose behaviour each test scripts. No Ray."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import httpx2  # the SDK's own
import pytest
from anthropic.types import Message as SdkMessage

from actors.errors import StreamBrokenError, WorkerUnavailableError
from actors.marks import mark, worker_tag
from actors.messages import Chunk, ImagePart, TextPart, Thought, ToolCall, ToolCallDelta, Usage
from tests.serve.test_gateway import KEY, Scripted, gateway
from tests.serve.test_responses import Says, calls

LOOK: Any = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}
THINK: Any = {"type": "adaptive"}


def client_of(*workers: Any, key: str = KEY, serve: dict[str, Any] | None = None) -> anthropic.AsyncAnthropic:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=gateway(*workers, serve=serve)))  # type: ignore[arg-type]
    return anthropic.AsyncAnthropic(base_url="http://fugu", api_key=key, http_client=http, max_retries=0)


def hello(**fields: Any) -> dict[str, Any]:
    return {"model": "fugu", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}], **fields}


async def test_a_plain_message_is_what_the_sdk_calls_one() -> None:
    worker = Says("a", Chunk("forty-"), Chunk("two"))
    message = await client_of(worker).messages.create(
        **hello(system="Be short.", stop_sequences=["END"], metadata={"user_id": "u1"}),
        extra_body={"temperature": 0.5, "top_k": 7},  # newer SDKs have no arguments for them
    )
    SdkMessage.model_validate(message.model_dump())
    assert [block.model_dump() for block in message.content] == [
        {"type": "text", "text": "forty-two", "citations": None}
    ]
    assert (message.stop_reason, message.model, message.role) == ("end_turn", "fugu", "assistant")
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (7, 2, 4)
    request = worker.requests[0]
    assert [(m.role, m.text) for m in request.messages] == [("system", "Be short."), ("user", "hello")]
    assert (request.max_tokens, request.temperature, request.stop) == (100, 0.5, ("END",))
    assert request.extra == {"top_k": 7, "user": "u1"}


async def test_what_a_prompt_cache_took_and_gave_is_told() -> None:
    worker = Says("a", Chunk("x"), usage=Usage(50, 4, 20, cache_written_tokens=10))
    usage = (await client_of(worker).messages.create(**hello())).usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (20, 20, 10)


async def test_the_events_of_thinking_text_and_tools() -> None:
    thought = Thought("hm", "sig", origin=worker_tag("a"))
    worker = Says(
        "a",
        Chunk(reasoning="h"),
        Chunk(reasoning="m", thoughts=(thought, Thought(signature="hidden", redacted=True, origin=worker_tag("a")))),
        Chunk("I look."),
        Chunk(tool_calls=(ToolCallDelta(0, "t0", "look", '{"at"'),)),
        Chunk(tool_calls=(ToolCallDelta(1, "t1", "look", "{}"), ToolCallDelta(0, arguments=':"sky"}'))),
    )
    client = client_of(worker)
    stream = await client.messages.create(**hello(stream=True, tools=[LOOK], thinking=THINK))
    told = [event.model_dump() async for event in stream]
    assert [(event["type"], event.get("index")) for event in told] == [
        ("message_start", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("content_block_start", 3),
        ("content_block_delta", 3),
        ("content_block_delta", 3),
        ("content_block_stop", 3),
        ("content_block_start", 4),
        ("content_block_delta", 4),
        ("content_block_stop", 4),
        ("message_delta", None),
        ("message_stop", None),
    ]
    async with client.messages.stream(**hello(tools=[LOOK], thinking=THINK)) as helper:
        final = await helper.get_final_message()
    plain = await client.messages.create(**hello(tools=[LOOK], thinking=THINK))
    shown = [block.model_dump(exclude={"parsed_output"}) for block in final.content]
    assert shown == [block.model_dump() for block in plain.content]
    thinking, redacted, text, first, second = (block.model_dump() for block in plain.content)
    assert thinking == {"type": "thinking", "thinking": "hm", "signature": f"{worker_tag('a')}.sig"}
    assert redacted == {"type": "redacted_thinking", "data": f"{worker_tag('a')}.hidden"}
    assert text["text"] == "I look."
    assert (first["id"], first["name"], first["input"]) == (mark("t0", "a"), "look", {"at": "sky"})
    assert (second["id"], second["input"]) == (mark("t1", "a"), {})
    assert (final.stop_reason, plain.stop_reason) == ("tool_use", "tool_use")
    assert final.usage.output_tokens == plain.usage.output_tokens == 4


async def test_thinking_is_shown_to_who_asked_for_it() -> None:
    worker = Says("a", Chunk(reasoning="hm"), Chunk("yes"))
    client = client_of(worker)
    assert [b.type for b in (await client.messages.create(**hello())).content] == ["text"]
    async with client.messages.stream(**hello()) as stream:
        assert [b.type for b in (await stream.get_final_message()).content] == ["text"]
    hidden = await client.messages.create(**hello(thinking={"type": "adaptive", "display": "omitted"}))
    assert [b.model_dump().get("thinking") for b in hidden.content] == ["", None]


async def test_a_tool_loop_goes_back_to_who_asked() -> None:
    thought = Thought("hm", "sig", origin=worker_tag("b"))
    first, second = Says("a", Chunk("no")), Says("b", Chunk(reasoning="hm", thoughts=(thought,)), calls("look", "{}"))
    client = client_of(first, second)
    asked = await client.messages.create(**hello(tools=[LOOK], thinking=THINK), extra_body={"fugu": {"allow": ["b"]}})
    call = asked.content[-1]
    assert call.type == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "none"}]}
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": asked.content},
        {"role": "user", "content": [{**result, "is_error": True}, {"type": "text", "text": "go on"}]},
    ]
    second.chunks = (Chunk("blue"),)
    answer = await client.messages.create(**hello(messages=turns, tools=[LOOK], thinking=THINK))
    assert not first.requests
    assert answer.content[0].type == "text"
    assistant, tool, user = second.requests[1].messages[1:]
    assert assistant.tool_calls == (ToolCall("call_0", "look", "{}"),)
    assert assistant.thoughts == (thought,)
    assert (tool.role, tool.text, tool.tool_call_id, tool.failed) == ("tool", "none", "call_0", True)
    assert (user.role, user.text) == ("user", "go on")


async def test_images_documents_and_cache_marks() -> None:
    worker = Says("a", Chunk("x"))
    ephemeral = {"type": "ephemeral"}
    content = [
        {"type": "text", "text": "see", "cache_control": ephemeral},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
        {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
    ]
    await client_of(worker).messages.create(**hello(messages=[{"role": "user", "content": content}]))
    request = worker.requests[0]
    assert request.messages[0].content == (
        TextPart("see"),
        ImagePart("data:image/png;base64,AAAA"),
        ImagePart("https://example.com/a.png"),
        TextPart("T\n\nwords"),
    )
    assert request.extra["cache_control"] == ephemeral


@pytest.mark.parametrize(
    ("choice", "mode", "parallel"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any"}, "required", None),
        ({"type": "tool", "name": "look"}, "named", None),
        ({"type": "none"}, "none", None),
    ],
)
async def test_tool_choices(choice: Any, mode: str, parallel: bool | None) -> None:
    worker = Says("a", Chunk("x"))
    await client_of(worker).messages.create(**hello(tools=[LOOK], tool_choice=choice))
    request = worker.requests[0]
    assert request.tool_choice is not None
    assert (request.tool_choice.mode, request.parallel_tool_calls) == (mode, parallel)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"messages": [{"role": "user", "content": [{"type": "container_upload"}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]},
            "messages[0].content[0].source",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"model": "claude-opus-4-8"}, "model"),
    ],
)
async def test_errors_have_anthropics_shape(fields: dict[str, Any], param: str) -> None:
    worker = Says("a", Chunk("x"))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway(worker)), base_url="http://fugu")  # type: ignore[arg-type]
    answer = await http.post("/v1/messages", json=hello(**fields), headers={"x-request-id": "r1"})
    body = answer.json()
    assert answer.status_code == (404 if param == "model" else 400)
    kind = "not_found_error" if param == "model" else "invalid_request_error"
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", kind, "r1")
    assert body["error"]["param"] == param
    assert not worker.requests


async def test_keys_in_either_header() -> None:
    keys = {"api_keys": [KEY]}
    worker = Says("a", Chunk("x"))
    assert (await client_of(worker, serve=keys).messages.create(**hello())).content
    with pytest.raises(anthropic.AuthenticationError):
        await client_of(worker, key="wrong-key", serve=keys).messages.create(**hello())
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=gateway(worker, serve=keys)))  # type: ignore[arg-type]
    bearer = anthropic.AsyncAnthropic(base_url="http://fugu", auth_token=KEY, http_client=http)
    assert (await bearer.messages.create(**hello())).content


async def test_failures_before_and_after_the_first_byte() -> None:
    client = client_of(Scripted("a", WorkerUnavailableError("down", worker="a")))
    with pytest.raises(anthropic.InternalServerError) as caught:
        await client.messages.create(**hello(stream=True))
    assert caught.value.status_code == 502
    broken = client_of(Scripted("a", "half", StreamBrokenError("cut", worker="a")))
    stream = await broken.messages.create(**hello(stream=True))
    seen = [(await anext(stream)).type for _ in range(3)]
    with pytest.raises(anthropic.APIStatusError, match="cut"):
        await anext(stream)
    assert seen == ["message_start", "content_block_start", "content_block_delta"]


async def test_counting_tokens() -> None:
    client = client_of(Says("a", Chunk("x")))
    few = await client.messages.count_tokens(model="fugu", messages=[{"role": "user", "content": "hello"}])
    many = await client.messages.count_tokens(
        model="fugu", messages=[{"role": "user", "content": "hello " * 100}], tools=[LOOK], system="Be short."
    )
    assert 1 <= few.input_tokens < 40
    assert many.input_tokens > 150
    with pytest.raises(anthropic.BadRequestError):
        await client.messages.count_tokens(model="fugu", messages=[])


async def test_effort_and_schemas_reach_the_worker() -> None:
    worker = Says("a", Chunk("{}"), usage=Usage(1, 1))
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    config: Any = {"effort": "high", "format": {"type": "json_schema", "schema": schema}}
    await client_of(worker).messages.create(**hello(output_config=config))
    request = worker.requests[0]
    assert request.reasoning_effort == "high"
    assert request.response_format is not None
    assert request.response_format.schema == schema
    await client_of(worker).messages.create(**hello(), extra_body={"output_format": config["format"]})
    assert worker.requests[1].response_format == request.response_format
