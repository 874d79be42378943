"""What the dialects share: putting a streamed answer together, and small translations of a request."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from actors.adapters.base import CallContext
from actors.adapters.upstream import Upstream
from actors.errors import StreamBrokenError, WorkerError
from actors.messages import (
    ChatReply,
    ChatRequest,
    Chunk,
    FinishReason,
    ImagePart,
    Message,
    Part,
    TextPart,
    Thought,
    ToolCall,
    ToolCallDelta,
    Usage,
)

TOOL_FAILED = "Error: the tool failed."
"""For dialects whose tool results have no field for it."""


@dataclass(slots=True)
class Assembler:
    """Collects an answer piece by piece. `take` gives what came since the last time as one chunk: pieces that
    arrive in one network read leave as one chunk, which is what keeps a fast stream cheap downstream."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tools: list[_Tool] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    finish: FinishReason | None = None
    thoughts: list[Thought] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    model: str = ""
    stop_sequence: str = ""
    _new_text: list[str] = field(default_factory=list)
    _new_reasoning: list[str] = field(default_factory=list)
    _new_tools: list[ToolCallDelta] = field(default_factory=list)
    _new_thoughts: list[Thought] = field(default_factory=list)
    _new_refusal: list[str] = field(default_factory=list)
    _told: Usage = field(default_factory=Usage)

    def named(self, model: Any) -> None:
        """The provider says which model answers, or leaves it out."""
        if isinstance(model, str):
            self.model = model[:200]

    def stopped(self, by: Any) -> None:
        """The provider says which of the caller's stop sequences ended the answer, or leaves it out."""
        if isinstance(by, str):
            self.stop_sequence = by

    def add_text(self, piece: str) -> None:
        if piece:
            self._new_text.append(piece)

    def add_reasoning(self, piece: str) -> None:
        if piece:
            self._new_reasoning.append(piece)

    def add_refusal(self, piece: str) -> None:
        if piece:
            self._new_refusal.append(piece)

    def add_thought(self, thought: Thought) -> None:
        """A finished piece of reasoning that the worker signed; its text was added before."""
        self._new_thoughts.append(thought)

    def open_tool(self, id: str, name: str, arguments: str = "") -> int:
        """Begin a tool call; its index in the answer."""
        index = len(self.tools)
        self.tools.append(_Tool(id, name, [arguments] if arguments else []))
        self._new_tools.append(ToolCallDelta(index, id, name, arguments))
        return index

    def add_arguments(self, index: int, piece: str) -> None:
        if piece:
            self.tools[index].arguments.append(piece)
            self._new_tools.append(ToolCallDelta(index, arguments=piece))

    def take(self) -> Chunk | None:
        new = (self._new_text, self._new_reasoning, self._new_tools, self._new_thoughts, self._new_refusal)
        if not any(new):
            return None
        chunk = Chunk(
            "".join(self._new_text),
            "".join(self._new_reasoning),
            tuple(self._new_tools),
            thoughts=tuple(self._new_thoughts),
            usage=None if self.usage == self._told else self.usage,
            refusal="".join(self._new_refusal),
        )
        self._told = self.usage
        self.text.append(chunk.text)
        self.reasoning.append(chunk.reasoning)
        self.thoughts += chunk.thoughts
        self.refusal.append(chunk.refusal)
        for pieces in new:
            pieces.clear()
        return chunk

    def reply(self, worker: str, dropped: Iterable[str]) -> ChatReply:
        """The whole answer. One that calls tools finishes with `tool_calls`, and one that says that it refuses with
        `refusal`, whatever the server called it."""
        self.take()
        calls = tuple(ToolCall(tool.id, tool.name, "".join(tool.arguments)) for tool in self.tools)
        finish = self.finish or "stop"
        refusal = "".join(self.refusal)
        if finish == "stop":
            finish = "tool_calls" if calls else "refusal" if refusal else "stop"
        return ChatReply(
            worker=worker,
            text="".join(self.text),
            reasoning="".join(self.reasoning),
            tool_calls=calls,
            finish_reason=finish,
            usage=self.usage,
            dropped=tuple(dropped),
            thoughts=tuple(self.thoughts),
            model=self.model,
            refusal=refusal,
            stop_sequence=self.stop_sequence,
        )


