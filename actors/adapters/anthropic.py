"""Anthropic Messages (`anthropic-version: 2023-06-01`), and servers that are compatible with it.

Source: Anthropic's API reference: "Messages", "Streaming", "Errors", "Structured outputs", "Effort", "Thinking".
What a model takes depends on its generation, read from its name (`claude-opus-4-7`, `claude-3-5-sonnet-…`):
sampling values ended with 4.7; effort and adaptive thinking began with 4.6; budgets of thinking tokens go from 3.7
to 4.5; JSON schemas began with 4.1. `accepts: [temperature, top_p]` sends sampling values in any case.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import httpx
import orjson

from actors.adapters.assemble import (
    Assembler,
    arguments_object,
    count,
    data_url,
    given,
    parts_of,
    split_system,
)
from actors.adapters.remote import RemoteAdapter
from actors.adapters.upstream import Upstream
from actors.config import WorkerSpec
from actors.messages import ChatRequest, FinishReason, ImagePart, Message, Thought, Usage
from actors.schema_subset import takes

PATH = "/v1/messages"
VERSION = "2023-06-01"

# The reference's optional fields that callers may give as they are; `user` becomes `metadata.user_id`.
ACCEPTED = frozenset({"cache_control", "container", "inference_geo", "speed"})

_FINISH: Mapping[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "refusal",
}
_EFFORT = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "max"}
_BUDGET = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 32768, "max": 32768}
_MIN_BUDGET = 1024


class AnthropicAdapter(RemoteAdapter):
    """Over `PATH`, streamed or not."""

    def __init__(self, spec: WorkerSpec, transport: httpx.AsyncBaseTransport) -> None:
        auth = {"anthropic-version": VERSION}
        if spec.api_key:
            auth["x-api-key"] = spec.api_key.get_secret_value()
        super().__init__(spec, transport, auth, path=PATH, body=request_body, reader=_Reader, streamed={"stream": True})


def generation(model: str) -> tuple[int, int] | None:
    """(4, 7) for `claude-opus-4-7`, (3, 5) for `claude-3-5-sonnet-20241022`; None for names of other forms."""
    found = re.search(r"claude-(?:[a-z]+-)?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)", model)
    return (int(found[1]), int(found[2] or 0)) if found else None


def request_body(spec: WorkerSpec, request: ChatRequest) -> tuple[dict[str, Any], list[str]]:
    """The body of a plain call, and the names of fields that were dropped."""
    known = generation(spec.model)
    system, messages = split_system(request.messages)
    dropped: list[str] = []
    max_tokens = request.max_tokens or _default_max_tokens(known)
    body: dict[str, Any] = {"model": spec.model, "max_tokens": max_tokens, "messages": _messages(messages)}
    if system:
        body["system"] = system
    _tools(body, request, messages, known, dropped)
    _thinking(body, request, known, dropped)
    _asked_thinking(body, request, known, dropped)
    _sampling(body, request, known, spec.accepts, dropped)
    if stops := [stop for stop in request.stop if stop.strip()]:
        body["stop_sequences"] = stops
    if len(stops) < len(request.stop):
        dropped.append("stop")
    if request.seed is not None:
        dropped.append("seed")
    wanted = request.response_format
    if wanted is not None and wanted.kind != "text":
        if wanted.kind == "json_schema" and wanted.schema is not None and (known is None or known >= (4, 1)):
            body.setdefault("output_config", {})["format"] = {"type": "json_schema", "schema": wanted.schema}
        else:
            dropped.append("response_format")
    for name, value in request.extra.items():
        if name in ("top_k", "thinking"):
            continue
        native = name in ACCEPTED or (name == "service_tier" and value in ("auto", "standard_only"))
        if name == "user" and isinstance(value, str):
            body["metadata"] = {"user_id": value}
        elif native or (name in spec.accepts and name not in body):
            body[name] = value
        else:
            dropped.append(name)
    return body, dropped


def _default_max_tokens(known: tuple[int, int] | None) -> int:
    """The API wants a bound. Where the caller gives none: what every model of the generation can do."""
    if known is None or (3, 5) <= known < (4, 0):
        return 8192
    return 16384 if known >= (4, 0) else 4096


def _sampling(
    body: dict[str, Any],
    request: ChatRequest,
    known: tuple[int, int] | None,
    accepts: tuple[str, ...],
    dropped: list[str],
) -> None:
    # With thinking on, the API takes no sampling values but its own.
    thinks = body.get("thinking", {}).get("type") in ("enabled", "adaptive")
    fits = not thinks and (known is None or known < (4, 7))
    wanted = given(temperature=request.temperature, top_p=request.top_p, top_k=request.extra.get("top_k"))
    for name, value in wanted.items():
        # From 4.1 on a request may give one of temperature and top_p, not both.
        second = name == "top_p" and "temperature" in body and known is not None and known >= (4, 1)
        if name in accepts or (fits and not second):
            # The scale ends at 1 here, at 2 in the OpenAI API.
            body[name] = value if name == "top_k" else min(value, 1.0)
        else:
            dropped.append(name)


def _thinking(body: dict[str, Any], request: ChatRequest, known: tuple[int, int] | None, dropped: list[str]) -> None:
    effort = request.reasoning_effort
    if effort is None or (effort == "none" and known is not None and known < (3, 7)):
        return
    if effort == "none":
        body["thinking"] = {"type": "disabled"}
    elif effort not in _EFFORT or (known is not None and known < (3, 7)):
        dropped.append("reasoning_effort")
    elif known is not None and known >= (4, 6):
        level = _EFFORT[effort]
        # From 4.7 on there is `xhigh`, and thoughts are left out of the answer unless asked for.
        newer = known >= (4, 7)
        if not _forced(body):
            body["thinking"] = {"type": "adaptive"} | ({"display": "summarized"} if newer else {})
        body["output_config"] = {"effort": "high" if level == "xhigh" and not newer else level}
    else:
        _budget(body, request, _BUDGET[effort], dropped)


def _asked_thinking(
    body: dict[str, Any], request: ChatRequest, known: tuple[int, int] | None, dropped: list[str]
) -> None:
    """The caller's own `thinking`, in the form that this generation takes: the caller knows none of the workers, and
    the API refuses budgets from 4.7 on and `adaptive` before 4.6."""
    asked = request.extra.get("thinking")
    if asked is None:
        return
    kind = asked.get("type") if isinstance(asked, Mapping) else None
    if known is not None and kind == "adaptive" and known < (4, 6):
        if known < (3, 7):
            dropped.append("thinking")
        elif "thinking" not in body and "reasoning_effort" not in dropped:
            _budget(body, request, _BUDGET["high"], dropped, "thinking")
    elif known is not None and kind == "enabled" and known >= (4, 7):
        body["thinking"] = {"type": "adaptive", "display": asked.get("display") or "summarized"}
    else:
        body["thinking"] = asked


def _forced(body: dict[str, Any]) -> bool:
    """The API refuses thinking together with a tool that must be called."""
    return body.get("tool_choice", {}).get("type") in ("any", "tool")


def _budget(
    body: dict[str, Any], request: ChatRequest, budget: int, dropped: list[str], field: str = "reasoning_effort"
) -> None:
    """Thinking tokens count toward `max_tokens`. A caller's bound is kept and shared; ours is widened. Not possible
    inside a tool loop whose earlier thoughts (signed blocks) the caller did not hand back."""
    if request.max_tokens is None:
        body["max_tokens"] = max(body["max_tokens"], budget + 8192)
    else:
        budget = min(budget, request.max_tokens // 2)
    since = itertools.takewhile(lambda message: message.role != "assistant", reversed(request.messages))
    in_loop = any(message.role == "tool" for message in since)
    asked = next((message for message in reversed(request.messages) if message.role == "assistant"), None)
    unsigned = in_loop and not (asked is not None and asked.thoughts)
    if budget < _MIN_BUDGET or _forced(body) or unsigned:
        dropped.append(field)
    else:
        body["thinking"] = {"type": "enabled", "budget_tokens": budget}


def _tools(
    body: dict[str, Any],
    request: ChatRequest,
    messages: list[Message],
    known: tuple[int, int] | None,
    dropped: list[str],
) -> None:
    held = {tool.name for tool in request.tools if tool.strict and _holds_to(tool.parameters, known)}
    if any(tool.strict and tool.name not in held for tool in request.tools):
        dropped.append("tools.strict")
    tools = [
        given(
            name=tool.name,
            description=tool.description or None,
            input_schema={"type": "object", "properties": {}, **tool.parameters},
            strict=tool.name in held or None,
        )
        for tool in request.tools
    ]
    choice = request.tool_choice
    if not tools:
        # A conversation with tool calls in it must define tools, even where none may be called any more.
        names = dict.fromkeys(call.name for message in messages for call in message.tool_calls)
        if names:
            schema = {"type": "object", "properties": {}}
            body["tools"] = [{"name": name, "input_schema": schema} for name in names]
            body["tool_choice"] = {"type": "none"}
        if choice is not None and choice.mode != "none":
            dropped.append("tool_choice")
        return
    body["tools"] = tools
    one = {"disable_parallel_tool_use": True} if request.parallel_tool_calls is False else {}
    if choice is not None and choice.mode == "none":
        body["tool_choice"] = {"type": "none"}
    elif choice is not None and choice.mode == "named":
        body["tool_choice"] = {"type": "tool", "name": choice.name, **one}
    elif choice is not None or one:
        required = choice is not None and choice.mode == "required"
        body["tool_choice"] = {"type": "any" if required else "auto", **one}


def _holds_to(schema: Mapping[str, Any], known: tuple[int, int] | None) -> bool:
    """A schema beyond what the API can hold a call to is refused with `strict`, and taken without."""
    return known is None or (known >= (4, 1) and takes("anthropic", schema))


def _messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Turns of `user` and `assistant`, merged where the same speaks twice; tool results are the user's."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        blocks = _blocks(message)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    if turns and turns[-1]["role"] == "assistant":
        # The API refuses a prefill that ends in whitespace.
        last = turns[-1]["content"][-1]
        if last["type"] == "text":
            last["text"] = last["text"].rstrip() or "…"
    return turns


def _blocks(message: Message) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for part in parts_of(message):
        if isinstance(part, ImagePart):
            content.append({"type": "image", "source": _source(part)})
        else:
            content.append({"type": "text", "text": part.text})
    if message.role == "tool":
        id, failed = _id(message.tool_call_id or ""), message.failed or None
        return [given(type="tool_result", tool_use_id=id, content=content or None, is_error=failed)]
    content = [*map(_thought, message.thoughts), *content]
    for call in message.tool_calls:
        use = {"type": "tool_use", "id": _id(call.id), "name": call.name, "input": arguments_object(call)}
        content.append(use)
    return content


def _thought(thought: Thought) -> dict[str, Any]:
    if thought.redacted:
        return {"type": "redacted_thinking", "data": thought.signature}
    return {"type": "thinking", "thinking": thought.text, "signature": thought.signature}


def _source(image: ImagePart) -> dict[str, str]:
    inline = data_url(image.url)
    if inline is None:
        return {"type": "url", "url": image.url}
    return {"type": "base64", "media_type": inline[0], "data": inline[1]}


def _id(id: str) -> str:
    """Ids that another worker made may hold characters that are refused here."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", id)


