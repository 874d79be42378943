"""Streams of every dialect against the sequences that the official servers document (`golden/`), by type and order, and
through the stream helpers of the official SDKs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import yaml

from actors.messages import ToolCall
from actors.sse import SSEDecoder
from tests.clients.server import KEY, WORKERS, ClientServer
from tests.loopback import Behaviour, LoopbackProvider

GOLDEN = Path(__file__).parent / "golden"
SAID = "one two three four five six seven"
ARGUMENTS = ('{"at": "sky", "how": "long"}', '{"at": "sea", "how": "short"}')
CALLS = tuple(ToolCall(f"call_{number}", "look", arguments) for number, arguments in enumerate(ARGUMENTS))
SCENARIOS = {
    "text": Behaviour(text=SAID),
    "tool": Behaviour(text="", tool_calls=CALLS[:1]),
    "parallel": Behaviour(text="", tool_calls=CALLS),
    "reasoning": Behaviour(text=SAID, reasoning="hm, let me see"),
    "incomplete": Behaviour(text=SAID, finish="length"),
    "filtered": Behaviour(text=SAID, finish="content_filter"),
    "broken": Behaviour(text=SAID, error_after=5, chunk_delay=0.1),
}
# What one dialect alone has.
ALONE: dict[str, set[str]] = {"responses": {"freeform"}}
LOOK = {"type": "object", "properties": {"at": {"type": "string"}, "how": {"type": "string"}}}
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


def asked(dialect: str) -> dict[str, Any]:
    """The same question in each dialect."""
    turns = [{"role": "user", "content": "?"}]
    look: dict[str, Any] = {"name": "look", "description": "Look."}
    if dialect == "chat":
        tool = {"type": "function", "function": {**look, "parameters": LOOK}}
        return {"model": "fugu", "messages": turns, "tools": [tool], "stream_options": {"include_usage": True}}
    if dialect == "responses":
        tool = {"type": "function", **look, "parameters": LOOK, "strict": False}
        return {"model": "fugu", "input": "?", "tools": [tool], "reasoning": {"summary": "auto"}}
    tool = {**look, "input_schema": LOOK}
    thinking = {"type": "enabled", "budget_tokens": 1024}
    return {"model": "fugu", "messages": turns, "max_tokens": 4000, "tools": [tool], "thinking": thinking}


def told(server: ClientServer, dialect: str, worker: str, **fields: Any) -> list[dict[str, Any] | str]:
    """The events as they come over the wire."""
    body = {**asked(dialect), **fields, "stream": True, "fugu": {"allow": [worker]}}
    answer = httpx.post(server.url + PATHS[dialect], json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=30)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any] | str] = []
    for event in SSEDecoder().feed(answer.content):
        if event.data == "[DONE]":
            found.append(event.data)
            continue
        data = json.loads(event.data)
        if dialect != "chat":
            assert event.event == data["type"], "the event's name is its type"
        found.append(data)
    return found


def labels(dialect: str, event: dict[str, Any] | str) -> Iterator[str]:
    if isinstance(event, str):
        yield event
    elif dialect == "chat":
        yield from _chat_labels(event)
    elif dialect == "messages":
        index = [str(event["index"])] if "index" in event else []
        kinds = (event.get("content_block"), event.get("delta"))
        kind = [each.get("type") or each["stop_reason"] for each in kinds if each is not None]
        if event["type"] != "ping":
            yield " ".join([event["type"], *index, *kind])
    else:
        kind = [event[name]["type"] for name in ("item", "part") if name in event]
        yield " ".join([event["type"], *kind])


def _chat_labels(event: dict[str, Any]) -> Iterator[str]:
    if "error" in event:
        yield "error"
        return
    if event.get("usage") is not None:
        yield "usage"
    for choice in event["choices"]:
        delta = choice["delta"]
        if "role" in delta:
            yield f"role {delta['role']}"
        if delta.get("reasoning_content"):
            yield "reasoning"
        if delta.get("content"):
            yield "content"
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert (call["type"], call["function"]["name"]) == ("function", "look")
                yield f"call {call['index']}"
            if call["function"]["arguments"]:
                yield f"arguments {call['index']}"
        if choice["finish_reason"] is not None:
            yield f"finish {choice['finish_reason']}"


def golden(dialect: str, scenario: str) -> list[str]:
    sequences: dict[str, list[str]] = yaml.safe_load((GOLDEN / f"{dialect}.yaml").read_text())
    assert set(sequences) == set(SCENARIOS) | ALONE.get(dialect, set())
    return sequences[scenario]


def matches(found: list[str], wanted: list[str]) -> bool:
    runs = [(label, len(list(run))) for label, run in groupby(found)]
    many = [label.removesuffix(" +") for label in wanted]
    return [label for label, _ in runs] == many and all(
        count == 1 or label.endswith(" +") for (_, count), label in zip(runs, wanted, strict=True)
    )


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("dialect", PATHS)
def test_the_events_are_those_that_are_documented(
    server: ClientServer, provider: LoopbackProvider, dialect: str, scenario: str, worker: str
) -> None:
    provider.enqueue(SCENARIOS[scenario])
    events = told(server, dialect, worker)
    wanted = golden(dialect, scenario)
    if (dialect, scenario, worker) == ("messages", "reasoning", "chatty"):
        # Only Anthropic's workers sign what they thought.
        wanted = [label for label in wanted if "signature_delta" not in label]
    found = [label for event in events for label in labels(dialect, event)]
    assert matches(found, wanted), found
    if dialect == "responses":
        numbers = [event["sequence_number"] for event in events if isinstance(event, dict)]
        assert numbers == list(range(len(events)))


@pytest.mark.parametrize("worker", WORKERS)
def test_the_events_of_a_freeform_tool(server: ClientServer, provider: LoopbackProvider, worker: str) -> None:
    patch = "*** Begin Patch\n*** End Patch"
    provider.enqueue(Behaviour(text="", tool_calls=(ToolCall("call_0", "apply_patch", json.dumps({"input": patch})),)))
    tools = [{"type": "custom", "name": "apply_patch", "description": "Edit files."}]
    events = told(server, "responses", worker, tools=tools)
    found = [label for event in events for label in labels("responses", event)]
    assert matches(found, golden("responses", "freeform")), found
    last: Any = events[-1]
    assert last["response"]["output"][0]["input"] == patch


def test_a_sequence_that_differs_is_found() -> None:
    wanted = ["a", "b +", "c"]
    assert matches(["a", "b", "c"], wanted)
    assert matches(["a", "b", "b", "c"], wanted)
    for wrong in (["a", "c"], ["b", "a", "c"], ["a", "a", "b", "c"], ["a", "b"], ["a", "b", "c", "c"], []):
        assert not matches(wrong, wanted)


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_chat_helper_of_the_sdk(
    server: ClientServer, provider: LoopbackProvider, scenario: str, worker: str
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30)
    provider.enqueue(SCENARIOS[scenario])
    fields: Any = asked("chat") | {"extra_body": {"fugu": {"allow": [worker]}}}
    text = ""
    choice: Any = None
    failed: openai.OpenAIError | None = None
    with client.chat.completions.stream(**fields) as stream:
        try:
            for event in stream:
                text += event.delta if event.type == "content.delta" else ""
            choice = stream.get_final_completion().choices[0]
        except openai.OpenAIError as error:
            failed = error
    if scenario == "broken":
        assert isinstance(failed, openai.APIError)
        assert failed.code == "stream_broken"
        assert SAID.startswith(text or "nothing")
        return
    assert text == SCENARIOS[scenario].text
    # How the helper tells of an answer that is not whole.
    unwhole = {"incomplete": openai.LengthFinishReasonError, "filtered": openai.ContentFilterFinishReasonError}
    if scenario in unwhole:
        assert isinstance(failed, unwhole[scenario])
        return
    assert failed is None
    assert choice.finish_reason == ("tool_calls" if scenario in ("tool", "parallel") else "stop")
    assert text == (choice.message.content or "")
    made = tuple(call.function.arguments for call in choice.message.tool_calls or ())
    assert made == tuple(call.arguments for call in SCENARIOS[scenario].tool_calls)


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_responses_helper_of_the_sdk(
    server: ClientServer, provider: LoopbackProvider, scenario: str, worker: str
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30)
    provider.enqueue(SCENARIOS[scenario])
    fields: Any = asked("responses") | {"extra_body": {"fugu": {"allow": [worker]}}}
    text = ""
    with client.responses.stream(**fields) as stream:
        for event in stream:
            text += event.delta if event.type == "response.output_text.delta" else ""
    last: Any = event
    if scenario == "broken":
        assert last.type == "response.failed"
        assert SAID.startswith(text or "nothing")
        assert last.response.error.code == "server_error"
        return
    assert last.type == golden("responses", scenario)[-1]
    assert text == last.response.output_text == SCENARIOS[scenario].text
    reasons = {"incomplete": "max_output_tokens", "filtered": "content_filter"}
    details = last.response.incomplete_details
    assert (details.reason if details else None) == reasons.get(scenario)
    made = tuple(item.arguments for item in last.response.output if item.type == "function_call")
    assert made == tuple(call.arguments for call in SCENARIOS[scenario].tool_calls)


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_messages_helper_of_the_sdk(
    server: ClientServer, provider: LoopbackProvider, scenario: str, worker: str
) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=30)
    provider.enqueue(SCENARIOS[scenario])
    fields: Any = asked("messages") | {"extra_body": {"fugu": {"allow": [worker]}}}
    text = ""
    with client.messages.stream(**fields) as stream:
        try:
            for piece in stream.text_stream:
                text += piece
        except anthropic.APIStatusError as error:
            body: Any = error.body
            assert (scenario, body["error"]["code"]) == ("broken", "stream_broken")
            assert SAID.startswith(text or "nothing")
            return
        final = stream.get_final_message()
    assert scenario != "broken"
    assert final.stop_reason == golden("messages", scenario)[-2].split()[1]
    assert text == SCENARIOS[scenario].text
    made = tuple(block.input for block in final.content if block.type == "tool_use")
    assert made == tuple(json.loads(call.arguments) for call in SCENARIOS[scenario].tool_calls)
    assert ("thinking" in {block.type for block in final.content}) == (scenario == "reasoning")
