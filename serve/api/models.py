"""`GET /v1/models`: the one model that is served, and the workers that constraints may name."""

from __future__ import annotations

from typing import Any

from actors.config import FuguConfig
from actors.errors import UnknownModelError
from serve.api.chat import MODEL


def model_body(config: FuguConfig, created: int) -> dict[str, Any]:
    workers = [{"name": spec.name, "tags": list(spec.tags)} for spec in config.active]
    return {"id": MODEL, "object": "model", "created": created, "owned_by": "fugu-ray", "workers": workers}


def models_body(config: FuguConfig, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [model_body(config, created)]}


def one_model_body(config: FuguConfig, created: int, name: str) -> dict[str, Any]:
    """Raises:
    UnknownModelError: it is not the model that is served.
    """
    if name != MODEL:
        raise UnknownModelError(f"model: {name[:64]!r} is not served here; use {MODEL!r}", param="model")
    return model_body(config, created)
