"""The Gemini dialect: the exact request, by generation of the model, and its counts."""

from __future__ import annotations

from typing import Any

import pytest

from actors.adapters.base import Adapter, CallContext
from actors.adapters.gemini import generation, request_body
from actors.config import WorkerSpec
from actors.errors import ProtocolError, RateLimitedError, WorkerAuthError
from actors.messages import ChatRequest, ImagePart, Message, ResponseFormat, TextPart, ToolCall, ToolChoice, ToolSpec
from tests.actors.dialects import KEY, PIXEL, RICH, SCHEMA, SIMPLE, adapter_for, drain
from tests.loopback import Behaviour, LoopbackProvider

DIALECT = "gemini"


def spec(model: str = "gemini-3-flash", **changes: Any) -> WorkerSpec:
    return WorkerSpec.model_validate({"name": "w", "provider": "gemini", "model": model, **changes})


RICH_BODY = {
    "systemInstruction": {"parts": [{"text": "Be brief.\n\nAnswer in French."}]},
    "contents": [
        {
            "role": "user",
            "parts": [
                {"text": "What is in these?"},
                {"inlineData": {"mimeType": "image/png", "data": PIXEL}},
                {"fileData": {"mimeType": "image/jpeg", "fileUri": "https://example.com/a.jpg"}},
                {"text": "And the weather?"},
            ],
        },
        {
            "role": "model",
            "parts": [
                {"text": "Let me look."},
                {
                    "functionCall": {"name": "weather", "args": {"city": "Paris"}},
                    "thoughtSignature": "skip_thought_signature_validator",
                },
                {"functionCall": {"name": "weather", "args": {"city": "Rome"}}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "weather", "response": {"celsius": 21}}},
                {"functionResponse": {"name": "weather", "response": {"result": "sunny"}}},
                {"text": "So?"},
            ],
        },
    ],
    "tools": [
        {
            "functionDeclarations": [
                {"name": "weather", "description": "Current weather", "parametersJsonSchema": SCHEMA}
            ]
        }
    ],
    "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["weather"]}},
    "generationConfig": {
        "temperature": 0.5,
        "topP": 0.9,
        "topK": 5,
        "maxOutputTokens": 500,
        "seed": 7,
        "stopSequences": ["END"],
        "responseMimeType": "application/json",
        "responseJsonSchema": SCHEMA,
        "thinkingConfig": {"thinkingLevel": "medium", "includeThoughts": True},
    },
}


def test_the_request_with_everything() -> None:
    body, dropped = request_body(spec(), RICH)
    assert body == RICH_BODY
    assert dropped == ["tools.strict", "user", "logit_bias", "fugu_unknown"]


def test_generations() -> None:
    assert generation("gemini-2.5-flash-lite") == (2, 5)
    assert generation("gemini-3-pro-preview") == (3, 0)
    assert generation("gemini-flash-latest") is None


@pytest.mark.parametrize(
    ("model", "effort", "expected"),
    [
        ("gemini-3-flash", "none", {"thinkingLevel": "minimal"}),
        ("gemini-3-pro-preview", "none", {"thinkingLevel": "low"}),
        ("gemini-flash-latest", "xhigh", {"thinkingLevel": "high", "includeThoughts": True}),
        ("gemini-2.5-flash", "none", {"thinkingBudget": 0}),
        ("gemini-2.5-pro", "none", {"thinkingBudget": 128}),
        ("gemini-2.5-pro", "medium", {"thinkingBudget": 8192, "includeThoughts": True}),
        ("gemini-2.0-flash", "high", None),
        ("gemini-3-flash", "enormous", None),
    ],
)
def test_reasoning_by_generation(model: str, effort: str, expected: Any) -> None:
    body, dropped = request_body(spec(model), SIMPLE.with_(reasoning_effort=effort))
    assert body.get("generationConfig", {}).get("thinkingConfig") == expected
    assert dropped == (["reasoning_effort"] if expected is None else [])


def test_older_models_want_no_signatures() -> None:
    body, _ = request_body(spec("gemini-2.5-flash"), RICH)
    assert "thoughtSignature" not in body["contents"][1]["parts"][1]


def test_nothing_is_sent_that_was_not_given() -> None:
    body, dropped = request_body(spec(), SIMPLE)
    assert body == {"contents": [{"role": "user", "parts": [{"text": "Hello?"}]}]}
    assert dropped == []


