"""What a limiter admitted, on disk, so that a restart does not forget the last window.

One append-only file per worker and shard, of records of 32 bytes. A grant is written before its request can leave,
with one `write`; a process that dies, even all of them by `kill -9`, leaves what it wrote in the page cache. (A
machine that loses power may lose the last seconds; it takes longer than a window to come back.) At start the file is
replayed: calls known to have been sent keep their stamps; calls granted and not known to be sent count from now.
After a window the file is set aside and a new one begun, so there are never more than two.

A disk that fails must not fail requests: one warning, the file is emptied, and as an empty file tells nothing, the
next start counts the window as used up. Writing is tried again after a window.
"""

from __future__ import annotations

import binascii
import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from actors.config import WorkerSpec
from actors.model_files import cache_dir

logger = logging.getLogger(__name__)

Live = Callable[[], Iterator[tuple[int, float | None, int, int]]]

_RECORD = struct.Struct("<QdqIH")  # key, wall time, tokens, requests, kind; a CRC of 2 bytes follows
_CRC = struct.Struct("<H")
_SIZE = _RECORD.size + _CRC.size
_HEADER, _GRANTED, _SENT, _SETTLED = range(4)
_VERSION = 1
_ROTATE_BYTES = 1 << 18
_STALE_SECONDS = 86_400.0


def state_dir() -> Path:
    """`FUGU_STATE`, else a folder beside the cache."""
    if chosen := os.environ.get("FUGU_STATE"):
        return Path(chosen).expanduser()
    cache = cache_dir()
    return cache.with_name(f"{cache.name}-state")


def journal_path(spec: WorkerSpec, shard: int) -> Path:
    """The journal of one shard. It belongs to the account and model upstream, not to the rest of the configuration,
    so that a changed timeout keeps it. The key is part of a digest only."""
    key = spec.api_key.get_secret_value() if spec.api_key else ""
    identity = "\0".join((spec.name, spec.provider, spec.url, spec.model, key))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return state_dir() / "limits" / f"{spec.name}-{digest}" / f"{shard}-of-{spec.shards}.log"


