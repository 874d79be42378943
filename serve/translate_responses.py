"""OpenAI Responses bodies → our messages. What no worker of another provider could be told is an error that says so.

Source: OpenAI's API reference, "Responses"; the types of its Python SDK. Freeform (`custom`) tools become functions
with one text argument, `input`, so that every worker can call them; namespaces become a prefix of the name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from actors.errors import RequestError
from actors.messages import (
    ChatRequest,
    ImagePart,
    Message,
    Part,
    RefusalPart,
    ResponseFormat,
    TextPart,
    Thought,
    ToolCall,
    ToolChoice,
    ToolSpec,
)
from serve.freeform import freeform_arguments, freeform_tool
from serve.schema import check
from serve.schema_responses import (
    CompactionItem,
    CustomCallItem,
    CustomToolBody,
    FormatBody,
    FunctionCallItem,
    FunctionToolBody,
    ImageContent,
    InputBody,
    MessageItem,
    NamedChoice,
    NamespaceToolBody,
    OutputItem,
    ReasoningItem,
    RefusalContent,
    ResponsesBody,
    TextContent,
)
from serve.sealed import unseal, unseal_summary

_PASSED_ON = ("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "safety_identifier", "service_tier")
# Ways of asking for state or text that is kept elsewhere, or for what only OpenAI's own servers do.
_REFUSED = ("conversation", "prompt", "context_management", "moderation", "image", "background_options")
_SUMMARY = "What has happened in this conversation so far; of the messages before only the user's own are left:"
# Fields without a meaning for an answer: how a stream is padded, and what Codex says of itself.
_SILENT = ("stream_options", "client_metadata")


@dataclass(slots=True)
class Tools:
    """The tools of a request. `freeform` are the names of custom ones; `spaces` maps a name that workers see to its
    namespace and its name there."""

    specs: list[ToolSpec] = field(default_factory=list)
    freeform: set[str] = field(default_factory=set)
    spaces: dict[str, tuple[str, str]] = field(default_factory=dict)

    def worker_name(self, name: str, namespace: str | None) -> str:
        return name if namespace is None else f"{namespace}__{name}"


def to_request(
    body: InputBody, earlier: Sequence[Mapping[str, Any]], tools: Tools
) -> tuple[ChatRequest, tuple[str, ...]]:
    """The request for a worker, and the fields that were dropped. `earlier` are the items of the responses that this
    one goes on from.

    Raises:
        RequestError: something that cannot be said to every worker; `param` names it.
    """
    extra = dict(body.model_extra or {})
    for name in _REFUSED:
        if extra.get(name) not in (None, [], {}):
            raise RequestError(
                f"{name}: this server does not keep or do that; send the conversation itself", param=name
            )
    included = (body.include if isinstance(body, ResponsesBody) else None) or ()
    if extra.get("top_logprobs") or "message.output_text.logprobs" in included:
        field = "top_logprobs" if extra.get("top_logprobs") else "include"
        raise RequestError(f"{field}: answers here carry no probabilities of tokens", param=field)
    messages: list[Message] = [Message("system", body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        messages += to_messages(earlier, tools, "previous_response_id", skip=len(earlier))
        if body.input:
            messages.append(Message("user", body.input))
    else:
        messages += to_messages([*earlier, *body.input], tools, "input", skip=len(earlier))
    if not messages:
        raise RequestError("input: is required", param="input")
    specs, choice = _choice(body.tool_choice, tools)
    text, reasoning = body.text, body.reasoning
    passed = {name: extra[name] for name in _PASSED_ON if extra.get(name) is not None}
    if text is not None and text.verbosity is not None:
        passed["verbosity"] = text.verbosity
    known = {*_PASSED_ON, *_REFUSED, *_SILENT}
    dropped = [name for name, value in extra.items() if name not in known and value not in (None, 0, [], {})]
    if reasoning is not None:
        dropped += [f"reasoning.{name}" for name, value in (reasoning.model_extra or {}).items() if value is not None]
    if body.truncation == "auto":
        dropped.append("truncation")
    request = ChatRequest(
        messages=tuple(messages),
        tools=specs,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls if specs else None,
        response_format=_format(text.format if text is not None else None),
        reasoning_effort=reasoning.effort if reasoning is not None else None,
        extra=passed,
    )
    if not isinstance(body, ResponsesBody):
        return request, tuple(dropped)
    if body.user is not None:
        passed["user"] = body.user
    settings = {"max_tokens": body.max_output_tokens, "temperature": body.temperature, "top_p": body.top_p}
    return request.with_(**settings), tuple(dropped)


def read_tools(tools: Sequence[dict[str, Any]] | None) -> Tools:
    """Raises:
    RequestError: a tool that only OpenAI's own servers have.
    """
    found = Tools()
    for index, tool in enumerate(tools or ()):
        where = f"tools[{index}]"
        if tool.get("type") == "namespace":
            space = check(tool, NamespaceToolBody, where)
            for at, inner in enumerate(space.tools):
                _add_tool(found, inner, f"{where}.tools[{at}]", space.name)
        else:
            _add_tool(found, tool, where, None)
    return found


def _add_tool(tools: Tools, tool: dict[str, Any], where: str, namespace: str | None) -> None:
    kind = tool.get("type")
    if kind == "function":
        function = check(tool, FunctionToolBody, where)
        name = tools.worker_name(function.name, namespace)
        spec = ToolSpec(name, function.description or "", function.parameters or {}, function.strict)
        given = function.name
    elif kind == "custom":
        custom = check(tool, CustomToolBody, where)
        name = tools.worker_name(custom.name, namespace)
        tools.freeform.add(name)
        grammar = custom.format if custom.format is not None and custom.format.type == "grammar" else None
        rule = (None, None) if grammar is None else (grammar.syntax, grammar.definition)
        spec = freeform_tool(name, custom.description, *rule)
        given = custom.name
    else:
        raise RequestError(
            f"{where}: {str(kind)[:64]!r} is a tool that OpenAI's servers run; no worker here has it. Leave it out "
            '(in Codex\'s config.toml: web_search = "disabled"), or define it as a function',
            param=where,
        )
    if namespace is not None:
        tools.spaces[name] = (namespace, given)
    tools.specs.append(spec)


def _choice(choice: str | NamedChoice | None, tools: Tools) -> tuple[tuple[ToolSpec, ...], ToolChoice | None]:
    specs = tuple(tools.specs)
    if choice is None or (choice == "auto" and not specs):
        return specs, None
    if isinstance(choice, str):
        if choice != "none" and not specs:
            raise RequestError("tool_choice: there are no tools to choose from", param="tool_choice")
        return specs, ToolChoice(choice)  # type: ignore[arg-type]
    if choice.type == "allowed_tools":
        allowed = {tools.worker_name(str(tool.get("name")), tool.get("namespace")) for tool in choice.tools or ()}
        specs = tuple(spec for spec in specs if spec.name in allowed)
        if not specs:
            raise RequestError("tool_choice.tools: none of them is among the tools", param="tool_choice.tools")
        return specs, ToolChoice(choice.mode or "auto")
    if choice.type not in ("function", "custom"):
        raise RequestError(f"tool_choice.type: no worker here has {choice.type[:64]!r}", param="tool_choice.type")
    if all(spec.name != choice.name for spec in specs):
        raise RequestError(f"tool_choice.name: no tool is called {choice.name}", param="tool_choice.name")
    return specs, ToolChoice("named", choice.name)


def _format(format: FormatBody | None) -> ResponseFormat | None:
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return ResponseFormat("json_object")
    if format.schema_ is None:
        raise RequestError("text.format.schema: is required", param="text.format.schema")
    return ResponseFormat("json_schema", format.name, format.schema_, format.strict)


def to_messages(items: Sequence[Mapping[str, Any]], tools: Tools, where: str, *, skip: int = 0) -> list[Message]:
    """Items in a row that are one turn of the assistant (reasoning, text, calls) become one message. `skip` items at
    the front come from the store, so that places in errors are those of the caller's own."""
    reader = _ItemReader(tools)
    for index, item in enumerate(items):
        reader.take(item, f"{where}[{index - skip}]" if index >= skip else "previous_response_id")
    return reader.finish()


