"""Three dialects, one model of a conversation: what goes out in a dialect comes back as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response

from actors.adapters import anthropic, openai
from actors.adapters.upstream import Upstream
from actors.config import WorkerSpec
from actors.marks import worker_tag
from actors.messages import (
    ChatReply,
    ChatRequest,
    Chunk,
    ImagePart,
    Message,
    RefusalPart,
    ResponseFormat,
    TextPart,
    Thought,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    ToolSpec,
    Usage,
)
from actors.sse import SSEDecoder
from serve import translate_messages
from serve.api.chat import ChatExchange
from serve.api.conversations import Conversations
from serve.api.job import Done
from serve.api.messages import MessagesExchange
from serve.api.responses import ResponsesExchange
from serve.api.responses_output import Output
from serve.auth import ANYONE
from serve.blocks import blocks_of
from serve.schema import parse_body, parse_chat
from serve.schema_messages import MessagesBody
from serve.schema_responses import ResponsesBody
from serve.translate import to_request
from serve.translate_responses import read_tools, to_messages

TAG = worker_tag("w")
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
# Text that begins and ends in something visible: providers trim what is at the ends of a conversation.
words = st.from_regex(r"[a-zA-Zäß😀{\"\\]{1,6}( [a-z.\n]{0,4}[a-z])?", fullmatch=True)
ids = st.from_regex(r"call_[a-z0-9]{1,8}", fullmatch=True)
names = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
objects = st.dictionaries(names, st.one_of(words, st.integers(-9, 9), st.booleans(), st.none()), max_size=3)
arguments = objects.map(lambda value: orjson.dumps(value).decode())
images = st.sampled_from((ImagePart("data:image/png;base64,AAAA"), ImagePart("https://example.com/a.png")))
contents = st.one_of(
    words,
    st.lists(st.one_of(words.map(TextPart), images), min_size=2, max_size=3).map(tuple),
)
thoughts = st.lists(
    st.one_of(
        st.builds(Thought, words, words, st.just(False), st.just(TAG)),
        st.builds(Thought, st.just(""), words, st.just(True), st.just(TAG)),
    ),
    max_size=2,
).map(tuple)


@st.composite
def conversations(
    draw: st.DrawFn,
    *,
    with_thoughts: bool = False,
    with_failures: bool = False,
    with_refusals: bool = False,
    with_images: bool = True,
) -> tuple[Message, ...]:
    """`with_images`: tools may show some."""
    messages = [Message("system", draw(words))] if draw(st.booleans()) else []
    number = 0
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(contents)))
        calls = []
        for _ in range(draw(st.integers(0, 2))):
            number += 1
            calls.append(ToolCall(f"call_{number}", draw(names), draw(arguments)))
        text = draw(words) if not calls or draw(st.booleans()) else ""
        thought = draw(thoughts) if with_thoughts else ()
        content = _refused(text, draw(words)) if with_refusals and draw(st.booleans()) else text
        messages.append(Message("assistant", content, tool_calls=tuple(calls), thoughts=thought))
        for call in calls:
            failed = with_failures and draw(st.booleans())
            result = draw(contents if with_images else words)
            messages.append(Message("tool", result, tool_call_id=call.id, failed=failed))
    if messages[-1].role == "assistant":
        messages.append(Message("user", draw(words)))
    return tuple(messages)


def _refused(text: str, refusal: str) -> tuple[TextPart, ...]:
    return (*((TextPart(text),) if text else ()), RefusalPart(refusal))


@st.composite
def tooled(draw: st.DrawFn) -> dict[str, Any]:
    specs = draw(st.lists(st.builds(ToolSpec, names, words, st.just({"type": "object", "properties": {}})), max_size=2))
    if not specs:
        return {}
    choice = draw(
        st.sampled_from((None, ToolChoice("auto"), ToolChoice("required"), ToolChoice("named", specs[0].name)))
    )
    return {"tools": tuple(specs), "tool_choice": choice}


settings_of_a_call = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 999),
        "temperature": st.one_of(st.none(), st.floats(0, 1)),
        "top_p": st.one_of(st.none(), st.floats(0.125, 1)),
        "stop": st.lists(words, max_size=2).map(tuple),
    }
)
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
formats = st.one_of(st.none(), st.just(ResponseFormat("json_schema", "response", EMPTY, True)))
SPEC = WorkerSpec(name="w", provider="openai", model="m")
CLAUDE = WorkerSpec(name="w", provider="anthropic", model="m", accepts=("temperature", "top_p"))


@given(conversations(with_refusals=True, with_images=False), tooled(), settings_of_a_call, formats)
def test_chat_requests(messages: tuple[Message, ...], tools: Any, settings: Any, format: ResponseFormat | None) -> None:
    request = ChatRequest(messages, response_format=format, **tools, **settings)
    body, dropped = openai.request_body(SPEC, request)
    read, also_dropped = to_request(parse_chat(orjson.dumps(body | {"model": "fugu"})))
    assert (read, dropped, also_dropped) == (request, [], ())


@given(conversations(with_thoughts=True, with_failures=True), tooled(), settings_of_a_call, formats)
def test_messages_requests(
    messages: tuple[Message, ...], tools: Any, settings: Any, format: ResponseFormat | None
) -> None:
    request = ChatRequest(messages, response_format=format, **tools, **settings)
    sent = request.with_(messages=tuple(map(_with_origin_told, messages)))
    body, dropped = anthropic.request_body(CLAUDE, sent)
    read = translate_messages.to_request(parse_body(orjson.dumps(body | {"model": "fugu"}), MessagesBody))
    assert dropped == []
    # Where tools are gone but calls remain, the adapter defines what the API wants to see.
    if not request.tools:
        read = read.with_(tools=(), tool_choice=request.tool_choice)
    # That the adapter puts a user's words behind results into their turn is the turn's to say, not the conversation's.
    assert read.with_(asides=()) == request
    assert all(request.messages[at].role == "user" for at in read.asides)


def _with_origin_told(message: Message) -> Message:
    """Callers see a signature with its worker's tag before it."""
    told = tuple(replace(each, signature=f"{each.origin}.{each.signature}") for each in message.thoughts)
    return replace(message, thoughts=told)


