"""What the wire tests share: workers of each dialect on a loopback provider, and one conversation with everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.adapters.base import Adapter, CallContext
from actors.adapters.build import adapter_of
from actors.config import WorkerSpec
from actors.messages import (
    ChatReply,
    ChatRequest,
    Chunk,
    ImagePart,
    Message,
    ResponseFormat,
    TextPart,
    ToolCall,
    ToolChoice,
    ToolSpec,
)
from tests.loopback import LoopbackProvider
from tests.loopback_dialects import Dialect

DIALECTS: tuple[Dialect, ...] = ("openai", "responses", "anthropic", "gemini")
MODELS: Mapping[str, str] = {
    "openai": "gpt-5.5",
    "responses": "gpt-5.5-pro",
    "anthropic": "claude-sonnet-4-6",
    "gemini": "gemini-3-flash",
}
KEY = "sk-loopback-secret-0123456789"

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
PIXEL = "iVBORw0KGgo="

RICH = ChatRequest(
    messages=(
        Message("system", "Be brief."),
        Message("developer", "Answer in French."),
        Message(
            "user",
            (
                TextPart("What is in these?"),
                ImagePart(f"data:image/png;base64,{PIXEL}", "high"),
                ImagePart("https://example.com/a.jpg"),
            ),
        ),
        Message("user", "And the weather?"),
        Message(
            "assistant",
            "Let me look.",
            tool_calls=(
                ToolCall("call_1", "weather", '{"city": "Paris"}'),
                ToolCall("call_2", "weather", '{"city": "Rome"}'),
            ),
        ),
        Message("tool", '{"celsius": 21}', tool_call_id="call_1"),
        Message("tool", "sunny", tool_call_id="call_2"),
        Message("user", "So?"),
    ),
    tools=(ToolSpec("weather", "Current weather", SCHEMA, strict=True),),
    tool_choice=ToolChoice("named", "weather"),
    parallel_tool_calls=False,
    max_tokens=500,
    temperature=0.5,
    top_p=0.9,
    stop=("END",),
    seed=7,
    response_format=ResponseFormat("json_schema", "place", SCHEMA, strict=True),
    reasoning_effort="medium",
    extra={"user": "u1", "top_k": 5, "logit_bias": {"1": 2}, "fugu_unknown": 1},
)
SIMPLE = ChatRequest(messages=(Message("user", "Hello?"),))


def spec_for(provider: LoopbackProvider, dialect: Dialect, **changes: Any) -> WorkerSpec:
    fields: dict[str, Any] = {
        "name": f"w-{dialect}",
        **({"provider": "openai", "api": "responses"} if dialect == "responses" else {"provider": dialect}),
        "model": MODELS[dialect],
        "base_url": provider.url_for(dialect),
        "api_key": KEY,
        "timeout": {"connect": 2, "first_byte": 5, "idle": 5, "total": 20},
    }
    return WorkerSpec.model_validate({**fields, **changes})


def adapter_for(provider: LoopbackProvider, dialect: Dialect, **changes: Any) -> Adapter:
    return adapter_of(spec_for(provider, dialect, **changes))


@dataclass
class Told:
    """What a call told its context."""

    sent: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)

    @property
    def context(self) -> CallContext:
        def on_sent() -> None:
            self.sent += 1

        return CallContext(on_sent, self.headers.append)


async def drain(adapter: Adapter, request: ChatRequest = SIMPLE) -> tuple[list[Chunk], ChatReply]:
    """Every chunk before the last, and the reply the last one carries."""
    chunks = [chunk async for chunk in adapter.stream(request, CallContext())]
    final = chunks.pop().final
    assert final is not None
    assert all(chunk.final is None for chunk in chunks)
    return chunks, final
