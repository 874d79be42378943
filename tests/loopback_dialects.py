"""What the loopback provider says: reply bodies, SSE frames and error bodies of four wire formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from actors.messages import ToolCall, Usage

Dialect = Literal["openai", "responses", "anthropic", "gemini"]
DEFAULT_TEXT = "Hello from the loopback provider."
SIGNATURE = "c2lnbmVk"


@dataclass(frozen=True)
class Recorded:
    """One request as it arrived. `body` is the parsed JSON (None where it was not JSON); `arrival` is
    `time.monotonic()` seconds; header names are in lower case."""

    number: int
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any
    raw: bytes
    arrival: float
    dialect: Dialect | None
    model: str
    stream: bool


@dataclass(frozen=True)
class Behaviour:
    """How the provider treats one request.

    `text` may be a function of the request. `usage` is in our words (cached part of input, reasoning part of
    output) and is counted from the request when None. `finish` is in the OpenAI words; `stopped_by` the stop
    sequence that ended the answer, told as Anthropic and vLLM do. `pieces` is how many pieces the text is streamed in
    (None: one per word).

    Misbehaviour: `delay` and `chunk_delay` in seconds; `break_after` n SSE events (n bytes of a plain body)
    by `break_how` ("rst" resets, "fin" closes, "half" shuts down the sending side only); `error_after` n events
    sends the dialect's in-stream error; `stall_after` n events falls silent for good; `pings` are so many signs of
    life after the second event, which say nothing (spaced as all events are); `terminator=False` leaves out the
    documented end of a stream; `split` cuts the bytes of a stream into writes of at most that many bytes; `body`
    replaces the whole body; `never` never answers; `close` closes the connection after the reply without having said
    so (a stale connection).
    """

    text: str | Callable[[Recorded], str] = DEFAULT_TEXT
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish: str | None = None
    stopped_by: str | None = None
    usage: Usage | None = None
    pieces: int | None = None
    status: int = 200
    error: str = "the loopback provider was told to fail"
    error_code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    retry_info: str | None = None
    delay: float = 0.0
    chunk_delay: float = 0.0
    break_after: int | None = None
    break_how: Literal["rst", "fin", "half"] = "rst"
    stall_after: int | None = None
    pings: int = 0
    error_after: int | None = None
    terminator: bool = True
    split: int | None = None
    body: bytes | None = None
    content_type: str | None = None
    never: bool = False
    close: bool = False


def detect(path: str) -> tuple[Dialect | None, str, bool]:
    """The dialect a path belongs to, and for Gemini also the model and whether it streams."""
    if path.endswith("/chat/completions"):
        return "openai", "", False
    if path.endswith("/responses"):
        return "responses", "", False
    if path.endswith("/v1/messages"):
        return "anthropic", "", False
    found = re.search(r"/models/([^/:]+):(generateContent|streamGenerateContent)$", path)
    if found:
        return "gemini", found[1], found[2] == "streamGenerateContent"
    return None, "", False


def fault(request: Recorded) -> str | None:
    """What the real provider would refuse about a request, or None."""
    if request.dialect is None:
        return f"unknown path {request.path}"
    body = request.body
    if not isinstance(body, dict):
        return "the body is not a JSON object"
    if request.dialect == "gemini":
        if request.stream and "alt=sse" not in request.query:
            return "the loopback provider streams with alt=sse only"
        return None if body.get("contents") else "contents is required"
    if not body.get("model"):
        return "model is required"
    if request.dialect == "responses":
        return None if body.get("input") else "input is required"
    if not body.get("messages"):
        return "messages is required"
    if request.dialect == "anthropic":
        if "anthropic-version" not in request.headers:
            return "anthropic-version: header is required"
        if not isinstance(body.get("max_tokens"), int):
            return "max_tokens: Field required"
    return None


def split_text(text: str, pieces: int | None) -> list[str]:
    if not text:
        return []
    if pieces is None:
        return re.findall(r"\s*\S+\s*$|\s*\S+", text) or [text]
    size = max(1, -(-len(text) // pieces))
    return [text[i : i + size] for i in range(0, len(text), size)]


@dataclass(frozen=True)
class Answer:
    """A behaviour applied to a request: the words to say, and the counts."""

    request: Recorded
    behaviour: Behaviour
    text: str
    usage: Usage

    @classmethod
    def make(cls, request: Recorded, behaviour: Behaviour) -> Answer:
        text = behaviour.text if isinstance(behaviour.text, str) else behaviour.text(request)
        usage = behaviour.usage or Usage(max(1, len(request.raw) // 4), max(1, len(text.split())))
        return cls(request, behaviour, text, usage)

    @property
    def finish(self) -> str:
        return self.behaviour.finish or ("tool_calls" if self.behaviour.tool_calls else "stop")

    def plain(self) -> bytes:
        maker = {
            "openai": openai_plain,
            "responses": responses_plain,
            "anthropic": anthropic_plain,
            "gemini": gemini_plain,
        }
        return orjson.dumps(maker[self.request.dialect or "openai"](self))

    def events(self) -> list[bytes]:
        maker = {
            "openai": openai_events,
            "responses": responses_events,
            "anthropic": anthropic_events,
            "gemini": gemini_events,
        }
        frames = maker[self.request.dialect or "openai"](self)
        ping = frame({"type": "ping"}, "ping") if self.request.dialect == "anthropic" else b": ping\n\n"
        frames[2:2] = [ping] * self.behaviour.pings
        return frames


def frame(data: Any, event: str | None = None) -> bytes:
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"


def error_body(dialect: Dialect | None, status: int, behaviour: Behaviour) -> dict[str, Any]:
    message = behaviour.error
    if dialect == "anthropic":
        kinds = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error"}
        kinds |= {404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
        kinds |= {504: "timeout_error", 529: "overloaded_error"}
        kind = behaviour.error_code or kinds.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_loopback"}
    if dialect == "gemini":
        names = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND"}
        names |= {429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}
        error: dict[str, Any] = {"code": status, "message": message}
        error["status"] = behaviour.error_code or names.get(status, "UNKNOWN")
        if behaviour.retry_info:
            kind = "type.googleapis.com/google.rpc.RetryInfo"
            error["details"] = [{"@type": kind, "retryDelay": behaviour.retry_info}]
        return {"error": error}
    types = {401: "invalid_request_error", 429: "requests", 500: "server_error", 503: "server_error"}
    codes = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}
    return {
        "error": {
            "message": message,
            "type": types.get(status, "invalid_request_error"),
            "param": None,
            "code": behaviour.error_code or codes.get(status),
        }
    }


def error_event(dialect: Dialect | None, behaviour: Behaviour) -> bytes:
    """The error a provider puts into a stream that has begun."""
    if dialect == "responses":
        return frame({"type": "error", "code": "server_error", "message": behaviour.error, "param": None}, "error")
    body = error_body(dialect, {"anthropic": 529, "gemini": 503}.get(dialect or "", 500), behaviour)
    return frame(body, "error" if dialect == "anthropic" else None)


# OpenAI chat completions


def openai_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens, "audio_tokens": 0},
    }


def _openai_head(answer: Answer, kind: str) -> dict[str, Any]:
    number = answer.request.number
    return {
        "id": f"chatcmpl-{number}",
        "object": kind,
        "created": 1_700_000_000,
        "model": answer.request.model,
    }


def openai_plain(answer: Answer) -> dict[str, Any]:
    behaviour = answer.behaviour
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if behaviour.refusal:
        message |= {"content": None, "refusal": behaviour.refusal}
    if behaviour.reasoning:
        message["reasoning_content"] = behaviour.reasoning
    if behaviour.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in behaviour.tool_calls
        ]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
    choice |= {"stop_reason": behaviour.stopped_by} if behaviour.stopped_by else {}
    body = _openai_head(answer, "chat.completion")
    return {**body, "choices": [choice], "usage": openai_usage(answer.usage)}


def openai_events(answer: Answer) -> list[bytes]:
    behaviour, head = answer.behaviour, _openai_head(answer, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        choice |= {"stop_reason": behaviour.stopped_by} if finish and behaviour.stopped_by else {}
        return frame({**head, "choices": [choice]})

    frames = [chunk({"role": "assistant", "content": ""})]
    frames += [chunk({"reasoning_content": piece}) for piece in split_text(behaviour.reasoning, behaviour.pieces)]
    frames += [chunk({"refusal": piece}) for piece in split_text(behaviour.refusal, behaviour.pieces)]
    if not behaviour.refusal:
        frames += [chunk({"content": piece}) for piece in split_text(answer.text, behaviour.pieces)]
    for index, call in enumerate(behaviour.tool_calls):
        function = {"name": call.name, "arguments": ""}
        frames.append(
            chunk({"tool_calls": [{"index": index, "id": call.id, "type": "function", "function": function}]})
        )
        for piece in split_text(call.arguments, behaviour.pieces):
            frames.append(chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}))
    frames.append(chunk({}, answer.finish))
    if (answer.request.body.get("stream_options") or {}).get("include_usage"):
        frames.append(frame({**head, "choices": [], "usage": openai_usage(answer.usage)}))
    if behaviour.terminator:
        frames.append(b"data: [DONE]\n\n")
    return frames


# OpenAI Responses


def responses_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_input_tokens,
            "cache_write_tokens": usage.cache_written_tokens,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def _responses_items(answer: Answer) -> list[tuple[dict[str, Any], str, str]]:
    """Each output item in its final form, and of which kind are the pieces that stream into it: (item, kind, text)."""
    behaviour, items = answer.behaviour, list[tuple[dict[str, Any], str, str]]()
    if behaviour.reasoning:
        summary = [{"type": "summary_text", "text": behaviour.reasoning}]
        item = {"id": "rs_1", "type": "reasoning", "summary": summary, "encrypted_content": SIGNATURE}
        items.append((item, "reasoning_summary_text", behaviour.reasoning))
    said = behaviour.refusal or answer.text
    if said:
        part = {"type": "refusal", "refusal": said}
        if not behaviour.refusal:
            part = {"type": "output_text", "text": said, "annotations": []}  # type: ignore[dict-item]
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
        items.append((item, part["type"], said))
    for call in behaviour.tool_calls:
        item = {"id": f"fc_{call.id}", "type": "function_call", "status": "completed", "call_id": call.id}
        item |= {"name": call.name, "arguments": call.arguments}
        items.append((item, "function_call_arguments", call.arguments))
    return items


def _responses_body(answer: Answer, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(answer.finish)
    ended = status == "completed"
    return {
        "id": f"resp_{answer.request.number}",
        "object": "response",
        "created_at": 1_700_000_000,
        "model": answer.request.model,
        "status": "incomplete" if ended and reason else status,
        "error": None,
        "incomplete_details": {"reason": reason} if ended and reason else None,
        "output": output,
        "usage": responses_usage(answer.usage) if ended else None,
    }


def responses_plain(answer: Answer) -> dict[str, Any]:
    return _responses_body(answer, "completed", [item for item, _, _ in _responses_items(answer)])


def responses_events(answer: Answer) -> list[bytes]:
    frames: list[bytes] = []

    def event(kind: str, **fields: Any) -> None:
        frames.append(frame({"type": kind, "sequence_number": len(frames), **fields}, kind))

    for kind in ("created", "in_progress"):
        event(f"response.{kind}", response=_responses_body(answer, "in_progress", []))
    for index, (item, what, text) in enumerate(_responses_items(answer)):
        where: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        empty = {"reasoning": {"summary": []}, "message": {"content": []}, "function_call": {"arguments": ""}}
        # As OpenAI's own: what is sealed may be incomplete until the item is done.
        begun = {**item, **empty[item["type"]]} | ({"encrypted_content": "c2"} if "encrypted_content" in item else {})
        event("response.output_item.added", output_index=index, item=begun)
        if item["type"] == "reasoning":
            where["summary_index"] = 0
            event("response.reasoning_summary_part.added", **where, part={"type": "summary_text", "text": ""})
        elif item["type"] == "message":
            where["content_index"] = 0
            key = "refusal" if what == "refusal" else "text"
            event("response.content_part.added", **where, part={"type": what, key: ""})
        for piece in split_text(text, answer.behaviour.pieces):
            event(f"response.{what}.delta", **where, delta=piece)
        event(f"response.{what}.done", **where, text=text)
        event("response.output_item.done", output_index=index, item=item)
    if answer.behaviour.terminator:
        whole = responses_plain(answer)
        event(f"response.{whole['status']}", response=whole)
    return frames


# Anthropic Messages

_ANTHROPIC_STOP = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


def anthropic_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens - usage.cached_input_tokens - usage.cache_written_tokens,
        "cache_creation_input_tokens": usage.cache_written_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": usage.cache_written_tokens - usage.cache_hour_tokens,
            "ephemeral_1h_input_tokens": usage.cache_hour_tokens,
        },
        "cache_read_input_tokens": usage.cached_input_tokens,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _anthropic_message(answer: Answer) -> dict[str, Any]:
    return {
        "id": f"msg_{answer.request.number}",
        "type": "message",
        "role": "assistant",
        "model": answer.request.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**anthropic_usage(answer.usage), "output_tokens": 1, "output_tokens_details": None},
    }


def _anthropic_blocks(answer: Answer) -> list[tuple[dict[str, Any], str]]:
    """Each content block in its opening form, and the text that streams into it."""
    blocks: list[tuple[dict[str, Any], str]] = []
    if answer.behaviour.reasoning:
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, answer.behaviour.reasoning))
    if answer.text:
        blocks.append(({"type": "text", "text": ""}, answer.text))
    for call in answer.behaviour.tool_calls:
        blocks.append(({"type": "tool_use", "id": call.id, "name": call.name, "input": {}}, call.arguments))
    return blocks


def anthropic_plain(answer: Answer) -> dict[str, Any]:
    content = []
    for block, text in _anthropic_blocks(answer):
        key = {"thinking": "thinking", "text": "text", "tool_use": "input"}[block["type"]]
        signed = {"signature": SIGNATURE} if key == "thinking" else {}
        content.append({**block, key: orjson.loads(text) if key == "input" else text, **signed})
    return {
        **_anthropic_message(answer),
        "content": content,
        **_anthropic_stop(answer),
        "usage": anthropic_usage(answer.usage),
    }


def _anthropic_stop(answer: Answer) -> dict[str, Any]:
    if answer.behaviour.stopped_by:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.behaviour.stopped_by}
    if not answer.behaviour.refusal:
        return {"stop_reason": _ANTHROPIC_STOP.get(answer.finish, answer.finish), "stop_sequence": None}
    details = {"type": "refusal", "category": None, "explanation": answer.behaviour.refusal}
    return {"stop_reason": "refusal", "stop_sequence": None, "stop_details": details}


def anthropic_events(answer: Answer) -> list[bytes]:
    frames = [frame({"type": "message_start", "message": _anthropic_message(answer)}, "message_start")]
    frames.append(frame({"type": "ping"}, "ping"))
    fields = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}
    for index, (block, text) in enumerate(_anthropic_blocks(answer)):
        start = {"type": "content_block_start", "index": index, "content_block": block}
        frames.append(frame(start, "content_block_start"))
        kind, key = fields.get(block["type"], ("input_json_delta", "partial_json"))
        deltas = [{"type": kind, key: piece} for piece in split_text(text, answer.behaviour.pieces)]
        if block["type"] == "thinking":
            deltas.append({"type": "signature_delta", "signature": SIGNATURE})
        for delta in deltas:
            event = {"type": "content_block_delta", "index": index, "delta": delta}
            frames.append(frame(event, "content_block_delta"))
        frames.append(frame({"type": "content_block_stop", "index": index}, "content_block_stop"))
    end = {"type": "message_delta", "delta": _anthropic_stop(answer), "usage": anthropic_usage(answer.usage)}
    frames.append(frame(end, "message_delta"))
    if answer.behaviour.terminator:
        frames.append(frame({"type": "message_stop"}, "message_stop"))
    return frames


# Gemini generateContent

_GEMINI_STOP = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP", "content_filter": "SAFETY"}


def gemini_usage(usage: Usage) -> dict[str, Any]:
    return {
        "promptTokenCount": usage.input_tokens,
        "cachedContentTokenCount": usage.cached_input_tokens,
        "candidatesTokenCount": usage.output_tokens - usage.reasoning_tokens,
        "thoughtsTokenCount": usage.reasoning_tokens,
        "totalTokenCount": usage.total_tokens,
    }


def _gemini_body(answer: Answer, parts: list[dict[str, Any]], finish: str | None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": parts}, "index": 0}
    if finish:
        candidate["finishReason"] = _GEMINI_STOP.get(finish, finish)
    return {
        "candidates": [candidate],
        "usageMetadata": gemini_usage(answer.usage),
        "modelVersion": answer.request.model,
        "responseId": f"loopback-{answer.request.number}",
    }


def _gemini_blocked(answer: Answer) -> dict[str, Any]:
    feedback = {"blockReason": "PROHIBITED_CONTENT", "blockReasonMessage": answer.behaviour.refusal}
    return {"promptFeedback": feedback, "usageMetadata": gemini_usage(answer.usage)}


def _gemini_calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "functionCall": {"name": call.name, "args": orjson.loads(call.arguments)},
            "thoughtSignature": "c2ln",
        }
        for call in answer.behaviour.tool_calls
    ]


def gemini_plain(answer: Answer) -> dict[str, Any]:
    if answer.behaviour.refusal:
        return _gemini_blocked(answer)
    parts: list[dict[str, Any]] = []
    if answer.behaviour.reasoning:
        parts.append({"text": answer.behaviour.reasoning, "thought": True})
    if answer.text:
        parts.append({"text": answer.text})
    return _gemini_body(answer, parts + _gemini_calls(answer), answer.finish)


def gemini_events(answer: Answer) -> list[bytes]:
    behaviour = answer.behaviour
    if behaviour.refusal:
        return [frame(_gemini_blocked(answer))]
    parts: list[dict[str, Any]] = [
        {"text": piece, "thought": True} for piece in split_text(behaviour.reasoning, behaviour.pieces)
    ]
    parts += [{"text": piece} for piece in split_text(answer.text, behaviour.pieces)]
    parts += _gemini_calls(answer)
    frames = [frame(_gemini_body(answer, [part], None)) for part in parts]
    if behaviour.terminator:
        frames.append(frame(_gemini_body(answer, [{"text": ""}], answer.finish)))
    return frames
