"""`POST /v1/responses/compact`, by OpenAI's SDK. Real adapters on a loopback provider. No Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from actors.config import FuguConfig
from tests.loopback import Behaviour, LoopbackProvider, ToolCall, Usage
from tests.serve.linked import serving

LOOK: Any = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
KINDS = ("openai", "anthropic")


@pytest.fixture(params=KINDS)
async def asked(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[openai.AsyncOpenAI, LoopbackProvider]]:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    with LoopbackProvider(Behaviour(text="noted", usage=Usage(90, 7))) as provider:
        worker = {"name": "a", "provider": request.param, "model": "m", "base_url": provider.url_for(request.param)}
        async with serving(tmp_path, FuguConfig.model_validate({"workers": [worker]})) as served:
            http = httpx.AsyncClient(transport=httpx.ASGITransport(app=served.app))  # type: ignore[arg-type]
            yield openai.AsyncOpenAI(base_url="http://fugu/v1", api_key="x", http_client=http, max_retries=0), provider


async def test_a_long_conversation_goes_on_from_its_summary(
    asked: tuple[openai.AsyncOpenAI, LoopbackProvider],
) -> None:
    gpt, provider = asked
    provider.enqueue(Behaviour(text="", tool_calls=(ToolCall("c1", "look", "{}"),)))
    first = await gpt.responses.create(model="fugu", input="What is behind the door?", tools=[LOOK])
    call: Any = first.output[0]
    seen: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "a green parrot"}
    second = await gpt.responses.create(model="fugu", previous_response_id=first.id, input=[seen], tools=[LOOK])

    provider.enqueue(Behaviour(text="Behind the door is a green parrot.", usage=Usage(120, 9)))
    short = await gpt.responses.compact(model="fugu", previous_response_id=second.id, input="Thank you.")
    assert short.object == "response.compaction"
    assert (short.usage.input_tokens, short.usage.output_tokens) == (120, 9)
    told: Any = short.output
    assert [(item.type, getattr(item, "role", None)) for item in told] == [
        ("message", "user"),
        ("message", "user"),
        ("compaction", None),
    ]
    assert [item.content[0].text for item in told[:2]] == ["What is behind the door?", "Thank you."]
    sent = provider.requests[-1].raw
    assert b"a green parrot" in sent, "what is to be summarised"
    assert b"Summarise this conversation" in sent

    items = [item.model_dump(exclude_none=True, warnings=False) for item in told]
    answer = await gpt.responses.create(model="fugu", input=[*items, {"role": "user", "content": "Its colour?"}])
    assert answer.output_text == "noted"
    sent = provider.requests[-1].raw
    assert b"Behind the door is a green parrot." in sent
    assert b'"look"' not in sent
    # The summary can be counted, and made shorter again.
    assert (await gpt.responses.input_tokens.count(input=items)).input_tokens > 20  # type: ignore[arg-type]
    again = await gpt.responses.compact(model="fugu", input=items)  # type: ignore[arg-type]
    assert [item.type for item in again.output] == ["message", "message", "compaction"]
    assert b"Behind the door is a green parrot." in provider.requests[-1].raw


async def test_what_is_no_summary_is_an_error(asked: tuple[openai.AsyncOpenAI, LoopbackProvider]) -> None:
    gpt, provider = asked
    provider.enqueue(Behaviour(text="half of i", finish="length"))
    with pytest.raises(openai.APIStatusError, match="not whole") as caught:
        await gpt.responses.compact(model="fugu", input="hello")
    assert caught.value.status_code == 502
    strange: Any = [{"type": "compaction", "encrypted_content": "gAAAAB"}]
    with pytest.raises(openai.BadRequestError, match="another server") as refused:
        await gpt.responses.create(model="fugu", input=strange)
    assert refused.value.param == "input[0]"
    with pytest.raises(openai.NotFoundError):
        await gpt.responses.compact(model="gpt-6", input="hello")
    assert len(provider.requests) == 1


async def test_a_summary_has_no_form(asked: tuple[openai.AsyncOpenAI, LoopbackProvider]) -> None:
    """What asks for the form of a conversation's answers, as a client that sends the same body does."""
    gpt, provider = asked
    text = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}
    more = {"text": text, "fugu": {"trace": True}}
    short = await gpt.responses.compact(model="fugu", input="Hello.", extra_body=more)
    assert short.output[-1].type == "compaction"
    assert len(provider.requests) == 1, "nothing to repair"
    assert b"json_schema" not in provider.requests[0].raw
    assert any("text.format" in each for each in short.model_extra["fugu"]["warnings"])
