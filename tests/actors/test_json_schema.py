"""Schemas made to do harm: refused, or checked against in bounded time, and never a byte fetched."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator

from actors.errors import RequestError
from actors.json_schema import LONGEST_PATTERN, MOST_BYTES, MOST_DEPTH, MOST_NODES, JsonSchema

# What a check may take of the processor; the bounds in the code are for a tenth of it.
SECONDS = 10.0


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def doubling(times: int) -> dict[str, Any]:
    definitions = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(times)}
    return {"$defs": {**definitions, f"d{times}": {"type": "object"}}, "$ref": "#/$defs/d0"}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("a loop", {"$ref": "#"}, "leads back to itself"),
    ("a longer loop", {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}},
                       "$ref": "#/$defs/a"}, "leads back to itself"),
    ("doubling references", doubling(40), "takes too long"),
    ("too deep", nested(MOST_DEPTH), "nested too deeply"),
    ("deeper than anything", nested(5000), "nested too deeply"),
    ("too many alternatives", {"enum": list(range(MOST_NODES + 1))}, "parts"),
    ("alternatives to compare", {"$schema": "http://json-schema.org/draft-07/schema#",
                                 "enum": [{"a": n} for n in range(4000)]}, "lists that are too long"),
    ("too large", {"enum": ["x" * MOST_BYTES]}, "bytes"),
    ("a file", {"$ref": "file:///etc/passwd"}, "nothing is fetched"),
    ("nowhere", {"properties": {"a": {"$ref": "#/$defs/none"}}}, "nothing is fetched"),
    ("nowhere, hidden", {"not": {"items": {"$dynamicRef": "#none"}}}, "nothing is fetched"),
    ("not a pattern", {"pattern": "("}, "pattern that is none"),
    ("not a pattern for names", {"patternProperties": {"[": {}}}, "pattern that is none"),
    ("a pattern that nests", {"pattern": "(" * 500 + ")" * 500}, "pattern that is none"),
    ("a long pattern", {"pattern": "(?:a|b)" * LONGEST_PATTERN}, "characters"),
    ("another dialect within", {"items": {"$schema": "http://json-schema.org/draft-07/schema#"}}, "dialect"),
    ("unbounded evaluation", {"patternProperties": {"a": {}}, "unevaluatedProperties": False}, "no bound"),
    ("no type", {"type": "nonsense"}, "not valid at"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "why"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_refused_at_once(schema: dict[str, Any], why: str) -> None:
    began = time.process_time()
    with pytest.raises(RequestError, match=why) as caught:
        JsonSchema(schema)
    assert time.process_time() - began < SECONDS
    assert (caught.value.param, caught.value.http_status) == ("response_format", 400)
    assert len(caught.value.message) < 300


PATTERNS = [r"^(a|a)*$", r"^(a|aa)+$", r"(a?){40}a{40}b", r"^(?=(a+))(a|a)*\1$", r"((((a{1,99}){1,99}){1,99}){1,99})b"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("where", ["pattern", "patternProperties", "propertyNames", "additionalProperties"])
def test_a_pattern_that_backtracks_has_an_end(pattern: str, where: str) -> None:
    schema: dict[str, Any] = {
        "pattern": {"pattern": pattern},
        "patternProperties": {"patternProperties": {pattern: {}}},
        "propertyNames": {"propertyNames": {"pattern": pattern}},
        "additionalProperties": {"patternProperties": {pattern: {}}, "additionalProperties": False},
    }[where]
    text = "a" * 3000 + "!"
    value: Any = text if where == "pattern" else {text: 1, text + "?": 2}
    checked = JsonSchema(schema)
    began = time.process_time()
    try:
        checked.fault(value)
    except RequestError as error:
        assert "takes too long to match" in error.message  # noqa: PT017
    assert time.process_time() - began < SECONDS


ALTERNATIVES = {"anyOf": [{"items": {"anyOf": [{"items": {"anyOf": [{"type": "null"}] * 20}}] * 20}}] * 10}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"uniqueItems": True}, [{"a": n} for n in range(20_000)]),
        ({"items": {"enum": [str(n) for n in range(9000)]}}, ["x"] * 50_000),
        ({"allOf": [{"type": "string"}] * 600}, [["long"] * 100] * 300),
        (ALTERNATIVES, [["x"] * 12] * 12),
        ({"$defs": {"t": {"properties": {"a": {"anyOf": [{"$ref": "#/$defs/t"}] * 9}}, "required": ["b"]}},
          "$ref": "#/$defs/t"}, {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}}}),
    ],
    ids=["comparisons", "many alternatives", "long messages", "alternatives of alternatives", "a tree of references"],
)  # fmt: skip
def test_an_answer_cannot_make_a_check_endless(schema: dict[str, Any], value: Any) -> None:
    checked = JsonSchema(schema)
    began = time.process_time()
    with pytest.raises(RequestError, match="takes too long to check"):
        checked.fault(value)
    assert time.process_time() - began < SECONDS


def test_a_deep_answer_to_a_schema_that_refers_to_itself() -> None:
    tree = JsonSchema({"type": "object", "properties": {"in": {"$ref": "#"}}, "additionalProperties": False})
    value: dict[str, Any] = {}
    for _ in range(20):
        value = {"in": value}
    assert tree.fault(value) is None
    for _ in range(900):
        value = {"in": value}
    with pytest.raises(RequestError, match="nested too deeply"):
        tree.fault(value)


@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
def test_nothing_is_fetched(keyword: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"
        for schema in (
            {keyword: address},
            {"$id": address, keyword: "other.json"},
            {"not": {"items": {keyword: address}}},
        ):
            with pytest.raises(RequestError, match="nothing is fetched"):
                JsonSchema(schema)
        JsonSchema({"$id": address, "$schema": "http://json-schema.org/draft-07/schema#", "type": "object"})
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_large_honest_schema_passes() -> None:
    properties = {f"p{n}": {"type": "string", "enum": [f"{n}.{m}" for m in range(10)]} for n in range(300)}
    schema = JsonSchema({"type": "object", "properties": properties, "required": list(properties)})
    assert schema.fault({f"p{n}": f"{n}.3" for n in range(300)}) is None
    rows = JsonSchema({"items": {"$ref": "#/$defs/row"}, "$defs": {"row": {"properties": {"n": {"minimum": 0}}}}})
    assert rows.fault([{"n": n} for n in range(5000)]) is None


SCHEMAS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "array", "string"]),
        "pattern": st.sampled_from(["^a", "b$", "[0-9]+", "^(?!a)"]),
        "enum": st.lists(st.sampled_from(["a", "ab", 1, True, None]), min_size=1, unique_by=repr),
        "uniqueItems": st.booleans(),
        "required": st.lists(st.sampled_from("ab"), unique=True),
        "additionalProperties": st.one_of(st.booleans(), st.just({"type": "string"})),
        "properties": st.just({"a": {"type": "integer"}}),
        "patternProperties": st.just({"^b": {"type": "boolean"}}),
    },
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.text("ab1", max_size=3))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "b", "ba", "c"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(SCHEMAS, VALUES, st.sampled_from([Draft7Validator, Draft202012Validator]))
def test_it_judges_as_the_library_does(schema: dict[str, Any], value: Any, dialect: Any) -> None:
    named = {"$schema": dialect.META_SCHEMA["$schema"], **schema}
    assert (JsonSchema(named).fault(value) is None) == dialect(schema).is_valid(value)
