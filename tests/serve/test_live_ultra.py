"""`fugu-ultra` of the running server: two gateways, a store whose actor is killed, OpenAI's and Anthropic's clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from typer.testing import CliRunner

import fugu
from orchestrator.workflow import Step, Workflow, render_workflow
from tests.loopback import Behaviour, LoopbackProvider, ToolCall
from tests.serve.conftest import KEY, WORKERS
from tests.serve.running import RunningServer, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

QUESTION: Any = [{"role": "user", "content": "Coat today?"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CHAIN = Behaviour(
    text=render_workflow(
        Workflow((Step("first", "look at the sky"), Step("second", "conclude from it", (0,)))), WORKERS
    )
)
LOOKS = Behaviour(text="", tool_calls=(ToolCall("call_1", "weather", "{}"),))


@pytest.fixture
def client(with_haproxy: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{with_haproxy.url}/v1", api_key=KEY, timeout=30, max_retries=0) as client:
        yield client


def test_a_workflow_from_plan_to_answer(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    assert "fugu-ultra" in [model.id for model in client.models.list()]
    provider.enqueue(CHAIN, Behaviour(text="clouds"), Behaviour(text="yes, a coat"))
    answer = client.chat.completions.create(model="fugu-ultra", messages=QUESTION, extra_body={"fugu": {"trace": True}})
    assert answer.choices[0].message.content == "yes, a coat"
    trace = (answer.model_extra or {})["fugu"]
    assert [step["worker"] for step in trace["rounds"][0]["steps"]] == ["first", "second"]
    assert trace["source"] == "head", "the router ranks those who step in"
    plan, look, conclude = provider.requests
    assert [request.body["model"] for request in provider.requests] == ["second", "first", "second"]
    assert "<question>" in plan.body["messages"][-1]["content"]
    assert "look at the sky" in look.body["messages"][-1]["content"]
    assert "clouds" in conclude.body["messages"][-1]["content"]


def test_it_streams(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    provider.enqueue(CHAIN, Behaviour(text="clouds"), Behaviour(text="yes a warm coat", chunk_delay=0.05))
    stream = client.chat.completions.create(model="fugu-ultra", messages=QUESTION, stream=True)
    reasoning, pieces = "", []
    for chunk in stream:
        delta = chunk.choices[0].delta
        reasoning += (delta.model_extra or {}).get("reasoning_content") or ""
        if delta.content:
            pieces.append(delta.content)
    assert reasoning.startswith("[plan] chain, 2 steps")
    assert "".join(pieces) == "yes a warm coat"
    assert len(pieces) > 1


def test_ask_shows_the_plan_and_its_steps(provider: LoopbackProvider, with_haproxy: RunningServer) -> None:
    provider.enqueue(CHAIN, Behaviour(text="clouds"), Behaviour(text="yes, a coat"))
    options = ["--model", "fugu-ultra", "--url", with_haproxy.url, "--trace"]
    said = CliRunner().invoke(fugu.app, ["ask", "Coat today?", *options], env={"FUGU_API_KEY": KEY})
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    assert lines[0] == "yes, a coat"
    assert "round 1: chain" in lines
    assert any(line.startswith("  2. second (reads 1): conclude from it · 0.") for line in lines)


def test_a_tool_loop_outlives_the_actor_that_remembers_it(
    client: openai.OpenAI, provider: LoopbackProvider, with_haproxy: RunningServer
) -> None:
    provider.enqueue(CHAIN, LOOKS)
    asked = client.chat.completions.create(model="fugu-ultra", messages=QUESTION, tools=[TOOL]).choices[0]
    assert asked.finish_reason == "tool_calls"
    assert asked.message.tool_calls is not None
    (call,) = asked.message.tool_calls
    (actor,) = with_haproxy.find("ray::MemoryActor")
    actor.kill()
    wait_until(lambda: not actor.is_running())
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain at noon"}
    messages: Any = [*QUESTION, asked.message.model_dump(exclude_none=True), result]
    # Twice, and more often than there are gateways: whichever one gets it knows.
    for _ in range(4):
        provider.clear()
        provider.enqueue(Behaviour(text="it rains"), Behaviour(text="yes, a coat"))
        answer = client.chat.completions.create(model="fugu-ultra", messages=messages, tools=[TOOL])
        assert answer.choices[0].message.content == "yes, a coat"
        look, conclude = provider.requests
        assert [message["role"] for message in look.body["messages"]][-2:] == ["assistant", "tool"]
        assert look.body["messages"][-1]["content"] == "rain at noon"
        assert "it rains" in conclude.body["messages"][-1]["content"]
        assert not any(message["role"] == "tool" for message in conclude.body["messages"])
    unknown = call.id.replace(call.id[3:19], "a" * 16)
    messages[1]["tool_calls"][0]["id"] = result["tool_call_id"] = unknown
    with pytest.raises(openai.NotFoundError, match="add a user message"):
        client.chat.completions.create(model="fugu-ultra", messages=messages, tools=[TOOL])


def test_responses(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
    provider.enqueue(CHAIN, LOOKS)
    asked = client.responses.create(model="fugu-ultra", input="Coat today?", tools=[tool])
    (call,) = [item for item in asked.output if item.type == "function_call"]
    provider.enqueue(Behaviour(text="it rains"), Behaviour(text="yes, a coat"))
    answer = client.responses.create(
        model="fugu-ultra",
        previous_response_id=asked.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain at noon"}],
        tools=[tool],
    )
    assert answer.output_text == "yes, a coat"


def test_messages(with_haproxy: RunningServer, provider: LoopbackProvider) -> None:
    client = anthropic.Anthropic(base_url=with_haproxy.url, api_key=KEY, timeout=30, max_retries=0)
    tool: Any = {"name": "weather", "input_schema": {"type": "object"}}
    provider.enqueue(CHAIN, LOOKS)
    asked = client.messages.create(model="fugu-ultra", max_tokens=99, messages=QUESTION, tools=[tool])
    assert asked.stop_reason == "tool_use"
    (call,) = [block for block in asked.content if block.type == "tool_use"]
    provider.enqueue(Behaviour(text="it rains"), Behaviour(text="yes, a coat"))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain at noon"}
    messages: Any = [
        *QUESTION,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in asked.content]},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(model="fugu-ultra", max_tokens=99, messages=messages, tools=[tool])
    assert [block.text for block in answer.content if block.type == "text"] == ["yes, a coat"]
