"""How many tokens a request may use, before it is sent: for reserving, so it leans upward. The provider's usage is
the truth and replaces it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from actors.messages import ChatRequest, Message

# English prose has 4 to 5 characters per token and code about 3; a Chinese character is 3 bytes and about 1 token.
_BYTES_PER_TOKEN = 3
_TOKENS_PER_MESSAGE = 8
_TOKENS_PER_TOOL = 16
# The most that a picture costs at the large providers after they have scaled it down; `low` is a fixed 85 at OpenAI.
_TOKENS_PER_IMAGE = {"low": 300, "auto": 1600, "high": 1600}
DEFAULT_OUTPUT_TOKENS = 1024
# What large models commonly write in a second.
_TOKENS_PER_SECOND = 100


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tokens read and written."""

    input: int
    output: int

    @property
    def total(self) -> int:
        return self.input + self.output


def estimate_tokens(request: ChatRequest, *, limit: int | None = None) -> Estimate:
    """Estimate a request. Without `max_tokens` the answer is put at `DEFAULT_OUTPUT_TOKENS`, or less where that would
    not fit into `limit` (tokens that may be used at all) but the input does."""
    read = sum(map(_message_tokens, request.messages))
    for tool in request.tools:
        read += _TOKENS_PER_TOOL + text_tokens(tool.name) + text_tokens(tool.description)
        read += len(orjson.dumps(dict(tool.parameters))) // _BYTES_PER_TOKEN
    if request.response_format is not None and request.response_format.schema is not None:
        read += len(orjson.dumps(dict(request.response_format.schema))) // _BYTES_PER_TOKEN
    if request.max_tokens is not None:
        return Estimate(read, request.max_tokens)
    written = DEFAULT_OUTPUT_TOKENS
    if limit is not None and read < limit:
        written = min(written, limit - read)
    return Estimate(read, written)


def text_tokens(text: str) -> int:
    """An upper-leaning estimate of the tokens of a text."""
    return size_tokens(text_size(text))


def text_size(text: str) -> int:
    """Bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def size_tokens(size: int) -> int:
    """As `text_tokens`, of a text of so many bytes."""
    return -(-size // _BYTES_PER_TOKEN)


def silent_tokens(seconds: float) -> int:
    """What a model may have written that was silent for so long: thinking that nobody is shown."""
    return int(_TOKENS_PER_SECOND * seconds)


def _message_tokens(message: Message) -> int:
    tokens = _TOKENS_PER_MESSAGE + text_tokens(message.text)
    for call in message.tool_calls:
        tokens += _TOKENS_PER_TOOL + text_tokens(call.name) + text_tokens(call.arguments)
    for image in message.images:
        tokens += _TOKENS_PER_IMAGE[image.detail]
    return tokens