@st.composite
def replies(draw: st.DrawFn) -> ChatReply:
    calls = tuple(ToolCall(f"call_{index}", draw(names), draw(arguments)) for index in range(draw(st.integers(0, 3))))
    text = draw(st.one_of(st.just(""), texts))
    signed = draw(thoughts)
    # Unsigned reasoning may follow what was signed.
    rest = draw(st.one_of(st.just(""), words))
    reasoning = "".join(each.text for each in signed) + rest
    finish = "tool_calls" if calls else draw(st.sampled_from(("stop", "length", "content_filter", "refusal")))
    refusal = draw(st.one_of(st.just(""), words)) if finish == "refusal" else ""
    stopped = draw(st.sampled_from(("", "END"))) if finish == "stop" else ""
    read, written = draw(st.integers(0, 99)), draw(st.integers(0, 99))
    usage = Usage(read, written, draw(st.integers(0, read)), draw(st.integers(0, written)))
    return ChatReply(
        "w", text, reasoning, calls, cast(Any, finish), usage, thoughts=signed, refusal=refusal, stop_sequence=stopped
    )


@st.composite
def streams(draw: st.DrawFn) -> tuple[ChatReply, list[Chunk]]:
    """A reply and some way of its coming: pieces of any size, calls one after the other or side by side."""
    reply = draw(replies())
    chunks: list[Chunk] = []

    def cut(text: str) -> list[str]:
        at = draw(st.integers(0, len(text)))
        return [piece for piece in (text[:at], text[at:]) if piece]

    for thought in reply.thoughts:
        pieces = cut(thought.text)
        chunks += [Chunk(reasoning=piece) for piece in pieces[:-1]]
        chunks.append(Chunk(reasoning=pieces[-1] if pieces else "", thoughts=(thought,)))
    signed = sum(len(thought.text) for thought in reply.thoughts)
    chunks += [Chunk(reasoning=piece) for piece in cut(reply.reasoning[signed:])]
    chunks += [Chunk(piece) for piece in cut(reply.text)]
    chunks += [Chunk(refusal=piece) for piece in cut(reply.refusal)]
    waiting: list[list[ToolCallDelta]] = []
    for index, call in enumerate(reply.tool_calls):
        first = ToolCallDelta(index, call.id, call.name, "")
        waiting.append([first, *(ToolCallDelta(index, arguments=piece) for piece in cut(call.arguments))])
    begun = 0
    while any(waiting):
        # A call begins after those before it have begun.
        open = [at for at, deltas in enumerate(waiting) if deltas and at <= begun]
        at = draw(st.sampled_from(open))
        begun = max(begun, at + 1)
        chunks.append(Chunk(tool_calls=(waiting[at].pop(0),)))
    if len(chunks) > 1 and draw(st.booleans()):
        chunks = _merged(chunks)
    return reply, chunks


