"""`fugu-ultra` of the running server: two gateways, a store whose actor is killed, OpenAI's and Anthropic's clients."""

from __future__ import annotations

import json
import shutil
import subprocess
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
from tests.serve.running import REPOSITORY, RunningServer, wait_until

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


def assert_like(found: Any, shown: Any, where: str = "answer") -> None:
    """All that is shown is there, with values of its kind."""
    if isinstance(shown, dict):
        assert not shown.keys() - found.keys(), where
        for key in shown:
            assert_like(found[key], shown[key], f"{where}.{key}")
    elif isinstance(shown, list):
        assert len(found) == len(shown), where
        for index, item in enumerate(shown):
            assert_like(found[index], item, f"{where}[{index}]")
    else:
        kinds = [float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)
                 for value in (found, shown)]  # fmt: skip
        assert kinds[0] is kinds[1], f"{where}: {found!r} is not like {shown!r}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_guides_request_is_answered_as_the_guide_shows(
    provider: LoopbackProvider, with_haproxy: RunningServer
) -> None:
    section = (REPOSITORY / "docs" / "ultra.md").read_text().partition("## From question to trace")[2]
    command, shown = section.split("```sh\n")[1].split("```")[0], section.split("```json\n")[1].split("```")[0]
    command = command.replace("http://127.0.0.1:8000", with_haproxy.url)
    command = command.replace("curl -s", f"curl -sS --fail-with-body -H 'authorization: Bearer {KEY}'")
    provider.enqueue(CHAIN, Behaviour(text="The Nile."), Behaviour(text="4"))
    told = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False)
    assert told.returncode == 0, (told.stdout, told.stderr)
    answer = json.loads(told.stdout)
    assert_like(answer, json.loads(shown))
    assert answer["choices"][0]["message"]["content"] == "4"
    assert answer["choices"][0]["message"]["reasoning_content"].startswith("[plan] chain, 2 steps")
    trace = answer["fugu"]
    (round,) = trace["rounds"]
    assert round["plan"]["topology"] == "chain"
    assert [step["worker"] for step in round["steps"]] == ["first", "second"]
    parts = [part["cost_usd"] for part in (*round["writings"], *round["steps"])]
    assert all(cost > 0 for cost in parts)
    assert trace["cost_usd"] == pytest.approx(sum(parts))


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


def answers(client: openai.OpenAI) -> bool:
    """No connection meets HAProxy's change to its new configuration any more."""
    try:
        return all(client.models.list().data for _ in range(5))
    except openai.OpenAIError:
        return False


def test_a_tool_loop_outlives_the_actor_that_remembers_it(
    client: openai.OpenAI, provider: LoopbackProvider, with_haproxy: RunningServer
) -> None:
    provider.enqueue(CHAIN, LOOKS)
    asked = client.chat.completions.create(model="fugu-ultra", messages=QUESTION, tools=[TOOL]).choices[0]
    assert asked.finish_reason == "tool_calls"
    assert asked.message.tool_calls is not None
    (call,) = asked.message.tool_calls
    # SIGKILL for the actor and for a gateway: neither can say goodbye.
    (actor,) = with_haproxy.find("ray::MemoryActor")
    gateway, _ = with_haproxy.find("ray::ServeReplica:fugu:Gateway")
    for process in (actor, gateway):
        process.kill()
        wait_until(lambda process=process: not process.is_running())
    wait_until(lambda: len(with_haproxy.find("ray::ServeReplica:fugu:Gateway")) == 2, timeout=90)
    wait_until(lambda: answers(client), timeout=30)
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
