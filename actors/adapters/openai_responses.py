"""OpenAI's Responses API, for workers with `api: responses`.

What it has over chat completions: the reasoning of a model comes back sealed, and goes back to it with the results of
the tools that it asked for, so that a tool loop does not begin to think anew at each turn; and some models have no
other API. Nothing is stored there (`store: false`) unless the caller asks for it.

Source: the API reference of OpenAI, "Responses" (create, streaming events).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx

from actors.adapters.assemble import TOOL_FAILED, Assembler, count, given, parts_of
from actors.adapters.failures import from_status, read_error
from actors.adapters.openai import top_p
from actors.adapters.remote import RemoteAdapter, bearer
from actors.adapters.upstream import Upstream
from actors.config import WorkerSpec
from actors.errors import WorkerError
from actors.messages import (
    ChatRequest,
    FinishReason,
    ImagePart,
    Message,
    TextPart,
    Thought,
    Usage,
)
from actors.structured import official, strict

PATH = "/responses"

# Optional fields whose effect our replies can carry.
ACCEPTED = frozenset(
    {
        "metadata",
        "moderation",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "truncation",
        "user",
    }
)
# Ours to decide, whatever a caller or `accepts` says.
_OURS = frozenset({"model", "input", "instructions", "stream", "stream_options", "background", "previous_response_id"})

_MIN_OUTPUT_TOKENS = 16
"""OpenAI's own servers refuse a lower bound."""

_FINISH: Mapping[str, FinishReason] = {"max_output_tokens": "length", "content_filter": "content_filter"}
_PIECES: Mapping[str, Callable[[Assembler, str], None]] = {
    "response.output_text.delta": Assembler.add_text,
    "response.refusal.delta": Assembler.add_refusal,
    "response.reasoning_text.delta": Assembler.add_reasoning,
    "response.reasoning_summary_text.delta": Assembler.add_reasoning,
}
# What a response that failed says of why. All others are about what was asked.
_STATUS_OF_CODE = {"server_error": 500, "rate_limit_exceeded": 429, "vector_store_timeout": 504}


class OpenAIResponsesAdapter(RemoteAdapter):
    """Over `PATH`, streamed or not."""

    def __init__(self, spec: WorkerSpec, transport: httpx.AsyncBaseTransport) -> None:
        super().__init__(
            spec, transport, bearer(spec), path=PATH, body=request_body, reader=_Reader, streamed={"stream": True}
        )


def request_body(spec: WorkerSpec, request: ChatRequest) -> tuple[dict[str, Any], list[str]]:
    """The body of a plain call, and the names of fields that were dropped."""
    extra = dict(request.extra)
    body: dict[str, Any] = {"model": spec.model, "input": _input(spec, request), "store": False}
    body |= given(temperature=request.temperature, top_p=top_p(spec, request))
    if request.max_tokens is not None:
        least = _MIN_OUTPUT_TOKENS if official(spec) else 1
        body["max_output_tokens"] = max(request.max_tokens, least)
    asked = extra.pop("reasoning", None)
    reasoning = dict(asked) if isinstance(asked, Mapping) else {}
    reasoning |= given(effort=request.reasoning_effort)
    text = given(format=_format(spec, request), verbosity=extra.pop("verbosity", None))
    body |= given(reasoning=reasoning or None, text=text or None)
    if request.tools:
        body["tools"] = [
            given(
                type="function",
                name=tool.name,
                description=tool.description or None,
                parameters={"type": "object", "properties": {}, **tool.parameters},
            )
            # Left out it would mean true.
            | {"strict": bool(strict(spec, tool.strict, tool.parameters))}
            for tool in request.tools
        ]
        body |= given(parallel_tool_calls=request.parallel_tool_calls)
    choice = request.tool_choice
    if choice is not None:
        body["tool_choice"] = {"type": "function", "name": choice.name} if choice.mode == "named" else choice.mode
    accepted = (ACCEPTED | set(spec.accepts)) - _OURS
    dropped = [name for name in extra if name not in accepted]
    if any(tool.strict and not strict(spec, True, tool.parameters) for tool in request.tools):
        dropped.append("tools.strict")
    dropped += [name for name, value in (("stop", request.stop), ("seed", request.seed)) if value not in ((), None)]
    if any(message.name for message in request.messages):
        dropped.append("messages.name")
    body |= {name: value for name, value in extra.items() if name in accepted and (name == "store" or name not in body)}
    return body, dropped


def _format(spec: WorkerSpec, request: ChatRequest) -> dict[str, Any] | None:
    wanted = request.response_format
    if wanted is None:
        return None
    if wanted.kind != "json_schema":
        return {"type": wanted.kind}
    held = strict(spec, wanted.strict, wanted.schema)
    return given(type="json_schema", name=wanted.name, schema=wanted.schema or {}, strict=held)


