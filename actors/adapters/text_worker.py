"""What the workers that run in this process, local and vLLM, have in common: conversation in, text out, no tools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from actors.adapters.base import CallContext
from actors.errors import ContextLengthError, FuguError, StreamBrokenError, WorkerRejectedError
from actors.messages import ChatReply, ChatRequest, Chunk, FinishReason, Message, Usage


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a generation: why it ended and what it cost. `text` is all text that was emitted, `stopped_by` the
    caller's stop sequence that ended it, "" where none did."""

    text: str
    reason: FinishReason
    usage: Usage
    stopped_by: str = ""


class TextAdapter(ABC):
    """An `actors.adapters.base.Adapter` over an engine that yields text.

    `accepts` names the request fields, beyond the sampling settings, that the engine acts on.
    """

    def __init__(self, name: str, *, accepts: Collection[str] = ()) -> None:
        self._name = name
        self._accepts = frozenset(accepts)

    @abstractmethod
    def _generate(self, request: ChatRequest, context: CallContext) -> AsyncGenerator[str | Finished, None]:
        """Pieces of text, then `Finished`. Closing the generator, however it happens, ends the generation."""

    @abstractmethod
    async def close(self) -> None: ...

    async def complete(self, request: ChatRequest, context: CallContext) -> ChatReply:
        end: Finished | None = None
        async with aclosing(self._events(request, context)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    end = event
        assert end is not None, "an engine's last event is its end or an error"
        return self._reply(request, end)

    async def stream(self, request: ChatRequest, context: CallContext) -> AsyncIterator[Chunk]:
        begun = False
        try:
            async with aclosing(self._events(request, context)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        yield Chunk(final=self._reply(request, event))
                    else:
                        yield Chunk(text=event)
                    begun = True
        except FuguError as error:
            if not begun:
                raise
            raise StreamBrokenError(error.message, worker=self._name) from error

    async def _events(self, request: ChatRequest, context: CallContext) -> AsyncGenerator[str | Finished, None]:
        try:
            _refuse_tools(request)
            async with aclosing(self._generate(request, context)) as events:
                async for event in events:
                    yield event
        except FuguError as error:
            error.worker = self._name
            raise

    def _reply(self, request: ChatRequest, end: Finished) -> ChatReply:
        ignored = tuple(name for name in _given(request) if name not in self._accepts)
        return ChatReply(
            worker=self._name,
            text=end.text,
            finish_reason=end.reason,
            usage=end.usage,
            dropped=ignored,
            stop_sequence=end.stopped_by,
        )


def render(tokenizer: Any, messages: tuple[Message, ...]) -> str:
    """The conversation through the tokenizer's chat template, up to where the answer begins.

    Raises:
        WorkerRejectedError: there are images or tool calls in it, or the template refuses it.
    """
    plain = [_plain(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # a template is a program of the model's maker and may raise anything
        raise WorkerRejectedError(
            f"the model's chat template refuses this conversation ({type(error).__name__})", param="messages"
        ) from error


def check_length(prompt: int, context: int, *, at_least: bool = False) -> None:
    """Raise `ContextLengthError` if a prompt of this many tokens leaves no room for an answer."""
    if prompt >= context:
        raise ContextLengthError(
            f"the conversation is {'at least ' if at_least else ''}{prompt} tokens long; this worker's context holds "
            f"{context}, answer included",
            param="messages",
        )


def _plain(message: Message) -> dict[str, str]:
    """A message as every chat template knows it: role and text."""
    if message.images:
        raise WorkerRejectedError("this worker reads text only, no images", param="messages")
    if message.role == "tool" or message.tool_calls:
        raise WorkerRejectedError("this worker cannot follow tool calls in a conversation", param="messages")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": message.text}


def _refuse_tools(request: ChatRequest) -> None:
    """Tools that may be used are ignored; tools that must be used cannot be."""
    if request.tool_choice is not None and request.tool_choice.mode in ("required", "named"):
        raise WorkerRejectedError("this worker cannot call tools, and the request demands it", param="tool_choice")


def _given(request: ChatRequest) -> tuple[str, ...]:
    """The fields of the request that ask for more than a conversation and sampling settings do."""
    formatted = request.response_format is not None and request.response_format.kind != "text"
    given = {
        "tools": bool(request.tools),
        "tool_choice": request.tool_choice is not None,
        "parallel_tool_calls": request.parallel_tool_calls is not None,
        "response_format": formatted,
        "reasoning_effort": request.reasoning_effort is not None,
    }
    return (*(name for name, is_given in given.items() if is_given), *request.extra)