def _merged(chunks: Sequence[Chunk]) -> list[Chunk]:
    """All that came, as if one network read had brought it."""
    return [
        Chunk(
            "".join(chunk.text for chunk in chunks),
            "".join(chunk.reasoning for chunk in chunks),
            tuple(call for chunk in chunks for call in chunk.tool_calls),
            thoughts=tuple(thought for chunk in chunks for thought in chunk.thoughts),
            refusal="".join(chunk.refusal for chunk in chunks),
        )
    ]


def events_of(raw: bytes) -> Iterator[str]:
    for event in SSEDecoder().feed(raw):
        yield event.data


def written(exchange: Any, reply: ChatReply, chunks: Sequence[Chunk]) -> bytes:
    done = Done(reply, reply.usage, reply.usage, None)
    return b"".join(exchange.chunk(chunk) for chunk in chunks) + cast(bytes, exchange.end(done))


@given(streams())
def test_chat_streams_and_replies(stream: tuple[ChatReply, list[Chunk]]) -> None:
    reply, chunks = stream

    def exchange() -> ChatExchange:
        return ChatExchange(parse_chat(orjson.dumps({**HELLO, "stream_options": {"include_usage": True}})), "id")

    for plain in (False, True):
        reader = openai._Reader(cast(Upstream, _Upstream()), ChatRequest(()))
        if plain:
            reader.take_whole(orjson.loads(exchange().whole(Done(reply, reply.usage, reply.usage, None))))
        else:
            for event in events_of(written(exchange(), reply, chunks)):
                reader.read(event)
            assert reader.done
        # Chat has no place for signed thoughts, for a refusal without words, nor for what stopped it.
        silent = reply.finish_reason == "refusal" and not reply.refusal
        finish: Any = "content_filter" if silent else reply.finish_reason
        expected = replace(reply, thoughts=(), model=HELLO["model"], finish_reason=finish, stop_sequence="")
        assert reader.answer.reply("w", ()) == expected


@given(streams())
def test_messages_streams_and_replies(stream: tuple[ChatReply, list[Chunk]]) -> None:
    reply, chunks = stream

    def exchange() -> MessagesExchange:
        body = {**HELLO, "max_tokens": 9, "thinking": {"type": "adaptive"}}
        return MessagesExchange(parse_body(orjson.dumps(body), MessagesBody), "id")

    told = tuple(replace(each, signature=f"{TAG}.{each.signature}", origin="") for each in reply.thoughts)
    for plain in (False, True):
        reader = anthropic._Reader(cast(Upstream, _Upstream()), ChatRequest(()))
        if plain:
            reader.take_whole(orjson.loads(exchange().whole(Done(reply, reply.usage, reply.usage, None))))
        else:
            for event in events_of(written(exchange(), reply, chunks)):
                reader.read(event)
            assert reader.done
        # Nor has Anthropic a word of its own for a filter's doing.
        finish: Any = "refusal" if reply.finish_reason == "content_filter" else reply.finish_reason
        expected = replace(reply, thoughts=told, model=HELLO["model"], finish_reason=finish)
        assert reader.answer.reply("w", ()) == expected


TOOLS = [
    {"type": "custom", "name": "a"},
    {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "b"}]},
]


