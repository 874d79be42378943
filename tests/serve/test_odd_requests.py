"""What the official SDKs let a caller ask that few do: answered, refused by name, or left out and told; never lost.
Real adapters on a loopback provider, in two wire formats. No Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2  # the SDK's own
import openai
import pytest

from actors.adapters.anthropic import AnthropicAdapter
from actors.adapters.openai import OpenAIAdapter
from actors.config import FuguConfig
from actors.transport import make_transport
from actors.worker import WorkerRuntime
from serve.api.health import Readiness
from serve.gateway import Gateway
from serve.router import OrderDecider
from tests.loopback import Behaviour, LoopbackProvider, ToolCall, Usage
from tests.serve.linked import Direct

WORKERS = {"chatty": ("openai", "gpt-5.5"), "claudine": ("anthropic", "claude-opus-4-8")}
PIXEL = "iVBORw0KGgo="
LOOK: Any = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as provider:
        yield provider


@pytest.fixture
def provider(shared: LoopbackProvider) -> LoopbackProvider:
    shared.clear()
    shared.default = Behaviour(text="yes")
    return shared


@pytest.fixture
async def app(provider: LoopbackProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    workers = [
        {"name": name, "provider": dialect, "model": model, "base_url": provider.url_for(dialect)}  # type: ignore[arg-type]
        for name, (dialect, model) in WORKERS.items()
    ]
    config = FuguConfig.model_validate({"workers": workers})
    kinds = {"openai": OpenAIAdapter, "anthropic": AnthropicAdapter}
    adapters = [kinds[spec.provider](spec, make_transport(spec)) for spec in config.active]
    direct = [Direct(WorkerRuntime(spec, each)) for spec, each in zip(config.active, adapters, strict=True)]
    yield Gateway(config, direct, OrderDecider(list(WORKERS)), Readiness({}))
    for adapter in adapters:
        await adapter.close()


@pytest.fixture
def gpt(app: Any) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
    return openai.AsyncOpenAI(base_url="http://fugu/v1", api_key="x", http_client=http, max_retries=0)


@pytest.fixture
def claude(app: Any) -> anthropic.AsyncAnthropic:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
    return anthropic.AsyncAnthropic(base_url="http://fugu", api_key="x", http_client=http, max_retries=0)


def only(worker: str, **fields: Any) -> Any:
    return {"fugu": {"allow": [worker], "trace": True}, **fields}


# Chat


async def test_chat_refuses_what_would_be_lost(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    lost: list[tuple[str, Any]] = [
        ("logprobs", {"logprobs": True}),
        ("web_search_options", {"web_search_options": {}}),
        ("functions", {"functions": [{"name": "f", "parameters": {}}]}),
        ("modalities", {"modalities": ["text", "audio"]}),
    ]
    for name, fields in lost:
        with pytest.raises(openai.BadRequestError, match=name) as caught:
            await gpt.chat.completions.create(model="fugu", messages=HELLO, **fields)
        assert caught.value.param == name
    assert not provider.requests


async def test_chat_tells_a_worker_what_it_takes(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    await gpt.chat.completions.create(
        model="fugu",
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "name": "ann", "content": [{"type": "text", "text": "hello"}]},
        ],
        max_completion_tokens=9,
        reasoning_effort="low",
        verbosity="low",
        stop=["END"],
        prediction={"type": "content", "content": "yes"},
        prompt_cache_key="k",
        safety_identifier="s",
        metadata={"a": "b"},
        n=1,
        logprobs=False,
        modalities=["text"],
        stream_options=None,
    )
    sent = provider.requests[0].body
    assert sent["messages"][0] == {"role": "system", "content": "Be short."}
    assert sent["max_completion_tokens"] == 9
    told = ("reasoning_effort", "verbosity", "stop", "prompt_cache_key", "safety_identifier", "metadata", "prediction")
    assert all(name in sent for name in told)
    with pytest.raises(openai.BadRequestError, match="n:"):
        await gpt.chat.completions.create(model="fugu", messages=HELLO, n=2)


async def test_only_some_tools(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    tools: Any = [{"type": "function", "function": {"name": name}} for name in ("look", "jump")]
    named: Any = {"type": "function", "function": {"name": "jump"}}
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    await gpt.chat.completions.create(model="fugu", messages=HELLO, tools=tools, tool_choice=choice)
    assert [tool["function"]["name"] for tool in provider.requests[0].body["tools"]] == ["jump"]
    assert provider.requests[0].body["tool_choice"] == "auto"


PATCH: Any = {
    "type": "custom",
    "custom": {
        "name": "patch",
        "description": "Changes files.",
        "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "x"'}},
    },
}


@pytest.mark.parametrize("worker", WORKERS)
async def test_a_freeform_tool_in_chat(gpt: openai.AsyncOpenAI, provider: LoopbackProvider, worker: str) -> None:
    look: Any = {"type": "function", "function": {"name": "look"}}
    asks = (ToolCall("c1", "patch", '{"input": "*** Begin\\n\\"x\\""}'), ToolCall("c2", "look", '{"at": 1}'))
    provider.default = Behaviour(text="", tool_calls=asks)
    fields: Any = {"model": "fugu", "tools": [PATCH, look], "extra_body": only(worker)}
    whole = await gpt.chat.completions.create(messages=HELLO, **fields)
    calls: Any = whole.choices[0].message.tool_calls
    assert [call.type for call in calls] == ["custom", "function"]
    assert (calls[0].custom.name, calls[0].custom.input) == ("patch", '*** Begin\n"x"')
    told: dict[int, Any] = {}
    async for chunk in await gpt.chat.completions.create(messages=HELLO, stream=True, **fields):
        for delta in (chunk.choices[0].delta.tool_calls or ()) if chunk.choices else ():
            call = told.setdefault(delta.index, {"type": delta.type, "id": delta.id, "said": ""})
            said: Any = delta.model_dump().get("custom") or (delta.function and delta.function.model_dump())
            call["name"] = call.get("name") or said.get("name")
            call["said"] += said.get("input") or said.get("arguments") or ""
    assert [(call["type"], call["name"], call["said"]) for call in told.values()] == [
        ("custom", "patch", '*** Begin\n"x"'),
        ("function", "look", '{"at": 1}'),
    ]
    provider.clear()
    provider.default = Behaviour(text="done")
    results = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in calls]
    turns = [*HELLO, whole.choices[0].message.model_dump(exclude_none=True), *results]
    await gpt.chat.completions.create(messages=turns, **fields)
    sent = provider.requests[0].raw
    assert b"must follow this lark grammar" in sent
    assert sent.count(b"*** Begin") == 1, "the worker sees its own call"


async def test_choosing_a_freeform_tool(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    named: Any = {"type": "custom", "custom": {"name": "patch"}}
    other: Any = {"type": "function", "function": {"name": "look"}}
    fields: Any = {"model": "fugu", "messages": HELLO, "tools": [PATCH, other]}
    await gpt.chat.completions.create(tool_choice=named, **fields)
    allowed: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    await gpt.chat.completions.create(tool_choice=allowed, **fields)
    forced, some = (request.body for request in provider.requests)
    assert forced["tool_choice"]["function"]["name"] == "patch"
    assert [tool["function"]["name"] for tool in some["tools"]] == ["patch"]
    wrong: Any = {"type": "custom", "custom": {"name": "nobody"}}
    with pytest.raises(openai.BadRequestError) as caught:
        await gpt.chat.completions.create(tool_choice=wrong, **fields)
    assert caught.value.param == "tool_choice.custom.name"
    search: Any = {"type": "web_search"}
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\]"):
        await gpt.chat.completions.create(model="fugu", messages=HELLO, tools=[search])


async def test_a_nucleus_of_nothing(
    gpt: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic, provider: LoopbackProvider
) -> None:
    """OpenAI takes `top_p: 0`; vLLM does not."""
    await gpt.chat.completions.create(model="fugu", messages=HELLO, top_p=0)
    await gpt.responses.create(model="fugu", input="?", top_p=0)
    await claude.messages.create(model="fugu", max_tokens=9, messages=HELLO, extra_body={"top_p": 0})
    assert [request.body["top_p"] for request in provider.requests] == [1e-6] * 3


# Responses


async def test_responses_name_what_they_leave_out(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    answer = await gpt.responses.create(
        model="fugu",
        input=[{"role": "developer", "content": "Be short."}, {"role": "user", "content": "hello"}],
        truncation="auto",
        reasoning={"effort": "low", "context": "all_turns"},
        max_tool_calls=3,
        prompt_cache_key="k",
        text={"verbosity": "low"},
        stream_options={"include_obfuscation": False},
        extra_body=only("chatty", new_field=1),
    )
    trace: Any = answer.model_extra
    assert sorted(trace["fugu"]["dropped"]) == ["max_tool_calls", "new_field", "reasoning.context", "truncation"]
    sent = provider.requests[0].body
    assert (sent["prompt_cache_key"], sent["verbosity"], sent["reasoning_effort"]) == ("k", "low", "low")
    for fields in ({"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}):
        with pytest.raises(openai.BadRequestError, match="probabilities"):
            await gpt.responses.create(model="fugu", input="?", **fields)  # type: ignore[call-overload]
    assert len(provider.requests) == 1


async def test_the_older_name_of_a_summary(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="yes", reasoning="hm")
    answer = await gpt.responses.create(model="fugu", input="?", reasoning={"generate_summary": "auto"})
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.reasoning is not None
    assert answer.reasoning.summary == "auto"


async def test_signed_reasoning_can_be_had_later(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="yes", reasoning="hm")
    made = await gpt.responses.create(
        model="fugu", input="?", reasoning={"summary": "auto"}, extra_body=only("claudine")
    )
    plain = await gpt.responses.retrieve(made.id)
    sealed = await gpt.responses.retrieve(made.id, include=["reasoning.encrypted_content"])
    contents = [item.model_dump().get("encrypted_content") for item in (plain.output[0], sealed.output[0])]
    assert contents[0] is None
    assert contents[1]
    assert [item.id for item in plain.output] == [item.id for item in sealed.output]


async def test_some_tools_of_a_namespace(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    tools: Any = [{"type": "namespace", "name": "files", "description": "d", "tools": [LOOK]}, {**LOOK, "name": "jump"}]
    named = {"type": "function", "name": "look", "namespace": "files"}
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    await gpt.responses.create(model="fugu", input="?", tools=tools, tool_choice=choice)
    assert [tool["function"]["name"] for tool in provider.requests[0].body["tools"]] == ["files__look"]


async def test_a_picture_from_a_tool_reaches_either_worker(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    picture = {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "auto"}
    for worker in WORKERS:
        provider.enqueue(Behaviour(text="", tool_calls=(ToolCall("c1", "look", "{}"),)))
        asked = await gpt.responses.create(model="fugu", input="?", tools=[LOOK], extra_body=only(worker))
        call: Any = asked.output[0]
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": [picture]}
        await gpt.responses.create(model="fugu", input=[result], previous_response_id=asked.id, tools=[LOOK])
    chatty, claudine = provider.requests[1].body["messages"], provider.requests[3].body["messages"]
    assert [message["role"] for message in chatty] == ["user", "assistant", "tool", "user"]
    assert chatty[-1]["content"][1]["image_url"]["url"].endswith(PIXEL)
    assert claudine[-1]["content"][0]["content"][0]["source"]["data"] == PIXEL


async def test_counting_the_tokens_of_an_input(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    few = await gpt.responses.input_tokens.count(model="fugu", input="hello")
    assert few.object == "response.input_tokens"
    assert 1 <= few.input_tokens < 40
    asked: Any = {"input": [{"role": "user", "content": "hello " * 100}], "tools": [LOOK], "instructions": "Be short."}
    many = await gpt.responses.input_tokens.count(**asked)
    assert many.input_tokens > 150
    made = await gpt.responses.create(model="fugu", **asked)
    requests = len(provider.requests)
    going_on = await gpt.responses.input_tokens.count(previous_response_id=made.id, input="and?", model=None)
    assert going_on.input_tokens > 150, "with all that it goes on from"
    with pytest.raises(openai.NotFoundError, match="previous_response_id"):
        await gpt.responses.input_tokens.count(previous_response_id="resp_none", input="and?")
    with pytest.raises(openai.BadRequestError, match=r"input\[0\]"):
        await gpt.responses.input_tokens.count(input=[{"type": "computer_call"}])  # type: ignore[list-item,typeddict-item]
    assert len(provider.requests) == requests, "no worker hears of it"


async def test_what_was_written_to_a_cache_is_told(gpt: openai.AsyncOpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="yes", usage=Usage(3000, 1, 1000, 0, 1500))
    response = await gpt.responses.create(model="fugu", input="?", extra_body=only("claudine"))
    assert response.usage is not None
    details = response.usage.input_tokens_details
    assert (details.cached_tokens, details.cache_write_tokens) == (1000, 1500)
    answer = await gpt.chat.completions.create(model="fugu", messages=HELLO, extra_body=only("claudine"))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cache_write_tokens == 1500


# Messages


@pytest.mark.parametrize("worker", WORKERS)
async def test_what_stopped_it(claude: anthropic.AsyncAnthropic, provider: LoopbackProvider, worker: str) -> None:
    provider.default = Behaviour(text="yes", stopped_by="END")
    fields: Any = {"model": "fugu", "max_tokens": 9, "messages": HELLO, "stop_sequences": ["END"]}
    whole = await claude.messages.create(**fields, extra_body=only(worker))
    async with claude.messages.stream(**fields, extra_body=only(worker)) as stream:
        streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "END")


async def test_messages_name_what_they_leave_out(claude: anthropic.AsyncAnthropic, provider: LoopbackProvider) -> None:
    answer = await claude.beta.messages.create(
        model="fugu",
        max_tokens=2000,
        messages=HELLO,
        system=[{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
        thinking={"type": "enabled", "budget_tokens": 1024},
        betas=["context-management-2025-06-27"],
        extra_body=only("claudine"),
    )
    trace: Any = answer.model_extra
    assert trace["fugu"]["dropped"] == ["context_management"]
    sent = provider.requests[0].body
    assert sent["cache_control"] == {"type": "ephemeral", "ttl": "1h"}
    assert sent["thinking"] == {"type": "adaptive", "display": "summarized"}, "as this generation takes it"
    with pytest.raises(anthropic.BadRequestError, match="mcp_servers"):
        await claude.beta.messages.create(
            model="fugu",
            max_tokens=9,
            messages=HELLO,
            mcp_servers=[{"type": "url", "name": "m", "url": "https://example.com"}],
        )
    assert len(provider.requests) == 1


async def test_a_failed_tool_and_its_picture(claude: anthropic.AsyncAnthropic, provider: LoopbackProvider) -> None:
    tool: Any = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
    provider.enqueue(Behaviour(text="", tool_calls=(ToolCall("c1", "look", "{}"),)))
    fields: Any = {"model": "fugu", "max_tokens": 9, "tools": [tool]}
    asked = await claude.messages.create(messages=HELLO, **fields)
    call: Any = asked.content[0]
    source = {"type": "base64", "media_type": "image/png", "data": PIXEL}
    shown = [{"type": "text", "text": "half of it"}, {"type": "image", "source": source}]
    result = {"type": "tool_result", "tool_use_id": call.id, "is_error": True, "content": shown}
    turns = [*HELLO, {"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    await claude.messages.create(messages=turns, **fields)
    tool_message, user = provider.requests[1].body["messages"][2:]
    assert (tool_message["role"], tool_message["content"]) == ("tool", "Error: the tool failed.\nhalf of it")
    assert user["content"][1]["image_url"]["url"].endswith(PIXEL)
