"""What passes between rooms: requests, replies and stream chunks, independent of any provider's dialect.

Everything here is a frozen dataclass of plain Python values, so that it pickles fast between Ray processes, hashes
the same everywhere (`ChatRequest.fingerprint`) and imports without torch or Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import orjson

Role = Literal["system", "developer", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "refusal"]
"""`refusal`: the model would not, and may say why (`ChatReply.refusal`); `content_filter`: somebody else stopped it."""


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text in a message's content."""

    text: str


@dataclass(frozen=True, slots=True)
class RefusalPart(TextPart):
    """What an assistant said instead of an answer; to a provider that does not tell the two apart it is text."""


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image: `url` is an http(s) address or a `data:<media type>;base64,<data>` URL."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


Part = TextPart | ImagePart


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call a worker asks for. `arguments` is the JSON text exactly as the worker wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Thought:
    """A finished piece of a worker's reasoning, as its provider wants it back in a later call. `signature` is the
    provider's proof that it is its own (of a `redacted` one, whose text is not shown, the whole content); `origin` the
    tag of the worker it came from (`actors.marks.worker_tag`), the only one that ever gets it back."""

    text: str = ""
    signature: str = ""
    redacted: bool = False
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. `content` is a string or an ordered tuple of parts; an assistant message that
    only calls tools has empty content. A `tool` message answers the call named in `tool_call_id`; `failed` says that
    the tool could not do it. `thoughts` are an assistant's, before its content."""

    role: Role
    content: str | tuple[Part, ...] = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    thoughts: tuple[Thought, ...] = ()
    failed: bool = False

    @property
    def text(self) -> str:
        """The text of all text parts, joined by newlines (images left out)."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImagePart, ...]:
        if isinstance(self.content, str):
            return ()
        return tuple(part for part in self.content if isinstance(part, ImagePart))


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function a worker may call; `parameters` is its JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`mode` "named" forces the function `name`; the others are as in the OpenAI API."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """`text`, any JSON object, or JSON that satisfies `schema`."""

    kind: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "response"
    schema: Mapping[str, Any] | None = None
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request to one worker. `None` means "not given by the caller": the worker's own default applies.

    `extra` holds fields of the caller that we do not know; an adapter passes on what its provider accepts and names
    the rest in `ChatReply.dropped`. `sample_index` tells apart repeated samples of one request in the response cache.
    `max_attempts` bounds the upstream calls made for it (below the worker's own `retry.attempts`), for callers that
    count what they spend. `asides` are the places in `messages` of what the user's program said in one turn with tool
    results, beside them; no worker is told of it.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    sample_index: int = 0
    max_attempts: int | None = None
    asides: tuple[int, ...] = ()

    def with_(self, **changes: Any) -> ChatRequest:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over every field that can change the answer, the sample index included: equal requests, equal
        text, on any machine."""
        fields = asdict(self)
        del fields["max_attempts"], fields["asides"]
        encoded = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
        return hashlib.sha256(encoded).hexdigest()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call or a sum of calls. `cached_input_tokens`, read from a provider's prompt cache, and
    `cache_written_tokens`, written to it at a price of their own, are parts of `input_tokens`, `reasoning_tokens` one
    of `output_tokens`; `cache_hour_tokens`, written to be kept for an hour, one of those written."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    reasoning_tokens: int = 0
    cache_written_tokens: int = 0
    cache_hour_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_input_tokens + other.cached_input_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cache_written_tokens + other.cache_written_tokens,
            self.cache_hour_tokens + other.cache_hour_tokens,
        )

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: waiting for the limiter, request sent to first byte or token, and the whole call."""

    queued_s: float = 0.0
    first_byte_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A worker's whole answer. `dropped` names request fields the provider does not accept; `cost_usd` is None where
    the price is unknown; `attempts` counts upstream calls, retries included; `cached` says no upstream call was made.
    `model` is what the provider says answered, "" where it does not. `refusal` is what was said instead of an answer,
    or of the rest of one. `estimated`: the provider told no usage, which is taken from the lengths of the texts.
    `stop_sequence` is the one of the caller's that ended it, "" where none did or the provider does not say.
    """

    worker: str
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason = "stop"
    usage: Usage = Usage()
    cost_usd: float | None = None
    timing: Timing = Timing()
    attempts: int = 1
    cached: bool = False
    dropped: tuple[str, ...] = ()
    thoughts: tuple[Thought, ...] = ()
    model: str = ""
    refusal: str = ""
    estimated: bool = False
    stop_sequence: str = ""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a streamed tool call. `id` and `name` come with its first piece; `arguments` pieces concatenate."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer. The last chunk of a complete stream carries `final`, the reply as a whole
    (its `text` is the concatenation of all deltas), and nothing follows it. `thoughts` are those that end with this
    piece: the reasoning up to here, signed; it comes before the piece's text. `usage` is what the provider has said by
    now of the tokens read and written, where that is news; `refusal` a piece of the reply's."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    final: ChatReply | None = None
    thoughts: tuple[Thought, ...] = ()
    usage: Usage | None = None
    refusal: str = ""


class Worker(Protocol):
    """What the orchestrator knows of a worker. Both methods raise the errors of `actors.errors`; cancelling the
    awaiting task (or closing the iterator) ends the upstream call and frees its unused budget."""

    @property
    def name(self) -> str: ...

    async def complete(self, request: ChatRequest) -> ChatReply: ...

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]: ...
