"""A caller's JSON schema: checked before it is used, and what is checked against it checked in bounded time.

A schema can be written to do harm: a `pattern` that backtracks for years, references that lead back to themselves or
double at every step, thousands of alternatives, an address to fetch. So a schema has a size; its references lead to
itself, and nothing is ever fetched; every keyword that is evaluated is counted, and patterns have a clock. What goes
beyond is the schema's fault (`RequestError`), never a worker's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any

import orjson
import regex
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import extend, validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from actors.errors import RequestError

MOST_BYTES = 256 * 1024
MOST_NODES = 10_000
MOST_DEPTH = 64
# Arrays with other things than strings in them may be compared each with each.
MOST_COMPARISONS = 500_000
LONGEST_PATTERN = 1024
# A keyword takes some 2 µs, so this is a fraction of a second. An honest answer takes a few thousand.
MOST_STEPS = 100_000
# Keywords within keywords. Python's own limit must not be met: the library's tables panic there.
MOST_WITHIN = 100
PATTERN_SECONDS = 0.5

_CHARACTERS_PER_STEP = 64
_STEPS_PER_ERROR = 8
_WHERE = "response_format"


class JsonSchema:
    """Raises:
    RequestError: it is not a valid schema, refers to something outside itself, or is made so that checking against
        it has no bound; says where.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        plain = _measured(schema)
        kind = validator_for(plain, default=Draft202012Validator)
        try:
            kind.check_schema(plain, format_checker=None)
            # Without its dialect's name every part is read by the class given here, and not by the dialect's own.
            root = {key: value for key, value in plain.items() if key != "$schema"}
            _check_parts(root, kind.META_SCHEMA["$schema"])
        except SchemaError as error:
            where = "".join(f"[{part!r}]" for part in error.absolute_path)
            raise _wrong(f"is not valid at {where or 'its root'} ({error.validator})") from None
        except RecursionError:
            raise _too_deep() from None
        self._validator: Any = _counted(kind)(root, registry=Registry())
        # References that lead back without going into the value do so for every value.
        self.fault({})

    def fault(self, value: Any) -> ValidationError | None:
        """What is most to blame where `value` is not of this schema; else None.

        Raises:
            RequestError: the schema cannot be checked against in bounded time.
        """
        held = _budget.set(_Budget())
        try:
            error: ValidationError | None = best_match(self._validator.iter_errors(value))
        finally:
            _budget.reset(held)
        return error


