"""Keep-alive comments come between events, and closing reaches the source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from serve.sse import KEEP_ALIVE, with_keep_alive


class Source:
    """Yields the events, each after its wait in seconds; remembers how it ended."""

    def __init__(self, *events: tuple[float, bytes | Exception]) -> None:
        self.events = events
        self.ended = ""

    async def run(self) -> AsyncGenerator[bytes, None]:
        try:
            for wait, event in self.events:
                await asyncio.sleep(wait)
                if isinstance(event, Exception):
                    raise event
                yield event
            self.ended = "done"
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        except GeneratorExit:
            self.ended = "closed"
            raise


async def test_comments_fill_the_silence_only() -> None:
    source = Source((0, b"a"), (0.25, b"b"), (0, b""), (0, b"c"))
    events = [event async for event in with_keep_alive(source.run(), 0.1)]
    assert events == [b"a", KEEP_ALIVE, KEEP_ALIVE, b"b", b"c"]
    assert source.ended == "done"


async def test_an_error_comes_through() -> None:
    lines = with_keep_alive(Source((0, b"a"), (0.15, ValueError("x"))).run(), 0.1)
    assert await anext(lines) == b"a"
    assert await anext(lines) == KEEP_ALIVE
    with pytest.raises(ValueError, match="x"):
        await anext(lines)


async def test_closing_while_the_source_waits_cancels_it() -> None:
    source = Source((0, b"a"), (30, b"b"))
    lines = with_keep_alive(source.run(), 0.05)
    assert [await anext(lines), await anext(lines)] == [b"a", KEEP_ALIVE]
    await lines.aclose()
    assert source.ended == "cancelled"


async def test_closing_between_events_closes_it() -> None:
    source = Source((0, b"a"), (0, b"b"))
    lines = with_keep_alive(source.run(), 5)
    assert await anext(lines) == b"a"
    await lines.aclose()
    assert source.ended == "closed"


async def test_cancelling_the_reader_cancels_the_source() -> None:
    source = Source((0, b"a"), (30, b"b"))

    async def read() -> None:
        async for _ in with_keep_alive(source.run(), 5):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert source.ended == "cancelled"
