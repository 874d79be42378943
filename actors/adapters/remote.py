"""A worker called over HTTP: the same two calls in every dialect, which says where, what, and how it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from actors.adapters.assemble import Reader, stream_answer
from actors.adapters.base import CallContext
from actors.adapters.upstream import Upstream
from actors.config import WorkerSpec
from actors.messages import ChatReply, ChatRequest, Chunk


class RemoteAdapter(ABC):
    """See `actors.adapters.base.Adapter`. `auth` as of `Upstream`."""

    def __init__(self, spec: WorkerSpec, transport: httpx.AsyncBaseTransport, auth: Mapping[str, str]) -> None:
        self._upstream = Upstream(spec, transport, auth)

    @abstractmethod
    def _path(self, *, stream: bool) -> str: ...

    @abstractmethod
    def _body(self, request: ChatRequest, *, stream: bool) -> tuple[dict[str, Any], list[str]]:
        """The request's body, and the names of fields that were dropped."""

    @abstractmethod
    def _reader(self, request: ChatRequest) -> Reader: ...

    async def complete(self, request: ChatRequest, context: CallContext) -> ChatReply:
        body, dropped = self._body(request, stream=False)
        reply = await self._upstream.post(self._path(stream=False), body, context)
        reader = self._reader(request)
        with self._upstream.parsing():
            reader.take_whole(reply)
        return reader.answer.reply(self._upstream.spec.name, dropped)

    def stream(self, request: ChatRequest, context: CallContext) -> AsyncIterator[Chunk]:
        body, dropped = self._body(request, stream=True)
        return stream_answer(self._upstream, self._path(stream=True), body, context, self._reader(request), dropped)

    async def close(self) -> None:
        await self._upstream.transport.aclose()


def bearer(spec: WorkerSpec) -> dict[str, str]:
    """The key as OpenAI's dialects carry it; nothing where there is none."""
    key = spec.api_key.get_secret_value() if spec.api_key else ""
    return {"authorization": f"Bearer {key}"} if key else {}
