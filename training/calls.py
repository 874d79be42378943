"""Worker calls that are paid once: answers are kept on disk by what was asked of whom, and equal calls that run at the
same time are made once. No Ray."""

from __future__ import annotations

import math
import pickle
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path

from actors.cache import ResponseCache
from actors.messages import ChatReply, ChatRequest, Chunk, Worker

# Key of a call: who (with what it was configured as) and the request's fingerprint.
Key = str


class CallStore:
    """Answers on disk (`calls.sqlite`; the answers are pickles, open only your own), by task and call. What is added is
    there after a kill."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path, timeout=60)
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = NORMAL")
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, task TEXT NOT NULL, usd REAL, reply BLOB NOT NULL)"
        )
        self._file.execute("CREATE INDEX IF NOT EXISTS by_task ON calls (task)")
        self.calls, self.usd = self._file.execute("SELECT count(*), coalesce(sum(usd), 0) FROM calls").fetchone()

    def add(self, answers: Iterable[tuple[str, Key, ChatReply]]) -> None:
        """Keep (task_id, key, reply)s; one that is there already (two nodes may ask at once) stays as it was."""
        with self._file:
            for task_id, key, reply in answers:
                usd = 0.0 if reply.cached else reply.cost_usd
                row = (key, task_id, usd, pickle.dumps(reply, protocol=5))
                made = self._file.execute("INSERT OR IGNORE INTO calls VALUES (?, ?, ?, ?)", row).rowcount
                self.calls += made
                self.usd += (usd or 0.0) * made

    def of(self, task_id: str) -> dict[Key, ChatReply]:
        """All answers to calls made for a task."""
        rows = self._file.execute("SELECT key, reply FROM calls WHERE task = ?", (task_id,))
        return {key: pickle.loads(reply) for key, reply in rows}

    def close(self) -> None:
        self._file.close()


class PaidOnce:
    """A worker whose answers are looked up before it is asked. `note` gets every answer that was not known."""

    def __init__(
        self, worker: Worker, digest: str, cache: ResponseCache[ChatReply], note: Callable[[Key, ChatReply], None]
    ) -> None:
        self._worker = worker
        self._digest = digest
        self._cache = cache
        self._note = note
        self.name = worker.name

    async def complete(self, request: ChatRequest) -> ChatReply:
        key = f"{self.name}|{self._digest}|{request.fingerprint()}"

        async def ask() -> ChatReply:
            reply = await self._worker.complete(request)
            self._note(key, reply)
            return reply

        reply, _ = await self._cache.get_or_make(key, ask)
        return reply

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        return self._worker.stream(request)


def call_cache(known: Mapping[Key, ChatReply]) -> ResponseCache[ChatReply]:
    """A cache that forgets nothing, filled with what is known."""
    cache: ResponseCache[ChatReply] = ResponseCache(1 << 62, math.inf)
    for key, reply in known.items():
        cache.put(key, reply)
    return cache
