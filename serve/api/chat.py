"""`POST /v1/chat/completions`: OpenAI's chat dialect."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from actors.errors import FuguError
from actors.messages import ChatRequest, Chunk
from serve import sse
from serve.api.job import Done
from serve.auth import Caller
from serve.schema import ChatBody, FuguBody, parse_chat
from serve.translate import ChunkWriter, error_event, finish_reason, freeform_names, reply_body, to_request, tokens_body


class ChatDialect:
    """See `serve.api.endpoint.Dialect`."""

    path = "/v1/chat/completions"
    schema_field = "response_format"

    def credential(self, headers: Mapping[bytes, bytes]) -> bytes | None:
        return headers.get(b"authorization")

    async def read(self, raw: bytes, id: str, caller: Caller) -> ChatExchange:
        return ChatExchange(parse_chat(raw), f"chatcmpl-{id}")

    def error(self, error: FuguError, trace: Mapping[str, Any] | None, id: str) -> None:
        return None


class ChatExchange:
    """See `serve.api.endpoint.Exchange`."""

    __slots__ = ("_body", "_created", "_freeform", "_id", "_writer", "fugu", "model", "stream")

    def __init__(self, body: ChatBody, id: str) -> None:
        self._body = body
        self._id = id
        self._created = int(time.time())
        self.model = body.model
        self.stream = bool(body.stream)
        self.fugu: FuguBody | None = body.fugu
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._freeform = freeform_names(body)
        self._writer = ChunkWriter(
            id=id, created=self._created, model=body.model, include_usage=include_usage, freeform=self._freeform
        )

    def request(self) -> tuple[ChatRequest, tuple[str, ...]]:
        return to_request(self._body)

    def whole(self, done: Done) -> bytes:
        usage = tokens_body(done.visible, done.total)
        return reply_body(
            done.reply,
            id=self._id,
            created=self._created,
            model=self.model,
            usage=usage,
            trace=done.told,
            freeform=self._freeform,
        )

    async def keep(self, done: Done) -> None:
        """Nothing: the caller keeps the conversation."""

    def chunk(self, chunk: Chunk) -> bytes:
        return self._writer.chunk(chunk)

    def end(self, done: Done) -> bytes:
        last = self._writer.finish(finish_reason(done.reply))
        last += self._writer.usage(tokens_body(done.visible, done.total))
        if done.told is not None:
            last += self._writer.trace(done.told)
        return last + sse.DONE

    def broken(self, error: FuguError, trace: Mapping[str, Any] | None) -> bytes:
        return error_event(error, trace) + sse.DONE

    def alive(self) -> bytes:
        return sse.KEEP_ALIVE