def test_the_rest_of_the_vocabulary() -> None:
    request = ChatRequest(
        messages=(
            Message("system", "Say hi."),
            Message("user", (ImagePart("https://example.com/picture"), TextPart(""))),
            Message("assistant", tool_calls=(ToolCall("c", "f", ""),)),
            Message("tool", (TextPart("[1]"), ImagePart("data:image/png;base64,AA==")), tool_call_id="c"),
        ),
        tools=(ToolSpec("f"),),
        tool_choice=ToolChoice("required"),
        response_format=ResponseFormat("json_object"),
        extra={"safetySettings": [], "presence_penalty": 0.5, "labels": {}, "contents": []},
    )
    failed = (*request.messages[:-1], Message("tool", "no", tool_call_id="c", failed=True))
    told = request_body(spec(), request.with_(messages=failed))[0]["contents"][-1]["parts"]
    assert told == [{"functionResponse": {"name": "f", "response": {"error": "no"}}}]
    body, dropped = request_body(spec(accepts=["labels", "contents"]), request)
    user, model, result = body["contents"]
    assert user["parts"] == [{"fileData": {"fileUri": "https://example.com/picture"}}]
    assert model["parts"][0]["functionCall"] == {"name": "f", "args": {}}
    assert result["parts"][0]["functionResponse"] == {"name": "f", "response": {"result": [1]}}
    assert result["parts"][1] == {"inlineData": {"mimeType": "image/png", "data": "AA=="}}
    assert body["tools"] == [{"functionDeclarations": [{"name": "f", "description": "f"}]}]
    assert body["toolConfig"] == {"functionCallingConfig": {"mode": "ANY"}}
    assert body["generationConfig"] == {"responseMimeType": "application/json", "presencePenalty": 0.5}
    assert (body["safetySettings"], body["labels"]) == ([], {})
    assert dropped == ["contents"]


async def test_what_arrives(provider: LoopbackProvider, adapter: Adapter) -> None:
    await adapter.complete(SIMPLE, CallContext())
    await drain(adapter)
    plain, streamed = provider.requests
    assert plain.path == "/v1beta/models/gemini-3-flash:generateContent"
    assert (streamed.path, streamed.query) == (
        "/v1beta/models/gemini-3-flash:streamGenerateContent",
        "alt=sse",
    )
    assert plain.headers["x-goog-api-key"] == KEY
    assert KEY not in plain.query
    assert streamed.body == plain.body


async def test_a_tuned_model(provider: LoopbackProvider) -> None:
    adapter = adapter_for(provider, "gemini", model="publishers/x/models/m-1")
    await adapter.complete(SIMPLE, CallContext())
    assert provider.requests[-1].path == "/v1beta/publishers/x/models/m-1:generateContent"
    await adapter.close()


async def test_blocked_prompts(provider: LoopbackProvider, adapter: Adapter) -> None:
    provider.default = Behaviour(refusal="not this")
    for reply in (await adapter.complete(SIMPLE, CallContext()), (await drain(adapter))[1]):
        assert reply.text == ""
        assert reply.finish_reason == "content_filter"
        assert reply.usage.input_tokens > 0


async def test_tool_call_ids_are_the_same_every_time(provider: LoopbackProvider, adapter: Adapter) -> None:
    calls = tuple(ToolCall("", "f", arguments) for arguments in ('{"a":1}', '{"a":1}', '{"a":2}'))
    provider.default = Behaviour(tool_calls=calls, text="")
    first, again = await adapter.complete(SIMPLE, CallContext()), (await drain(adapter))[1]
    assert first.tool_calls == again.tool_calls
    assert len({call.id for call in first.tool_calls}) == 3


async def test_a_malformed_function_call(provider: LoopbackProvider, adapter: Adapter) -> None:
    provider.default = Behaviour(text="", finish="MALFORMED_FUNCTION_CALL")
    with pytest.raises(ProtocolError, match="MALFORMED_FUNCTION_CALL"):
        await adapter.complete(SIMPLE, CallContext())
    with pytest.raises(ProtocolError, match="MALFORMED_FUNCTION_CALL"):
        await drain(adapter)


async def test_retry_info(provider: LoopbackProvider, adapter: Adapter) -> None:
    provider.default = Behaviour(status=429, retry_info="7.5s")
    with pytest.raises(RateLimitedError) as caught:
        await adapter.complete(SIMPLE, CallContext())
    assert caught.value.retry_after == 7.5


async def test_a_bad_key_comes_as_400(provider: LoopbackProvider, adapter: Adapter) -> None:
    body = (
        b'{"error":{"code":400,"message":"API key not valid.","status":"INVALID_ARGUMENT","details":'
        b'[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"API_KEY_INVALID"}]}}'
    )
    provider.default = Behaviour(status=400, body=body)
    with pytest.raises(WorkerAuthError, match="API key not valid"):
        await adapter.complete(SIMPLE, CallContext())


async def test_one_call_at_a_time(provider: LoopbackProvider, adapter: Adapter) -> None:
    """The API cannot be told, so that only the first of several calls is handed on."""
    several = tuple(ToolCall(f"c{number}", "f", '{"a":1}') for number in range(2))
    provider.default = Behaviour(text="", tool_calls=several)
    request = SIMPLE.with_(tools=(ToolSpec("f"),), parallel_tool_calls=False)
    for asked, count in ((request, 1), (request.with_(parallel_tool_calls=None), 2)):
        whole = await adapter.complete(asked, CallContext())
        _, streamed = await drain(adapter, asked)
        assert len(whole.tool_calls) == len(streamed.tool_calls) == count
