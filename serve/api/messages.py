"""`POST /v1/messages`: Anthropic's dialect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import orjson

from actors.errors import FuguError
from actors.estimate import estimate_tokens
from actors.messages import ChatRequest, Chunk
from serve.api.job import Done
from serve.auth import Caller
from serve.blocks import Block, Blocks, Step, blocks_of
from serve.schema import parse_body
from serve.schema_messages import CountBody, MessagesBody
from serve.translate import dumps
from serve.translate_messages import (
    block_body,
    error_body,
    left_out,
    signature,
    stop_body,
    to_request,
    usage_body,
)

PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class MessagesDialect:
    """See `serve.api.endpoint.Dialect`."""

    path = "/v1/messages"
    schema_field = "output_config.format"

    def credential(self, headers: Mapping[bytes, bytes]) -> bytes | None:
        key = headers.get(b"x-api-key")
        return headers.get(b"authorization") if key is None else b"Bearer " + key

    async def read(self, raw: bytes, id: str, caller: Caller) -> MessagesExchange:
        return MessagesExchange(parse_body(raw, MessagesBody), id)

    def error(self, error: FuguError, trace: Mapping[str, Any] | None, id: str) -> bytes:
        body = error_body(error, id)
        return dumps(body if trace is None else body | {"fugu": trace})


class MessagesExchange:
    """See `serve.api.endpoint.Exchange`."""

    def __init__(self, body: MessagesBody, request_id: str) -> None:
        self._body = body
        self._request_id = request_id
        self._id = f"msg_{request_id}"
        self._blocks = Blocks()
        self._begun = False
        self._estimated = 0
        self.model = body.model
        self.stream = bool(body.stream)
        self.fugu = body.fugu
        thinking = body.thinking
        self._thinks = thinking is not None and thinking.type != "disabled"
        self._hides = thinking is not None and thinking.display == "omitted"

    def request(self) -> tuple[ChatRequest, tuple[str, ...]]:
        request = to_request(self._body)
        self._estimated = estimate_tokens(request).input
        return request, left_out(self._body)

    def whole(self, done: Done) -> bytes:
        blocks = blocks_of(replace(done.reply, refusal=""))
        body = self._message() | {
            "content": [self._shown(block) for block in blocks if self._shows(block)],
            "usage": usage_body(done.visible, done.total),
        }
        body |= stop_body(done.reply)
        return dumps(body if done.told is None else body | {"fugu": done.told})

    async def keep(self, done: Done) -> None:
        """Nothing: the caller keeps the conversation."""

    def chunk(self, chunk: Chunk) -> bytes:
        return self._told(self._blocks.take(replace(chunk, refusal="") if chunk.refusal else chunk))

    def end(self, done: Done) -> bytes:
        last = self._told(self._blocks.end())
        end: dict[str, Any] = {"delta": stop_body(done.reply), "usage": usage_body(done.visible, done.total)}
        if done.told is not None:
            end["fugu"] = done.told
        return last + _event("message_delta", end) + _event("message_stop", {})

    def broken(self, error: FuguError, trace: Mapping[str, Any] | None) -> bytes:
        body = error_body(error, self._request_id)
        return _event("error", body if trace is None else body | {"fugu": trace})

    def alive(self) -> bytes:
        return self._begin() + PING

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        # What was read is known at the end only (`message_delta` has it); until then an estimate.
        usage = {"input_tokens": self._estimated, "output_tokens": 0}
        usage |= {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return _event("message_start", {"message": self._message() | {"usage": usage}}) + PING

    def _told(self, steps: Iterator[Step]) -> bytes:
        events = [self._begin()]
        for what, block, piece in steps:
            if self._shows(block):
                events.append(self._step(what, block, piece))
        return b"".join(events)

    def _shows(self, block: Block) -> bool:
        return self._thinks or block.kind not in ("reasoning", "redacted")

    def _shown(self, block: Block) -> dict[str, Any]:
        body = block_body(block)
        return body | {"thinking": ""} if self._hides and block.kind == "reasoning" else body

    def _step(self, what: str, block: Block, piece: str) -> bytes:
        index = block.number if self._thinks else self._number(block)
        if what == "open":
            empty = Block(block.kind, block.number, block.id, block.name)
            start = block_body(block if block.kind == "redacted" else empty)
            return _event("content_block_start", {"index": index, "content_block": start})
        if what == "close":
            signed = b""
            if block.kind == "reasoning" and block.thought is not None:
                signed = _delta(index, {"type": "signature_delta", "signature": signature(block)})
            return signed + _event("content_block_stop", {"index": index})
        if block.kind == "text":
            return _delta(index, {"type": "text_delta", "text": piece})
        if block.kind == "tool":
            return _delta(index, {"type": "input_json_delta", "partial_json": piece})
        return b"" if self._hides else _delta(index, {"type": "thinking_delta", "thinking": piece})

    def _number(self, block: Block) -> int:
        """Its place among the blocks that are shown."""
        return sum(self._shows(each) for each in self._blocks.done if each.number < block.number)


async def count_tokens(raw: bytes, caller: Caller) -> bytes:
    """The body of `POST /v1/messages/count_tokens`: an estimate, since which worker will read it is not known yet.

    Raises:
        RequestError: as for a message.
    """
    return orjson.dumps({"input_tokens": estimate_tokens(to_request(parse_body(raw, CountBody))).input})


def _delta(index: int, delta: Mapping[str, Any]) -> bytes:
    return _event("content_block_delta", {"index": index, "delta": delta})


def _event(kind: str, data: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), dumps({"type": kind, **data}))
