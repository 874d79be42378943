"""What the server keeps for its callers between requests: conversations, and whatever else is found again by an id.

One small interface; SQLite behind it, in the state folder, shared by the replicas of a machine and kept over restarts.
Every value has an owner (a key's id, or "" where no key is needed) and is found by that owner only.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

Result = TypeVar("Result")

_BUSY_SECONDS = 10.0
_PURGE_EVERY = 256
# SQLite's write-ahead log needs memory that all who have the file open share: machines that mount one storage do not.
NETWORKED = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3"}
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS kept (
    kind TEXT NOT NULL, id TEXT NOT NULL, owner TEXT NOT NULL, value BLOB NOT NULL, expires REAL NOT NULL,
    PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS kept_expires ON kept (expires);
"""


@dataclass(frozen=True, slots=True)
class Kept:
    """A value to keep. `kind` and `id` together name it."""

    kind: str
    id: str
    value: bytes


class Store(Protocol):
    async def put(self, values: Sequence[Kept], owner: str, *, seconds: float) -> None:
        """Keep values, all or none of them, for `seconds`; those of the same name are replaced."""

    async def get(self, kind: str, id: str, owner: str) -> bytes | None:
        """A value of this owner's; None where there is none (any more)."""

    async def delete(self, kind: str, id: str, owner: str) -> bool:
        """Forget a value; whether there was one of this owner's."""


class SqliteStore:
    """See `Store`. SQLite is called in one thread of the store's own, never in the event loop. Beyond about `most`
    values those that would expire soonest are forgotten."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, most: int | None = None) -> None:
        self._database = Database(path, _SCHEMA)
        self._clock = clock
        self._most = most
        self._puts = 0

    async def put(self, values: Sequence[Kept], owner: str, *, seconds: float) -> None:
        expires = self._clock() + seconds
        rows = [(each.kind, each.id, owner, each.value, expires) for each in values]

        def write(connection: sqlite3.Connection) -> None:
            # Another owner's value of the same name stays: ids are ours and random, so nobody meets one by chance.
            connection.executemany(
                "INSERT INTO kept VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, id) DO UPDATE "
                "SET value = excluded.value, expires = excluded.expires WHERE owner = excluded.owner",
                rows,
            )
            if self._puts % _PURGE_EVERY == 0:
                connection.execute("DELETE FROM kept WHERE expires < ?", (self._clock(),))
                if self._most is not None:
                    connection.execute(
                        "DELETE FROM kept WHERE (kind, id) IN "
                        "(SELECT kind, id FROM kept ORDER BY expires DESC LIMIT -1 OFFSET ?)",
                        (self._most,),
                    )
            self._puts += 1

        await self._database.run(write)

    async def get(self, kind: str, id: str, owner: str) -> bytes | None:
        query = "SELECT value FROM kept WHERE kind = ? AND id = ? AND owner = ? AND expires >= ?"
        arguments = (kind, id, owner, self._clock())
        row = await self._database.run(lambda connection: connection.execute(query, arguments).fetchone())
        return None if row is None else bytes(row[0])

    async def delete(self, kind: str, id: str, owner: str) -> bool:
        query = "DELETE FROM kept WHERE kind = ? AND id = ? AND owner = ?"
        return await self._database.run(lambda connection: connection.execute(query, (kind, id, owner)).rowcount > 0)


class Database:
    """A SQLite file, opened on first use, called from one thread. Several processes may have it open."""

    def __init__(self, path: Path, schema: str) -> None:
        self._path = path
        self._schema = schema
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")

    async def run(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        """The action in a transaction of its own; rolled back if it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.run_here, action)

    def run_here(self, action: Callable[[sqlite3.Connection], Result]) -> Result:
        """The same, in the calling thread, which must always be the same one."""
        if self._connection is None:
            self._connection = self._open()
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            return action(self._connection)

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
        self._path.chmod(0o600)
        if file_system(self._path) in NETWORKED:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = FULL")
        else:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(self._schema)
        return connection


def file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """The type of the file system that a file is on, as Linux calls it; "" where that cannot be told."""
    if not mounts.exists():
        return ""
    # Device, mount point (\\040 is a space), type, …
    rows = [line.split(" ") for line in mounts.read_text().splitlines()]
    found = {Path(row[1].replace("\\040", " ")): row[2] for row in rows}
    return next((found[place] for place in (path.resolve(), *path.resolve().parents) if place in found), "")