@dataclass(slots=True)
class _Tool:
    id: str
    name: str
    arguments: list[str]


class Reader(Protocol):
    """A dialect's reading of its event stream (`read`), or of an answer that is not streamed (`take_whole`). `done`
    turns true at the event that the dialect documents as the last, or never where it documents none; `complete` says
    whether the answer has been given in full."""

    answer: Assembler

    @property
    def done(self) -> bool: ...

    @property
    def complete(self) -> bool: ...

    def read(self, data: str) -> None: ...

    def take_whole(self, reply: dict[str, Any]) -> None: ...


async def stream_answer(
    upstream: Upstream,
    path: str,
    body: Mapping[str, Any],
    context: CallContext,
    reader: Reader,
    dropped: Iterable[str],
) -> AsyncIterator[Chunk]:
    """The chunks of a streamed call; the last carries the whole reply.

    Raises:
        StreamBrokenError: anything that fails after the first chunk, a missing end included.
        WorkerError: anything that fails before it.
    """
    started = False
    try:
        async with upstream.open(path, body, context, upstream.spec.timeout.first_byte) as response:
            while not reader.done:
                events = await response.events()
                if events is None:
                    break
                with upstream.parsing():
                    for event in events:
                        reader.read(event.data)
                        if reader.done:
                            break
                chunk = reader.answer.take()
                if chunk is not None:
                    started = True
                    yield chunk
            if not reader.complete:
                raise upstream.malformed("the stream ended before the answer did")
    except StreamBrokenError:
        raise
    except WorkerError as error:
        if not started:
            raise
        raise StreamBrokenError(f"the answer broke off: {error.message}", worker=error.worker) from error
    yield Chunk(final=reader.answer.reply(upstream.spec.name, dropped))


def parts_of(message: Message) -> tuple[Part, ...]:
    """A message's content as parts, empty text left out (providers refuse it)."""
    parts = (TextPart(message.content),) if isinstance(message.content, str) else message.content
    return tuple(part for part in parts if isinstance(part, ImagePart) or part.text)


def split_system(messages: Iterable[Message]) -> tuple[str, list[Message]]:
    """System and developer texts, joined by blank lines, and the rest. Where there is no rest, the system text is
    the conversation: providers that keep the two apart refuse an empty one."""
    system, rest = [], []
    for message in messages:
        if message.role in ("system", "developer"):
            system.append(message.text)
        else:
            rest.append(message)
    text = "\n\n".join(filter(None, system))
    return (text, rest) if rest else ("", [Message("user", text)])


def data_url(url: str) -> tuple[str, str] | None:
    """Media type and base64 data of a `data:` URL, or None for other addresses."""
    if not url.startswith("data:"):
        return None
    head, _, data = url[5:].partition(",")
    return head.removesuffix(";base64") or "application/octet-stream", data


def arguments_object(call: ToolCall) -> dict[str, Any]:
    """A tool call's arguments as the object some providers want. What is no JSON object is wrapped, not lost."""
    if not call.arguments.strip():
        return {}
    try:
        value = orjson.loads(call.arguments)
    except orjson.JSONDecodeError:
        value = call.arguments
    return value if isinstance(value, dict) else {"arguments": value}


def tool_call_id(request: ChatRequest, index: int, name: str, arguments: str = "") -> str:
    """An id for a tool call that came without one: the same for the same call at the same place, everywhere, and
    short enough for every provider that may see it later in the conversation."""
    key = orjson.dumps([len(request.messages), index, name, arguments])
    return f"call_{hashlib.sha256(key).hexdigest()[:24]}"


def count(value: Any) -> int:
    """A token count from a provider's JSON; what is absent or no count is 0."""
    return value if isinstance(value, int) and value > 0 else 0


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}
