"""What a checkpoint says of itself, read without torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from actors.config import RouterConfig
from actors.errors import CheckpointError, ConfigError


def why_no_roles(config: RouterConfig) -> str | None:
    """None if the checkpoint has rows for the roles that `fugu-trinity` plays, else why it cannot be served."""
    if config.checkpoint is None:
        return "nothing is trained yet (router.checkpoint is not set)"
    try:
        with safe_open(config.checkpoint, framework="np") as file:
            roles = json.loads((file.metadata() or {}).get("roles", "false"))
    except (SafetensorError, OSError, ValueError):
        # The router says what is wrong with it.
        return "the checkpoint cannot be read"
    if roles is not True:
        return "the checkpoint has no roles; `fugu train evolve --mode fugu-trinity` makes one that has"
    return None


def workers_of(file: Path) -> tuple[str, ...]:
    """The workers that a checkpoint's rows stand for; none where it cannot be read."""
    try:
        with safe_open(file, framework="np") as opened:
            names = json.loads((opened.metadata() or {}).get("workers", "[]"))
    except (SafetensorError, OSError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def check_pins(config: RouterConfig, rolling: object) -> None:
    """`rolling` is the checkpoint that the rolling names have, if any.

    Raises:
        ConfigError: a pin's checkpoint cannot be read, or is not what its digest says; or there is none that rolls,
            and so no router is deployed that could keep them.
    """
    if config.pins and rolling is None:
        raise ConfigError("router.pins: set router.checkpoint, too, if only to one of them; without it nothing decides")
    for pin, file in config.pins.items():
        if not file.is_file():
            raise ConfigError(f"router.pins.{pin}: {file} cannot be read from here")
        check_digest(config, pin)
    for pin in config.pin_sha256:
        if pin not in config.pins:
            raise ConfigError(f"router.pin_sha256.{pin}: there is no such pin; add it to router.pins, or take this out")


def check_digest(config: RouterConfig, pin: str) -> None:
    """Raises:
    CheckpointError: see `check_pinned`.
    """
    check_pinned("router", pin, config.pins[pin], config.pin_sha256.get(pin))


def check_pinned(part: str, pin: str, file: Path, wanted: str | None) -> None:
    """`part` of the configuration has the pin; `wanted` is the digest that it says, if any.

    Raises:
        CheckpointError: the pin's file is not the one that its digest was taken of.
    """
    if wanted is None:
        return
    found = digest(file)
    if found != wanted:
        raise CheckpointError(
            f"{part}.pins.{pin}: {file} has the SHA-256 {found or '(it cannot be read)'}, and not {wanted} "
            f"as {part}.pin_sha256 says: it is another file than the one that was pinned. Put that one back, or give "
            "the new one a pin of its own"
        )


def digest(file: Path) -> str | None:
    """The SHA-256 of a file in hexadecimal digits; None where it cannot be read."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return None
