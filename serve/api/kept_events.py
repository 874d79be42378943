"""The events of a response that is streamed while it is made in the background: kept in pages as they come, so that
whoever reads them may leave, and go on where he was, from any gateway that shares the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from actors.errors import NotFoundError
from serve.auth import Caller
from serve.store import Kept, Store
from serve.translate import dumps

EVENTS = "events"
# How long events wait for more to fill a page; how soon a reader looks for the next.
_PAGE_SECONDS = 0.2
_LOOK_SECONDS = 0.1
# The last page is written after the response: for so long a reader waits for it.
_LATE_SECONDS = 2.0
_END = b"\n\n"
_LAST = tuple(b"event: response.%b\n" % kind for kind in (b"completed", b"incomplete", b"failed"))


class Responses(Protocol):
    """Where the response itself is (`serve.api.conversations`)."""

    async def shown(self, id: str, caller: Caller) -> dict[str, Any]: ...


class KeptEvents:
    """Events of many responses. `store` is None where nothing is kept; `seconds` is for how long."""

    def __init__(self, store: Store | None, seconds: float) -> None:
        self._store = store
        self._seconds = seconds

    async def put(self, id: str, page: int, raw: bytes, caller: Caller) -> None:
        if self._store is not None:
            await self._store.put([Kept(EVENTS, f"{id}.{page}", raw)], caller.id, seconds=self._seconds)

    async def page(self, id: str, page: int, caller: Caller) -> list[bytes] | None:
        """Whole events, in order; None where the page is not there (yet)."""
        raw = None if self._store is None else await self._store.get(EVENTS, f"{id}.{page}", caller.id)
        return None if raw is None else [event + _END for event in raw.split(_END) if event]

    async def forget(self, id: str, caller: Caller) -> None:
        page = 0
        while self._store is not None and await self._store.delete(EVENTS, f"{id}.{page}", caller.id):
            page += 1

    async def read(self, id: str, caller: Caller, responses: Responses, after: int = -1) -> AsyncGenerator[bytes, None]:
        """The events whose `sequence_number` is above `after`, as they come, until the response ends."""
        page = number = 0
        late: float | None = None
        while True:
            events = await self.page(id, page, caller)
            if events is not None:
                for event in events:
                    if number > after:
                        yield event
                    number += 1
                if events[-1].startswith(_LAST):
                    return
                page += 1
                continue
            try:
                body = await responses.shown(id, caller)
            except NotFoundError:
                return
            if body["status"] == "cancelled":
                return
            if body["status"] != "in_progress":
                late = late or time.monotonic() + _LATE_SECONDS
                if time.monotonic() > late:  # who made it has died
                    kind = f"response.{body['status']}"
                    told = dumps({"type": kind, "sequence_number": number, "response": body})
                    yield b"event: %b\ndata: %b\n\n" % (kind.encode(), told)
                    return
            await asyncio.sleep(_LOOK_SECONDS)


class Recorder:
    """Writes the events of one response, a page at most every fifth of a second."""

    def __init__(self, kept: KeptEvents, id: str, caller: Caller) -> None:
        self._kept = kept
        self._id = id
        self._caller = caller
        self._page = 0
        self._waiting: list[bytes] = []
        self._written = 0.0
        self._turn = asyncio.Lock()

    async def add(self, events: bytes) -> None:
        if events:
            self._waiting.append(events)
        if time.monotonic() - self._written >= _PAGE_SECONDS:
            await self.flush()

    async def last(self, events: bytes) -> None:
        self._waiting.append(events)
        await self.flush()

    async def flush(self) -> None:
        async with self._turn:
            if self._waiting:
                raw = b"".join(self._waiting)
                self._waiting.clear()
                await self._kept.put(self._id, self._page, raw, self._caller)
                self._page += 1
                self._written = time.monotonic()
