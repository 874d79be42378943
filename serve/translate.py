"""OpenAI chat bodies ↔ our messages. Replies are built as plain dicts and bytes; nothing is validated twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import orjson

from actors.errors import FuguError, RequestError
from actors.messages import (
    ChatReply,
    ChatRequest,
    Chunk,
    ImagePart,
    Message,
    Part,
    RefusalPart,
    ResponseFormat,
    TextPart,
    ToolCall,
    ToolCallDelta,
    ToolChoice,
    ToolSpec,
    Usage,
)
from serve.freeform import freeform_arguments, freeform_input, freeform_tool
from serve.schema import (
    AllowedToolsBody,
    ChatBody,
    ChatCustomToolBody,
    CustomToolCallBody,
    MessageBody,
    NamedCustomToolBody,
    NamedToolBody,
    PartBody,
    RefusalPartBody,
    ResponseFormatBody,
    TextPartBody,
    ToolBody,
    ToolCallBody,
)

# Fields that ask for what no answer of ours has; to leave them out would be to lose it.
_REFUSED = {
    "logprobs": "answers here carry no probabilities of tokens",
    "top_logprobs": "answers here carry no probabilities of tokens",
    "audio": "answers here are text",
    "web_search_options": "it is a tool that OpenAI's servers run, which no worker here has; define a function",
    "functions": "use tools",
    "function_call": "use tool_choice",
}
_NOTHING: tuple[Any, ...] = (None, False, 0, [], "none", "auto")


def to_request(body: ChatBody) -> tuple[ChatRequest, tuple[str, ...]]:
    """The request for a worker, and the fields that were dropped.

    Raises:
        RequestError: a message lacks what its role needs, or something is asked for that no answer of ours has.
    """
    extra = dict(body.model_extra or {})
    for name, why in _REFUSED.items():
        if extra.pop(name, None) not in _NOTHING:
            raise RequestError(f"{name}: {why}", param=name)
    if extra.pop("modalities", None) not in (None, [], ["text"]):
        raise RequestError("modalities: answers here are text", param="modalities")
    tools, choice = _tools(body)
    request = ChatRequest(
        messages=tuple(_message(message, index) for index, message in enumerate(body.messages)),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        seed=body.seed,
        response_format=_response_format(body.response_format),
        reasoning_effort=body.reasoning_effort,
        extra=extra,
    )
    return request, ()


def _message(message: MessageBody, index: int) -> Message:
    where = f"messages[{index}]"
    calls = tuple(map(_call, message.tool_calls or ()))
    if calls and message.role != "assistant":
        raise RequestError(f"{where}.tool_calls: only an assistant message has them", param=f"{where}.tool_calls")
    if message.role == "tool" and not message.tool_call_id:
        raise RequestError(f"{where}.tool_call_id: is required", param=f"{where}.tool_call_id")
    for name in ("function_call", "audio"):
        if (message.model_extra or {}).get(name) is not None:
            why = "use tool_calls" if name == "function_call" else "no worker here keeps it; send its transcript"
            raise RequestError(f"{where}.{name}: {why}", param=f"{where}.{name}")
    if message.content is None and not calls and message.refusal is None:
        raise RequestError(f"{where}.content: is required", param=f"{where}.content")
    return Message(message.role, _content(message, where), message.name, calls, message.tool_call_id)


def _call(call: ToolCallBody | CustomToolCallBody) -> ToolCall:
    if isinstance(call, CustomToolCallBody):
        return ToolCall(call.id, call.custom.name, freeform_arguments(call.custom.input))
    return ToolCall(call.id, call.function.name, call.function.arguments)


def _content(message: MessageBody, where: str) -> str | tuple[Part, ...]:
    given = message.content
    if not message.refusal and (given is None or isinstance(given, str)):
        return given or ""
    if given is None or isinstance(given, str):
        parts: tuple[Part, ...] = (TextPart(given),) if given else ()
    else:
        parts = tuple(_part(part) for part in given)
    if message.refusal:
        parts = (*parts, RefusalPart(message.refusal))
    if message.role != "assistant" and any(isinstance(part, RefusalPart) for part in parts):
        raise RequestError(f"{where}: only an assistant message has a refusal", param=where)
    return parts


def _part(part: PartBody) -> Part:
    if isinstance(part, TextPartBody):
        return TextPart(part.text)
    if isinstance(part, RefusalPartBody):
        return RefusalPart(part.refusal)
    return ImagePart(part.image_url.url, part.image_url.detail)


def _tools(body: ChatBody) -> tuple[tuple[ToolSpec, ...], ToolChoice | None]:
    """The tools that may be called, and which of them must be."""
    tools = tuple(map(_tool, body.tools or ()))
    choice = body.tool_choice
    if not isinstance(choice, AllowedToolsBody):
        return tools, None if choice is None else _tool_choice(choice, tools)
    where = "tool_choice.allowed_tools.tools"
    names = {_named(tool)[1] for tool in choice.allowed_tools.tools}
    tools = tuple(tool for tool in tools if tool.name in names)
    if not tools:
        raise RequestError(f"{where}: none of them is among the tools", param=where)
    return tools, ToolChoice(choice.allowed_tools.mode)


def _tool(tool: ToolBody | ChatCustomToolBody) -> ToolSpec:
    if isinstance(tool, ChatCustomToolBody):
        custom = tool.custom
        rule = custom.format.grammar if custom.format is not None else None
        syntax, definition = (None, None) if rule is None else (rule.syntax, rule.definition)
        return freeform_tool(custom.name, custom.description, syntax, definition)
    function = tool.function
    return ToolSpec(function.name, function.description or "", function.parameters or {}, function.strict)


def freeform_names(body: ChatBody) -> frozenset[str]:
    """The names of the tools whose calls come back with plain text."""
    return frozenset(tool.custom.name for tool in body.tools or () if isinstance(tool, ChatCustomToolBody))


def _named(tool: NamedToolBody | NamedCustomToolBody) -> tuple[str, str]:
    """Its kind and its name."""
    return tool.type, (tool.function if isinstance(tool, NamedToolBody) else tool.custom).name


def _tool_choice(
    choice: Literal["auto", "none", "required"] | NamedToolBody | NamedCustomToolBody, tools: Sequence[ToolSpec]
) -> ToolChoice:
    if choice != "none" and not tools:
        raise RequestError("tool_choice: there are no tools to choose from", param="tool_choice")
    if not isinstance(choice, (NamedToolBody, NamedCustomToolBody)):
        return ToolChoice(choice)
    kind, name = _named(choice)
    if all(tool.name != name for tool in tools):
        raise RequestError(f"tool_choice.{kind}.name: no tool is called {name}", param=f"tool_choice.{kind}.name")
    return ToolChoice("named", name)


def _response_format(body: ResponseFormatBody | None) -> ResponseFormat | None:
    if body is None:
        return None
    if body.type != "json_schema":
        return ResponseFormat(body.type)
    if body.json_schema is None:
        raise RequestError("response_format.json_schema: is required", param="response_format.json_schema")
    schema = body.json_schema
    return ResponseFormat("json_schema", schema.name, schema.schema_, schema.strict)


def usage_body(usage: Usage) -> dict[str, Any]:
    written = {"cache_write_tokens": usage.cache_written_tokens} if usage.cache_written_tokens else {}
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens} | written,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def tokens_body(visible: Usage, total: Usage) -> dict[str, Any]:
    """The usage of an answer: what the caller sees of it, and the tokens of other calls that were made for it as
    orchestration tokens, which come on top and are part of the total."""
    body = usage_body(visible)
    body["total_tokens"] = total.total_tokens
    body["prompt_tokens_details"] |= {
        "orchestration_input_tokens": total.input_tokens - visible.input_tokens,
        "orchestration_input_cached_tokens": total.cached_input_tokens - visible.cached_input_tokens,
    }
    body["completion_tokens_details"]["orchestration_output_tokens"] = total.output_tokens - visible.output_tokens
    return body


def reply_body(
    reply: ChatReply,
    *,
    id: str,
    created: int,
    model: str,
    usage: Mapping[str, Any],
    trace: Mapping[str, Any] | None,
    freeform: Collection[str] = (),
) -> bytes:
    """The JSON of a whole answer. `model` is what was asked for; only the trace names the worker. `freeform` are the
    names of tools whose input is plain text."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None, "refusal": reply.refusal or None}
    if not reply.tool_calls and not reply.refusal:
        message["content"] = reply.text
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["tool_calls"] = [_call_body(call, freeform) for call in reply.tool_calls]
    body: dict[str, Any] = {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(reply)}],
        "usage": usage,
    }
    if trace is not None:
        body["fugu"] = trace
    return dumps(body)


