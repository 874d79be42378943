"""Which schemas go to a vendor as they are: those that its guide names, and no others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.schema_subset import Vendor, takes

OBJECT = {"type": "object", "additionalProperties": False}
TREE = {
    **OBJECT,
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "$defs": {
        "node": {
            **OBJECT,
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
        }
    },
}


def of(**properties: Any) -> dict[str, Any]:
    return {**OBJECT, "properties": properties, "required": list(properties)}


@pytest.mark.parametrize(
    ("schema", "openai", "anthropic"),
    [
        (of(a={"type": "string"}, b={"type": ["integer", "null"], "title": "B"}), True, True),
        ({**of(a={"type": "string"}), "required": []}, False, True),
        ({"type": "object", "properties": {}}, False, False),
        (of(a={"type": "object", "properties": {}}), False, False),
        (of(a={"type": "array", "items": of(b={"type": "number", "minimum": 1})}), True, False),
        (of(a={"type": "array", "items": {"type": "string"}, "minItems": 1}), True, True),
        (of(a={"type": "array", "items": {"type": "string"}, "minItems": 2}), True, False),
        (of(a={"type": "string", "pattern": "^x"}), True, False),
        (of(a={"type": "string", "maxLength": 3}), False, False),
        (of(a={"type": "string", "format": "uri"}), False, True),
        (of(a={"type": "string", "format": "regex"}), False, False),
        (of(a={"type": "string", "default": "x"}), False, True),
        (of(a={"oneOf": [{"type": "string"}]}), False, False),
        ({"anyOf": [of(a={"type": "string"})]}, False, True),
        ({"type": "array", "items": {"type": "string"}}, False, True),
        (of(a=True), False, False),
        (TREE, True, False),
        ({**of(a={"$ref": "#/$defs/b"}), "$defs": {"b": {"type": "string"}}}, True, True),
        ({**of(a={"$ref": "#/properties/a"})}, True, False),
    ],
)
def test_what_is_held_to(schema: dict[str, Any], openai: bool, anthropic: bool) -> None:
    assert takes("openai", schema) is openai
    assert takes("anthropic", schema) is anthropic


keywords = st.sampled_from(
    ["type", "properties", "required", "additionalProperties", "items", "anyOf", "$ref", "$defs", "format", "minItems"]
)
values = st.recursive(
    st.none() | st.just(False) | st.just("object") | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keywords, inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(["openai", "anthropic"]), st.dictionaries(keywords, values))
def test_anything_may_be_asked_about(vendor: Vendor, schema: dict[str, Any]) -> None:
    assert takes(vendor, schema) in (True, False)