class _Reader:
    """Reads replies and stream events."""

    def __init__(self, upstream: Upstream, _request: ChatRequest) -> None:
        self.answer = Assembler()
        self.done = False
        self._upstream = upstream
        self._tools: dict[int, int] = {}
        self._thinking: dict[int, tuple[list[str], list[str]]] = {}
        self._usage: dict[str, Any] = {}

    @property
    def complete(self) -> bool:
        return self.done

    def take_whole(self, reply: dict[str, Any]) -> None:
        self.answer.named(reply.get("model"))
        for index, block in enumerate(reply["content"]):
            self._open(index, block)
            self._close(index)
        self._stop(reply)
        self._count(reply["usage"])

    def read(self, data: str) -> None:
        event = self._upstream.event_object(data)
        kind = event["type"]
        if kind == "content_block_delta":
            self._delta(event["index"], event["delta"])
        elif kind == "content_block_start":
            self._open(event["index"], event["content_block"])
        elif kind == "content_block_stop":
            self._close(event["index"])
        elif kind == "message_start":
            self.answer.named(event["message"].get("model"))
            self._count(event["message"].get("usage") or {})
        elif kind == "message_delta":
            self._stop(event["delta"])
            self._count(event.get("usage") or {})
        elif kind == "message_stop":
            self.done = True
        # Others (`ping`, and types still to come) carry nothing for us: the reference says to ignore them.

    def _open(self, index: int, block: dict[str, Any]) -> None:
        kind = block["type"]
        if kind == "text":
            self.answer.add_text(block.get("text") or "")
        elif kind == "thinking":
            self.answer.add_reasoning(block.get("thinking") or "")
            self._thinking[index] = ([block.get("thinking") or ""], [block.get("signature") or ""])
        elif kind == "redacted_thinking":
            self.answer.add_thought(Thought(signature=block["data"], redacted=True))
        elif kind == "tool_use":
            given_at_once = block.get("input")
            arguments = orjson.dumps(given_at_once).decode() if given_at_once else ""
            self._tools[index] = self.answer.open_tool(block["id"], block["name"], arguments)

    def _delta(self, index: int, delta: dict[str, Any]) -> None:
        kind = delta["type"]
        if kind == "text_delta":
            self.answer.add_text(delta["text"])
        elif kind == "thinking_delta":
            self.answer.add_reasoning(delta["thinking"])
            if index in self._thinking:
                self._thinking[index][0].append(delta["thinking"])
        elif kind == "signature_delta" and index in self._thinking:
            self._thinking[index][1].append(delta["signature"])
        elif kind == "input_json_delta" and index in self._tools:
            self.answer.add_arguments(self._tools[index], delta["partial_json"])

    def _close(self, index: int) -> None:
        # A call without arguments streams no JSON at all.
        if index in self._thinking:
            text, signature = map("".join, self._thinking.pop(index))
            if signature:
                self.answer.add_thought(Thought(text, signature))
        if index in self._tools and not self.answer.tools[self._tools[index]].arguments:
            self.answer.add_arguments(self._tools[index], "{}")

    def _stop(self, told: dict[str, Any]) -> None:
        if reason := told.get("stop_reason"):
            self.answer.finish = _FINISH.get(reason, "stop")
        self.answer.stopped(told.get("stop_sequence"))
        # Why it refused, where that can be told.
        self.answer.add_refusal((told.get("stop_details") or {}).get("explanation") or "")

    def _count(self, usage: dict[str, Any]) -> None:
        """Counts are cumulative; the later event wins where it gives one. `input_tokens` leaves out what was read
        from or written to the cache: the reference gives the sum of the three as the total."""
        self._usage |= {name: value for name, value in usage.items() if value is not None}
        cached = count(self._usage.get("cache_read_input_tokens"))
        written = count(self._usage.get("cache_creation_input_tokens"))
        lasting = self._usage.get("cache_creation") or {}
        details = self._usage.get("output_tokens_details") or {}
        self.answer.usage = Usage(
            input_tokens=count(self._usage.get("input_tokens")) + cached + written,
            output_tokens=count(self._usage.get("output_tokens")),
            cached_input_tokens=cached,
            cache_written_tokens=written,
            cache_hour_tokens=min(written, count(lasting.get("ephemeral_1h_input_tokens"))),
            reasoning_tokens=count(details.get("thinking_tokens")),
        )
