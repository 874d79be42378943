"""The bodies of answers, for `/openapi.json` only: answers are built as plain dicts and bytes (`serve.translate*`), and
the tests hold them against this. Fields beyond those named here may come with newer servers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Tokens = Annotated[int, Field(ge=0)]
Trace = Annotated[dict[str, Any] | None, Field(description="Who answered, how that was decided, and what it took")]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """OpenAI's envelope. `fugu` is the trace, where it was asked for."""

    error: ErrorDetail
    fugu: Trace = None


class MessagesErrorDetail(BaseModel):
    type: str
    message: str
    code: str
    param: str | None = None


class MessagesErrorBody(BaseModel):
    """Anthropic's error object, with our `code` and `param` in it."""

    type: Literal["error"]
    error: MessagesErrorDetail
    request_id: str
    fugu: Trace = None


class HealthBody(BaseModel):
    status: Literal["ok"]


class ReadyBody(BaseModel):
    """`parts`: each is `ready`, or says why not."""

    status: Literal["ready", "not ready"]
    parts: dict[str, str]


class ModelWorker(BaseModel):
    name: str
    tags: list[str]


class ModelBody(BaseModel):
    """A served model, the workers that constraints may name for it, and of a pin the SHA-256 of its checkpoint."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    workers: list[ModelWorker]
    sha256: str | None = None


class ModelsBody(BaseModel):
    object: Literal["list"]
    data: list[ModelBody]


class ChatFunction(BaseModel):
    name: str
    arguments: str


class ChatToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: ChatFunction


class ChatCustom(BaseModel):
    name: str
    input: str


class ChatCustomToolCall(BaseModel):
    id: str
    type: Literal["custom"]
    custom: ChatCustom


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[ChatToolCall | ChatCustomToolCall] | None = None


class ChatChoice(BaseModel):
    index: Literal[0]
    message: ChatMessage
    logprobs: None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]


class ChatUsage(BaseModel):
    """What the caller sees of the answer; the details name the orchestration tokens, which come on top."""

    prompt_tokens: Tokens
    completion_tokens: Tokens
    total_tokens: Tokens
    prompt_tokens_details: dict[str, Tokens]
    completion_tokens_details: dict[str, Tokens]


class ChatCompletionBody(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: Annotated[list[ChatChoice], Field(min_length=1, max_length=1)]
    usage: ChatUsage
    fugu: Trace = None


class ResponseUsage(BaseModel):
    input_tokens: Tokens
    input_tokens_details: dict[str, Tokens]
    output_tokens: Tokens
    output_tokens_details: dict[str, Tokens]
    total_tokens: Tokens


class ResponseItem(BaseModel):
    """A message, a call or a piece of reasoning."""

    id: str
    type: Literal["message", "function_call", "custom_tool_call", "reasoning"]
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseBody(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]
    fugu: Trace = None


class CompactedItem(BaseModel):
    """A message of the user's, or the summary."""

    id: str
    type: Literal["message", "compaction"]


class CompactedBody(BaseModel):
    id: str
    object: Literal["response.compaction"]
    created_at: int
    output: list[CompactedItem]
    usage: ResponseUsage
    fugu: Trace = None


class DeletedBody(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemsBody(BaseModel):
    """A page of items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MessageUsage(BaseModel):
    input_tokens: Tokens
    output_tokens: Tokens
    cache_creation_input_tokens: Tokens
    cache_read_input_tokens: Tokens
    output_tokens_details: dict[str, Tokens]
    orchestration_input_tokens: Tokens
    orchestration_input_cached_tokens: Tokens
    orchestration_output_tokens: Tokens


class InputTokensAnswerBody(BaseModel):
    """An estimate that leans upward."""

    object: Literal["response.input_tokens"]
    input_tokens: Tokens


class MessageBlock(BaseModel):
    type: Literal["text", "tool_use", "thinking", "redacted_thinking"]


class MessageAnswerBody(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]
    stop_sequence: str | None
    stop_details: dict[str, Any] | None = None
    usage: MessageUsage
    fugu: Trace = None


class TokensBody(BaseModel):
    input_tokens: Tokens
