"""`GET /v1/models`: the models that are served, and the workers that constraints may name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.config import FuguConfig
from actors.errors import UnknownModelError
from serve.api.session import TRINITY
from serve.api.ultra import ULTRA
from serve.auth import ANYONE, Caller
from serve.keys import Key

MODEL = "fugu"
ROLLING = (MODEL, TRINITY, ULTRA)


@dataclass(frozen=True, slots=True)
class Served:
    """The models that are served, rolling names before pins; of those that could be, why they are not; and of pins the
    SHA-256 of their checkpoint."""

    names: tuple[str, ...]
    absent: Mapping[str, str]
    sha256: Mapping[str, str] = field(default_factory=dict)


def models_body(config: FuguConfig, created: int, served: Served, caller: Caller = ANYONE) -> dict[str, Any]:
    """The models that the caller may use."""
    data = [_model(name, config, created, served, caller.key) for name in served.names if _may_use(caller.key, name)]
    return {"object": "list", "data": data}


def one_model_body(
    config: FuguConfig, created: int, name: str, served: Served, caller: Caller = ANYONE
) -> dict[str, Any]:
    """Raises:
    UnknownModelError: it is not a model that is served.
    PermissionDeniedError: the caller may not use it.
    """
    check_served(name, served)
    caller.check_model(name)
    return _model(name, config, created, served, caller.key)


def check_served(name: str, served: Served) -> None:
    """Raises:
    UnknownModelError: it is not a model that is served; with the reason, if it is one that could be.
    """
    if name in served.names:
        return
    if name in served.absent:
        why = served.absent[name]
        raise UnknownModelError(f"model: {name!r} is not served here: {why}; use {MODEL!r}", param="model")
    names = " or ".join(map(repr, served.names))
    raise UnknownModelError(f"model: {name[:64]!r} is not served here; use {names}", param="model")


def _may_use(key: Key | None, model: str) -> bool:
    return key is None or key.models is None or model in key.models


def _model(name: str, config: FuguConfig, created: int, served: Served, key: Key | None) -> dict[str, Any]:
    allowed = [spec for spec in config.active if key is None or key.workers is None or spec.name in key.workers]
    workers = [{"name": spec.name, "tags": list(spec.tags)} for spec in allowed]
    about = {"id": name, "object": "model", "created": created, "owned_by": "fugu-ray", "workers": workers}
    return about | ({"sha256": served.sha256[name]} if name in served.sha256 else {})
