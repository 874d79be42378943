"""API keys that were created with `fugu keys create`: what each may use, how much, and what it has used.

A key itself is shown once and never kept, only its SHA-256 (it is 256 random bits, so nobody finds it from that). Keys
and usage are in SQLite in the state folder, shared by the gateways of a machine and kept over restarts; a gateway sees
a revoked key within a second, and a new one when it is first used. Limits hold across gateways: every metered request
is one short transaction before and one after it, off the event loop. A request reserves the tokens and the money it may
use and is settled with those it did; what is held by requests whose gateway died counts as spent in the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from actors.errors import BudgetSpentError, ConfigError, KeyLimitError, RequestError
from actors.journal import state_dir
from actors.messages import Usage
from serve.store import Database

log = logging.getLogger("fugu.gateway")

PREFIX = "fugu-"
WINDOW_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_LOOK_AGAIN_SECONDS = 0.1
_BUDGET_RETRY_SECONDS = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL UNIQUE, models TEXT, workers TEXT,
    requests_per_minute INTEGER, tokens_per_minute INTEGER, monthly_usd REAL,
    created REAL NOT NULL, revoked REAL
);
CREATE TABLE IF NOT EXISTS usage (
    key TEXT NOT NULL, month TEXT NOT NULL, requests INTEGER NOT NULL, input INTEGER NOT NULL, cached INTEGER NOT NULL,
    output INTEGER NOT NULL, reasoning INTEGER NOT NULL, usd REAL NOT NULL, unpriced INTEGER NOT NULL,
    PRIMARY KEY (key, month)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS recent (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, at REAL NOT NULL, tokens INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS estimated (
    key TEXT NOT NULL, month TEXT NOT NULL, usd REAL NOT NULL, PRIMARY KEY (key, month)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cache_written (
    key TEXT NOT NULL, month TEXT NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (key, month)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS recent_key ON recent (key, at);
CREATE TABLE IF NOT EXISTS held (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, month TEXT NOT NULL, until REAL NOT NULL, usd REAL NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it is kept. `models` and `workers` are what it may use, None everything; limits None are none;
    `monthly_usd` is spent anew every calendar month (UTC). Times in seconds since 1970."""

    id: str
    name: str
    models: frozenset[str] | None = None
    workers: frozenset[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    monthly_usd: float | None = None
    created: float = 0.0
    revoked: float | None = None


@dataclass(frozen=True, slots=True)
class Used:
    """What a key used in a month. `unpriced` counts requests whose cost is unknown and so not in `usd`, of which
    `estimated_usd` is a guess: of answers that were broken off, and of requests whose gateway died."""

    requests: int = 0
    usage: Usage = field(default_factory=Usage)
    usd: float = 0.0
    unpriced: int = 0
    estimated_usd: float = 0.0


class KeyBook:
    """The keys of a state folder. `clock`: seconds since 1970. `longest`: seconds that a request may take, after which
    what it holds counts as spent."""

    def __init__(
        self, path: Path | None = None, *, clock: Callable[[], float] = time.time, longest: float = 7200.0
    ) -> None:
        self._path = path or state_dir() / "keys.sqlite"
        self._database = Database(self._path, _SCHEMA)
        self._clock = clock
        self._longest = longest
        self._by_digest: dict[bytes, Key] = {}
        self._looked = float("-inf")
        self._looking = asyncio.Lock()
        self._known = False
        self.any = False
        """Whether keys were ever created: then a key is needed, though all may be revoked by now."""

    # Looking up

    async def refresh(self) -> None:
        """See keys that another process created or revoked; at most once a second. Nobody passes before the first
        look."""
        if time.monotonic() - self._looked < _LOOK_SECONDS or (self._known and self._looking.locked()):
            return
        await self._look(time.monotonic() - _LOOK_SECONDS)

    async def look_for(self, secret: bytes) -> Key | None:
        """The key with this secret as `find` says it, after another look if it is not known: one gateway must not
        refuse a key that its neighbour has accepted. Whoever guesses costs at most ten looks a second."""
        asked = time.monotonic()
        if self.find(secret) is None:
            await asyncio.sleep(self._looked + _LOOK_AGAIN_SECONDS - asked)
            await self._look(asked)
        return self.find(secret)

    async def _look(self, since: float) -> None:
        """Read the keys, unless a look begun after `since` (of the monotonic clock) is over by the time it is one's
        turn."""
        async with self._looking:
            if self._looked > since:
                return
            began = time.monotonic()
            if self._path.exists():
                self._learn(await self._database.run(_all))
            self._looked, self._known = began, True

    def _learn(self, rows: Iterable[tuple[bytes, Key]]) -> None:
        rows = list(rows)
        self.any = bool(rows)
        self._by_digest = {digest: key for digest, key in rows if key.revoked is None}

    def find(self, secret: bytes) -> Key | None:
        """The key with this secret, if it is not revoked."""
        return self._by_digest.get(hashlib.sha256(secret).digest())

    # Metering

    async def admit(self, key: Key, tokens: int, usd: float = 0.0, *, most: int = 0) -> int:
        """Reserve a request of so many tokens and so much money; a number to settle it with. Of its minute's tokens it
        reserves up to `most`, where so many are left.

        Raises:
            KeyLimitError: the key's requests or tokens of this minute are used, or requests that are being answered
                hold what is left of its month; says when to come again.
            BudgetSpentError: its money of this month is spent, or too little is left for this request.
            RequestError: it alone is more than the key's tokens per minute.
        """
        if key.tokens_per_minute is not None and tokens > key.tokens_per_minute:
            raise RequestError(
                f"the request may take {tokens} tokens, and this key has {key.tokens_per_minute} per minute; "
                "ask for fewer with max_tokens",
                param="max_tokens",
            )
        # Not SQLite's own, which come again when the rows with the highest are gone.
        number = secrets.randbits(62)
        try:
            await self._database.run(lambda connection: self._admit(connection, key, number, tokens, usd, most))
        except asyncio.CancelledError:
            await self._withdraw(number)
            raise
        return number

    async def _withdraw(self, number: int) -> None:
        """Take a reservation back that nobody will settle: its caller left while it was being written. The write is
        made or not made by then, since the store has one thread."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM recent WHERE id = ?", (number,))
            connection.execute("DELETE FROM held WHERE id = ?", (number,))

        try:
            await asyncio.shield(asyncio.ensure_future(self._database.run(write)))
        except sqlite3.Error as error:
            # It falls out of the minute by itself, and counts as spent.
            log.error("a reservation was not taken back: %s", type(error).__name__)

    def _admit(self, connection: sqlite3.Connection, key: Key, number: int, tokens: int, usd: float, most: int) -> None:
        now = self._clock()
        connection.execute("DELETE FROM recent WHERE at <= ?", (now - WINDOW_SECONDS,))
        if key.monthly_usd is not None:
            self._check_budget(connection, key, key.monthly_usd, usd, now)
        recent = connection.execute("SELECT at, tokens FROM recent WHERE key = ? ORDER BY at", (key.id,)).fetchall()
        if key.requests_per_minute is not None and len(recent) >= key.requests_per_minute:
            wait = recent[len(recent) - key.requests_per_minute][0] + WINDOW_SECONDS - now
            raise KeyLimitError(f"this key has {key.requests_per_minute} requests per minute", retry_after=wait)
        if key.tokens_per_minute is not None:
            left = key.tokens_per_minute - sum(each[1] for each in recent)
            over = tokens - left
            for at, freed in recent:
                if over <= 0:
                    break
                over -= freed
                wait = at + WINDOW_SECONDS - now
                if over <= 0:
                    raise KeyLimitError(f"this key has {key.tokens_per_minute} tokens per minute", retry_after=wait)
            tokens = max(tokens, min(most, left))
        connection.execute("INSERT INTO recent VALUES (?, ?, ?, ?)", (number, key.id, now, tokens))
        if key.monthly_usd is not None:
            held = (number, key.id, _month(now), now + self._longest, usd)
            connection.execute("INSERT INTO held VALUES (?, ?, ?, ?, ?)", held)

    def _check_budget(self, connection: sqlite3.Connection, key: Key, budget: float, usd: float, now: float) -> None:
        expired = connection.execute("DELETE FROM held WHERE until <= ? RETURNING key, month, usd", (now,)).fetchall()
        for owner, month, lost in expired:
            _add(connection, owner, month, Usage(), lost, lost)
        spent = self._used(connection, key.id, now).usd
        if spent >= budget:
            raise BudgetSpentError(f"this key's budget of ${budget:g} for the month is spent")
        if spent + usd > budget:
            raise BudgetSpentError(
                f"${budget - spent:.4g} of this key's ${budget:g} for the month is left, and the request may cost "
                f"${usd:.4g}; ask for fewer tokens with max_tokens"
            )
        held = connection.execute(
            "SELECT COALESCE(SUM(usd), 0) FROM held WHERE key = ? AND month = ?", (key.id, _month(now))
        ).fetchone()[0]
        if spent + held + usd > budget:
            raise KeyLimitError(
                f"requests that are being answered hold ${held:.4g} of this key's ${budget:g} for the month, of which "
                f"${spent:.4g} is spent, and this one may cost ${usd:.4g}",
                retry_after=_BUDGET_RETRY_SECONDS,
            )

    async def settle(
        self, key: Key, number: int, usage: Usage, usd: float | None, *, estimated_usd: float = 0.0
    ) -> None:
        """Replace what was reserved by what was used, and add it to the month that it was reserved in. `usd` is None
        where it is unknown; `estimated_usd` is the part of it that is a guess."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE recent SET tokens = ? WHERE id = ?", (usage.total_tokens, number))
            held = connection.execute("DELETE FROM held WHERE id = ? RETURNING month", (number,)).fetchone()
            _add(connection, key.id, _month(self._clock()) if held is None else held[0], usage, usd, estimated_usd)

        await self._database.run(write)

    # For the command line, from one thread

    def create(self, key: Key) -> tuple[Key, str]:
        """Keep a new key; its id is made here. Returns it with its secret, which is not kept."""
        secret = PREFIX + secrets.token_urlsafe(32)
        digest = hashlib.sha256(secret.encode()).digest()
        id = digest.hex()[:12]
        created = self._clock()
        row = (id, key.name, digest, _listed(key.models), _listed(key.workers), key.requests_per_minute,
               key.tokens_per_minute, key.monthly_usd, created, None)  # fmt: skip
        self._database.run_here(lambda it: it.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row))
        return replace(key, id=id, created=created), secret

    def list(self) -> list[tuple[Key, Used]]:
        """Every key, the oldest first, and what it used this month."""

        def read(connection: sqlite3.Connection) -> list[tuple[Key, Used]]:
            return [(key, self._used(connection, key.id, self._clock())) for _, key in _all(connection)]

        return self._database.run_here(read) if self._path.exists() else []

    def revoke(self, id: str) -> Key:
        """Raises:
        ConfigError: there is no such key, or it is revoked already.
        """
        known = {key.id: key for key, _ in self.list()}
        if id not in known or known[id].revoked is not None:
            raise ConfigError(f"there is no key {id!r} to revoke; `fugu keys list` shows them")
        self._database.run_here(lambda it: it.execute("UPDATE keys SET revoked = ? WHERE id = ?", (self._clock(), id)))
        return known[id]

    def _used(self, connection: sqlite3.Connection, id: str, now: float) -> Used:
        row = connection.execute(
            "SELECT requests, input, output, cached, reasoning, usd, unpriced FROM usage WHERE key = ? AND month = ?",
            (id, _month(now)),
        ).fetchone()
        if row is None:
            return Used()
        guessed = connection.execute("SELECT usd FROM estimated WHERE key = ? AND month = ?", (id, _month(now)))
        kept = connection.execute("SELECT tokens FROM cache_written WHERE key = ? AND month = ?", (id, _month(now)))
        usage = replace(Usage(*row[1:5]), cache_written_tokens=(kept.fetchone() or (0,))[0])
        return Used(row[0], usage, row[5], row[6], (guessed.fetchone() or (0.0,))[0])


