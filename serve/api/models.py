"""`GET /v1/models`: the models that are served, and the workers that constraints may name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.config import FuguConfig
from actors.errors import UnknownModelError
from serve.api.session import TRINITY
from serve.api.ultra import ULTRA

MODEL = "fugu"
MODELS = (MODEL, TRINITY, ULTRA)


def models_body(config: FuguConfig, created: int, absent: Mapping[str, str]) -> dict[str, Any]:
    """`absent` says of each model that is not served here why."""
    served = [_model(name, config, created) for name in MODELS if name not in absent]
    return {"object": "list", "data": served}


def one_model_body(config: FuguConfig, created: int, name: str, absent: Mapping[str, str]) -> dict[str, Any]:
    """Raises:
    UnknownModelError: it is not a model that is served.
    """
    check_served(name, absent)
    return _model(name, config, created)


def check_served(name: str, absent: Mapping[str, str]) -> None:
    """Raises:
    UnknownModelError: it is not a model that is served; with the reason, if it is one that could be.
    """
    if name in absent:
        raise UnknownModelError(f"model: {name!r} is not served here: {absent[name]}; use {MODEL!r}", param="model")
    if name not in MODELS:
        names = " or ".join(repr(served) for served in MODELS if served not in absent)
        raise UnknownModelError(f"model: {name[:64]!r} is not served here; use {names}", param="model")


def _model(name: str, config: FuguConfig, created: int) -> dict[str, Any]:
    workers = [{"name": spec.name, "tags": list(spec.tags)} for spec in config.active]
    return {"id": name, "object": "model", "created": created, "owned_by": "fugu-ray", "workers": workers}
