"""OpenAI chat completions, and every server that is compatible with them.

Source: the API reference of OpenAI, "Chat completions", and for compatible servers (vLLM, DeepSeek, OpenRouter,
Mistral and others) the deviations named where they are handled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import orjson

from actors.adapters.assemble import TOOL_FAILED, Assembler, count, given, tool_call_id
from actors.adapters.remote import RemoteAdapter, bearer
from actors.adapters.upstream import Upstream
from actors.config import WorkerSpec
from actors.messages import (
    ChatRequest,
    FinishReason,
    ImagePart,
    Message,
    RefusalPart,
    TextPart,
    Usage,
)
from actors.structured import official, strict

PATH = "/chat/completions"

# OpenAI's own optional fields whose effect our replies can carry. Left out: `n`, `logprobs`, `top_logprobs`,
# `audio`, `modalities` (no place in a reply), `functions` and `function_call` (replaced by tools).
ACCEPTED = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "metadata",
        "moderation",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
        "web_search_options",
    }
)
# Ours to decide, whatever a caller or `accepts` says.
_OURS = frozenset({"model", "messages", "stream", "stream_options", "n"})

_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_SMALLEST = 1e-6
_SHOWN = "The images that the tools returned:"

_FINISH: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


class OpenAIAdapter(RemoteAdapter):
    """Over `PATH`, streamed or not."""

    def __init__(self, spec: WorkerSpec, transport: httpx.AsyncBaseTransport) -> None:
        super().__init__(
            spec, transport, bearer(spec), path=PATH, body=request_body, reader=_Reader, streamed=_STREAMED
        )


def request_body(spec: WorkerSpec, request: ChatRequest) -> tuple[dict[str, Any], list[str]]:
    """The body of a plain call, and the names of fields that were dropped."""
    body: dict[str, Any] = {"model": spec.model, "messages": _messages(spec, request)}
    body |= given(
        temperature=request.temperature,
        top_p=top_p(spec, request),
        seed=request.seed,
        stop=list(request.stop) or None,
        reasoning_effort=request.reasoning_effort,
    )
    if request.max_tokens is not None:
        body[spec.max_tokens_field] = request.max_tokens
    if request.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": given(
                    name=tool.name,
                    description=tool.description or None,
                    parameters=dict(tool.parameters) or None,
                    strict=strict(spec, tool.strict, tool.parameters),
                ),
            }
            for tool in request.tools
        ]
        body |= given(parallel_tool_calls=request.parallel_tool_calls)
    if request.tool_choice is not None:
        choice = request.tool_choice
        named = {"type": "function", "function": {"name": choice.name}}
        body["tool_choice"] = named if choice.mode == "named" else choice.mode
    wanted = request.response_format
    if wanted is not None and wanted.kind == "json_schema":
        schema = given(name=wanted.name, schema=wanted.schema, strict=strict(spec, wanted.strict, wanted.schema))
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif wanted is not None:
        body["response_format"] = {"type": wanted.kind}
    accepted = (ACCEPTED | set(spec.accepts)) - _OURS
    dropped = [name for name in request.extra if name not in accepted]
    if any(tool.strict and not strict(spec, True, tool.parameters) for tool in request.tools):
        dropped.append("tools.strict")
    body |= {name: value for name, value in request.extra.items() if name in accepted and name not in body}
    return body, dropped


def top_p(spec: WorkerSpec, request: ChatRequest) -> float | None:
    """vLLM takes no 0, which says the same as a very small number."""
    return _SMALLEST if request.top_p == 0 and not official(spec) else request.top_p


def _messages(spec: WorkerSpec, request: ChatRequest) -> list[dict[str, Any]]:
    # Compatible servers feed a conversation to a chat template, and few templates know `developer` or refusals.
    knows_all = official(spec)
    messages: list[dict[str, Any]] = []
    shown: list[ImagePart] = []
    for message in request.messages:
        if message.role != "tool" and shown:
            messages.append(_images(shown))
            shown = []
        role = "system" if message.role == "developer" and not knows_all else message.role
        item: dict[str, Any] = {"role": role, "content": _content(message, refusals=knows_all)}
        if message.role == "tool":
            item["content"] = _result(message)
            shown += message.images
        item |= given(name=message.name, tool_call_id=message.tool_call_id)
        if message.tool_calls:
            item["content"] = item["content"] or None
            item["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.tool_calls
            ]
        messages.append(item)
    if shown:
        messages.append(_images(shown))
    return messages


def _images(images: Sequence[ImagePart]) -> dict[str, Any]:
    """What tools showed, as the user's: a `tool` message takes text only, and must follow the one that called it."""
    parts = tuple(images)
    return {"role": "user", "content": _content(Message("user", (TextPart(_SHOWN), *parts)), refusals=False)}