class _ItemReader:
    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._messages: list[Message] = []
        self._thoughts: list[Thought] = []
        self._text: str | tuple[Part, ...] | None = None
        self._calls: list[ToolCall] = []

    def take(self, item: Mapping[str, Any], where: str) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._message(check(item, MessageItem, where), where)
        elif kind == "reasoning":
            if self._text is not None or self._calls:
                self._flush()
            self._thoughts += unseal(check(item, ReasoningItem, where).encrypted_content)
        elif kind == "function_call":
            call = check(item, FunctionCallItem, where)
            name = self._tools.worker_name(call.name, call.namespace)
            self._calls.append(ToolCall(call.call_id, name, call.arguments))
        elif kind == "custom_tool_call":
            custom = check(item, CustomCallItem, where)
            name = self._tools.worker_name(custom.name, custom.namespace)
            self._calls.append(ToolCall(custom.call_id, name, freeform_arguments(custom.input)))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = check(item, OutputItem, where)
            self._flush()
            content = _content(output.output, f"{where}.output")
            self._messages.append(Message("tool", content, tool_call_id=output.call_id))
        elif kind == "compaction":
            self._flush()
            self._messages.append(Message("user", _summary(check(item, CompactionItem, where), where)))
        else:
            raise RequestError(
                f"{where}: items of type {str(kind)[:64]!r} cannot be handed to every worker", param=where
            )

    def finish(self) -> list[Message]:
        self._flush()
        return self._messages

    def _message(self, message: MessageItem, where: str) -> None:
        content = _content(message.content, f"{where}.content", refusals=message.role == "assistant")
        if message.role != "assistant":
            self._flush()
            self._messages.append(Message(message.role, content))
            return
        if self._text is not None:
            if _refuses(content):  # instead of the rest
                before = (TextPart(self._text),) if isinstance(self._text, str) else self._text
                content = (*before, *content)
            else:
                self._flush()
        self._text = content

    def _flush(self) -> None:
        if self._text is not None or self._calls:
            self._messages.append(
                Message(
                    "assistant",
                    self._text or "",
                    tool_calls=tuple(self._calls),
                    thoughts=tuple(self._thoughts),
                )
            )
        self._thoughts, self._text, self._calls = [], None, []


