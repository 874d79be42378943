"""Worker calls inside a system under measurement: known answers are looked up, new ones are paid once within a budget
and kept before anything else happens to them, and all are counted. No Ray."""

from __future__ import annotations

import asyncio
import math
import pickle
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from actors.cache import ResponseCache
from actors.config import WorkerSpec
from actors.errors import FuguError
from actors.messages import ChatReply, ChatRequest, Chunk, Usage, Worker
from actors.worker import as_chunks
from training.generations import BudgetReachedError
from training.spending import Budget, after_failure, most_usd

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


class PaidCalls:
    """Answers on disk (SQLite; they are pickles, open only your own) by who was asked what. A call is noted with the
    most it can cost before it leaves: one that has no end when the file is opened again counts with that."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = sqlite3.connect(path, timeout=60)
        self._file.execute("PRAGMA journal_mode = WAL")
        self._file.execute("PRAGMA synchronous = NORMAL")
        self._file.execute(
            "CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, usd REAL NOT NULL, requests INTEGER NOT NULL, "
            "reply BLOB)"
        )

    @property
    def spent(self) -> tuple[float, int]:
        """USD and upstream requests of all runs."""
        totals = "SELECT coalesce(sum(usd), 0), coalesce(sum(requests), 0) FROM calls"
        usd, requests = self._file.execute(totals).fetchone()
        return float(usd), int(requests)

    def reply(self, key: str) -> ChatReply | None:
        row = self._file.execute("SELECT reply FROM calls WHERE key = ?", (key,)).fetchone()
        return None if row is None or row[0] is None else pickle.loads(row[0])

    def add(self, key: str, usd: float, requests: int, reply: ChatReply | None = None) -> None:
        """Count (negative: take back) what a call costs; with its answer, keep that."""
        with self._file:
            self._file.execute(
                "INSERT INTO calls VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET usd = usd + excluded.usd, "
                "requests = requests + excluded.requests, reply = coalesce(excluded.reply, reply)",
                (key, usd, requests, None if reply is None else pickle.dumps(reply, protocol=5)),
            )

    def close(self) -> None:
        self._file.close()


@dataclass
class Purse:
    """What all measured systems pay from: one budget, one store of answers. `stopped` says why nothing more is paid
    (empty: it still is)."""

    budget: Budget
    paid: PaidCalls
    specs: Mapping[str, WorkerSpec]
    digests: Mapping[str, str]
    stopped: str = ""
    _cache: ResponseCache[ChatReply] = field(default_factory=lambda: ResponseCache(1 << 20, math.inf))

    async def complete(self, worker: Worker, request: ChatRequest) -> tuple[ChatReply, bool]:
        """A worker's answer, and whether it was known. Equal calls at the same time are made once.

        Raises:
            BudgetReachedError: it is not known, and asking does not fit into the budget.
            FuguError: the worker's error, after as many tries as its configuration allows.
        """
        key = f"{worker.name}|{self.digests[worker.name]}|{request.fingerprint()}"
        if (known := self.paid.reply(key)) is not None:
            return known, True
        return await self._cache.get_or_make(key, lambda: self._ask(key, worker, request))

    async def _ask(self, key: str, worker: Worker, request: ChatRequest) -> ChatReply:
        spec = self.specs[worker.name]
        for attempt in range(1, spec.retry.attempts + 1):
            try:
                return await self._once(key, worker, request)
            except BudgetReachedError:
                raise
            except FuguError as error:
                if not error.retryable or attempt == spec.retry.attempts:
                    raise
                pause = max(_SHORTEST_PAUSE * 2 ** (attempt - 1), error.retry_after or 0.0)
                if pause > _LONGEST_PAUSE:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("retry.attempts is at least 1")

    async def _once(self, key: str, worker: Worker, request: ChatRequest) -> ChatReply:
        usd = most_usd(request, self.specs[worker.name]) if self.budget.usd is not None else 0.0
        held = (usd, 1)
        if self.stopped or not self.budget.hold(*held):
            self.stopped = self.stopped or f"the next call does not fit into the budget: {self.budget.describe()} used"
            raise BudgetReachedError(self.stopped)
        self.paid.add(key, *held)
        spent = held  # if we are cancelled, nobody knows better
        reply = None
        try:
            reply = await worker.complete(request.with_(max_attempts=1))
            spent = (0.0, 0) if reply.cached else (reply.cost_usd or 0.0, reply.attempts)
        except FuguError as error:
            spent = after_failure(error, usd)
            raise
        finally:
            self.budget.settle(held, *spent)
            self.paid.add(key, spent[0] - held[0], spent[1] - held[1], reply)
        return reply


@dataclass
class Meter:
    """What one attempt of a system took: the workers that acted, in order, their tokens and cost (as if nothing had
    been known; None: a price is unknown), and `saved_s`, the seconds that known answers once took. `refused` says that
    something was not asked for want of a budget: whatever came of the attempt then says nothing."""

    acted: list[str] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = 0.0
    saved_s: float = 0.0
    refused: bool = False

    def note(self, reply: ChatReply, known: bool, seconds: float) -> None:
        self.acted.append(reply.worker)
        self.usage = self.usage + reply.usage
        self.cost_usd = None if self.cost_usd is None or reply.cost_usd is None else self.cost_usd + reply.cost_usd
        if known:
            self.saved_s += max(0.0, reply.timing.total_s - seconds)


class MeteredWorker:
    """A worker of the pool as a system under measurement sees it. `recorded` gives answers that are known apart from
    the purse's."""

    def __init__(
        self,
        worker: Worker,
        purse: Purse,
        meter: Meter,
        recorded: Callable[[ChatRequest], ChatReply | None] = lambda _request: None,
    ) -> None:
        self._worker = worker
        self._purse = purse
        self._meter = meter
        self._recorded = recorded
        self.name = worker.name

    async def complete(self, request: ChatRequest) -> ChatReply:
        began = time.perf_counter()
        reply, known = self._recorded(request), True
        if reply is None:
            try:
                reply, known = await self._purse.complete(self._worker, request)
            except BudgetReachedError:
                self._meter.refused = True
                raise
        self._meter.note(reply, known, time.perf_counter() - began)
        return reply

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        for chunk in as_chunks(await self.complete(request)):
            yield chunk
