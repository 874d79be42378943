"""A response cache: bounded in number and age, and equal calls that run at the same time are made once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


@dataclass(slots=True)
class _Running(Generic[Value]):
    task: asyncio.Task[Value]
    waiters: int


class ResponseCache(Generic[Value]):
    """Least recently used goes first when there are more than `entries`; nothing is older than `ttl` seconds.

    Values must not be changed by those who get them. Errors are not kept.
    """

    def __init__(self, entries: int, ttl: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries = entries
        self._ttl = ttl
        self._clock = clock
        self._kept: OrderedDict[str, tuple[float, Value]] = OrderedDict()
        self._running: dict[str, _Running[Value]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Value | None:
        found = self._kept.get(key)
        if found is None:
            return None
        stored, value = found
        if self._clock() - stored >= self._ttl:
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return value

    def put(self, key: str, value: Value) -> None:
        self._kept[key] = (self._clock(), value)
        self._kept.move_to_end(key)
        while len(self._kept) > self._entries:
            self._kept.popitem(last=False)

    async def get_or_make(self, key: str, make: Callable[[], Coroutine[Any, Any, Value]]) -> tuple[Value, bool]:
        """The value for `key`, and whether it was there or in the making already.

        `make` runs in a task of its own that all who ask at the same time wait for: one of them being cancelled does
        not end it for the others, and it is cancelled when the last of them is. What it raises, all of them raise.
        """
        value = self.get(key)
        if value is not None:
            return value, True
        running = self._running.get(key)
        shared = running is not None
        if running is None:
            running = self._running[key] = _Running(asyncio.create_task(self._make(key, make())), 0)
        running.waiters += 1
        try:
            return await asyncio.shield(running.task), shared
        finally:
            running.waiters -= 1
            if running.waiters == 0 and not running.task.done():
                # Whoever asks from now on starts anew instead of joining a call that is being cancelled.
                self._forget(key, running.task)
                running.task.cancel()

    async def _make(self, key: str, making: Awaitable[Value]) -> Value:
        try:
            value = await making
            self.put(key, value)
            return value
        finally:
            this = asyncio.current_task()
            if this is not None:
                self._forget(key, this)

    def _forget(self, key: str, task: asyncio.Task[Any]) -> None:
        running = self._running.get(key)
        if running is not None and running.task is task:
            del self._running[key]
