"""Files that lie elsewhere: `s3://`, `gs://` and other addresses that pyarrow knows, beside paths."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.errors import ConfigError
from actors.model_files import cache_dir


def local_copy(address: str, base: Path = Path()) -> Path:
    """The file at `address` on this machine: a path (relative to `base`) as it is, anything else as a copy in the
    cache, made anew if it changed there. Credentials are the machine's own.

    Raises:
        ConfigError: there is no such file, or it cannot be reached.
    """
    if "://" not in address:
        return base / Path(address).expanduser()
    from pyarrow import ArrowException, fs

    try:
        system, path = filesystem(address)
        info = system.get_file_info(path)
        if info.type != fs.FileType.File:
            raise ConfigError(f"there is no file {address}")
        version = hashlib.sha256(f"{address}\0{info.mtime_ns}\0{info.size}".encode()).hexdigest()[:16]
        copy = cache_dir() / "fetched" / f"{version}{Path(path).suffix}"
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with system.open_input_stream(path) as source:
                content = source.read()
            # Whole or not at all, whoever else fetches it at this moment.
            handle, part = tempfile.mkstemp(dir=copy.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(part, copy)
    except (ArrowException, OSError) as error:
        raise ConfigError(f"cannot fetch {address}: {type(error).__name__}") from None
    return copy


def local_folder(address: str, names: Sequence[str]) -> Path:
    """A folder with the files called `names` of the one at `address`: a path as it is, anything else as copies.

    Raises:
        ConfigError: as `local_copy`.
    """
    if "://" not in address:
        return Path(address).expanduser()
    copies = [local_copy(f"{address.rstrip('/')}/{name}") for name in names]
    version = hashlib.sha256("\0".join(copy.stem for copy in copies).encode()).hexdigest()[:16]
    folder = cache_dir() / "fetched" / version
    folder.mkdir(parents=True, exist_ok=True)
    for name, copy in zip(names, copies, strict=True):
        if not (folder / name).exists():
            os.link(copy, folder / name)
    return folder


@contextmanager
def written(address: str) -> Iterator[Path]:
    """The path to write the file at, which is to be at `address`: itself, or for anything else than a path one in the
    cache, always the same for this address. That is sent there when the context ends, if it does so without an error.

    Raises:
        ConfigError: nothing can be written there, which is found out first; or the file could not be sent: it is kept,
            and the error says where.
    """
    if "://" not in address:
        yield Path(address).expanduser()
        return
    from pyarrow import ArrowException

    try:
        system, path = filesystem(address)
        # On an object store this asks for the bucket, and that one may write to it.
        system.create_dir(path.rpartition("/")[0], recursive=True)
    except (ArrowException, OSError) as error:
        raise ConfigError(f"cannot write to {address}: {type(error).__name__}") from None
    here = place_of(address)
    here.parent.mkdir(parents=True, exist_ok=True)
    yield here
    try:
        send(here, system, path)
    except (ArrowException, OSError) as error:
        raise ConfigError(f"cannot write to {address}: {type(error).__name__}; the file is {here}") from None


def place_of(address: str) -> Path:
    """Where this machine has what is to be at an address: always the same, under its name there."""
    return cache_dir() / "written" / hashlib.sha256(address.encode()).hexdigest()[:16] / address.rpartition("/")[2]


def send(here: Path, system: Any, there: str) -> None:
    """Copy a file to a path of a file system of pyarrow's: whole or not at all, also where the sender dies meanwhile.
    An object appears when it is complete; a file of a mounted disk is given its name when it is."""
    folder, _, name = there.rpartition("/")
    begun = f"{folder}/.{name}.part" if system.type_name == "local" else there
    with here.open("rb") as file, system.open_output_stream(begun) as out:
        shutil.copyfileobj(file, out)
    if begun != there:
        system.move(begun, there)


def filesystem(address: str) -> tuple[Any, str]:
    from pyarrow import fs

    found: tuple[Any, str] = fs.FileSystem.from_uri(address)
    return found
