"""A worker on a model in this process. Several workers may share one engine, each with its own LoRA adapter."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from actors.adapters.base import CallContext
from actors.adapters.local_engine import Event, LocalEngine
from actors.adapters.text_worker import Finished, TextAdapter
from actors.config import WorkerSpec
from actors.errors import FuguError
from actors.messages import ChatRequest


class LocalAdapter(TextAdapter):
    """Adapter over a `LocalEngine`. Closing it closes the engine, for all workers that share it."""

    def __init__(self, spec: WorkerSpec, engine: LocalEngine) -> None:
        super().__init__(spec.name)
        self._adapter = spec.name if spec.adapter else None
        self._engine = engine

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)

    async def _generate(self, request: ChatRequest, context: CallContext) -> AsyncGenerator[str | Finished, None]:
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
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            generation.cancelled = True
