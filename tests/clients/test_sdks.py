"""The official Python SDKs of OpenAI and Anthropic mend a repository through the running server, in every way that
they have: chat, Responses (by id and stateless) and Messages, streamed and not, three wire formats behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.clients import coding
from tests.clients.server import KEY, WORKERS, ClientServer
from tests.clients.test_agents import check_turns, playing
from tests.loopback import Behaviour, LoopbackProvider

MOST_TURNS = 8


def first_choice(worker: str) -> Any:
    """What the first request says of workers; inside the loop the choice holds by itself. `worker` is "" for any."""
    return {"fugu": {"allow": [worker]}} if worker else {}


def chat(server: ClientServer, folder: Path, worker: str, stream: bool, model: str = "fugu") -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30)
    tools: Any = [
        {"type": "function", "function": {"name": name, "description": text, "parameters": coding.schema(name)}}
        for name, text in coding.DESCRIPTIONS.items()
    ]
    messages: list[Any] = [{"role": "user", "content": coding.QUESTION}]
    extra = first_choice(worker)
    for _ in range(MOST_TURNS):
        if stream:
            with client.chat.completions.stream(model=model, messages=messages, tools=tools, extra_body=extra) as told:
                message = told.get_final_completion().choices[0].message
        else:
            answer = client.chat.completions.create(model=model, messages=messages, tools=tools, extra_body=extra)
            message = answer.choices[0].message  # type: ignore[assignment]
        extra = {}
        if not message.tool_calls:
            return message.content or ""
        calls = [call.model_dump(include={"id", "type", "function"}) for call in message.tool_calls]
        for call in calls:
            call["function"] = {key: call["function"][key] for key in ("name", "arguments")}
        messages.append({"role": "assistant", "content": message.content, "tool_calls": calls})
        for call in calls:
            said = coding.use_tool(folder, call["function"]["name"], json.loads(call["function"]["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": said})
    raise AssertionError("it never came to an end")


def responses(
    server: ClientServer, folder: Path, worker: str, stream: bool, model: str = "fugu", *, by_id: bool = True
) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30)
    tools: Any = [
        {"type": "function", "name": name, "description": text, "parameters": coding.schema(name), "strict": True}
        for name, text in coding.DESCRIPTIONS.items()
    ]
    items: list[Any] = [{"role": "user", "content": coding.QUESTION}]
    extra = first_choice(worker)
    fields: Any = {"model": model, "tools": tools, "reasoning": {"summary": "auto"}, "store": by_id}
    if not by_id:
        fields["include"] = ["reasoning.encrypted_content"]
    for _ in range(MOST_TURNS):
        if stream:
            with client.responses.stream(input=items, extra_body=extra, **fields) as told:
                answer: Any = told.get_final_response()
        else:
            answer = client.responses.create(input=items, extra_body=extra, **fields)
        extra = {}
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            return str(answer.output_text)
        results = [
            {
                "type": "function_call_output",
                "call_id": call.call_id,
                "output": coding.use_tool(folder, call.name, json.loads(call.arguments)),
            }
            for call in calls
        ]
        if by_id:
            fields["previous_response_id"] = answer.id
            items = results
        else:
            items += [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in answer.output]
            items += results
    raise AssertionError("it never came to an end")


def responses_stateless(server: ClientServer, folder: Path, worker: str, stream: bool, model: str = "fugu") -> str:
    return responses(server, folder, worker, stream, model, by_id=False)


def messages(server: ClientServer, folder: Path, worker: str, stream: bool, model: str = "fugu") -> str:
    client = anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=30)
    tools: Any = [
        {"name": name, "description": text, "input_schema": coding.schema(name)}
        for name, text in coding.DESCRIPTIONS.items()
    ]
    turns: list[Any] = [{"role": "user", "content": coding.QUESTION}]
    extra = first_choice(worker)
    fields: Any = {"model": model, "max_tokens": 4000, "tools": tools, "thinking": {"type": "adaptive"}}
    for _ in range(MOST_TURNS):
        if stream:
            with client.messages.stream(messages=turns, extra_body=extra, **fields) as told:
                answer: Any = told.get_final_message()
        else:
            answer = client.messages.create(messages=turns, extra_body=extra, **fields)
        extra = {}
        calls = [block for block in answer.content if block.type == "tool_use"]
        if not calls:
            return "".join(block.text for block in answer.content if block.type == "text")
        turns.append({"role": "assistant", "content": [_sent(block) for block in answer.content]})
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": coding.use_tool(folder, call.name, call.input)}
            for call in calls
        ]
        turns.append({"role": "user", "content": results})
    raise AssertionError("it never came to an end")


def _sent(block: Any) -> dict[str, Any]:
    shown: dict[str, Any] = block.model_dump(exclude_none=True, exclude={"parsed_output"})
    return shown


STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
AGENTS = pytest.mark.parametrize(
    "agent", [chat, responses, responses_stateless, messages], ids=lambda agent: agent.__name__
)


@STREAMED
@AGENTS
def test_a_workflow_mends_a_repository(
    server: ClientServer, provider: LoopbackProvider, repository: Path, agent: Any, stream: bool
) -> None:
    """A step of it calls the tools, and gets their results; another step tells of it."""
    provider.chooses = playing([behaviour.tool_calls for behaviour in coding.script()[:-1]])
    assert agent(server, repository, "", stream, "fugu-ultra") == coding.ANSWER
    assert coding.is_mended(repository)
    check_turns(provider, "fugu-ultra")
    plans = [request for request in provider.requests if "<question>" in json.dumps(request.body["messages"][-1])]
    assert len(plans) == 1, "planned once, gone on with after every tool"
    assert provider.requests[-1].dialect == "anthropic", "the last step is the other worker's"


@pytest.mark.parametrize("worker", WORKERS)
@STREAMED
@AGENTS
def test_a_repository_is_mended(
    server: ClientServer, provider: LoopbackProvider, repository: Path, agent: Any, stream: bool, worker: str
) -> None:
    provider.enqueue(*coding.script())
    assert not coding.is_mended(repository)
    assert agent(server, repository, worker, stream) == coding.ANSWER
    assert coding.is_mended(repository)
    expected = {"chatty": "openai", "claudine": "anthropic", "reasoner": "responses"}[worker]
    assert [request.dialect for request in provider.requests] == [expected] * 4, "the loop stays with who asked"
    last = json.dumps(provider.requests[-1].body)
    for id in ("call_read0", "call_read1", "call_write", "call_run"):
        assert f'"{id}"' in last, "the worker sees its calls as it made them"
    assert "the test passed" in last
    sealed = {"claudine": '"signature": "c2lnbmVk"', "reasoner": '"encrypted_content": "c2lnbmVk"'}.get(worker)
    if sealed is not None and agent is not chat:
        assert sealed in last, "and its thoughts, signed"


def test_a_summary_of_the_reasoning_can_be_asked_for(server: ClientServer, provider: LoopbackProvider) -> None:
    provider.default = Behaviour("Four.", reasoning="Two and two.")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30)
    extra = {"reasoning": {"summary": "auto"}, **first_choice("reasoner")}
    ask: Any = {"model": "fugu", "messages": [{"role": "user", "content": "2 + 2?"}], "reasoning_effort": "low"}
    message = client.chat.completions.create(**ask, extra_body=extra).choices[0].message
    assert (message.content, message.reasoning_content) == ("Four.", "Two and two.")
    assert provider.requests[-1].body["reasoning"] == {"summary": "auto", "effort": "low"}
