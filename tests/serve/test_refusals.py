"""A model that will not answer: what it says instead is told as that, whoever it is and whatever its caller speaks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2  # the SDK's own
import openai
import pytest
from pydantic import BaseModel

from actors.adapters.anthropic import AnthropicAdapter
from actors.adapters.openai import OpenAIAdapter
from actors.config import FuguConfig
from actors.transport import make_transport
from actors.worker import WorkerRuntime
from serve.api.health import Readiness
from serve.gateway import Gateway
from serve.router import OrderDecider
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.linked import Direct

WHY = "I cannot help with that."
ASKED: Any = [{"role": "user", "content": "how?"}]
MODELS = {"openai": "gpt-5.5", "anthropic": "claude-opus-4-8"}


@pytest.fixture(scope="module")
def shared() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as provider:
        yield provider


@pytest.fixture
def provider(shared: LoopbackProvider) -> LoopbackProvider:
    shared.clear()
    shared.default = Behaviour(text="", refusal=WHY, pieces=3)
    return shared


@pytest.fixture(params=["openai", "anthropic"])
async def app(
    request: pytest.FixtureRequest, provider: LoopbackProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    """A gateway whose worker speaks the dialect."""
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    dialect = request.param
    worker = {"name": "w", "provider": dialect, "model": MODELS[dialect], "base_url": provider.url_for(dialect)}
    config = FuguConfig.model_validate({"workers": [worker]})
    spec = config.active[0]
    adapter = {"openai": OpenAIAdapter, "anthropic": AnthropicAdapter}[dialect](spec, make_transport(spec))
    yield Gateway(config, [Direct(WorkerRuntime(spec, adapter))], OrderDecider(["w"]), Readiness({}))
    await adapter.close()


def client_of(app: Any) -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
    return openai.AsyncOpenAI(base_url="http://fugu/v1", api_key="x", http_client=http, max_retries=0)


class Place(BaseModel):
    city: str


async def test_chat(app: Any, provider: LoopbackProvider) -> None:
    client = client_of(app)
    (choice,) = (await client.chat.completions.create(model="fugu", messages=ASKED)).choices
    assert (choice.message.content, choice.message.refusal, choice.finish_reason) == (None, WHY, "stop")
    async with client.chat.completions.stream(model="fugu", messages=ASKED) as stream:
        kinds = [event.type async for event in stream if event.type != "chunk"]
        (streamed,) = (await stream.get_final_completion()).choices
    assert (streamed.message.refusal, streamed.finish_reason) == (WHY, "stop")
    assert kinds[-1] == "refusal.done"
    assert set(kinds) - {"content.delta"} == {"refusal.delta", "refusal.done"}
    asked = len(provider.requests)
    parsed = await client.chat.completions.parse(model="fugu", messages=ASKED, response_format=Place)
    assert (parsed.choices[0].message.parsed, parsed.choices[0].message.refusal) == (None, WHY)
    assert len(provider.requests) == asked + 1, "a refusal is nobody's JSON, and is not repaired"
    # It goes back as the assistant's, in either form.
    for said in ({"refusal": WHY}, {"content": [{"type": "refusal", "refusal": WHY}]}):
        again: Any = [*ASKED, {"role": "assistant", **said}, {"role": "user", "content": "why?"}]
        await client.chat.completions.create(model="fugu", messages=again)
        sent = provider.requests[-1].body["messages"][1]
        assert sent == {"role": "assistant", "content": [{"type": "text", "text": WHY}]}
    wrong: Any = [{"role": "user", "content": [{"type": "refusal", "refusal": WHY}]}]
    with pytest.raises(openai.BadRequestError, match="only an assistant"):
        await client.chat.completions.create(model="fugu", messages=wrong)


async def test_responses(app: Any, provider: LoopbackProvider) -> None:
    client = client_of(app)
    whole = await client.responses.create(model="fugu", input="how?")
    assert whole.status == "completed"
    assert [part.to_dict() for part in whole.output[0].content] == [{"type": "refusal", "refusal": WHY}]  # type: ignore[union-attr]
    assert whole.output_text == ""
    async with client.responses.stream(model="fugu", input="how?") as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    said = kinds.count("response.refusal.delta")
    assert said >= 1
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.refusal.delta"] * said,
        "response.refusal.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.output[0].content[0].refusal == WHY  # type: ignore[union-attr]
    await client.responses.create(model="fugu", input="why?", previous_response_id=whole.id)
    roles = [(message["role"], message["content"]) for message in provider.requests[-1].body["messages"]]
    assert roles[1] == ("assistant", [{"type": "text", "text": WHY}])


async def test_messages(app: Any) -> None:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
    client = anthropic.AsyncAnthropic(base_url="http://fugu", api_key="x", http_client=http, max_retries=0)
    whole = await client.messages.create(model="fugu", messages=ASKED, max_tokens=9)
    async with client.messages.stream(model="fugu", messages=ASKED, max_tokens=9) as stream:
        kinds = [event.type async for event in stream]
        streamed = await stream.get_final_message()
    assert kinds == ["message_start", "message_delta", "message_stop"]
    for message in (whole, streamed):
        assert (message.content, message.stop_reason) == ([], "refusal")
        assert message.stop_details is not None
        assert (message.stop_details.type, message.stop_details.explanation) == ("refusal", WHY)