@given(streams(), st.booleans(), st.booleans())
def test_responses_streams_and_replies(stream: tuple[ChatReply, list[Chunk]], summary: bool, sealed: bool) -> None:
    reply, chunks = stream

    def exchange(stream: bool = True) -> ResponsesExchange:
        body: dict[str, Any] = {"model": "fugu", "input": "?", "tools": TOOLS, "stream": stream}
        body |= {"reasoning": {"summary": "auto"}} if summary else {}
        body |= {"include": ["reasoning.encrypted_content"]} if sealed else {}
        return ResponsesExchange(parse_body(orjson.dumps(body), ResponsesBody), (), ANYONE, Conversations(None, 1))

    events = [json.loads(event) for event in events_of(written(exchange(), reply, chunks))]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1]["response"]
    assert events[-1]["type"] == f"response.{final['status']}"
    Response.model_validate(final)
    open: int | None = None
    items, deltas = [], ""
    for event in events[2:-1]:
        if event["type"] == "response.output_item.added":
            assert open is None, "one item at a time"
            assert event["output_index"] == len(items)
            open, deltas = event["output_index"], ""
        elif event["type"] == "response.output_item.done":
            items.append(event["item"])
            assert deltas == _words_of(event["item"])
            open = None
        else:
            assert event["output_index"] == open
            deltas += event.get("delta", "")
    assert open is None
    assert items == final["output"]
    plain = orjson.loads(exchange(stream=False).whole(Done(reply, reply.usage, reply.usage, None)))
    strip = _without_ids
    assert [strip(item) for item in plain["output"]] == [strip(item) for item in items]
    assert final["usage"]["total_tokens"] == reply.usage.total_tokens
    unfinished = reply.finish_reason in ("length", "content_filter") or (
        reply.finish_reason == "refusal" and not reply.refusal
    )
    assert final["status"] == ("incomplete" if unfinished else "completed")


def _words_of(item: dict[str, Any]) -> str:
    if item["type"] == "message":
        (part,) = item["content"]
        return cast(str, part["refusal"] if part["type"] == "refusal" else part["text"])
    if item["type"] == "reasoning":
        return "".join(part["text"] for part in item["summary"])
    return cast(str, item.get("arguments", item.get("input")))


def _without_ids(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != "id"}


@given(st.lists(replies(), min_size=1, max_size=3))
def test_kept_responses_are_read_as_they_were(answers: list[ChatReply]) -> None:
    tools = read_tools(TOOLS)
    output = Output("secret", tools, summary=True, sealed=False)
    items: list[dict[str, Any]] = []
    expected: list[Message] = []
    for reply in answers:
        calls = tuple(_as_custom(call) if call.name == "a" else call for call in reply.tool_calls)
        reply = replace(reply, tool_calls=calls)
        items += [{"role": "user", "content": "?"}, *output.kept(blocks_of(reply))]
        expected.append(Message("user", "?"))
        if reply.text or reply.refusal or calls:
            content = _refused(reply.text, reply.refusal) if reply.refusal else reply.text
            expected.append(Message("assistant", content, tool_calls=calls, thoughts=reply.thoughts))
    assert to_messages(items, tools, "input") == expected


def _as_custom(call: ToolCall) -> ToolCall:
    """A freeform tool has one text argument."""
    return replace(call, arguments=orjson.dumps({"input": call.arguments}).decode())


@pytest.mark.parametrize("name", ["weather", "n__b"])
def test_a_namespace_comes_back(name: str) -> None:
    output = Output("secret", read_tools(TOOLS), summary=False, sealed=False)
    reply = ChatReply("w", tool_calls=(ToolCall("c", name, "{}"),))
    items = output.kept(blocks_of(reply))
    assert items[0].get("namespace") == ("n" if name == "n__b" else None)
    assert to_messages(items, read_tools(TOOLS), "input")[0].tool_calls == reply.tool_calls


HELLO: dict[str, Any] = {"model": "fugu", "messages": [{"role": "user", "content": "hello"}], "stream": True}


class _Upstream:
    """As much of the upstream as a reader needs."""

    spec = SPEC

    def event_object(self, data: str) -> Any:
        return orjson.loads(data)
