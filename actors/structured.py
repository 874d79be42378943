"""Answers that must be JSON: asked for natively where the worker's API has it, checked, and repaired once.

`native` says what the worker's API does with a schema: `trusted` holds the model to it while it writes, `sent` is told
of it but may ignore it (servers that are compatible with OpenAI's differ), `none` does not know the field, or refuses
this schema, which is then put into the conversation. What is not trusted is checked before anybody sees a byte of it;
an answer that fails gets one turn of repair by the same worker.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson

from actors.config import WorkerSpec
from actors.messages import ChatReply, ChatRequest, Message, ResponseFormat
from actors.schema_subset import takes

Native = Literal["trusted", "sent", "none"]

_FENCED = re.compile(r"\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*", re.DOTALL)
_SHOWN_CHARACTERS = 2000


def native(spec: WorkerSpec, wanted: ResponseFormat | None = None) -> Native:
    """What becomes of what is wanted at this worker; without it, of a schema that its API takes."""
    match spec.provider:
        case "vllm" | "gemini":
            return "trusted"
        case "anthropic":
            return _at_anthropic(spec, wanted)
        case "openai":
            if not official(spec):
                return "sent"
            held = wanted is None or wanted.kind != "json_schema" or strict(spec, wanted.strict, wanted.schema)
            return "trusted" if held else "sent"
        case "replay":
            return "sent"  # it knows conversations by their words, so nothing may be added
        case "local":
            return "none"


def _at_anthropic(spec: WorkerSpec, wanted: ResponseFormat | None) -> Native:
    from actors.adapters.anthropic import generation

    known = generation(spec.model)
    if wanted is not None and wanted.kind != "json_schema":
        return "none"  # it has no mode for JSON of any form
    if known is None:
        return "sent"
    if known < (4, 1) or (wanted is not None and not takes("anthropic", wanted.schema or {})):
        return "none"
    return "trusted"


def official(spec: WorkerSpec) -> bool:
    """Whether it is a server of OpenAI's own, or of Azure's."""
    return (urlsplit(spec.url).hostname or "").endswith(("openai.com", "azure.com"))


def strict(spec: WorkerSpec, asked: bool | None, schema: Mapping[str, Any] | None) -> bool | None:
    """What a server of OpenAI's dialect is told of `strict`: OpenAI's own refuse it beside a schema that they cannot
    hold the model to, and take that without."""
    fits = not asked or not official(spec) or takes("openai", schema or {})
    return asked if fits else None


class Shape:
    """What an answer must be: JSON, and of a schema where there is one.

    Raises:
        RequestError: see `actors.json_schema.JsonSchema`.
    """

    def __init__(self, wanted: ResponseFormat) -> None:
        self.schema: Mapping[str, Any] | None = wanted.schema if wanted.kind == "json_schema" else None
        self._checked: Any = None
        if self.schema is not None:
            # Requests without a schema, nearly all, do without it.
            from actors.json_schema import JsonSchema

            self._checked = JsonSchema(self.schema)

    def read(self, reply: ChatReply) -> tuple[ChatReply, tuple[str, str] | None]:
        """The reply, bare of a fence around its JSON, and what is wrong with it: (in words that quote nothing, in words
        for the worker). An answer that was cut off, was refused or calls tools is nobody's JSON, and not wrong."""
        if reply.finish_reason != "stop" or reply.tool_calls:
            return reply, None
        fenced = _FENCED.fullmatch(reply.text)
        text = fenced[1] if fenced else reply.text
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            return reply, ("it is not JSON", f"It is not valid JSON: {error.msg} at character {error.pos}.")
        if text != reply.text:
            reply = replace(reply, text=text)
        if self._checked is None:
            wrong = None if isinstance(value, dict) else ("it is not a JSON object", "It is not a JSON object.")
            return reply, wrong
        return reply, self._wrong(value)

    async def checked(self, reply: ChatReply) -> tuple[ChatReply, tuple[str, str] | None]:
        """`read`, without the event loop waiting for it."""
        return self.read(reply) if self.schema is None else await asyncio.to_thread(self.read, reply)

    def _wrong(self, value: Any) -> tuple[str, str] | None:
        error = self._checked.fault(value)
        if error is None:
            return None
        return f"at {error.json_path} ({error.validator})", f"At {error.json_path}: {error.message}"[:_SHOWN_CHARACTERS]

    def asked(self, request: ChatRequest) -> ChatRequest:
        """The request with the shape told in the conversation, for a worker whose API does not know of it."""
        if self.schema is None:
            told = "Answer with one JSON object and nothing else."
        else:
            schema = orjson.dumps(dict(self.schema)).decode()
            told = f"Answer with JSON that satisfies this schema, and nothing else:\n{schema}"
        own = 0
        while own < len(request.messages) and request.messages[own].role in ("system", "developer"):
            own += 1
        messages = (*request.messages[:own], Message("system", told), *request.messages[own:])
        return request.with_(messages=messages, response_format=None)


async def shape_of(request: ChatRequest) -> Shape | None:
    """What the answer must be; None where it may be any text. The event loop does not wait for a large schema.

    Raises:
        RequestError: as `Shape`.
    """
    wanted = request.response_format
    if wanted is None or wanted.kind == "text":
        return None
    return Shape(wanted) if wanted.schema is None else await asyncio.to_thread(Shape, wanted)


def repaired(request: ChatRequest, reply: ChatReply, wrong: str) -> ChatRequest:
    """The request that asks the worker to put its answer right."""
    told = f"{wrong}\nGive the whole answer again as JSON that satisfies the schema, and nothing else."
    messages = (*request.messages, Message("assistant", reply.text or "…"), Message("user", told))
    return request.with_(messages=messages)


def joined(first: ChatReply, second: ChatReply) -> ChatReply:
    """The second reply with the cost of both."""
    costs = (first.cost_usd, second.cost_usd)
    timing = replace(
        second.timing,
        queued_s=first.timing.queued_s + second.timing.queued_s,
        total_s=first.timing.total_s + second.timing.total_s,
    )
    return replace(
        second,
        usage=first.usage + second.usage,
        cost_usd=None if None in costs else sum(cost for cost in costs if cost is not None),
        attempts=first.attempts + second.attempts,
        timing=timing,
        estimated=first.estimated or second.estimated,
    )
