"""The span of one worker call, in the words of OpenTelemetry's conventions for generative AI (still in development
there, so all of their names stand here).

With `content` the conversation and the answer are on it, as those conventions write them; else nothing of either is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from actors.config import WorkerSpec
from actors.messages import ChatReply, ChatRequest, Message, ToolCall
from actors.spans import Attributes, Span

# The most characters of a conversation, and of an answer, that a span carries.
CONTENT_CHARACTERS = 32 * 1024
_PROVIDERS = {"gemini": "gcp.gemini"}


def begin_chat(around: Span, spec: WorkerSpec, request: ChatRequest, *, streamed: bool) -> Span:
    """Begin the span of a call to this worker. One that was asked after another under the same span is a fallback."""
    number = around.calls
    around.calls += 1
    chat = around.child(
        f"chat {spec.model}",
        "client",
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _PROVIDERS.get(spec.provider, spec.provider),
            "gen_ai.request.model": spec.model,
            "gen_ai.request.stream": streamed,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.request.top_p": request.top_p,
            "gen_ai.request.seed": request.seed,
            "fugu.worker": spec.name,
            "fugu.fallback": number or None,
            **server(spec),
        },
    )
    if chat.content:
        chat.set({"gen_ai.input.messages": _json(map(_message, request.messages), newest_last=True)})
    return chat


def tell_reply(chat: Span, reply: ChatReply) -> None:
    """Put into a call's span what came of it."""
    usage, timing = reply.usage, reply.timing
    chat.set(
        {
            "gen_ai.response.model": reply.model or None,
            "gen_ai.response.finish_reasons": [reply.finish_reason],
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_input_tokens or None,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens or None,
            "fugu.cost_usd": reply.cost_usd,
            "fugu.limiter.wait_s": round(timing.queued_s, 6),
            "fugu.retries": max(0, reply.attempts - 1),
            "fugu.cached": reply.cached or None,
        }
    )
    if chat.content:
        answer = {"role": "assistant", "parts": _said(reply), "finish_reason": reply.finish_reason}
        chat.set({"gen_ai.output.messages": _json([answer], newest_last=False)})


def server(spec: WorkerSpec) -> Attributes:
    """Where the worker's provider is: host and port, nothing else of its address."""
    if not spec.url:
        return {}
    address = urlsplit(spec.url)
    return {
        "server.address": address.hostname,
        "server.port": address.port or (443 if address.scheme == "https" else 80),
    }


def _message(message: Message) -> dict[str, Any]:
    if message.role == "tool":
        parts = [{"type": "tool_call_response", "id": message.tool_call_id, "response": _cropped(message.text)}]
        return {"role": "tool", "parts": parts}
    parts = [{"type": "text", "content": _cropped(message.text)}] if message.text else []
    # An image's address may be its data, and its data is for nobody to read here.
    parts += [{"type": "uri", "modality": "image", "uri": image.url[:200]} for image in message.images]
    return {"role": message.role, "parts": parts + [_call(call) for call in message.tool_calls]}


def _said(reply: ChatReply) -> list[dict[str, Any]]:
    parts = [{"type": "reasoning", "content": _cropped(reply.reasoning)}] if reply.reasoning else []
    parts += [{"type": "text", "content": _cropped(said)} for said in (reply.text, reply.refusal) if said]
    return parts + [_call(call) for call in reply.tool_calls]


def _call(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_call", "id": call.id, "name": call.name, "arguments": _cropped(call.arguments)}


def _cropped(text: str) -> str:
    return text if len(text) <= CONTENT_CHARACTERS else f"{text[: CONTENT_CHARACTERS - 1]}…"


def _json(messages: Iterable[dict[str, Any]], *, newest_last: bool) -> str:
    """The messages as JSON; of a conversation that is too long the newest."""
    written = [json.dumps(message, ensure_ascii=False) for message in messages]
    size = sum(map(len, written))
    while newest_last and len(written) > 1 and size > CONTENT_CHARACTERS:
        size -= len(written.pop(0))
    return f"[{','.join(written)}]"
