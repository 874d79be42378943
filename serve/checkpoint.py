"""What a checkpoint says of itself, read without torch."""

from __future__ import annotations

import json

from safetensors import SafetensorError, safe_open

from actors.config import RouterConfig
from actors.errors import ConfigError


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


def check_pins(config: RouterConfig, rolling: object) -> None:
    """`rolling` is the checkpoint that the rolling names have, if any.

    Raises:
        ConfigError: a pin's checkpoint cannot be read; or there is none that rolls, and so no router is deployed that
            could keep them.
    """
    if config.pins and rolling is None:
        raise ConfigError("router.pins: set router.checkpoint, too, if only to one of them; without it nothing decides")
    for pin, file in config.pins.items():
        if not file.is_file():
            raise ConfigError(f"router.pins.{pin}: {file} cannot be read from here")
