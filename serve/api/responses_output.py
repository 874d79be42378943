"""The answer's side of Responses: output items and the events that tell of them.

The order of events is that of OpenAI's reference: an item is added, its parts are added, grow and are done, the item is
done; the next begins. `sequence_number` counts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from actors.errors import FuguError
from actors.messages import Usage
from serve.blocks import Block, Step
from serve.freeform import freeform_input
from serve.sealed import seal
from serve.translate import dumps
from serve.translate_responses import Tools


class EventWriter:
    """Numbers the events of one stream."""

    def __init__(self) -> None:
        self.number = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), dumps(body))


class Output:
    """Blocks as output items of one response. `summary`: the caller wants to read the reasoning; `sealed`: to carry
    it."""

    def __init__(self, secret: str, tools: Tools, *, summary: bool, sealed: bool) -> None:
        self._secret = secret
        self._tools = tools
        self._summary = summary
        self._sealed = sealed
        self._places: dict[int, int] = {}
        self.cut: int | None = None
        """The number of the block that the answer ended in the middle of."""

    def shown(self, blocks: Sequence[Block]) -> list[dict[str, Any]]:
        """The items that the caller sees."""
        return [self._item(block, sealed=self._sealed) for block in blocks if self._shows(block)]

    def kept(self, blocks: Sequence[Block]) -> list[dict[str, Any]]:
        """The items that the next turn needs, whatever the caller sees."""
        return [self._item(block, sealed=True) for block in blocks if self._shows(block) or block.thought is not None]

    def step(self, writer: EventWriter, step: Step) -> Iterator[bytes]:
        what, block, piece = step
        if not self._shows(block):
            return
        place = self._places.setdefault(block.number, len(self._places))
        where = {"item_id": self._id(block), "output_index": place}
        if what == "open":
            yield writer.event("response.output_item.added", output_index=place, item=self._opening(block))
        if block.kind in ("text", "refusal"):
            yield from _said(writer, what, block, piece, where)
        elif block.kind == "tool":
            yield from self._call(writer, what, block, piece, where)
        elif self._summary and block.kind == "reasoning":
            yield from _summary(writer, what, block, piece, where)
        if what == "close":
            item = self._item(block, sealed=self._sealed)
            yield writer.event("response.output_item.done", output_index=place, item=item)

    def _shows(self, block: Block) -> bool:
        if block.kind == "reasoning":
            return self._summary or self._sealed
        return self._sealed or block.kind != "redacted"

    def _is_freeform(self, block: Block) -> bool:
        return block.name in self._tools.freeform

    def _id(self, block: Block) -> str:
        tool = "ctc" if self._is_freeform(block) else "fc"
        kind = {"text": "msg", "refusal": "msg", "tool": tool}.get(block.kind, "rs")
        return f"{kind}_{self._secret}{block.number:02x}"

    def _opening(self, block: Block) -> dict[str, Any]:
        item = self._item(Block(block.kind, block.number, block.id, block.name), sealed=False)
        if "content" in item:
            item["content"] = []
        if "summary" in item:
            item["summary"] = []
        return item | {"status": "in_progress"}

    def _item(self, block: Block, *, sealed: bool) -> dict[str, Any]:
        id = self._id(block)
        status = "incomplete" if block.number == self.cut else "completed"
        if block.kind in ("text", "refusal"):
            content = [_part(block.kind, block.text)]
            return {"id": id, "type": "message", "role": "assistant", "status": status, "content": content}
        if block.kind == "tool":
            space, name = self._tools.spaces.get(block.name, (None, block.name))
            item: dict[str, Any] = {"id": id, "call_id": block.id, "name": name, "status": status}
            if space is not None:
                item["namespace"] = space
            if self._is_freeform(block):
                return item | {"type": "custom_tool_call", "input": freeform_input(block.text)}
            return item | {"type": "function_call", "arguments": block.text}
        shown = self._summary and block.kind == "reasoning" and block.text
        summary = [{"type": "summary_text", "text": block.text}] if shown else []
        item = {"id": id, "type": "reasoning", "summary": summary, "status": "completed"}
        if sealed and block.thought is not None:
            item["encrypted_content"] = seal((block.thought,))
        return item

    def _call(
        self, writer: EventWriter, what: str, block: Block, piece: str, where: Mapping[str, Any]
    ) -> Iterator[bytes]:
        if self._is_freeform(block):
            # The worker writes JSON around it, so the input is known when the call is complete.
            if what == "close":
                text = freeform_input(block.text)
                yield writer.event("response.custom_tool_call_input.delta", **where, delta=text)
                yield writer.event("response.custom_tool_call_input.done", **where, input=text)
        elif what == "delta":
            yield writer.event("response.function_call_arguments.delta", **where, delta=piece)
        elif what == "close":
            done = {**where, "name": block.name, "arguments": block.text}
            yield writer.event("response.function_call_arguments.done", **done)


def _said(writer: EventWriter, what: str, block: Block, piece: str, where: Mapping[str, Any]) -> Iterator[bytes]:
    """Text, or a refusal."""
    where = {**where, "content_index": 0}
    if what == "open":
        yield writer.event("response.content_part.added", **where, part=_part(block.kind, ""))
    elif what == "delta" and block.kind == "text":
        yield writer.event("response.output_text.delta", **where, delta=piece, logprobs=[])
    elif what == "delta":
        yield writer.event("response.refusal.delta", **where, delta=piece)
    else:
        if block.kind == "text":
            yield writer.event("response.output_text.done", **where, text=block.text, logprobs=[])
        else:
            yield writer.event("response.refusal.done", **where, refusal=block.text)
        yield writer.event("response.content_part.done", **where, part=_part(block.kind, block.text))


def _summary(writer: EventWriter, what: str, block: Block, piece: str, where: Mapping[str, Any]) -> Iterator[bytes]:
    where = {**where, "summary_index": 0}
    if what == "open":
        yield writer.event("response.reasoning_summary_part.added", **where, part={"type": "summary_text", "text": ""})
    elif what == "delta":
        yield writer.event("response.reasoning_summary_text.delta", **where, delta=piece)
    else:
        part = {"type": "summary_text", "text": block.text}
        yield writer.event("response.reasoning_summary_text.done", **where, text=block.text)
        yield writer.event("response.reasoning_summary_part.done", **where, part=part)


def _part(kind: str, said: str) -> dict[str, Any]:
    if kind == "refusal":
        return {"type": "refusal", "refusal": said}
    return {"type": "output_text", "text": said, "annotations": [], "logprobs": []}


def usage_body(visible: Usage, total: Usage) -> dict[str, Any]:
    """Fugu's usage object: orchestration tokens come on top and are part of the total."""
    read: dict[str, Any] = {
        "cached_tokens": visible.cached_input_tokens,
        "cache_write_tokens": visible.cache_written_tokens,
    }
    written: dict[str, Any] = {"reasoning_tokens": visible.reasoning_tokens}
    read["orchestration_input_tokens"] = total.input_tokens - visible.input_tokens
    read["orchestration_input_cached_tokens"] = total.cached_input_tokens - visible.cached_input_tokens
    written["orchestration_output_tokens"] = total.output_tokens - visible.output_tokens
    return {
        "input_tokens": visible.input_tokens,
        "input_tokens_details": read,
        "output_tokens": visible.output_tokens,
        "output_tokens_details": written,
        "total_tokens": total.total_tokens,
    }


def error_body(error: FuguError) -> dict[str, Any]:
    """The `error` of a failed response. OpenAI knows few codes there; ours is told beside."""
    code = "rate_limit_exceeded" if error.http_status == 429 else "server_error"
    if 400 <= error.http_status < 429:
        code = "invalid_prompt"
    return {"code": code, "message": error.message, "type": error.type, "reason": error.code}