def _input(spec: WorkerSpec, request: ChatRequest) -> list[dict[str, Any]]:
    # Compatible servers feed a conversation to a chat template, and few templates know `developer`.
    roles = {} if official(spec) else {"developer": "system"}
    items: list[dict[str, Any]] = []
    for message in request.messages:
        if message.role == "tool":
            output = _result(message)
            items.append({"type": "function_call_output", "call_id": message.tool_call_id or "", "output": output})
            continue
        content = _content(message)
        if content or message.tool_calls:
            # One that nothing follows would be refused; so would what this worker signed when it was of another vendor.
            items += [_reasoning(thought) for thought in message.thoughts if ":" in thought.signature]
        if content:
            items.append({"type": "message", "role": roles.get(message.role, message.role), "content": content})
        items += [
            {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
            for call in message.tool_calls
        ]
    return items


def _content(message: Message) -> str | list[dict[str, Any]]:
    """An assistant's is text: in parts it would be an output of the server's own, with its id."""
    if isinstance(message.content, str) or message.role == "assistant":
        return message.text
    parts: list[dict[str, Any]] = []
    for part in parts_of(message):
        if isinstance(part, ImagePart):
            parts.append({"type": "input_image", "image_url": part.url, "detail": part.detail})
        else:
            parts.append({"type": "input_text", "text": part.text})
    return parts


def _result(message: Message) -> str | list[dict[str, Any]]:
    """What a tool said and showed. That it failed has no field here, and is said in words."""
    failed = TOOL_FAILED if message.failed else ""
    if not message.images:
        return "\n".join(filter(None, (failed, message.text)))
    shown = replace(message, content=(TextPart(failed), *parts_of(message)))
    return _content(shown)


def _reasoning(thought: Thought) -> dict[str, Any]:
    id, _, sealed = thought.signature.partition(":")
    summary = [{"type": "summary_text", "text": thought.text}] if thought.text else []
    return {"type": "reasoning", "id": id, "summary": summary, "encrypted_content": sealed}


class _Reader:
    """Reads replies and stream events. Of an item of which nothing was streamed, the whole item is read."""

    def __init__(self, upstream: Upstream, _request: ChatRequest) -> None:
        self.answer = Assembler()
        self.done = False
        self._upstream = upstream
        self._streamed: set[int] = set()
        self._ended: set[int] = set()
        self._tools: dict[int, int] = {}

    @property
    def complete(self) -> bool:
        return self.done

    def take_whole(self, reply: dict[str, Any]) -> None:
        if reply.get("status") == "failed":
            raise self._failed(reply.get("error"))
        for index, item in enumerate(reply["output"]):
            if index not in self._ended:
                self._item(index, item)
        self.answer.named(reply.get("model"))
        self._usage(reply.get("usage") or {})
        reason = str((reply.get("incomplete_details") or {}).get("reason"))
        self.answer.finish = _FINISH.get(reason, "length") if reply.get("status") == "incomplete" else "stop"

    def read(self, data: str) -> None:
        event = self._upstream.event_object(data)
        kind = event["type"]
        if kind == "error":
            raise self._failed(event)
        if kind == "response.failed":
            raise self._failed(event["response"].get("error"))
        if kind in ("response.completed", "response.incomplete"):
            self.take_whole(event["response"])
            self.done = True
        elif kind == "response.output_item.done":
            self._item(event["output_index"], event["item"])
        elif kind == "response.output_item.added" and event["item"]["type"] == "function_call":
            self._open(event["output_index"], event["item"])
        elif kind in _PIECES:
            self._streamed.add(event["output_index"])
            _PIECES[kind](self.answer, event["delta"])
        elif kind == "response.reasoning_summary_part.added" and event["summary_index"] > 0:
            self.answer.add_reasoning("\n\n")
        elif kind == "response.function_call_arguments.delta":
            self._streamed.add(event["output_index"])
            self.answer.add_arguments(self._tools[event["output_index"]], event["delta"])

    def _open(self, index: int, item: dict[str, Any]) -> None:
        self._tools[index] = self.answer.open_tool(item["call_id"], item["name"])

    def _item(self, index: int, item: dict[str, Any]) -> None:
        """An item that is complete."""
        self._ended.add(index)
        kind = item["type"]
        if kind == "reasoning":
            said = "\n\n".join(part["text"] for part in item.get("summary") or ())
            said = said or "".join(part["text"] for part in item.get("content") or ())
            if index not in self._streamed:
                self.answer.add_reasoning(said)
            sealed = item.get("encrypted_content")
            if sealed:
                self.answer.add_thought(Thought(said, f"{item['id']}:{sealed}", redacted=not said))
        elif kind == "message" and index not in self._streamed:
            for part in item["content"]:
                self.answer.add_text(part.get("text") or "")
                self.answer.add_refusal(part.get("refusal") or "")
        elif kind == "function_call":
            if index not in self._tools:
                self._open(index, item)
            if index not in self._streamed:
                self.answer.add_arguments(self._tools[index], item["arguments"])

    def _usage(self, usage: dict[str, Any]) -> None:
        read, written = usage.get("input_tokens_details") or {}, usage.get("output_tokens_details") or {}
        self.answer.usage = Usage(
            count(usage.get("input_tokens")),
            count(usage.get("output_tokens")),
            count(read.get("cached_tokens")),
            count(written.get("reasoning_tokens")),
            count(read.get("cache_write_tokens")),
        )

    def _failed(self, error: Any) -> WorkerError:
        """A response that failed names no status, but a code."""
        spec = self._upstream.spec
        blame = read_error({"error": error})
        code = "" if blame is None else blame.code
        status = 500 if code in ("", "error") else _STATUS_OF_CODE.get(code, 400)
        return from_status(status, blame, {}, worker=spec.name, secrets=self._upstream.secrets)
