"""`POST /v1/responses` as OpenAI's own client sees it, over workers whose behaviour each test scripts. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from actors.errors import StreamBrokenError, WorkerUnavailableError
from actors.marks import mark, worker_tag
from actors.messages import ChatReply, ChatRequest, Chunk, Thought, ToolCall, ToolCallDelta, Usage
from tests.serve.test_gateway import KEY, Scripted, gateway

LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edit files.", "format": {"type": "text"}}


class Says:
    """Streams the given chunks, then the reply that they come to."""

    def __init__(self, name: str, *chunks: Chunk, finish: str = "stop", usage: Usage = Usage(9, 4, 2, 1)) -> None:
        self.name = name
        self.chunks = chunks
        self.finish = finish
        self.usage = usage
        self.requests: list[ChatRequest] = []
        self.wait = asyncio.Event()
        self.wait.set()
        self.cancelled = 0

    async def complete(self, request: ChatRequest) -> ChatReply:
        last: ChatReply | None = None
        async for chunk in self.stream(request):
            last = chunk.final
        assert last is not None
        return last

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        try:
            await self.wait.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        calls: dict[int, list[str]] = {}
        for chunk in self.chunks:
            yield chunk
            for call in chunk.tool_calls:
                calls.setdefault(call.index, [call.id or "", call.name or "", ""])[2] += call.arguments
        yield Chunk(
            final=ChatReply(
                self.name,
                "".join(chunk.text for chunk in self.chunks),
                "".join(chunk.reasoning for chunk in self.chunks),
                tuple(ToolCall(*call) for call in calls.values()),
                self.finish if not calls else "tool_calls",  # type: ignore[arg-type]
                self.usage,
                0.5,
                thoughts=tuple(thought for chunk in self.chunks for thought in chunk.thoughts),
            )
        )


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))


def client_of(*workers: Any, key: str = KEY, serve: dict[str, Any] | None = None) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway(*workers, serve=serve)))  # type: ignore[arg-type]
    return openai.AsyncOpenAI(base_url="http://fugu/v1", api_key=key, http_client=http, max_retries=0)


def calls(*texts: str) -> Chunk:
    """A piece with whole calls in it: name and arguments in turn."""
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Chunk(tool_calls=tuple(ToolCallDelta(i, f"call_{i}", name, args) for i, (name, args) in enumerate(pairs)))


async def test_a_plain_response_is_what_the_sdk_calls_one() -> None:
    worker = Says("a", Chunk("forty-"), Chunk("two"))
    response = await client_of(worker).responses.create(
        model="fugu", input="6 * 7?", instructions="Be short.", temperature=0.5, metadata={"a": "b"}
    )
    Response.model_validate(response.model_dump(), strict=False)
    assert response.output_text == "forty-two"
    assert (response.status, response.model, response.metadata) == ("completed", "fugu", {"a": "b"})
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (9, 4, 13)
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert [(m.role, m.text) for m in worker.requests[0].messages] == [("system", "Be short."), ("user", "6 * 7?")]


async def test_the_events_of_a_text() -> None:
    stream = await client_of(Says("a", Chunk("forty-"), Chunk("two"))).responses.create(
        model="fugu", input="?", stream=True
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    last: Any = events[-1]
    assert last.response.output_text == "forty-two"
    done: Any = events[-2]
    assert done.item == last.response.output[0]
    ids = {event.item_id for event in events if hasattr(event, "item_id")}
    assert ids == {last.response.output[0].id}


async def test_the_sdks_own_accumulation_agrees_with_us() -> None:
    """`responses.stream` checks every event against what it has put together itself."""
    thought = Thought("hm", "sig", origin=worker_tag("a"))
    worker = Says(
        "a",
        Chunk(reasoning="h"),
        Chunk(reasoning="m", thoughts=(thought,)),
        Chunk("I will "),
        Chunk("look."),
        Chunk(tool_calls=(ToolCallDelta(0, "call_0", "look", '{"at"'), ToolCallDelta(1, "call_1", "look", "{}"))),
        Chunk(tool_calls=(ToolCallDelta(0, arguments=':"sky"}'),)),
        Chunk(tool_calls=(ToolCallDelta(2, "call_2", "apply_patch", '{"input":"*** a"}'),)),
    )
    async with client_of(worker).responses.stream(
        model="fugu",
        input="?",
        tools=[LOOK, PATCH],  # type: ignore[list-item]
        reasoning={"summary": "auto"},
        include=["reasoning.encrypted_content"],
    ) as stream:
        types = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert [item.type for item in final.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
        "custom_tool_call",
    ]
    reasoning, message, first, second, patch = (item.model_dump() for item in final.output)
    assert reasoning["summary"] == [{"text": "hm", "type": "summary_text"}]
    assert reasoning["encrypted_content"]
    assert message["content"][0]["text"] == "I will look."
    assert (first["call_id"], first["name"], first["arguments"]) == (mark("call_0", "a"), "look", '{"at":"sky"}')
    assert (second["call_id"], second["arguments"]) == (mark("call_1", "a"), "{}")
    assert (patch["name"], patch["input"]) == ("apply_patch", "*** a")
    assert types.count("response.output_item.added") == types.count("response.output_item.done") == 5
    for kind in ("reasoning_summary_text", "function_call_arguments", "custom_tool_call_input"):
        assert f"response.{kind}.delta" in types
        assert f"response.{kind}.done" in types


async def test_a_tool_loop_by_previous_response_id_goes_back_to_who_asked() -> None:
    thought = Thought("secret", "sig", origin=worker_tag("b"))
    first, second = (
        Says("a", Chunk("no")),
        Says("b", Chunk(reasoning="secret", thoughts=(thought,)), calls("look", "{}")),
    )
    client = client_of(first, second)
    asked = await client.responses.create(
        model="fugu",
        input="look!",
        tools=[LOOK],
        extra_body={"fugu": {"allow": ["b"]}},  # type: ignore[list-item]
    )
    call = asked.output[-1]
    assert call.type == "function_call"
    second.chunks = (Chunk("blue"),)
    answer = await client.responses.create(
        model="fugu",
        previous_response_id=asked.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "blue sky"}],
        tools=[LOOK],  # type: ignore[list-item]
    )
    assert answer.output_text == "blue"
    assert not first.requests, "the result goes to the worker that asked, though the order names another first"
    user, assistant, tool = second.requests[1].messages
    assert (user.text, tool.text) == ("look!", "blue sky")
    assert assistant.tool_calls == (ToolCall("call_0", "look", "{}"),), "as the worker gave it"
    assert tool.tool_call_id == "call_0"
    assert assistant.thoughts == (thought,), "kept on this side, though the caller did not ask to carry it"
    follow = await client.responses.create(model="fugu", previous_response_id=answer.id, input="sure?")
    assert follow.previous_response_id == answer.id
    assert [m.role for m in first.requests[0].messages] == ["user", "assistant", "tool", "assistant", "user"]


async def test_kept_responses_survive_a_restart_and_belong_to_their_key() -> None:
    keys = {"api_keys": [KEY, "another-key-77"]}
    made = await client_of(Says("a", Chunk("one")), serve=keys).responses.create(model="fugu", input="first")
    later = client_of(Says("a", Chunk("two")), serve=keys)
    assert (await later.responses.retrieve(made.id)).output_text == "one"
    second = await later.responses.create(model="fugu", previous_response_id=made.id, input="second")
    items = [item.model_dump() async for item in later.responses.input_items.list(second.id, order="asc", limit=2)]
    assert [item["content"][0]["text"] for item in items] == ["first", "one", "second"]
    stranger = client_of(Says("a", Chunk("x")), key="another-key-77", serve=keys)
    for attempt in (
        stranger.responses.retrieve(made.id),
        stranger.responses.delete(made.id),
        stranger.responses.create(model="fugu", previous_response_id=made.id, input="mine?"),
    ):
        with pytest.raises(openai.NotFoundError):
            await attempt
    await later.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        await later.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        await later.responses.create(model="fugu", previous_response_id=second.id, input="third")


async def test_what_is_not_to_be_kept_is_not() -> None:
    client = client_of(Says("a", Chunk("one")))
    made = await client.responses.create(model="fugu", input="first", store=False)
    assert made.store is False  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)


async def test_items_can_be_referred_to() -> None:
    worker = Says("a", Chunk("one"))
    client = client_of(worker)
    made = await client.responses.create(model="fugu", input="first")
    reference: Any = {"type": "item_reference", "id": made.output[0].id}
    await client.responses.create(model="fugu", input=[reference, {"role": "user", "content": "go on"}])
    assert [(m.role, m.text) for m in worker.requests[1].messages] == [("assistant", "one"), ("user", "go on")]


async def until(client: openai.AsyncOpenAI, id: str, status: str) -> Response:
    for _ in range(100):
        response = await client.responses.retrieve(id)
        if response.status == status:
            return response
        await asyncio.sleep(0.05)
    raise AssertionError(f"never {status}: {response.status}")


async def test_in_the_background() -> None:
    worker = Says("a", Chunk("slowly"))
    worker.wait.clear()
    client = client_of(worker)
    made = await client.responses.create(model="fugu", input="?", background=True)
    assert (made.status, made.output) == ("in_progress", [])
    worker.wait.set()
    assert (await until(client, made.id, "completed")).output_text == "slowly"
    with pytest.raises(openai.BadRequestError, match="completed already"):
        await client.responses.cancel(made.id)


async def test_cancelled_in_the_background() -> None:
    worker = Says("a", Chunk("never"))
    worker.wait.clear()
    client = client_of(worker)
    made = await client.responses.create(model="fugu", input="?", background=True)
    await asyncio.sleep(0.05)
    assert (await client.responses.cancel(made.id)).status == "cancelled"
    for _ in range(60):
        if worker.cancelled:
            break
        await asyncio.sleep(0.05)
    assert worker.cancelled == 1, "the call upstream ends"
    worker.wait.set()
    assert (await client.responses.retrieve(made.id)).status == "cancelled"


async def test_failed_in_the_background() -> None:
    client = client_of(Scripted("a", WorkerUnavailableError("down", worker="a")))
    made = await client.responses.create(model="fugu", input="?", background=True)
    failed = await until(client, made.id, "failed")
    assert failed.error is not None
    assert "down" in failed.error.message


async def test_failures_before_and_after_the_first_byte() -> None:
    client = client_of(Scripted("a", WorkerUnavailableError("down", worker="a")))
    with pytest.raises(openai.InternalServerError) as caught:
        await client.responses.create(model="fugu", input="?", stream=True)
    assert caught.value.status_code == 502
    broken = client_of(Scripted("a", "half", StreamBrokenError("cut", worker="a")))
    events = [event async for event in await broken.responses.create(model="fugu", input="?", stream=True)]
    assert [event.type for event in events][-2:] == ["response.output_text.delta", "response.failed"]
    last: Any = events[-1]
    assert (last.response.status, last.response.error.message) == ("failed", "cut")


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
async def test_incomplete(finish: str, reason: str) -> None:
    client = client_of(Says("a", Chunk("half"), finish=finish))
    response = await client.responses.create(model="fugu", input="?", max_output_tokens=5)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", reason)  # type: ignore[union-attr]
    events: list[Any] = [e async for e in await client.responses.create(model="fugu", input="?", stream=True)]
    assert events[-1].type == "response.incomplete"
    assert events[-2].item == events[-1].response.output[0]
    assert [response.output[0].status, events[-2].item.status] == ["incomplete"] * 2  # type: ignore[union-attr]


async def test_a_call_that_was_cut_off_is_not_to_be_made() -> None:
    thought = Thought("hm", "sig", origin=worker_tag("a"))
    whole, cut = ToolCall("c0", "look", "{}"), ToolCall("c1", "look", '{"at')
    reply = ChatReply("a", reasoning="hm", tool_calls=(whole, cut), finish_reason="length", thoughts=(thought,))

    class Cut(Says):
        async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
            yield Chunk(reasoning="hm", thoughts=(thought,))
            for at, call in enumerate(reply.tool_calls):
                yield Chunk(tool_calls=(ToolCallDelta(at, call.id, call.name, call.arguments),))
            yield Chunk(final=reply)

    client = client_of(Cut("a"))
    fields: Any = {"model": "fugu", "input": "?", "tools": [LOOK], "reasoning": {"summary": "auto"}}
    plain = await client.responses.create(**fields)
    events: list[Any] = [event async for event in await client.responses.create(**fields, stream=True)]
    told = [event.item for event in events if event.type == "response.output_item.done"]
    for items in (plain.output, told, events[-1].response.output):
        assert [item.status for item in items] == ["completed", "completed", "incomplete"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": "?", "tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": "?", "conversation": "conv_1"}, "conversation"),
        ({"input": "?", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "?", "tool_choice": "required"}, "tool_choice"),
        ({"input": "?", "tools": [LOOK], "tool_choice": {"type": "function", "name": "jump"}}, "tool_choice.name"),
        ({"input": "?", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"input": "?", "background": True, "stream": True, "store": False}, "background"),
        ({}, "input"),
    ],
)
async def test_what_cannot_be_said_is_an_error_that_says_so(fields: dict[str, Any], param: str) -> None:
    worker = Says("a", Chunk("x"))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway(worker)), base_url="http://fugu")  # type: ignore[arg-type]
    answer = await http.post("/v1/responses", json={"model": "fugu", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not worker.requests


async def test_namespaces_freeform_grammars_and_allowed_tools() -> None:
    worker = Says("a", calls("files__look", "{}"))
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: WORD"}
    tools: Any = [
        {"type": "namespace", "name": "files", "description": "d", "tools": [LOOK]},
        {**PATCH, "format": grammar},
        {**LOOK, "name": "other"},
    ]
    client = client_of(worker)
    response = await client.responses.create(model="fugu", input="?", tools=tools, parallel_tool_calls=False)
    call = response.output[0].model_dump()
    assert (call["name"], call["namespace"]) == ("look", "files")
    names = [tool.name for tool in worker.requests[0].tools]
    assert names == ["files__look", "apply_patch", "other"]
    assert "start: WORD" in worker.requests[0].tools[1].description
    assert worker.requests[0].parallel_tool_calls is False
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}
    await client.responses.create(model="fugu", input="?", tools=tools, tool_choice=choice)
    assert [tool.name for tool in worker.requests[1].tools] == ["other"]
    assert worker.requests[1].tool_choice is not None
    assert worker.requests[1].tool_choice.mode == "required"