class Journal:
    """The log of one limiter (`actors.limiter.Log`).

    Args:
        path: the file; `.old` and `.lock` files lie beside it.
        span: seconds that an admitted call counts after it was sent (window and slack).
        wall: Unix seconds, which go on between processes.
    """

    def __init__(self, path: Path, *, span: float, wall: Callable[[], float] = time.time) -> None:
        self.path = path
        self.span = span
        self._wall = wall
        self._old = path.with_suffix(".old")
        self._file: int | None = None
        self._lock: int | None = None
        self._begun = 0.0
        self._size = 0
        self._pending = b""
        self._unsent: dict[int, int] = {}
        self._live: Live = lambda: iter(())
        self._warned = False

    @property
    def working(self) -> bool:
        """Whether grants are being written."""
        return self._file is not None

    # Starting

    def recover(self) -> list[tuple[float, int, int]] | None:
        """What earlier processes admitted within the last span, as (age in seconds, requests, tokens).

        None if that cannot be known: a damaged or emptied file, or another split of the same limit (`shards` was
        changed, or another server runs with it) in use within the span. No file at all is an empty list; whether
        that can be trusted is for the caller to say.
        """
        try:
            self._take_lock()
            found = [file for file in (self._old, self.path) if file.exists()]
            if self._others_in_use():
                return None
            return replay([file.read_bytes() for file in found], self._wall(), self.span)
        except OSError as error:
            self._fail(error)
            return None

    @property
    def exists(self) -> bool:
        return self.path.exists() or self._old.exists()

    def start(self, live: Live) -> None:
        """Begin a fresh file that holds what is occupied now, then log into it. `live` is `Limiter.live`."""
        self._live = live
        self._begin()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        """One process writes a file. Another server with the same worker gets a file of its own; each of them then
        keeps to the limit by itself only."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for attempt in range(20):
            self._lock = os.open(self.path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            os.close(self._lock)
            self._lock = None
            if attempt < 19:
                time.sleep(0.1)  # the process before this one may still be ending
        logger.warning(
            "another process uses the rate-limit journal %s: this one keeps its own, and both together may exceed the "
            "provider's limit",
            self.path.name,
        )
        self.path = self.path.with_name(f"{self.path.stem}.{os.getpid()}.log")
        self._old = self.path.with_suffix(".old")

    def _others_in_use(self) -> bool:
        now, others = self._wall(), False
        for file in self.path.parent.iterdir():
            if file.suffix not in (".log", ".old") or file in (self.path, self._old):
                continue
            age = now - file.stat().st_mtime
            others = others or age < self.span
            if age > _STALE_SECONDS:
                file.unlink(missing_ok=True)
        return others

    # Logging

    def granted(self, key: int, tokens: int) -> None:
        self._unsent[key] = tokens
        if self._file is not None and self._size > _ROTATE_BYTES and self._wall() - self._begun > self.span:
            self._rotate()
        self._write(self._pending + _record(key, self._wall(), tokens, 1, _GRANTED))

    def sent(self, key: int) -> None:
        # Need not be on disk at once: a call not known to be sent counts for longer, never for less.
        self._unsent.pop(key, None)
        self._pending += _record(key, self._wall(), 0, 0, _SENT)

    def settled(self, key: int, requests: int, tokens: int) -> None:
        self._unsent.pop(key, None)
        self._write(self._pending + _record(key, self._wall(), tokens, requests, _SETTLED))

    def _write(self, data: bytes) -> None:
        self._pending = b""
        if self._file is None:
            if self._wall() - self._begun > self.span:
                self._begin()
            return
        try:
            self._append(data)
        except OSError as error:
            self._fail(error)

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        if os.write(self._file, data) != len(data):
            raise OSError("the disk took only a part of a record")
        self._size += len(data)

    def _rotate(self) -> None:
        """Set the file aside; what it says is out of the window before it is overwritten, save for calls that have
        not left yet, which move into the new file."""
        assert self._file is not None
        try:
            self._append(self._pending)
            self._pending = b""
            os.close(self._file)
            self._file = None
            os.replace(self.path, self._old)
            now = self._wall()
            self._open(self.path, b"".join(_record(k, now, tokens, 1, _GRANTED) for k, tokens in self._unsent.items()))
        except OSError as error:
            self._fail(error)

    def _begin(self) -> None:
        """Write everything that is occupied now into a new file, then let it take the place of the old ones."""
        now, records = self._wall(), []
        self._unsent.clear()
        for key, age, requests, tokens in self._live():
            records.append(_record(key, now, tokens, requests, _GRANTED))
            if age is None:
                self._unsent[key] = tokens
            else:
                records.append(_record(key, now - age, 0, 0, _SENT))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = self.path.with_suffix(".new")
            self._open(temporary, b"".join(records))
            os.replace(temporary, self.path)
            self._old.unlink(missing_ok=True)
        except OSError as error:
            self._fail(error)

    def _open(self, path: Path, content: bytes) -> None:
        self._begun, self._size = self._wall(), 0
        self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._append(_record(_VERSION, self._begun, 0, 0, _HEADER) + content)

    def _fail(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "cannot keep the rate-limit journal in %s (%s): requests go on, and a restart will wait for one whole "
                "window",
                self.path.parent,
                error.strerror or error,
            )
        self._begun = self._wall()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        for file in (self.path, self._old):
            with contextlib.suppress(OSError):
                os.truncate(file, 0)


def _record(key: int, wall: float, tokens: int, requests: int, kind: int) -> bytes:
    body = _RECORD.pack(key, wall, tokens, requests, kind)
    return body + _CRC.pack(binascii.crc_hqx(body, 0xFFFF))


def replay(files: list[bytes], now: float, span: float) -> list[tuple[float, int, int]] | None:
    """What the files, older first, say is still occupied: (age in seconds, requests, tokens) each. None if a file is
    damaged. An unfinished last record is what a killed process leaves, and its call had not left yet."""
    calls: dict[int, tuple[float | None, int, int]] = {}
    for content in files:
        if len(content) < _SIZE:
            return None
        for offset in range(0, len(content) - _SIZE + 1, _SIZE):
            body = content[offset : offset + _RECORD.size]
            if binascii.crc_hqx(body, 0xFFFF) != _CRC.unpack_from(content, offset + _RECORD.size)[0]:
                return None
            key, wall, tokens, requests, kind = _RECORD.unpack(body)
            stamp, had_requests, had_tokens = calls.get(key, (None, 0, 0))
            if kind == _GRANTED:
                calls[key] = (None, requests, tokens)
            elif kind == _SENT:
                calls[key] = (wall, had_requests, had_tokens)
            elif kind == _SETTLED:
                calls[key] = (wall if stamp is None else stamp, requests, tokens)
            elif offset or key != _VERSION:
                return None
    ages = ((0.0 if stamp is None else max(0.0, now - stamp), r, t) for stamp, r, t in calls.values())
    return [(age, requests, tokens) for age, requests, tokens in ages if age < span and (requests or tokens)]


def unsettled(files: list[bytes]) -> set[int]:
    """The calls that the files, older first, tell of and that have not ended."""
    calls: set[int] = set()
    for content in files:
        for offset in range(_SIZE, len(content) - _SIZE + 1, _SIZE):
            key, _, _, _, kind = _RECORD.unpack_from(content, offset)
            if kind == _GRANTED:
                calls.add(key)
            elif kind == _SETTLED:
                calls.discard(key)
    return calls
