"""A worker on a model in this process. Several workers may share one engine, each with its own LoRA adapter."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from actors.adapters.base import CallContext
from actors.adapters.local_engine import Event, Finished, LocalEngine
from actors.config import WorkerSpec
from actors.errors import FuguError, StreamBrokenError, WorkerRejectedError
from actors.messages import ChatReply, ChatRequest, Chunk


class LocalAdapter:
    """Adapter over a `LocalEngine` (see `actors.adapters.base.Adapter`). Closing it closes the engine."""

    def __init__(self, spec: WorkerSpec, engine: LocalEngine) -> None:
        self._name = spec.name
        self._adapter = spec.name if spec.adapter else None
        self._engine = engine

    async def complete(self, request: ChatRequest, context: CallContext) -> ChatReply:
        async for event in self._events(request, context):
            if isinstance(event, Finished):
                return self._reply(request, event)
        raise AssertionError("the engine ended a generation without an end")

    async def stream(self, request: ChatRequest, context: CallContext) -> AsyncIterator[Chunk]:
        begun = False
        try:
            async for event in self._events(request, context):
                if isinstance(event, Finished):
                    yield Chunk(final=self._reply(request, event))
                else:
                    yield Chunk(text=event)
                begun = True
        except FuguError as error:
            if not begun:
                raise
            raise StreamBrokenError(error.message, worker=self._name) from error

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)

    async def _events(self, request: ChatRequest, context: CallContext) -> AsyncIterator[str | Finished]:
        """Pieces of text, then `Finished`. Leaving the iteration, for whatever reason, cancels the generation."""
        self._refuse(request)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            # RuntimeError: the loop closed in the meantime, so nobody listens any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        generation = await asyncio.to_thread(self._engine.prepare, request, emit, adapter=self._adapter)
        try:
            self._engine.submit(generation)
            context.on_sent()
            while True:
                event = await events.get()
                if isinstance(event, FuguError):
                    event.worker = self._name
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            generation.cancelled = True

    def _refuse(self, request: ChatRequest) -> None:
        if request.tool_choice is not None and request.tool_choice.mode in ("required", "named"):
            raise WorkerRejectedError(
                "this worker cannot call tools, and the request demands it",
                param="tool_choice",
                worker=self._name,
            )

    def _reply(self, request: ChatRequest, end: Finished) -> ChatReply:
        return ChatReply(
            worker=self._name,
            text=end.text,
            finish_reason=end.reason,
            usage=end.usage,
            dropped=_dropped(request),
        )


def _dropped(request: ChatRequest) -> tuple[str, ...]:
    """The fields of a request that a local model does not act on."""
    formatted = request.response_format is not None and request.response_format.kind != "text"
    given = {
        "tools": bool(request.tools),
        "tool_choice": request.tool_choice is not None,
        "parallel_tool_calls": request.parallel_tool_calls is not None,
        "response_format": formatted,
        "reasoning_effort": request.reasoning_effort is not None,
    }
    return (*(name for name, is_given in given.items() if is_given), *request.extra)
