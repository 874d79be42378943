"""Folders that a run works in and that shall outlive its machine: kept at `s3://`, `gs://` and other addresses that
pyarrow knows while the run goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from actors.errors import ConfigError
from actors.storage import filesystem, place_of, send

logger = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two looks at what has changed; more where sending takes more than a tenth of that."""
_ASIDE = ("-wal", "-shm", "-journal")  # SQLite's own, which mean nothing beside a copy

# Of a file at either end: when it was written (ns) and how many bytes it has.
Stamp = tuple[int, int]


@contextmanager
def kept_at(address: str, folder: Path | None = None) -> Iterator[Path]:
    """The folder to work in: a path itself, and for anything else `folder`, or one in the cache that is always the same
    for this address. What lies at the address is fetched first, unless this machine has sent it itself and may be ahead
    of it; what changes is sent every half a minute, and when the context ends, however it does. A machine that is lost
    so takes half a minute with it. Databases of SQLite are sent as they are between two transactions.

    Raises:
        ConfigError: the address cannot be read or written, which is found out first; or the last changes could not be
            sent: they are kept, and the error says where.
    """
    if "://" not in address:
        yield Path(address).expanduser()
        return
    address = address.rstrip("/")
    here = folder or place_of(address)
    mirror = _Mirror(address, here)
    mirror.fetch()
    stop = threading.Event()
    thread = threading.Thread(target=_keep, args=(mirror, stop), name=f"mirror of {address}", daemon=True)
    thread.start()
    try:
        yield here
    finally:
        stop.set()
        thread.join()
        mirror.send()


def _keep(mirror: _Mirror, stop: threading.Event) -> None:
    wait = EVERY
    while not stop.wait(wait):
        began = time.monotonic()
        try:
            mirror.send()
        except ConfigError as error:
            logger.warning("%s; trying again", error.message)
        wait = max(EVERY, 10 * (time.monotonic() - began))


class _Mirror:
    """What was sent and fetched is remembered beside the folder, so that a later run here knows whose word counts."""

    def __init__(self, address: str, folder: Path) -> None:
        self._address, self._folder = address, folder
        self._book = folder.with_name(f"{folder.name}.sent.json")
        self._known: dict[str, tuple[Stamp, Stamp]] = {}  # name to what it was here and there, when they were equal

    def fetch(self) -> None:
        with self._explained("read"):
            self._folder.mkdir(parents=True, exist_ok=True)
            system, root = filesystem(self._address)
            # On an object store this asks for the bucket, and that one may write to it.
            system.create_dir(root, recursive=True)
            self._recall()
            found = _listed(system, root)
            for name in self._known.keys() - found.keys():  # it was sent, and somebody removed it there
                _unlink(self._folder / name)
                del self._known[name]
            for name, stamp in found.items():
                file = self._folder / name
                if file.exists() and name in self._known and self._known[name][1] == stamp:
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                with _whole(file) as part, system.open_input_stream(f"{root}/{name}") as source, part.open("wb") as out:
                    shutil.copyfileobj(source, out)
                _unlink(file, aside_only=True)
                self._known[name] = _stamp(file), stamp
            self._remember()

    def send(self) -> None:
        """Send what has changed here, and remove there what is gone here."""
        with self._explained("write to"):
            system, root = filesystem(self._address)
            files = {
                path.relative_to(self._folder).as_posix(): path
                for path in self._folder.rglob("*")
                if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_ASIDE)
            }
            for name, path in files.items():
                try:
                    before = _stamp(path)
                    if name in self._known and self._known[name][0] == before:
                        continue
                    stamp = self._sent(system, root, name, path)
                except FileNotFoundError:
                    continue  # it was removed or replaced meanwhile; the next look finds what is there
                self._known[name] = before, stamp
                self._remember()  # else a kill would let what is there count more than what goes on here
            for name in self._known.keys() - files.keys():
                if system.get_file_info(f"{root}/{name}").is_file:
                    system.delete_file(f"{root}/{name}")
                del self._known[name]
                self._remember()

    def _sent(self, system: Any, root: str, name: str, path: Path) -> Stamp:
        there = f"{root}/{name}"
        with tempfile.TemporaryDirectory() as scratch:
            if path.suffix == ".sqlite":
                copy = Path(scratch) / path.name
                there_is = f"{path.absolute().as_uri()}?mode=rw"  # nothing is made where it was removed meanwhile
                with (
                    closing(sqlite3.connect(there_is, uri=True, timeout=60)) as source,
                    closing(sqlite3.connect(copy)) as target,
                ):
                    source.backup(target)
                path = copy
            system.create_dir(str(PurePosixPath(there).parent), recursive=True)
            send(path, system, there)
        info = system.get_file_info(there)
        return info.mtime_ns, info.size

    def _recall(self) -> None:
        try:
            kept = json.loads(self._book.read_text())
            self._known = {name: (tuple(here), tuple(there)) for name, (here, there) in kept.items()}
        except (OSError, ValueError):
            self._known = {}

    def _remember(self) -> None:
        with _whole(self._book) as part:
            part.write_text(json.dumps(self._known))

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except (ArrowException, OSError, sqlite3.Error) as error:
            kind = type(error).__name__
            raise ConfigError(f"cannot {what} {self._address}: {kind}; the files are in {self._folder}") from None


def _stamp(path: Path) -> Stamp:
    """Of a database with its log, which is written before the database itself is."""
    log = path.with_name(f"{path.name}-wal")
    states = [each.stat() for each in (path, log) if each is path or each.exists()]
    return max(state.st_mtime_ns for state in states), sum(state.st_size for state in states)


def _listed(system: Any, root: str) -> dict[str, Stamp]:
    from pyarrow import fs

    found = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return {
        info.path.removeprefix(root).lstrip("/"): (info.mtime_ns, info.size)
        for info in found
        if info.type == fs.FileType.File
        and ".." not in PurePosixPath(info.path).parts
        and not info.base_name.startswith(".")
    }


def _unlink(path: Path, *, aside_only: bool = False) -> None:
    for suffix in (*_ASIDE, *([] if aside_only else [""])):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write that takes `path`'s place when it is complete."""
    part = path.with_name(f".{path.name}.part")
    yield part
    os.replace(part, path)
