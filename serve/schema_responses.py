"""The body of `POST /v1/responses` as OpenAI defines it, and our `fugu` field in it. Items and tools are read one by
one, each by its type."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from serve.schema import Count, FuguBody, Open

NonEmpty = Annotated[str, Field(min_length=1)]


class MessageItem(Open):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]


class TextContent(Open):
    text: str


class RefusalContent(Open):
    refusal: str


class ImageContent(Open):
    image_url: Annotated[str, Field(pattern=r"^(https?://|data:image/[A-Za-z0-9.+-]+;base64,)")] | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None


class FunctionCallItem(Open):
    call_id: NonEmpty
    name: NonEmpty
    arguments: str
    namespace: str | None = None


class CustomCallItem(Open):
    call_id: NonEmpty
    name: NonEmpty
    input: str
    namespace: str | None = None


class OutputItem(Open):
    """What a tool said."""

    call_id: NonEmpty
    output: str | list[dict[str, Any]]


class ReasoningItem(Open):
    encrypted_content: str | None = None


class CompactionItem(Open):
    encrypted_content: NonEmpty


class ReferenceItem(Open):
    id: NonEmpty


class FunctionToolBody(Open):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class GrammarBody(Open):
    type: Literal["text", "grammar"]
    syntax: str | None = None
    definition: str | None = None


class CustomToolBody(Open):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: str | None = None
    format: GrammarBody | None = None


class NamespaceToolBody(Open):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    tools: list[dict[str, Any]]


class NamedChoice(Open):
    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


class ReasoningBody(Open):
    """`generate_summary` is what `summary` was called once."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class FormatBody(Open):
    type: Literal["text", "json_object", "json_schema"]
    name: str = "response"
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextBody(Open):
    format: FormatBody | None = None
    verbosity: str | None = None


class InputBody(Open):
    """What a response is made from: all that `input_tokens` counts, and the part that a response shares with it."""

    input: str | list[dict[str, Any]] = ""
    instructions: str | None = None
    previous_response_id: NonEmpty | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningBody | None = None
    text: TextBody | None = None
    truncation: Literal["auto", "disabled"] | None = None


class InputTokensBody(InputBody):
    """`model` may be left out: which worker will read it is not known anyway."""

    model: NonEmpty | None = None


class CompactBody(InputBody):
    """The conversation that `compact` makes shorter; of the rest of a response's fields none has a meaning there."""

    model: NonEmpty
    fugu: FuguBody | None = None


class ResponsesBody(InputBody):
    """The whole body."""

    model: NonEmpty
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    user: str | None = None
    fugu: FuguBody | None = None
