"""What the commands of `training.cli` share: reports shown and written, options read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import orjson

from actors.console import out_console
from actors.errors import ConfigError
from actors.mirror import kept_at
from actors.storage import written

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.head import Read


@contextmanager
def made(out: str, kind: str) -> Iterator[Path]:
    """Where to write the checkpoint that is to be at `out`; what its run goes on from is beside it, in a folder that
    ends in `kind`, and goes to the same place."""
    with written(out) as file, kept_at(_run_of(out, kind), Path(_run_of(str(file), kind))):
        yield file


def _run_of(out: str, kind: str) -> str:
    folder, slash, name = out.rpartition("/")
    return f"{folder}{slash}{Path(name).stem}.{kind}"


@contextmanager
def adapter_at(out: str | None, state: str | None) -> Iterator[tuple[Path | None, Path | None]]:
    """The folders of adapter and state to work in; the state of an adapter that is to be at an address goes there,
    too."""
    if state is None and out is not None and "://" in out:
        state = f"{out.rstrip('/')}.state"
    with (
        nullcontext() if out is None else kept_at(out) as folder,
        nullcontext() if state is None else kept_at(state) as kept,
    ):
        yield folder, kept


class Report(Protocol):
    """What every run gives back."""

    def json(self) -> dict[str, Any]: ...

    def table(self) -> RenderableType: ...


def tell(report: Report, json: Path | None) -> None:
    out_console.print(report.table())
    if json is not None:
        # Numbers that are not finite become null.
        json.write_bytes(orjson.dumps(report.json(), option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def check_json(path: Path | None) -> None:
    """Find out before the work that its report could not be written."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--json: cannot write {path}: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--json: cannot write {path}")


def names(text: str) -> tuple[str, ...]:
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ConfigError(f"--workers: {', '.join(twice)} is named twice")
    return found


def pairs(text: str, option: str) -> dict[str, str]:
    found = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if wrong := [name for name, _, value in found if not name.strip() or not value.strip()]:
        raise ConfigError(f"{option}: {wrong[0]!r} is not of the form name=column")
    return {name.strip(): value.strip() for name, _, value in found}


def reads(texts: Sequence[str]) -> tuple[Read, ...]:
    from orchestrator.head import POSITIONS, Read

    found = []
    for text in texts:
        position, _, layer = text.partition("@")
        if position not in POSITIONS or not (layer == "" or layer.isdigit()):
            raise ConfigError(f"--read: {text!r} is not one of {', '.join(POSITIONS)}, with @LAYER or without")
        found.append(Read(int(layer) if layer else -1, position))  # type: ignore[arg-type]  # checked above
    return tuple(found)
