"""The body of `POST /v1/chat/completions` as OpenAI defines it, and our `fugu` field in it.

Types are strict (no "1" for 1, no NaN), so that a mistake is told to the caller and not guessed at; fields we do not
know are kept in `model_extra` and passed on to workers that accept them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.errors import RequestError

Count = Annotated[int, Field(gt=0, le=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
MOST_NESTED = 100
Names = Annotated[tuple[str, ...], Field(strict=False, max_length=256)]


class Open(BaseModel):
    """Strict types; unknown fields are kept."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Closed(BaseModel):
    """Strict types; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPartBody(Open):
    type: Literal["text"]
    text: str


class ImageUrlBody(Open):
    url: Annotated[str, Field(pattern=r"^(https?://|data:image/[A-Za-z0-9.+-]+;base64,)")]
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePartBody(Open):
    type: Literal["image_url"]
    image_url: ImageUrlBody


class RefusalPartBody(Open):
    type: Literal["refusal"]
    refusal: str


PartBody = Annotated[TextPartBody | ImagePartBody | RefusalPartBody, Field(discriminator="type")]


class FunctionCallBody(Open):
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class ToolCallBody(Open):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: FunctionCallBody


class CustomCallBody(Open):
    name: Annotated[str, Field(min_length=1)]
    input: str


class CustomToolCallBody(Open):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["custom"]
    custom: CustomCallBody


class MessageBody(Open):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[PartBody] | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody | CustomToolCallBody] | None = None
    tool_call_id: str | None = None


class FunctionBody(Open):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Open):
    type: Literal["function"]
    function: FunctionBody


class GrammarRuleBody(Open):
    definition: str
    syntax: str | None = None


class CustomFormatBody(Open):
    type: Literal["text", "grammar"]
    grammar: GrammarRuleBody | None = None


class CustomBody(Open):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    format: CustomFormatBody | None = None


class ChatCustomToolBody(Open):
    """A tool whose input is plain text."""

    type: Literal["custom"]
    custom: CustomBody


AnyToolBody = Annotated[ToolBody | ChatCustomToolBody, Field(discriminator="type")]


class NamedFunctionBody(Open):
    name: Annotated[str, Field(min_length=1)]


class NamedToolBody(Open):
    type: Literal["function"]
    function: NamedFunctionBody


class NamedCustomToolBody(Open):
    type: Literal["custom"]
    custom: NamedFunctionBody


AnyNamedBody = Annotated[NamedToolBody | NamedCustomToolBody, Field(discriminator="type")]


class SomeToolsBody(Open):
    mode: Literal["auto", "required"]
    tools: list[AnyNamedBody]


class AllowedToolsBody(Open):
    """Only these tools may be called, though more are defined."""

    type: Literal["allowed_tools"]
    allowed_tools: SomeToolsBody


class JsonSchemaBody(Open):
    name: str = "response"
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormatBody(Open):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaBody | None = None


class StreamOptionsBody(Open):
    include_usage: bool | None = None


class FuguBody(Closed):
    """Constraints on the pool and what to tell about the decision. `tags`: a worker needs all of them. `show_turns`:
    the turns of a `fugu-trinity` session (unless asked for, they do not), or plan and steps of `fugu-ultra` (unless
    suppressed, they do) come as reasoning. What follows is for `fugu-ultra`: how often and how deep it may plan, and
    what the request may take."""

    allow: Names | None = None
    deny: Names = ()
    tags: Names = ()
    trace: bool = False
    show_turns: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    choose: Literal["argmax", "sample"] | None = None
    max_rounds: Annotated[int, Field(ge=1, le=8)] | None = None
    max_recursion: Annotated[int, Field(ge=0, le=3)] | None = None
    max_steps: Annotated[int, Field(ge=1, le=5)] | None = None
    deadline_s: Annotated[float, Field(gt=0, strict=False)] | None = None
    budget_usd: Annotated[float, Field(gt=0, strict=False)] | None = None
    budget_tokens: Count | None = None
    max_calls: Count | None = None


class ChatBody(Open):
    """The whole body. `n` other than 1 is refused: one decision, one answer."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[MessageBody], Field(min_length=1)]
    tools: list[AnyToolBody] | None = None
    tool_choice: Literal["auto", "none", "required"] | AnyNamedBody | AllowedToolsBody | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Seed | None = None
    response_format: ResponseFormatBody | None = None
    reasoning_effort: str | None = None
    stream: bool | None = None
    stream_options: StreamOptionsBody | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    fugu: FuguBody | None = None


Body = TypeVar("Body", bound=BaseModel)


def parse_body(raw: bytes, kind: type[Body]) -> Body:
    """Read and check a request body.

    Raises:
        RequestError: the JSON is malformed, or a field is missing or wrong; `param` names it.
    """
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        data = _loads_leniently(raw, error)
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object")
    _check_depth(data)
    return check(data, kind)


def parse_chat(raw: bytes) -> ChatBody:
    """See `parse_body`."""
    return parse_body(raw, ChatBody)


def check(data: Any, kind: type[Body], where: str = "") -> Body:
    """`data` as a model; `where` is its place in the body.

    Raises:
        RequestError: a field is missing or wrong; `param` names it.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error, data, where) from None
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None


def _check_depth(data: dict[str, Any]) -> None:
    """What is read must also be written again, by us and by every worker's server, and theirs hold less than ours."""
    level: list[Any] = [data]
    for _ in range(MOST_NESTED):
        level = [
            part
            for each in level
            for part in (each.values() if isinstance(each, dict) else each)
            if isinstance(part, (dict, list))
        ]
        if not level:
            return
    raise RequestError(f"the body is nested more than {MOST_NESTED} deep")


def _loads_leniently(raw: bytes, error: orjson.JSONDecodeError) -> Any:
    """Only to say more about a body that is not JSON: Python's reader takes NaN and Infinity, so that the field that
    holds one can be named."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        raise RequestError(f"the body is not valid JSON: {error.msg} (at byte {error.pos})") from None
    for path, number in _numbers(data):
        if not math.isfinite(number):
            raise RequestError(f"{path}: must be a finite number, not {number}", param=path)
    raise RequestError(f"the body is not valid JSON: {error.msg} (at byte {error.pos})")


def _numbers(data: Any, path: str = "") -> Iterator[tuple[str, float]]:
    pending = [(path, data)]
    while pending:
        path, data = pending.pop()
        if isinstance(data, float):
            yield path, data
        elif isinstance(data, dict):
            pending.extend((f"{path}.{key}" if path else str(key), value) for key, value in data.items())
        elif isinstance(data, list):
            pending.extend((f"{path}[{index}]", value) for index, value in enumerate(data))


def _explain(error: ValidationError, data: Any, where: str) -> RequestError:
    """The fault that lies deepest (of a union, the branch the caller most likely meant), without its value."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    fault = max(faults, key=lambda fault: len(_field(fault["loc"], data, fault["type"])))
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in _field(fault["loc"], data, fault["type"])
    )
    path = (where + path).lstrip(".")
    what = {"missing": "is required", "extra_forbidden": "is not a known field"}.get(fault["type"], fault["msg"])
    return RequestError(f"{path}: {what}" if path else what, param=path or None)


def _field(loc: Sequence[int | str], data: Any, kind: str) -> tuple[int | str, ...]:
    """The parts of a pydantic location that lead through `data`; the names of union branches drop out."""
    path: list[int | str] = []
    for depth, part in enumerate(loc):
        inside = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list) else {}
        if part in inside:
            data = inside[part]
            path.append(part)
        elif kind == "missing" and depth == len(loc) - 1:
            path.append(part)
    return tuple(path)
