"""A worker called over HTTP: the same two calls in every dialect, which says where, what, and how it is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx

from actors.adapters.assemble import Reader, stream_answer
from actors.adapters.base import CallContext
from actors.adapters.upstream import Upstream
from actors.config import WorkerSpec
from actors.messages import ChatReply, ChatRequest, Chunk

Body = Callable[[WorkerSpec, ChatRequest], tuple[dict[str, Any], list[str]]]
"""A request's body, plain, and the names of fields that were dropped."""


class RemoteAdapter:
    """See `actors.adapters.base.Adapter`. `auth` as of `Upstream`. A streamed call has the fields `streamed` on top of
    its body, and goes to `stream_path` where that is another one."""

    def __init__(
        self,
        spec: WorkerSpec,
        transport: httpx.AsyncBaseTransport,
        auth: Mapping[str, str],
        *,
        path: str,
        body: Body,
        reader: Callable[[Upstream, ChatRequest], Reader],
        streamed: Mapping[str, Any] | None = None,
        stream_path: str | None = None,
    ) -> None:
        self._upstream = Upstream(spec, transport, auth)
        self._path, self._stream_path = path, stream_path or path
        self._body, self._reader = body, reader
        self._streamed = streamed or {}

    async def complete(self, request: ChatRequest, context: CallContext) -> ChatReply:
        body, dropped = self._body(self._upstream.spec, request)
        reply = await self._upstream.post(self._path, body, context)
        reader = self._reader(self._upstream, request)
        with self._upstream.parsing():
            reader.take_whole(reply)
        return reader.answer.reply(self._upstream.spec.name, dropped)

    def stream(self, request: ChatRequest, context: CallContext) -> AsyncIterator[Chunk]:
        body, dropped = self._body(self._upstream.spec, request)
        reader = self._reader(self._upstream, request)
        return stream_answer(self._upstream, self._stream_path, {**body, **self._streamed}, context, reader, dropped)

    async def close(self) -> None:
        await self._upstream.transport.aclose()


def bearer(spec: WorkerSpec) -> dict[str, str]:
    """The key as OpenAI's dialects carry it; nothing where there is none."""
    key = spec.api_key.get_secret_value() if spec.api_key else ""
    return {"authorization": f"Bearer {key}"} if key else {}
