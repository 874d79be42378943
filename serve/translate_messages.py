"""Anthropic Messages bodies ↔ our messages. What no worker of another provider could be told is an error that says so.

Source: Anthropic's API reference, "Messages", "Streaming", "Errors"; the types of its Python SDK.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from actors.adapters.assemble import arguments_object
from actors.errors import FuguError, RequestError
from actors.messages import (
    ChatReply,
    ChatRequest,
    ImagePart,
    Message,
    Part,
    ResponseFormat,
    TextPart,
    Thought,
    ToolCall,
    ToolChoice,
    ToolSpec,
    Usage,
)
from serve.blocks import Block
from serve.schema import check
from serve.schema_messages import (
    ClientToolBody,
    CountBody,
    DocumentBlockBody,
    ImageBlockBody,
    MessagesBody,
    RedactedBlockBody,
    TextBlockBody,
    ThinkingBlockBody,
    ToolChoiceBody,
    ToolResultBlockBody,
    ToolUseBlockBody,
    TurnBody,
)

_STOP_REASON = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
    "refusal": "refusal",
}

# Fields with a meaning for Anthropic's own workers, which take them as they are.
_PASSED_ON = ("cache_control", "container", "inference_geo", "service_tier", "speed")
# Ways of asking for state that is kept elsewhere, or for what only Anthropic's own servers do.
_REFUSED = ("mcp_servers", "thread", "compaction")

# How Claude Code tells that its user stopped a tool; the user's next words follow in the same turn.
_INTERRUPTED = "[Request interrupted by user"

_ERROR_TYPE = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def to_request(body: CountBody) -> ChatRequest:
    """The request for a worker.

    Raises:
        RequestError: something that cannot be said to every worker; `param` names it.
    """
    for name in _REFUSED:
        if (body.model_extra or {}).get(name) not in (None, [], {}):
            raise RequestError(
                f"{name}: this server does not keep or do that; send the conversation itself, and tools with an "
                "input_schema",
                param=name,
            )
    messages: list[Message] = []
    if body.system:
        messages.append(Message("system", _system(body.system)))
    asides: list[int] = []
    for index, turn in enumerate(body.messages):
        added = _turn(turn, f"messages[{index}]")
        asides += (len(messages) + at for at in _asides(added))
        messages += added
    tools = tuple(_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ()))
    choice = body.tool_choice
    extra = {name: value for name in _PASSED_ON if (value := (body.model_extra or {}).get(name)) is not None}
    if "cache_control" not in extra and (marks := _cache_marks(body)):
        # One model for all: wherever the caller put its marks, the worker's provider caches automatically, for the
        # longer time if one of them names that.
        long = any(mark.get("ttl") == "1h" for mark in marks)
        extra["cache_control"] = {"type": "ephemeral"} | ({"ttl": "1h"} if long else {})
    if body.thinking is not None:
        extra["thinking"] = body.thinking.model_dump(exclude_none=True)
    wanted = (body.output_config.format if body.output_config else None) or body.output_format
    request = ChatRequest(
        messages=tuple(messages),
        tools=tools,
        tool_choice=_tool_choice(choice, tools),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        response_format=None if wanted is None else ResponseFormat("json_schema", schema=wanted.schema_, strict=True),
        reasoning_effort=body.output_config.effort if body.output_config else None,
        extra=extra,
        asides=tuple(asides),
    )
    if not isinstance(body, MessagesBody):
        return request
    if body.top_k is not None:
        extra["top_k"] = body.top_k
    if body.metadata is not None and body.metadata.user_id is not None:
        extra["user"] = body.metadata.user_id
    return request.with_(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stop=tuple(body.stop_sequences or ()),
    )


def _system(system: str | list[dict[str, Any]]) -> str | tuple[Part, ...]:
    if isinstance(system, str):
        return system
    parts = tuple(_part(block, f"system[{index}]") for index, block in enumerate(system))
    return parts[0].text if len(parts) == 1 and isinstance(parts[0], TextPart) else parts


def _turn(turn: TurnBody, where: str) -> list[Message]:
    """One message, or several: tool results are messages of their own with us."""
    if isinstance(turn.content, str):
        return [Message(turn.role, turn.content)]
    if turn.role == "assistant":
        return [_assistant(turn.content, f"{where}.content")]
    messages: list[Message] = []
    parts: list[Part] = []
    for index, block in enumerate(turn.content):
        place = f"{where}.content[{index}]"
        if block.get("type") != "tool_result":
            parts.append(_part(block, place))
            continue
        if parts:
            messages.append(Message(turn.role, _content(parts)))
            parts = []
        messages.append(_result(block, place))
    if parts:
        messages.append(Message(turn.role, _content(parts)))
    if not messages:
        raise RequestError(f"{where}.content: must not be empty", param=f"{where}.content")
    return messages


def _asides(turn: Sequence[Message]) -> list[int]:
    """The places in a turn of what stands behind tool results: what the user's program has to tell the model that it
    goes on with. A user who interrupts begins anew."""
    behind = False
    places = []
    for at, message in enumerate(turn):
        if behind and message.role == "user":
            if _INTERRUPTED in message.text:
                return []
            places.append(at)
        behind = behind or message.role == "tool"
    return places


def _assistant(blocks: Sequence[dict[str, Any]], where: str) -> Message:
    parts: list[Part] = []
    calls: list[ToolCall] = []
    thoughts: list[Thought] = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        kind = block.get("type")
        if kind == "tool_use":
            use = check(block, ToolUseBlockBody, place)
            calls.append(ToolCall(use.id, use.name, orjson.dumps(use.input).decode()))
        elif kind == "thinking":
            thinking = check(block, ThinkingBlockBody, place)
            origin, _, signature = thinking.signature.partition(".")
            if signature:  # without one no provider takes it back
                thoughts.append(Thought(thinking.thinking, signature, origin=origin))
        elif kind == "redacted_thinking":
            origin, _, data = check(block, RedactedBlockBody, place).data.partition(".")
            thoughts.append(Thought(signature=data, redacted=True, origin=origin))
        else:
            parts.append(_part(block, place))
    return Message("assistant", _content(parts), tool_calls=tuple(calls), thoughts=tuple(thoughts))


def _content(parts: Sequence[Part]) -> str | tuple[Part, ...]:
    if not parts:
        return ""
    return parts[0].text if len(parts) == 1 and isinstance(parts[0], TextPart) else tuple(parts)


def _result(block: dict[str, Any], where: str) -> Message:
    result = check(block, ToolResultBlockBody, where)
    content: str | tuple[Part, ...]
    if result.content is None or isinstance(result.content, str):
        content = result.content or ""
    else:
        content = _content([_part(part, f"{where}.content[{at}]") for at, part in enumerate(result.content)])
    return Message("tool", content, tool_call_id=result.tool_use_id, failed=result.is_error)


def _part(block: dict[str, Any], where: str) -> Part:
    kind = block.get("type")
    if kind == "text":
        return TextPart(check(block, TextBlockBody, where).text)
    if kind == "image":
        source = check(block, ImageBlockBody, where).source
        if source.type == "url" and source.url:
            return ImagePart(source.url)
        if source.type == "base64" and source.media_type and source.data:
            return ImagePart(f"data:{source.media_type};base64,{source.data}")
        raise RequestError(f"{where}.source: needs url, or media_type and data", param=f"{where}.source")
    if kind == "document":
        document = check(block, DocumentBlockBody, where)
        if document.source.type == "text" and document.source.data is not None:
            return TextPart(f"{document.title}\n\n{document.source.data}" if document.title else document.source.data)
        raise RequestError(
            f"{where}.source: documents of type {document.source.type[:32]!r} cannot be handed to every worker; "
            "send their text, or their pages as images",
            param=f"{where}.source",
        )
    raise RequestError(f"{where}: blocks of type {str(kind)[:64]!r} cannot be handed to every worker", param=where)


def _tool(tool: dict[str, Any], where: str) -> ToolSpec:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise RequestError(
            f"{where}: {str(kind)[:64]!r} is a tool of Anthropic's own, which other workers do not know; define it as "
            "a tool with an input_schema, or leave it out",
            param=where,
        )
    spec = check(tool, ClientToolBody, where)
    return ToolSpec(spec.name, spec.description or "", spec.input_schema, spec.strict)


def _tool_choice(choice: ToolChoiceBody | None, tools: Sequence[ToolSpec]) -> ToolChoice | None:
    if choice is None:
        return None
    if choice.type == "none":
        return ToolChoice("none")
    if not tools:
        raise RequestError("tool_choice: there are no tools to choose from", param="tool_choice")
    if choice.type != "tool":
        return ToolChoice("required" if choice.type == "any" else "auto")
    if all(tool.name != choice.name for tool in tools):
        raise RequestError(f"tool_choice.name: no tool is called {choice.name}", param="tool_choice.name")
    return ToolChoice("named", choice.name)


def left_out(body: CountBody) -> tuple[str, ...]:
    """The fields that no worker is told of."""
    known = {*_PASSED_ON, *_REFUSED}
    extra, config = body.model_extra or {}, (body.output_config.model_extra if body.output_config else None) or {}
    names = [name for name, value in extra.items() if name not in known and value not in (None, [], {})]
    return (*names, *(f"output_config.{name}" for name, value in config.items() if value is not None))


def _cache_marks(body: CountBody) -> list[dict[str, Any]]:
    system = body.system if isinstance(body.system, list) else []
    blocks = (block for turn in body.messages if isinstance(turn.content, list) for block in turn.content)
    marks = (item.get("cache_control") for items in (system, body.tools or (), blocks) for item in items)
    return [mark for mark in marks if isinstance(mark, dict)]


def usage_body(visible: Usage, total: Usage) -> dict[str, Any]:
    """Anthropic counts what was read from a cache, or written to it, beside the input. Orchestration tokens come on
    top."""
    return {
        "input_tokens": visible.input_tokens - visible.cached_input_tokens - visible.cache_written_tokens,
        "cache_creation_input_tokens": visible.cache_written_tokens,
        "cache_read_input_tokens": visible.cached_input_tokens,
        "output_tokens": visible.output_tokens,
        "output_tokens_details": {"thinking_tokens": visible.reasoning_tokens},
        "orchestration_input_tokens": total.input_tokens - visible.input_tokens,
        "orchestration_input_cached_tokens": total.cached_input_tokens - visible.cached_input_tokens,
        "orchestration_output_tokens": total.output_tokens - visible.output_tokens,
    }


def stop_body(reply: ChatReply) -> dict[str, Any]:
    """Why it ended. What a worker said instead of an answer is no content here but an explanation of the end."""
    body: dict[str, Any] = {"stop_reason": _STOP_REASON[reply.finish_reason], "stop_sequence": None}
    if reply.finish_reason == "stop" and reply.stop_sequence:
        body = {"stop_reason": "stop_sequence", "stop_sequence": reply.stop_sequence}
    if reply.refusal:
        body["stop_reason"] = "refusal"
        body["stop_details"] = {"type": "refusal", "category": None, "explanation": reply.refusal}
    return body


def block_body(block: Block) -> dict[str, Any]:
    """A closed block as Anthropic shows it. A signature names its worker, so that it finds back to it."""
    if block.kind == "text":
        return {"type": "text", "text": block.text, "citations": None}
    if block.kind == "tool":
        input = arguments_object(ToolCall(block.id, block.name, block.text))
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": input}
    if block.kind == "redacted":
        return {"type": "redacted_thinking", "data": signature(block)}
    return {"type": "thinking", "thinking": block.text, "signature": signature(block)}


def signature(block: Block) -> str:
    thought = block.thought
    return f"{thought.origin}.{thought.signature}" if thought is not None else ""


def error_body(error: FuguError, request_id: str) -> dict[str, Any]:
    """Anthropic's error object; `code` and `param` are ours, on top."""
    kind = _ERROR_TYPE.get(error.http_status, "api_error")
    told: dict[str, Any] = {"type": kind, "message": error.message, "code": error.code}
    if error.param is not None:
        told["param"] = error.param
    return {"type": "error", "error": told, "request_id": request_id}
