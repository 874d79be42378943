"""`/openapi.json`: what FastAPI cannot see by itself, since conversations are answered before it and items and blocks
are read one by one, each by its type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve import schema_answers as answers
from serve import schema_messages as messages
from serve import schema_responses as responses
from serve.auth import Keys

_REF = "#/components/schemas/{model}"
_WHY = {
    400: "The request is wrong; `param` names the field",
    401: "A key is required, or is not one of this server's",
    403: "The key may not use this model",
    404: "There is no such thing",
    405: "The path does not take this method",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "A limit is reached; `Retry-After` says when to come again",
    500: "A fault of this server",
    502: "No worker could answer",
    503: "Too busy, or the workers rest; come again",
    504: "No answer in time",
}
ASKING = (400, 401, 403, 404, 408, 413, 429, 500, 502, 503, 504)
"""The statuses of a request that is answered by workers."""
COUNTING = (400, 401, 404, 408, 413, 500, 503)
LOOKING = (400, 401, 403, 404, 500)

# What is read by its `type`, in requests: fields of a component that hold such things → types → what each must be.
# None: without a type.
_ITEMS: Mapping[str | None, type[BaseModel]] = {
    None: responses.MessageItem,
    "message": responses.MessageItem,
    "reasoning": responses.ReasoningItem,
    "function_call": responses.FunctionCallItem,
    "custom_tool_call": responses.CustomCallItem,
    "function_call_output": responses.OutputItem,
    "custom_tool_call_output": responses.OutputItem,
    "compaction": responses.CompactionItem,
    "item_reference": responses.ReferenceItem,
}
_PARTS: Mapping[str | None, type[BaseModel]] = {
    "input_text": responses.TextContent,
    "output_text": responses.TextContent,
    "refusal": responses.RefusalContent,
    "input_image": responses.ImageContent,
}
_TOOLS: Mapping[str | None, type[BaseModel]] = {
    "function": responses.FunctionToolBody,
    "custom": responses.CustomToolBody,
    "namespace": responses.NamespaceToolBody,
}
_BLOCKS: Mapping[str | None, type[BaseModel]] = {
    "text": messages.TextBlockBody,
    "image": messages.ImageBlockBody,
    "document": messages.DocumentBlockBody,
    "thinking": messages.ThinkingBlockBody,
    "redacted_thinking": messages.RedactedBlockBody,
    "tool_use": messages.ToolUseBlockBody,
    "tool_result": messages.ToolResultBlockBody,
}
_SAID: Mapping[str | None, type[BaseModel]] = {kind: _BLOCKS[kind] for kind in ("text", "image", "document")}
_CLIENT_TOOLS: Mapping[str | None, type[BaseModel]] = {None: messages.ClientToolBody, "custom": messages.ClientToolBody}
_READ_BY_TYPE: Mapping[tuple[str, str], Mapping[str | None, type[BaseModel]]] = {
    **{(body, "input"): _ITEMS for body in ("ResponsesBody", "InputTokensBody", "CompactBody")},
    **{(body, "tools"): _TOOLS for body in ("ResponsesBody", "InputTokensBody", "CompactBody")},
    ("MessageItem", "content"): _PARTS,
    ("OutputItem", "output"): _PARTS,
    ("NamespaceToolBody", "tools"): {kind: _TOOLS[kind] for kind in ("function", "custom")},
    **{(body, "system"): {"text": messages.TextBlockBody} for body in ("CountBody", "MessagesBody")},
    **{(body, "tools"): _CLIENT_TOOLS for body in ("CountBody", "MessagesBody")},
    ("TurnBody", "content"): _BLOCKS,
    ("ToolResultBlockBody", "content"): _SAID,
}
# Where Anthropic's clients come, with a header of their own for the key.
_OF_BOTH = ("/v1/models", "/v1/models/{name}", "/v1/messages", "/v1/messages/count_tokens")
_WISHES = {
    "x-fugu-allow": "Workers that may answer, with commas",
    "x-fugu-deny": "Workers that may not",
    "x-fugu-tags": "Tags that a worker needs, all of them",
    "x-fugu-trace": "1: tell of the decision in the answer's `fugu`",
    "x-fugu-seed": "For `choose: sample`",
}
_LISTING = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
    "order": {"enum": ["asc", "desc"], "default": "desc"},
    "after": {"type": "string"},
}


def told(
    body: type[BaseModel], statuses: tuple[int, ...], error: type[BaseModel] = answers.ErrorBody
) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route: its answer, and its errors."""
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": error, "description": _WHY[status]} for status in statuses
    }
    return {200: {"model": body}, **errors}


def streams(body: type[BaseModel], error: type[BaseModel] = answers.ErrorBody) -> dict[int | str, dict[str, Any]]:
    """The same of a path that answers whole or, asked to, as events."""
    said = told(body, ASKING, error)
    said[200]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return said


def wishes() -> dict[str, Any]:
    """FastAPI's `openapi_extra` of a path that answers conversations: its headers."""
    return {
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": why, "schema": {"type": "string"}}
            for name, why in _WISHES.items()
        ]
    }


def listing() -> dict[str, Any]:
    """FastAPI's `openapi_extra` of a path that lists: its query."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in _LISTING.items()
        ]
    }


def describe(app: FastAPI, models: tuple[str, ...], keys: Keys) -> None:
    """Have `app` write what it is: `models` are the names that are served."""
    own: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        made = app.openapi_schema is None
        schema = own()
        if made:
            _complete(schema, models)
        # Keys can be created while it runs: from then on they are needed.
        schema["security"] = [{"bearer": []}] if keys.needed else []
        for path in _OF_BOTH:
            for operation in schema["paths"][path].values():
                operation["security"] = [{"bearer": []}, {"x-api-key": []}] if keys.needed else []
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(schema: dict[str, Any], models: tuple[str, ...]) -> None:
    components = schema["components"]
    parts = {model for by_type in _READ_BY_TYPE.values() for model in by_type.values()}
    _, inner = models_json_schema(
        [(model, "validation") for model in sorted(parts, key=lambda model: model.__name__)], ref_template=_REF
    )
    schemas = components["schemas"] = inner["$defs"] | components["schemas"]
    for (name, field), by_type in _READ_BY_TYPE.items():
        _array_of(schemas[name]["properties"][field])["items"] = {
            "anyOf": [_typed(kind, model) for kind, model in by_type.items()]
        }
    for name in ("ChatBody", "ResponsesBody", "CompactBody", "CountBody", "MessagesBody"):
        schemas[name]["properties"]["model"]["enum"] = list(models)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for path in ("/healthz", "/readyz"):
        schema["paths"][path]["get"]["security"] = []
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }


def _array_of(field: dict[str, Any]) -> dict[str, Any]:
    choices: list[dict[str, Any]] = field.get("anyOf", [field])
    return next(choice for choice in choices if choice.get("type") == "array")


def _typed(kind: str | None, model: type[BaseModel]) -> dict[str, Any]:
    """A component together with the `type` that it is read by; None: it has none."""
    if kind is None:
        said: dict[str, Any] = {"not": {"required": ["type"]}}
    else:
        said = {"properties": {"type": {"const": kind}}, "required": ["type"]}
    return {"allOf": [{"$ref": _REF.format(model=model.__name__)}, said]}
