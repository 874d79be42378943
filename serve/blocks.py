"""A streamed answer as blocks that open, grow and close one after the other, as Responses and Messages tell it.

Workers may stream several tool calls at once, and coalesce what came together; here at most one block is open at a
time. Of calls that run side by side the first streams on, the others follow whole at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from actors.errors import StreamBrokenError
from actors.messages import ChatReply, Chunk, Thought, ToolCallDelta

Kind = Literal["reasoning", "redacted", "text", "refusal", "tool"]
What = Literal["open", "delta", "close"]


@dataclass(slots=True)
class Block:
    """`number` counts from 0 over the answer. `id` and `name` are a tool call's; `thought` is what the worker signed,
    of a reasoning or redacted block, known when it closes."""

    kind: Kind
    number: int
    id: str = ""
    name: str = ""
    thought: Thought | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


Step = tuple[What, Block, str]


class Blocks:
    """Takes chunks, gives steps. `done` are the closed blocks, in order."""

    def __init__(self) -> None:
        self.done: list[Block] = []
        self._open: Block | None = None
        self._index: int | None = None
        self._later: dict[int, Block] = {}

    @property
    def current(self) -> Block | None:
        return self._open

    @property
    def last(self) -> int | None:
        """The number of the last block that `end` closes; None where none is open."""
        left = (self._open is not None) + len(self._later)
        return len(self.done) + left - 1 if left else None

    def take(self, chunk: Chunk) -> Iterator[Step]:
        """Raises:
        StreamBrokenError: a tool call goes on after something else began.
        """
        if chunk.reasoning or chunk.thoughts:
            yield from self._reasoning(chunk)
        if chunk.text:
            yield from self._ensure("text")
            yield self._grow(chunk.text)
        if chunk.refusal:
            yield from self._ensure("refusal")
            yield self._grow(chunk.refusal)
        for call in chunk.tool_calls:
            yield from self._call(call)

    def end(self) -> Iterator[Step]:
        """Close what is open, then tell the calls that had to wait."""
        yield from self._close()
        for index in sorted(self._later):
            waiting = self._later[index]
            block = Block("tool", len(self.done), waiting.id, waiting.name)
            self._open = block
            yield "open", block, ""
            if waiting.text:
                yield self._grow(waiting.text)
            yield from self._close()
        self._later.clear()

    def _reasoning(self, chunk: Chunk) -> Iterator[Step]:
        left = chunk.reasoning
        for thought in chunk.thoughts:
            if thought.redacted:
                yield from self._close()
                block = self._open = Block("redacted", len(self.done), thought=thought)
                yield "open", block, ""
            else:
                said = self._open.text if self._open is not None and self._open.kind == "reasoning" else ""
                # Two thoughts may come in one piece: the signed text tells where the first ends.
                size = len(thought.text) - len(said) if (said + left).startswith(thought.text) else len(left)
                yield from self._ensure("reasoning")
                if left[:size]:
                    yield self._grow(left[:size])
                left = left[size:]
                assert self._open is not None
                self._open.thought = thought
            yield from self._close()
        if left:
            yield from self._ensure("reasoning")
            yield self._grow(left)

    def _call(self, delta: ToolCallDelta) -> Iterator[Step]:
        if delta.index in self._later:
            self._later[delta.index].pieces.append(delta.arguments)
        elif self._open is not None and self._open.kind == "tool" and self._index != delta.index:
            self._later[delta.index] = Block("tool", 0, delta.id or "", delta.name or "", pieces=[delta.arguments])
        else:
            if self._index is None or delta.index > self._index:
                yield from self._close()
                self._index = delta.index
                self._open = Block("tool", len(self.done), delta.id or "", delta.name or "")
                yield "open", self._open, ""
            elif self._open is None or self._open.kind != "tool":
                raise StreamBrokenError("a tool call went on after it had ended")
            if delta.arguments:
                yield self._grow(delta.arguments)

    def _ensure(self, kind: Kind) -> Iterator[Step]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            self._open = Block(kind, len(self.done))
            yield "open", self._open, ""

    def _grow(self, piece: str) -> Step:
        assert self._open is not None
        self._open.pieces.append(piece)
        return "delta", self._open, piece

    def _close(self) -> Iterator[Step]:
        block, self._open = self._open, None
        if block is not None:
            self.done.append(block)
            yield "close", block, ""


def blocks_of(reply: ChatReply) -> list[Block]:
    """A whole reply as blocks."""
    calls = tuple(ToolCallDelta(at, call.id, call.name, call.arguments) for at, call in enumerate(reply.tool_calls))
    whole = Chunk(reply.text, reply.reasoning, calls, thoughts=reply.thoughts, refusal=reply.refusal)
    blocks = Blocks()
    for _ in blocks.take(whole):
        pass
    for _ in blocks.end():
        pass
    return blocks.done
