"""Responses, Messages and keys on the running server: two gateways behind HAProxy, and one without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from actors.messages import ToolCall
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.conftest import KEY
from tests.serve.running import REPOSITORY, RunningServer, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

LOOK: Any = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def test_a_conversation_by_id_across_gateways(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="", tool_calls=(ToolCall("call_1", "look", "{}"),))
    answer = client.responses.create(model="fugu", input="look!", tools=[LOOK])
    asked = provider.requests[-1].model
    for turn in range(6):
        call = answer.output[-1]
        assert call.type == "function_call"
        if turn == 5:
            provider.default = Behaviour(text="blue")
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": f"turn {turn}"}
        answer = client.responses.create(model="fugu", previous_response_id=answer.id, input=[result], tools=[LOOK])
        assert provider.requests[-1].model == asked, "whichever gateway took it"
    assert answer.output_text == "blue"
    said = [message["content"] for message in provider.requests[-1].body["messages"] if message["role"] == "tool"]
    assert said == [f"turn {turn}" for turn in range(6)]
    listed = client.responses.input_items.list(answer.id, order="asc", limit=100).data
    assert len(listed) == 1 + 6 * 2
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_events_come_as_they_are_made(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="one two three", chunk_delay=0.05)
    with client.responses.stream(model="fugu", input="?") as stream:
        types = [event.type for event in stream]
        assert stream.get_final_response().output_text == "one two three"
    assert types.count("response.output_text.delta") == 3


def test_cancelled_on_another_gateway(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(never=True)
    made = client.responses.create(model="fugu", input="?", background=True)
    wait_until(lambda: provider.in_flight == 1)
    assert client.responses.cancel(made.id).status == "cancelled"
    wait_until(lambda: provider.in_flight == 0)
    assert client.responses.retrieve(made.id).status == "cancelled"


def test_anthropics_client(server: RunningServer, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="forty two", chunk_delay=0.02)
    client = anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=30)
    messages: Any = [{"role": "user", "content": "6 * 7?"}]
    with client.messages.stream(model="fugu", max_tokens=50, messages=messages) as stream:
        assert stream.get_final_text() == "forty two"
    assert client.messages.count_tokens(model="fugu", messages=messages).input_tokens > 0
    stranger = anthropic.Anthropic(base_url=server.url, api_key="nobodys-key", max_retries=0, timeout=30)
    with pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model="fugu", max_tokens=50, messages=messages)


def test_keys_come_and_go_while_it_runs(server: RunningServer, provider: LoopbackProvider) -> None:
    environment = {**os.environ, "FUGU_STATE": str(server.folder / "state"), "COLUMNS": "200"}

    def fugu(*command: str) -> str:
        run = [sys.executable, str(REPOSITORY / "fugu.py"), "keys", *command]
        return subprocess.run(run, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

    secret = fugu("create", "test", "--worker", "second", "--rpm", "2").strip().splitlines()[-1]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0, timeout=30)

    def accepted() -> bool:
        try:
            client.models.list()
        except openai.AuthenticationError:
            return False
        return True

    wait_until(accepted)
    for _ in range(2):
        client.responses.create(model="fugu", input="?")
        assert provider.requests[-1].model == "second"
    with pytest.raises(openai.RateLimitError):
        client.responses.create(model="fugu", input="?")
    id = next(line for line in fugu("list").splitlines() if "second" in line).split()[1]
    fugu("revoke", id)
    wait_until(lambda: not accepted())
