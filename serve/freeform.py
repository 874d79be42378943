"""Freeform (`custom`) tools of OpenAI's dialects: their input is plain text. Every worker is told of them as functions
with one text argument, and what it writes is taken out of there again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from actors.messages import ToolSpec

INPUT = "input"

_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {INPUT: {"type": "string", "description": "The tool's whole input, as it is."}},
    "required": [INPUT],
    "additionalProperties": False,
}


def freeform_tool(name: str, description: str | None, syntax: str | None, grammar: str | None) -> ToolSpec:
    """The function that a worker sees; a grammar is told in words."""
    told = description or ""
    if grammar:
        rule = f"The input must follow this {syntax or 'lark'} grammar:\n{grammar}"
        told = f"{told}\n\n{rule}" if told else rule
    return ToolSpec(name, told, _PARAMETERS)


def freeform_arguments(input: str) -> str:
    """The input as the worker wrote it."""
    return orjson.dumps({INPUT: input}).decode()


def freeform_input(arguments: str) -> str:
    """What a worker wrote for a freeform tool. A worker that wrote something else is taken at its word."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    if isinstance(value, dict) and isinstance(value.get(INPUT), str):
        return str(value[INPUT])
    return value if isinstance(value, str) else arguments