def _add(
    connection: sqlite3.Connection, key: str, month: str, usage: Usage, usd: float | None, estimated_usd: float
) -> None:
    """A request to what a key used in a month."""
    if usd is not None and estimated_usd:
        connection.execute(
            "INSERT INTO estimated VALUES (?, ?, ?) ON CONFLICT (key, month) DO UPDATE SET usd = usd + excluded.usd",
            (key, month, estimated_usd),
        )
    if usage.cache_written_tokens:
        connection.execute(
            "INSERT INTO cache_written VALUES (?, ?, ?) "
            "ON CONFLICT (key, month) DO UPDATE SET tokens = tokens + excluded.tokens",
            (key, month, usage.cache_written_tokens),
        )
    connection.execute(
        "INSERT INTO usage VALUES (?, ?, 1, ?, ?, ?, ?, ?, ?) ON CONFLICT (key, month) DO UPDATE SET "
        "requests = requests + 1, input = input + excluded.input, cached = cached + excluded.cached, "
        "output = output + excluded.output, reasoning = reasoning + excluded.reasoning, "
        "usd = usd + excluded.usd, unpriced = unpriced + excluded.unpriced",
        (
            key,
            month,
            usage.input_tokens,
            usage.cached_input_tokens,
            usage.output_tokens,
            usage.reasoning_tokens,
            usd or 0.0,
            int(usd is None),
        ),
    )


def _all(connection: sqlite3.Connection) -> list[tuple[bytes, Key]]:
    rows = connection.execute(
        "SELECT digest, id, name, models, workers, requests_per_minute, tokens_per_minute, monthly_usd, created, "
        "revoked FROM keys ORDER BY created"
    )
    return [(row[0], Key(row[1], row[2], _set(row[3]), _set(row[4]), *row[5:])) for row in rows]


def _listed(names: frozenset[str] | None) -> str | None:
    return None if names is None else json.dumps(sorted(names))


def _set(text: str | None) -> frozenset[str] | None:
    names: Any = None if text is None else json.loads(text)
    return None if names is None else frozenset(names)


def _month(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m")
