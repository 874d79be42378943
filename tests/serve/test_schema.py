"""Bad bodies are refused with the field's name; good ones become our messages without loss."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import RequestError
from actors.messages import ImagePart, Message, ResponseFormat, TextPart, ToolCall, ToolChoice, ToolSpec
from serve.schema import parse_chat
from serve.translate import to_request

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "fugu", "messages": HELLO, **fields}).encode()


BAD: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b"null", None),
    (b'"text"', None),
    (b"\xff\xfe", None),
    (b"[" * 100_000, None),
    (b'{"a":' * 100_000, None),
    (b"{}", "model"),
    (b'{"model": "fugu"}', "messages"),
    (body(model=7), "model"),
    (body(model=""), "model"),
    (body(messages=[]), "messages"),
    (body(messages="hello"), "messages"),
    (body(messages=[7]), "messages[0]"),
    (body(messages=[{"content": "x"}]), "messages[0].role"),
    (body(messages=[{"role": "robot", "content": "x"}]), "messages[0].role"),
    (body(messages=[{"role": "user"}]), "messages[0].content"),
    (body(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
    (body(messages=[*HELLO, {"role": "user", "content": [{"type": "text"}]}]), "messages[1].content[0].text"),
    (body(messages=[{"role": "user", "content": [{"type": "video"}]}]), "messages[0].content[0]"),
    (
        body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]),
        "messages[0].content[0].image_url.url",
    ),
    (body(messages=[{"role": "tool", "content": "x"}]), "messages[0].tool_call_id"),
    (
        body(messages=[{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}]),
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        body(
            messages=[
                {
                    "role": "user",
                    "content": "x",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}],
                }
            ]
        ),
        "messages[0].tool_calls",
    ),
    (body(temperature="0.5"), "temperature"),
    (body(temperature=2.5), "temperature"),
    (body(temperature=True), "temperature"),
    (body(temperature=float("nan")), "temperature"),
    (body(top_p=float("inf")), "top_p"),
    (body(top_p=-0.1), "top_p"),
    (b'{"model": "fugu", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
    (body(unknown={"deep": [1, float("-inf")]}), "unknown.deep[1]"),
    (body(max_tokens=0), "max_tokens"),
    (body(max_tokens=1.5), "max_tokens"),
    (body(max_completion_tokens=-1), "max_completion_tokens"),
    (body(seed="7"), "seed"),
    (body(seed=2**70), "seed"),
    (body(n=2), "n"),
    (body(stream="yes"), "stream"),
    (body(stop=["a", 1]), "stop[1]"),
    (body(stop=["a"] * 5), "stop"),
    (body(tools=[{"type": "function"}]), "tools[0].function"),
    (body(tools=[{"type": "function", "function": {"name": "no spaces"}}]), "tools[0].function.name"),
    (body(tool_choice="auto"), "tool_choice"),
    (body(tools=[TOOL], tool_choice="always"), "tool_choice"),
    (
        body(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "jump"}}),
        "tool_choice.function.name",
    ),
    (body(response_format={"type": "xml"}), "response_format.type"),
    (body(response_format={"type": "json_schema"}), "response_format.json_schema"),
    (body(fugu=7), "fugu"),
    (body(fugu={"alow": ["a"]}), "fugu.alow"),
    (body(fugu={"allow": ["a", 3]}), "fugu.allow[1]"),
    (body(fugu={"trace": "yes"}), "fugu.trace"),
    (body(fugu={"seed": -1}), "fugu.seed"),
    (body(fugu={"choose": "best"}), "fugu.choose"),
]


@pytest.mark.parametrize(("raw", "param"), BAD, ids=[f"{raw[:60]!r}" for raw, _ in BAD])
def test_a_bad_body_is_refused_and_the_field_named(raw: bytes, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        to_request(parse_chat(raw))
    assert caught.value.param == param
    assert caught.value.http_status == 400
    if param:
        assert caught.value.message.startswith(f"{param}: ")


def test_an_error_never_repeats_the_value() -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(body(messages=[{"role": "user", "content": {"private": "words"}}]))
    assert "words" not in str(caught.value.envelope())


def test_every_field_arrives() -> None:
    request, dropped = to_request(
        parse_chat(
            body(
                messages=[
                    {"role": "system", "content": "be brief"},
                    {
                        "role": "user",
                        "name": "ann",
                        "content": [
                            {"type": "text", "text": "what is this"},
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
                        ],
                    },
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
                ],
                tools=[{"type": "function", "function": {"name": "look", "description": "sees", "strict": True}}],
                tool_choice={"type": "function", "function": {"name": "look"}},
                parallel_tool_calls=False,
                max_tokens=5,
                temperature=1,
                top_p=0.5,
                stop="END",
                seed=-3,
                response_format={"type": "json_schema", "json_schema": {"name": "r", "schema": {"type": "object"}}},
                reasoning_effort="low",
                top_k=40,
                logprobs=False,
                modalities=["text"],
            )
        )
    )
    assert request.messages == (
        Message("system", "be brief"),
        Message("user", (TextPart("what is this"), ImagePart("data:image/png;base64,AAAA", "low")), name="ann"),
        Message("assistant", "", tool_calls=(ToolCall("c1", "look", '{"a": 1}'),)),
        Message("tool", "a cat", tool_call_id="c1"),
    )
    assert request.tools == (ToolSpec("look", "sees", {}, True),)
    assert request.tool_choice == ToolChoice("named", "look")
    assert request.response_format == ResponseFormat("json_schema", "r", {"type": "object"})
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (5, 1.0, 0.5, -3)
    assert (request.stop, request.parallel_tool_calls, request.reasoning_effort) == (("END",), False, "low")
    assert request.extra == {"top_k": 40}
    assert dropped == ()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        (
            {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
            "messages[0].function_call",
        ),
        ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
    ],
)
def test_what_no_answer_of_ours_has_is_an_error(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        to_request(parse_chat(body(**fields)))
    assert caught.value.param == param


def test_only_some_of_the_tools() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("look", "jump")]
    named = {"type": "function", "function": {"name": "jump"}}

    def asked(*names: str) -> dict[str, Any]:
        allowed = [{**named, "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": allowed}}

    request, _ = to_request(parse_chat(body(tools=tools, tool_choice=asked("jump"))))
    assert (request.tools, request.tool_choice) == ((ToolSpec("jump"),), ToolChoice("required"))
    with pytest.raises(RequestError, match="none of them"):
        to_request(parse_chat(body(tools=tools, tool_choice=asked("fly"))))


def test_max_completion_tokens_wins_over_the_older_name() -> None:
    request, _ = to_request(parse_chat(body(max_tokens=5, max_completion_tokens=9)))
    assert request.max_tokens == 9


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["model", "messages", "temperature", "tools", "stop", "fugu", "n", "stream_options", "x"])


@given(st.dictionaries(fields, json_values, max_size=4))
def test_any_json_is_taken_or_refused_and_nothing_else(changes: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        to_request(parse_chat(json.dumps({"model": "fugu", "messages": HELLO, **changes}).encode()))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_words(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_chat(raw)
