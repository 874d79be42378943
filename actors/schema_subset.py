"""Which JSON schemas a vendor's API holds its model to. What goes beyond is refused there with a 400, so that it is
asked for in another way and checked here.

Sources: OpenAI's guide "Structured outputs", on supported schemas (`strict`); Anthropic's guide "Structured outputs",
on JSON schema limitations. Only what the guides name as supported counts: a keyword too few costs a check of ours, one
too many the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

Vendor = Literal["openai", "anthropic"]

_SHARED = frozenset(
    {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref", "$defs"}
    | {"definitions", "$schema", "description", "title", "format", "minItems"}
)
_KEYWORDS: Mapping[Vendor, frozenset[str]] = {
    "openai": _SHARED
    | {"pattern", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "maxItems"},
    "anthropic": _SHARED | {"allOf", "default"},
}
_EVERYWHERE = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
_FORMATS: Mapping[Vendor, tuple[str, ...]] = {"openai": _EVERYWHERE, "anthropic": (*_EVERYWHERE, "uri")}


def takes(vendor: Vendor, schema: Mapping[str, Any]) -> bool:
    """Whether the vendor's API holds its model to this schema. Anything may be asked about; what is no schema is not
    taken."""
    if vendor == "openai" and (schema.get("type") != "object" or "anyOf" in schema):
        return False
    if vendor == "anthropic" and _recursive(schema):
        return False
    return all(_fits(vendor, part) for part in _parts(schema))


def _fits(vendor: Vendor, part: Any) -> bool:
    if not isinstance(part, Mapping) or not part.keys() <= _KEYWORDS[vendor]:
        return False
    if "format" in part and part["format"] not in _FORMATS[vendor]:
        return False
    if vendor == "anthropic" and part.get("minItems", 0) not in (0, 1):
        return False
    if not isinstance(part.get("items", {}), Mapping):
        return False
    kinds = part.get("type")
    is_object = kinds == "object" or "properties" in part or (isinstance(kinds, list) and "object" in kinds)
    if is_object and part.get("additionalProperties") is not False:
        return False
    required = part.get("required", [])
    if not isinstance(required, list) or not isinstance(part.get("properties", {}), Mapping):
        return False
    return vendor == "anthropic" or all(name in required for name in _named(part, "properties"))


def _parts(schema: Any) -> Iterator[Any]:
    """The schema and all that are in it."""
    yield schema
    if not isinstance(schema, Mapping):
        return
    for name in ("properties", "$defs", "definitions"):
        for part in _named(schema, name).values():
            yield from _parts(part)
    for name in ("anyOf", "allOf"):
        several = schema.get(name)
        for part in several if isinstance(several, list) else ():
            yield from _parts(part)
    if isinstance(schema.get("items"), Mapping):
        yield from _parts(schema["items"])


def _named(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = schema.get(name)
    return found if isinstance(found, Mapping) else {}


def _recursive(schema: Mapping[str, Any]) -> bool:
    """Whether a definition refers to itself, by way of others too, or anything to what is no definition."""
    spaces = ("$defs", "definitions")
    uses = {f"#/{space}/{name}": _uses(part) for space in spaces for name, part in _named(schema, space).items()}
    if not _uses(schema) <= uses.keys():
        return True
    for start in uses:
        reached: set[str] = set()
        pending = [start]
        while pending:
            new = uses[pending.pop()] - reached
            reached |= new
            pending += new
        if start in reached:
            return True
    return False


def _uses(schema: Any) -> set[str]:
    return {str(part["$ref"]) for part in _parts(schema) if isinstance(part, Mapping) and "$ref" in part}
