"""Gemini `generateContent` and `streamGenerateContent` (v1beta).

Source: Google's API reference "Generating content" and its guides "Thinking", "Thought signatures", "Structured
outputs" and "Function calling". What a model takes depends on its generation, read from its name
(`gemini-2.5-flash`): thinking levels from 3 on, budgets in 2.5, neither before. A name without a number is taken
for a current model.
"""

from __future__ import annotations

import mimetypes
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
    tool_call_id,
)
from actors.adapters.remote import RemoteAdapter
from actors.adapters.upstream import Upstream
from actors.config import WorkerSpec
from actors.messages import ChatRequest, FinishReason, ImagePart, Message, Usage

# Callers' fields as this API calls them, in `generationConfig`; and those it takes at the top.
_CONFIG = {"top_k": "topK", "presence_penalty": "presencePenalty", "frequency_penalty": "frequencyPenalty"}
ACCEPTED = frozenset({"safetySettings", "cachedContent"})
_OURS = frozenset({"contents", "systemInstruction", "tools", "toolConfig", "generationConfig"})

_FINISH: Mapping[str, FinishReason] = {
    "MAX_TOKENS": "length",
    "SAFETY": "content_filter",
    "RECITATION": "content_filter",
    "LANGUAGE": "content_filter",
    "BLOCKLIST": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "SPII": "content_filter",
    "IMAGE_SAFETY": "content_filter",
}
# The model's own mistakes in calling a tool; another attempt may do better.
_MISCALLED = frozenset({"MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS"})
_MODES = {"auto": "AUTO", "none": "NONE", "required": "ANY", "named": "ANY"}

