"""Server-sent events: keep-alive comments while an answer is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


async def with_keep_alive(
    events: AsyncGenerator[bytes, None], every: float, alive: Callable[[], bytes] = lambda: KEEP_ALIVE
) -> AsyncGenerator[bytes, None]:
    """The events as they come, and `alive()` whenever none came for `every` seconds. Closing it, or cancelling the
    task that reads it, closes `events`."""
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(events))
            while not pending.done():
                await asyncio.wait((pending,), timeout=every)
                if not pending.done():
                    yield alive()
            try:
                event = pending.result()
            except StopAsyncIteration:
                return
            if event:
                yield event
    finally:
        if pending is not None and not pending.done():
            pending.cancel()
            await asyncio.wait((pending,))
        await events.aclose()