class _Budget:
    """What one check may still take."""

    def __init__(self) -> None:
        self.steps = MOST_STEPS
        self.within = 0
        # Of this thread's own work: a machine that is busy with other things is not the pattern's fault.
        self.pattern_seconds = PATTERN_SECONDS

    def take(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise _wrong("takes too long to check: its alternatives or references multiply")

    def found(self, pattern: str, text: str) -> bool:
        """Whether a pattern is somewhere in a text."""
        self.take(1 + len(text) // _CHARACTERS_PER_STEP)
        began = time.thread_time()
        try:
            found = _compiled(pattern).search(text, timeout=max(self.pattern_seconds, 0.001), concurrent=True)
        except TimeoutError:
            raise _wrong("has a pattern that takes too long to match") from None
        self.pattern_seconds -= time.thread_time() - began
        return found is not None


_budget: ContextVar[_Budget] = ContextVar("budget")


def _measured(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in plain types, if it is not too large."""
    try:
        packed = orjson.dumps(dict(schema))
    except orjson.JSONEncodeError:
        raise _too_deep() from None
    if len(packed) > MOST_BYTES:
        raise _wrong(f"has more than {MOST_BYTES} bytes")
    plain: dict[str, Any] = orjson.loads(packed)
    nodes = comparisons = depth = 0
    level: list[Any] = [plain]
    while level:
        depth += 1
        if depth > MOST_DEPTH:
            raise _too_deep()
        inner: list[Any] = []
        for each in level:
            parts = each.values() if isinstance(each, dict) else each
            nodes += len(parts)
            if isinstance(each, list) and not all(isinstance(part, str) for part in each):
                comparisons += len(each) ** 2
            inner += [part for part in parts if isinstance(part, (dict, list))]
        if nodes > MOST_NODES:
            raise _wrong(f"has more than {MOST_NODES} parts")
        if comparisons > MOST_COMPARISONS:
            raise _wrong("has lists that are too long")
        level = inner
    return plain


def _check_parts(schema: dict[str, Any], dialect: str) -> None:
    """Every subschema's references and patterns."""
    specification = specification_with(dialect)
    resource: Resource[Any] = specification.create_resource(schema)
    resolver = Registry().with_resource("", resource).resolver()
    pending = [(resource, resolver.in_subresource(resource))]
    seen: set[str] = set()
    while pending:
        part, resolver = pending.pop()
        if isinstance(part.contents, dict):
            seen |= part.contents.keys()
            _check_part(part.contents, resolver)
        pending += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]
    if "patternProperties" in seen and seen & {"unevaluatedProperties", "unevaluatedItems"}:
        raise _wrong("uses patternProperties together with unevaluatedProperties, which has no bound in time")


def _check_part(part: dict[str, Any], resolver: Any) -> None:
    for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
        target = part.get(keyword)
        if not isinstance(target, str):
            continue
        try:
            resolver.lookup(target)
        except Unresolvable:
            raise _wrong(f"refers to {target[:80]!r}, outside itself or nowhere; nothing is fetched") from None
    if "$schema" in part:
        raise _wrong("names a dialect ($schema) within itself")
    patterns = list(part["patternProperties"]) if isinstance(part.get("patternProperties"), dict) else []
    for pattern in (*patterns, part.get("pattern")):
        if isinstance(pattern, str):
            _compiled(pattern)


def _compiled(pattern: str) -> Any:
    # `regex` has what `re` lacks: a clock. It keeps what it compiled.
    if len(pattern) > LONGEST_PATTERN:
        raise _wrong(f"has a pattern of more than {LONGEST_PATTERN} characters")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError):
        raise _wrong(f"has a pattern that is none: {pattern[:80]!r}") from None


Check = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]


@cache
def _counted(kind: Any) -> Any:
    """A dialect's validator whose every keyword is counted."""
    own: dict[str, Check] = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    checks = {name: _counting(check) for name, check in (kind.VALIDATORS | own).items() if name in kind.VALIDATORS}
    return extend(kind, checks)


def _counting(check: Check) -> Check:
    def counting(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        budget = _budget.get()
        budget.take(1 + _comparisons(value, instance))
        if budget.within >= MOST_WITHIN:
            raise _too_deep()
        budget.within += 1
        try:
            for error in check(validator, value, instance, schema) or ():
                budget.take(_STEPS_PER_ERROR)
                if not error.relative_schema_path:  # made here, with the value in its message
                    budget.take(len(error.message) // _CHARACTERS_PER_STEP)
                yield error
        finally:
            budget.within -= 1

    return counting


def _comparisons(value: Any, instance: Any) -> int:
    """An upper bound of the steps that one keyword takes by itself: `enum` and `required` go through their list,
    `uniqueItems` may compare each item with each."""
    if isinstance(value, list):
        return len(value) // 8
    return len(instance) ** 2 // 64 if value is True and isinstance(instance, list) else 0


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string") and not _budget.get().found(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, inner in patterns.items():
        for name, value in instance.items():
            if _budget.get().found(pattern, name):
                yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    budget = _budget.get()
    extras = [
        name for name in instance if name not in named and not any(budget.found(pattern, name) for pattern in patterns)
    ]
    if validator.is_type(allowed, "object"):
        for name in extras:
            yield from validator.descend(instance[name], allowed, path=name)
    elif not allowed and extras:
        yield ValidationError(f"Additional properties are not allowed ({', '.join(map(repr, sorted(extras)))})")


def _wrong(what: str) -> RequestError:
    return RequestError(f"{_WHERE}: the schema {what}", param=_WHERE)


def _too_deep() -> RequestError:
    return _wrong("is nested too deeply, or leads back to itself")
