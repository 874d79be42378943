"""A conversation as the backbone reads it: text by the checkpoint's prompt format, then at most N tokens.

`chat` goes through the backbone's own chat template with a dispatcher's system message and an open assistant
turn, so that the hidden state stands where an answer would begin (TRINITY §3.1). `raw` is one "role: content"
line per message. Both are part of what a head was trained on: changing a word here asks for a new checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from actors.errors import ConfigError, RequestError
from actors.messages import ImagePart, Message
from orchestrator.head import PromptFormat

SYSTEM = "You direct each request to the assistant best able to answer it. Judge what the request takes."
CUT_MARKER = "\n[...]\n"
MIN_TOKENS = 32
_ARGUMENT_CHARACTERS = 200
# Text beyond this many characters per token and side is dropped before tokenizing: a body of many megabytes
# must not cost seconds. English has about 4 characters per token, so what is kept nearly always holds every
# token wanted.
_CHARACTERS_PER_TOKEN = 32


def encode(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    prompt_format: PromptFormat,
    max_tokens: int,
) -> list[list[int]]:
    """Token ids of each conversation, at most `max_tokens` (≥ 32) each. A longer one loses its middle: its
    first and last tokens stay, with a marker between.

    Raises:
        RequestError: a conversation is empty.
        ConfigError: `chat` is asked of a tokenizer without a chat template.
    """
    if max_tokens < MIN_TOKENS:
        raise ConfigError(f"the backbone must read at least {MIN_TOKENS} tokens, not {max_tokens}")
    texts = [render(tokenizer, messages, prompt_format) for messages in conversations]
    # Long texts become two pieces, tokenized apart; all pieces go through the tokenizer in one call.
    reach = _CHARACTERS_PER_TOKEN * max_tokens
    pieces = [[text] if len(text) <= 2 * reach else [text[:reach], text[-reach:]] for text in texts]
    flat = [CUT_MARKER, *(piece for parts in pieces for piece in parts)]
    marker, *tokenized = tokenizer(flat, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    prompts, tokens = [], iter(tokenized)
    for parts in pieces:
        head = next(tokens)
        prompts.append(
            cut_middle(head, max_tokens, marker) if len(parts) == 1 else _join(head, next(tokens), max_tokens, marker)
        )
    return prompts


def cut_middle(tokens: Sequence[int], limit: int, marker: Sequence[int]) -> list[int]:
    """`tokens` if they are at most `limit`, else exactly `limit` of them: first ones, the marker, last ones.
    The two ends are of equal length; an odd token goes to the last ones."""
    if len(tokens) <= limit:
        return list(tokens)
    return _join(tokens, tokens, limit, marker)


def _join(head: Sequence[int], tail: Sequence[int], limit: int, marker: Sequence[int]) -> list[int]:
    room = limit - len(marker)
    if room < 2:
        raise ValueError(f"a limit of {limit} tokens leaves no room around the marker")
    first, last = room // 2, room - room // 2
    return [*head[:first], *marker, *tail[-last:]]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt_format: PromptFormat) -> str:
    """The whole conversation as the backbone's text, uncut."""
    if not messages:
        raise RequestError("messages must not be empty", param="messages")
    if prompt_format == "raw":
        return "\n".join(f"{message.role}: {content(message)}" for message in messages)
    if not tokenizer.chat_template:
        raise ConfigError(f"the backbone {tokenizer.name_or_path} has no chat template; use the raw prompt format")
    special = [token for token in tokenizer.all_special_tokens if len(token) > 1]
    turns = [{"role": role, "content": _plain(text, special)} for role, text in (("system", SYSTEM), *_turns(messages))]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert isinstance(text, str)
    return text


def content(message: Message) -> str:
    """One message as text: images, tool calls and tool results as short markers in their place."""
    if isinstance(message.content, str):
        parts = [message.content] if message.content else []
    else:
        parts = ["[image]" if isinstance(part, ImagePart) else part.text for part in message.content]
    for call in message.tool_calls:
        arguments = call.arguments
        if len(arguments) > _ARGUMENT_CHARACTERS:
            arguments = arguments[:_ARGUMENT_CHARACTERS] + "..."
        parts.append(f"[calls {call.name}({arguments})]")
    if message.role == "tool":
        parts.insert(0, f"[result of {message.name}]" if message.name else "[result]")
    return "\n".join(parts)


def _turns(messages: Iterable[Message]) -> list[tuple[str, str]]:
    """Strictly alternating user and assistant turns, beginning with the user, because some templates refuse
    anything else. Instructions and tool results are what the assistant is told, so they count as the
    user's."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        text = content(message)
        if message.role in ("system", "developer"):
            text = f"[instructions]\n{text}"
        role = "assistant" if message.role == "assistant" else "user"
        if not turns and role == "assistant":
            turns.append(("user", "[conversation goes on]"))
        if turns and turns[-1][0] == role:
            text = f"{turns.pop()[1]}\n\n{text}"
        turns.append((role, text))
    return turns


def _plain(text: str, special: Iterable[str]) -> str:
    """`text` with the template's control tokens broken up, so that a message cannot forge turns."""
    for token in special:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
