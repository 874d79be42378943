"""The body of `POST /v1/messages` as Anthropic defines it, and our `fugu` field in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from serve.schema import Count, FuguBody, Open


class TurnBody(Open):
    """Content blocks are read one by one, each by its type."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class TextBlockBody(Open):
    text: str


class SourceBody(Open):
    type: Literal["base64", "url"]
    media_type: Annotated[str, Field(pattern=r"^image/[A-Za-z0-9.+-]+$")] | None = None
    data: str | None = None
    url: Annotated[str, Field(pattern=r"^https?://")] | None = None


class ImageBlockBody(Open):
    source: SourceBody


class DocumentSourceBody(Open):
    type: str
    data: str | None = None


class DocumentBlockBody(Open):
    source: DocumentSourceBody
    title: str | None = None


class ThinkingBlockBody(Open):
    thinking: str
    signature: str = ""


class RedactedBlockBody(Open):
    data: str


class ToolUseBlockBody(Open):
    id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]


class ToolResultBlockBody(Open):
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: str | list[dict[str, Any]] | None = None
    is_error: bool = False


class ClientToolBody(Open):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoiceBody(Open):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingBody(Open):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    display: Literal["summarized", "omitted"] | None = None


class OutputFormatBody(Open):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfigBody(Open):
    effort: str | None = None
    format: OutputFormatBody | None = None


class MetadataBody(Open):
    user_id: str | None = None


class CountBody(Open):
    """What `count_tokens` takes, and the part that a message shares with it. `output_format` is what
    `output_config.format` was called while it was in beta."""

    model: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[TurnBody], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoiceBody | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputConfigBody | None = None
    output_format: OutputFormatBody | None = None


class MessagesBody(CountBody):
    """The whole body."""

    max_tokens: Count
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[str], Field(max_length=64)] | None = None
    stream: bool | None = None
    metadata: MetadataBody | None = None
    fugu: FuguBody | None = None