def _summary(item: CompactionItem, where: str) -> str:
    summary = unseal_summary(item.encrypted_content)
    if summary is None:
        raise RequestError(f"{where}: another server made that summary, and nobody here can read it", param=where)
    return f"{_SUMMARY}\n\n{summary}"


def _refuses(content: str | tuple[Part, ...]) -> TypeGuard[tuple[Part, ...]]:
    return bool(content) and not isinstance(content, str) and all(isinstance(part, RefusalPart) for part in content)


def _content(content: str | Sequence[dict[str, Any]], where: str, *, refusals: bool = False) -> str | tuple[Part, ...]:
    if isinstance(content, str):
        return content
    parts = tuple(_part(part, f"{where}[{index}]", refusals) for index, part in enumerate(content))
    return parts[0].text if len(parts) == 1 and type(parts[0]) is TextPart else parts


def _part(part: dict[str, Any], where: str, refusals: bool) -> Part:
    kind = part.get("type")
    if kind in ("input_text", "output_text", "text"):
        return TextPart(check(part, TextContent, where).text)
    if kind == "refusal" and refusals:
        return RefusalPart(check(part, RefusalContent, where).refusal)
    if kind == "input_image":
        image = check(part, ImageContent, where)
        if image.image_url is None:
            raise RequestError(
                f"{where}: files are not kept here; send image_url with an address or the data", param=where
            )
        return ImagePart(image.image_url, "high" if image.detail == "original" else image.detail or "auto")
    raise RequestError(f"{where}: parts of type {str(kind)[:64]!r} cannot be handed to every worker", param=where)
