"""Events from a run to its reader, who may be slow: the run is told to wait before it makes more pieces of an answer.

Events are put without waiting, for most of them are few (steps that begin and end). Whoever makes many calls `room`
after each, and so a client that reads slowly slows the provider down and not the server's memory up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

Event = TypeVar("Event")

MOST_UNREAD = 32

# Waits until more may be told.
Room = Callable[[], Awaitable[None]]


async def always_room() -> None:
    """For a reader who takes everything at once."""


class Events(Generic[Event]):
    """One run writes and one reader reads, in one event loop."""

    def __init__(self, most: int = MOST_UNREAD) -> None:
        self._unread: deque[Event] = deque()
        self._most = most
        self._closed = False
        self._some = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def put(self, event: Event) -> None:
        self._unread.append(event)
        self._some.set()
        if len(self._unread) >= self._most:
            self._room.clear()

    async def room(self) -> None:
        """Wait until fewer than the most are unread. A reader that goes away ends the run, and this with it."""
        await self._room.wait()

    def close(self) -> None:
        """Nothing more comes; what is unread still is read."""
        self._closed = True
        self._some.set()

    async def read(self) -> Event | None:
        """The next event; None after the last."""
        while not self._unread:
            if self._closed:
                return None
            self._some.clear()
            await self._some.wait()
        event = self._unread.popleft()
        if len(self._unread) < self._most:
            self._room.set()
        return event