def _result(message: Message) -> str | list[dict[str, Any]]:
    """What a tool said. That it failed has no field here, and is said in words."""
    if message.images or message.failed:
        return "\n".join(filter(None, (TOOL_FAILED if message.failed else "", message.text)))
    return _content(message, refusals=False)


def _content(message: Message, *, refusals: bool) -> str | list[dict[str, Any]]:
    if isinstance(message.content, str):
        return message.content
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, ImagePart):
            detail = None if part.detail == "auto" else part.detail
            parts.append({"type": "image_url", "image_url": given(url=part.url, detail=detail)})
        elif refusals and isinstance(part, RefusalPart):
            parts.append({"type": "refusal", "refusal": part.text})
        else:
            parts.append({"type": "text", "text": part.text})
    return parts


class _Reader:
    """Reads replies and chunks; both have the same fields, under `message` or under `delta`."""

    def __init__(self, upstream: Upstream, request: ChatRequest) -> None:
        self.answer = Assembler()
        self.done = False
        self._upstream = upstream
        self._request = request
        self._places: dict[int, int] = {}

    @property
    def complete(self) -> bool:
        return self.done

    def read(self, data: str) -> None:
        if data.strip() == "[DONE]":
            self.done = True
            return
        chunk = self._upstream.event_object(data)
        self.answer.named(chunk.get("model"))
        for choice in chunk.get("choices") or ():
            self._choice(choice, choice.get("delta") or {})
        self._usage(chunk.get("usage"))

    def take_whole(self, reply: dict[str, Any]) -> None:
        if not reply.get("choices"):
            raise self._upstream.malformed("it has no choices")
        choice = reply["choices"][0]
        self.answer.named(reply.get("model"))
        self._choice(choice, choice["message"])
        self._usage(reply.get("usage"))

    def _choice(self, choice: dict[str, Any], said: dict[str, Any]) -> None:
        answer = self.answer
        content = said.get("content")
        if isinstance(content, str):
            answer.add_text(content)
        elif isinstance(content, list):
            self._parts(content)
        # vLLM, DeepSeek and OpenRouter; servers in transition send both with the same text.
        reasoning = said.get("reasoning_content") or said.get("reasoning")
        if isinstance(reasoning, str):
            answer.add_reasoning(reasoning)
        for place, call in enumerate(said.get("tool_calls") or ()):
            self._tool_call(place, call)
        if refusal := said.get("refusal"):
            answer.add_refusal(refusal)
        finish = choice.get("finish_reason")
        if finish:
            answer.finish = _FINISH.get(finish, "stop")
        # vLLM's own field; a number there is a token.
        answer.stopped(choice.get("stop_reason"))

    def _parts(self, content: list[Any]) -> None:
        """Mistral's reasoning models answer in parts."""
        for part in content:
            if isinstance(part, dict) and part.get("type") == "text":
                self.answer.add_text(part.get("text") or "")
            elif isinstance(part, dict) and part.get("type") == "thinking":
                for thought in part.get("thinking") or ():
                    self.answer.add_reasoning(thought.get("text") or "")

    def _tool_call(self, place: int, call: dict[str, Any]) -> None:
        function = call.get("function") or {}
        name, arguments = function.get("name"), function.get("arguments") or ""
        if not isinstance(arguments, str):
            arguments = orjson.dumps(arguments).decode()
        # Some servers leave out the index of a streamed call; a name then begins the next one.
        index = call.get("index")
        if index is None:
            index = len(self._places) if name else max(self._places, default=place)
        if index in self._places:
            self.answer.add_arguments(self._places[index], arguments)
        elif name:
            number = len(self.answer.tools)
            id = call.get("id") or tool_call_id(self._request, number, name)
            self._places[index] = self.answer.open_tool(id, name, arguments)
        else:
            raise self._upstream.malformed("a tool call has no name")

    def _usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        prompt, completion = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details") or {}
        cached, kept = count(details.get("cached_tokens")), count(details.get("cache_write_tokens"))
        # DeepSeek's name for the same.
        cached = cached or count(usage.get("prompt_cache_hit_tokens"))
        reasoning = count((usage.get("completion_tokens_details") or {}).get("reasoning_tokens"))
        # xAI counts reasoning beside the completion, not in it; the total tells which.
        if reasoning and count(usage.get("total_tokens")) == prompt + completion + reasoning:
            completion += reasoning
        self.answer.usage = Usage(prompt, completion, cached, reasoning, kept)
