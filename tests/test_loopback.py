"""The loopback provider itself: a vendor's own client must not tell it from the real thing."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import openai
import pytest

from tests.loopback import Behaviour, LoopbackProvider, ToolCall, Usage

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider(api_key="sk-right") as made:
        yield made


@pytest.fixture
def client(provider: LoopbackProvider) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=provider.url_for("openai"), api_key="sk-right", max_retries=0) as made:
        yield made


def test_the_official_client_plain(provider: LoopbackProvider, client: openai.OpenAI) -> None:
    provider.default = Behaviour(tool_calls=(ToolCall("c", "f", '{"a":1}'),), usage=Usage(9, 4, 3, 2))
    reply = client.chat.completions.create(**ASK)  # type: ignore[call-overload]
    assert reply.choices[0].message.content == Behaviour.text
    assert reply.choices[0].message.tool_calls[0].function.arguments == '{"a":1}'
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    assert provider.requests[0].body["messages"] == ASK["messages"]


def test_the_official_client_streaming(provider: LoopbackProvider, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        **ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == Behaviour.text
    assert chunks[-1].usage.completion_tokens == 5


def test_errors_and_keys(provider: LoopbackProvider, client: openai.OpenAI) -> None:
    provider.enqueue(Behaviour(status=429, headers={"retry-after": "2"}))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**ASK)  # type: ignore[call-overload]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").chat.completions.create(**ASK)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="messages is required"):
        client.chat.completions.create(model="m", messages=[])


def test_it_notices_clients_that_leave(provider: LoopbackProvider, client: openai.OpenAI) -> None:
    provider.by_model["slow"] = Behaviour(text="word " * 200, chunk_delay=0.02)
    stream = client.chat.completions.create(**{**ASK, "model": "slow"}, stream=True)  # type: ignore[call-overload]
    next(iter(stream))
    stream.close()
    assert provider.wait_for(lambda: len(provider.disconnects) == 1)
    assert provider.disconnects[0].request.model == "slow"
    assert provider.in_flight == 0


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "tests.loopback", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as response:
            assert response.status == 200
        process.terminate()


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_client_of_responses(provider: LoopbackProvider, client: openai.OpenAI, stream: bool) -> None:
    call = ToolCall("c", "f", '{"a":1}')
    provider.default = Behaviour(reasoning="hm", tool_calls=(call,), usage=Usage(9, 4, 3, 2, 1))
    if stream:
        with client.responses.stream(model="m", input="hi") as told:
            reply = told.get_final_response()
    else:
        reply = client.responses.create(model="m", input="hi")
    assert [item.type for item in reply.output] == ["reasoning", "message", "function_call"]
    assert reply.output_text == Behaviour.text
    assert reply.output[2].arguments == '{"a":1}'  # type: ignore[union-attr]
    assert reply.usage is not None
    assert reply.usage.input_tokens_details.cache_write_tokens == 1
