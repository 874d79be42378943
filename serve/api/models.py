"""`GET /v1/models`: the models that are served, and the workers that constraints may name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.config import FuguConfig
from actors.errors import UnknownModelError
from serve.api.session import TRINITY

MODEL = "fugu"


def models_body(config: FuguConfig, created: int, no_roles: str | None) -> dict[str, Any]:
    """`no_roles` says why `fugu-trinity` is not served; None: it is."""
    return {"object": "list", "data": [_model(name, config, created) for name in _served(no_roles)]}


def one_model_body(config: FuguConfig, created: int, name: str, no_roles: str | None) -> dict[str, Any]:
    """Raises:
    UnknownModelError: it is not a model that is served.
    """
    check_served(name, no_roles)
    return _model(name, config, created)


def check_served(name: str, no_roles: str | None) -> None:
    """Raises:
    UnknownModelError: it is not a model that is served, or `fugu-trinity` is not, with the reason.
    """
    served = _served(no_roles)
    if name in served:
        return
    if name == TRINITY:
        raise UnknownModelError(f"model: {TRINITY!r} is not served here: {no_roles}; use {MODEL!r}", param="model")
    names = " or ".join(map(repr, served))
    raise UnknownModelError(f"model: {name[:64]!r} is not served here; use {names}", param="model")


def _served(no_roles: str | None) -> Sequence[str]:
    return (MODEL, TRINITY) if no_roles is None else (MODEL,)


def _model(name: str, config: FuguConfig, created: int) -> dict[str, Any]:
    workers = [{"name": spec.name, "tags": list(spec.tags)} for spec in config.active]
    return {"id": name, "object": "model", "created": created, "owned_by": "fugu-ray", "workers": workers}
