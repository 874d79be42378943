"""Files that lie elsewhere: `s3://`, `gs://` and other addresses that pyarrow knows, beside paths."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

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
        system, path = fs.FileSystem.from_uri(address)
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