def _call_body(call: ToolCall, freeform: Collection[str]) -> dict[str, Any]:
    if call.name in freeform:
        custom = {"name": call.name, "input": freeform_input(call.arguments)}
        return {"id": call.id, "type": "custom", "custom": custom}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def finish_reason(reply: ChatReply) -> str:
    """OpenAI's word. A refusal there is a field of its own beside `stop`; without words for it nothing is left to tell
    it by but the filter's."""
    if reply.finish_reason != "refusal":
        return reply.finish_reason
    return "stop" if reply.refusal else "content_filter"


class ChunkWriter:
    """The `data:` events of one streamed answer, in OpenAI's shape. `freeform` are the names of tools whose input is
    plain text: the worker writes JSON around it, so it is told at the end, when the call is complete."""

    __slots__ = ("_begun", "_freeform", "_head", "_include_usage", "_inputs")

    def __init__(
        self, *, id: str, created: int, model: str, include_usage: bool, freeform: Collection[str] = ()
    ) -> None:
        self._freeform = freeform
        self._inputs: dict[int, list[str]] = {}
        self._head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._include_usage = include_usage
        self._begun = False

    def chunk(self, chunk: Chunk) -> bytes:
        """The event for a chunk; empty if it has nothing to say."""
        delta = self._begin()
        if chunk.text:
            delta["content"] = chunk.text
        if chunk.reasoning:
            delta["reasoning_content"] = chunk.reasoning
        if chunk.refusal:
            delta["refusal"] = chunk.refusal
        if chunk.tool_calls:
            told = [self._call(call) for call in chunk.tool_calls]
            delta |= {"tool_calls": calls} if (calls := [call for call in told if call is not None]) else {}
        return self._event([_choice(delta, None)]) if delta else b""

    def finish(self, reason: str) -> bytes:
        """The event with the finish reason; before it the opening one, where nothing has been said, and the inputs of
        freeform tools."""
        delta = self._begin()
        if self._inputs:
            inputs = {index: freeform_input("".join(pieces)) for index, pieces in self._inputs.items()}
            delta["tool_calls"] = [{"index": index, "custom": {"input": text}} for index, text in inputs.items()]
        said = self._event([_choice(delta, None)]) if delta else b""
        return said + self._event([_choice({}, reason)])

    def _call(self, call: ToolCallDelta) -> dict[str, Any] | None:
        if call.name in self._freeform:
            self._inputs[call.index] = [call.arguments]
            return {"index": call.index, "id": call.id, "type": "custom", "custom": {"name": call.name, "input": ""}}
        if call.index in self._inputs:
            self._inputs[call.index].append(call.arguments)
            return None
        return _call_delta(call)

    def _begin(self) -> dict[str, Any]:
        if self._begun:
            return {}
        self._begun = True
        return {"role": "assistant", "content": ""}

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The event with the token counts, where the caller asked for it."""
        return self._event([], usage=usage) if self._include_usage else b""

    def trace(self, trace: Mapping[str, Any]) -> bytes:
        """An event without choices that carries the trace; OpenAI's clients hand it through."""
        return self._event([], fugu=trace)

    def _event(self, choices: list[dict[str, Any]], **fields: Any) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": choices, **fields}
        if self._include_usage and "usage" not in fields:
            body["usage"] = None
        return b"data: " + dumps(body) + b"\n\n"


def error_event(error: FuguError, trace: Mapping[str, Any] | None = None) -> bytes:
    """The event that tells of a failure after the stream began; `[DONE]` follows it."""
    body = error.envelope()
    if trace is not None:
        body["fugu"] = trace
    return b"data: " + dumps(body) + b"\n\n"


def dumps(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)


def _choice(delta: Mapping[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    body: dict[str, Any] = {"index": call.index, "function": function}
    if call.name is not None:
        function["name"] = call.name
    if call.id is not None:
        body["id"] = call.id
        body["type"] = "function"
    return body