_LEVEL = {"minimal": "minimal", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_BUDGET = {"minimal": 1024, "low": 1024, "medium": 8192, "high": 24576, "xhigh": 24576, "max": 24576}
# "Thought signatures": what stands for the signature of a call that was not made by this model in this place.
_UNSIGNED = "skip_thought_signature_validator"


class GeminiAdapter(RemoteAdapter):
    """The path says whether it is streamed."""

    def __init__(self, spec: WorkerSpec, transport: httpx.AsyncBaseTransport) -> None:
        auth = {"x-goog-api-key": spec.api_key.get_secret_value()} if spec.api_key else {}
        model = f"/{spec.model}" if "/" in spec.model else f"/models/{spec.model}"
        super().__init__(
            spec,
            transport,
            auth,
            path=f"{model}:generateContent",
            stream_path=f"{model}:streamGenerateContent?alt=sse",
            body=request_body,
            reader=_Reader,
        )


def generation(model: str) -> tuple[int, int] | None:
    """(2, 5) for `gemini-2.5-flash`; None for a name without a number."""
    found = re.search(r"gemini-(\d{1,2})(?:\.(\d{1,2}))?", model)
    return (int(found[1]), int(found[2] or 0)) if found else None


def request_body(spec: WorkerSpec, request: ChatRequest) -> tuple[dict[str, Any], list[str]]:
    """The body of a call, plain or streamed, and the names of fields that were dropped."""
    known = generation(spec.model)
    system, messages = split_system(request.messages)
    dropped: list[str] = []
    config = given(
        temperature=request.temperature,
        topP=request.top_p,
        maxOutputTokens=request.max_tokens,
        seed=request.seed,
        stopSequences=list(request.stop) or None,
    )
    wanted = request.response_format
    if wanted is not None and wanted.kind != "text":
        config["responseMimeType"] = "application/json"
        if wanted.kind == "json_schema" and wanted.schema is not None:
            config["responseJsonSchema"] = wanted.schema
    if (thinking := _thinking(spec.model, known, request.reasoning_effort, dropped)) is not None:
        config["thinkingConfig"] = thinking
    body: dict[str, Any] = {"contents": _contents(messages, signed=known is None or known >= (3, 0))}
    if system:
        body["systemInstruction"] = {"parts": [{"text": system}]}
    _tools(body, request, dropped)
    for name, value in request.extra.items():
        if name in _CONFIG:
            config[_CONFIG[name]] = value
        elif name in ACCEPTED or (name in spec.accepts and name not in _OURS):
            body[name] = value
        else:
            dropped.append(name)
    if config:
        body["generationConfig"] = config
    return body, dropped


def _thinking(
    model: str, known: tuple[int, int] | None, effort: str | None, dropped: list[str]
) -> dict[str, Any] | None:
    if effort is None:
        return None
    if (effort != "none" and effort not in _LEVEL) or (known is not None and known < (2, 5)):
        dropped.append("reasoning_effort")
        return None
    # The larger models cannot do without thinking; the least they take stands for none.
    large = "pro" in model
    if known == (2, 5):
        if effort == "none":
            return {"thinkingBudget": 128 if large else 0}
        return {"thinkingBudget": _BUDGET[effort], "includeThoughts": True}
    if effort in ("none", "minimal"):
        return {"thinkingLevel": "low" if large else "minimal"}
    return {"thinkingLevel": _LEVEL[effort], "includeThoughts": True}


def _tools(body: dict[str, Any], request: ChatRequest, dropped: list[str]) -> None:
    if request.tools:
        declarations = [
            given(
                name=tool.name,
                description=tool.description or tool.name,
                parametersJsonSchema=dict(tool.parameters) or None,
            )
            for tool in request.tools
        ]
        body["tools"] = [{"functionDeclarations": declarations}]
    choice = request.tool_choice
    if choice is not None and request.tools:
        calling: dict[str, Any] = {"mode": _MODES[choice.mode]}
        if choice.mode == "named":
            calling["allowedFunctionNames"] = [choice.name]
        body["toolConfig"] = {"functionCallingConfig": calling}
    elif choice is not None and choice.mode != "none":
        dropped.append("tool_choice")
    if any(tool.strict for tool in request.tools):
        dropped.append("tools.strict")


def _contents(messages: list[Message], *, signed: bool) -> list[dict[str, Any]]:
    """Turns of `user` and `model`, merged where the same speaks twice. Results name their function, not a call."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = "model" if message.role == "assistant" else "user"
        parts = _parts(message, names, signed)
        if turns and turns[-1]["role"] == role:
            turns[-1]["parts"] += parts
        elif parts:
            turns.append({"role": role, "parts": parts})
    return turns


def _parts(message: Message, names: Mapping[str, str], signed: bool) -> list[dict[str, Any]]:
    images = [_image(image) for image in message.images]
    if message.role == "tool":
        name = names.get(message.tool_call_id or "", message.name or "tool")
        response = {"error": message.text} if message.failed else _result(message.text)
        return [{"functionResponse": {"name": name, "response": response}}, *images]
    parts: list[dict[str, Any]] = []
    for part in parts_of(message):
        parts.append(_image(part) if isinstance(part, ImagePart) else {"text": part.text})
    for number, call in enumerate(message.tool_calls):
        item: dict[str, Any] = {"functionCall": {"name": call.name, "args": arguments_object(call)}}
        # Only the first of parallel calls carries a signature.
        if signed and number == 0:
            item["thoughtSignature"] = _UNSIGNED
        parts.append(item)
    return parts


def _image(image: ImagePart) -> dict[str, Any]:
    inline = data_url(image.url)
    if inline is not None:
        return {"inlineData": {"mimeType": inline[0], "data": inline[1]}}
    kind = mimetypes.guess_type(httpx.URL(image.url).path)[0]
    return {"fileData": given(mimeType=kind, fileUri=image.url)}


def _result(text: str) -> dict[str, Any]:
    """A function's result must be an object; anything else becomes its `result`."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = text
    return value if isinstance(value, dict) else {"result": value}


class _Reader:
    """Reads replies; a stream is a sequence of them, each with the next parts, and has no end of its own beside the
    connection's: the answer is complete once a finish reason has come."""

    done = False

    def __init__(self, upstream: Upstream, request: ChatRequest) -> None:
        self.answer = Assembler()
        self.complete = False
        self._upstream = upstream
        self._request = request

    def read(self, data: str) -> None:
        self._take(self._upstream.event_object(data))

    def take_whole(self, reply: dict[str, Any]) -> None:
        self._take(reply)
        if not self.complete:
            raise self._upstream.malformed("it has neither an answer nor a reason for none")

    def _take(self, reply: dict[str, Any]) -> None:
        self.answer.named(reply.get("modelVersion"))
        for candidate in (reply.get("candidates") or ())[:1]:
            for part in (candidate.get("content") or {}).get("parts") or ():
                self._part(part)
            if reason := candidate.get("finishReason"):
                self._finish(reason)
        if (reply.get("promptFeedback") or {}).get("blockReason"):
            self.answer.finish = "content_filter"
            self.complete = True
        if usage := reply.get("usageMetadata"):
            self._count(usage)

    def _part(self, part: dict[str, Any]) -> None:
        if call := part.get("functionCall"):
            if self._request.parallel_tool_calls is False and self.answer.tools:
                return  # the API has no field for it; a model that needs the others calls them once it has the first
            arguments = orjson.dumps(call.get("args") or {}).decode()
            number = len(self.answer.tools)
            id = call.get("id") or tool_call_id(self._request, number, call["name"], arguments)
            self.answer.open_tool(id, call["name"], arguments)
        elif part.get("thought"):
            self.answer.add_reasoning(part.get("text") or "")
        else:
            self.answer.add_text(part.get("text") or "")

    def _finish(self, reason: str) -> None:
        if reason in _MISCALLED and not self.answer.tools:
            raise self._upstream.malformed(f"the model failed to call a tool ({reason})")
        self.answer.finish = _FINISH.get(reason, "stop")
        self.complete = True

    def _count(self, usage: dict[str, Any]) -> None:
        """The prompt's count includes cached tokens; thoughts are counted beside the answer."""
        thoughts = count(usage.get("thoughtsTokenCount"))
        self.answer.usage = Usage(
            input_tokens=count(usage.get("promptTokenCount")) + count(usage.get("toolUsePromptTokenCount")),
            output_tokens=count(usage.get("candidatesTokenCount")) + thoughts,
            cached_input_tokens=count(usage.get("cachedContentTokenCount")),
            reasoning_tokens=thoughts,
        )
