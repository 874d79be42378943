"""`fugu serve --emit-serve-config`: a configuration as the file that `serve deploy` takes. Needs no Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from actors.config import FuguConfig, RouterConfig
from actors.config_file import named_pins, parse_config, read_yaml
from actors.errors import ConfigError
from actors.storage import local_copy
from serve.auth import check_bind
from serve.checkpoint import check_pins, why_no_roles

CODE = Path(__file__).resolve().parents[1]
# What stands for a variable that is only set on the cluster, where the file is checked on this machine.
_LATER = "http://set-on-the-cluster"


def serve_config(
    path: Path,
    *,
    host: str | None = None,
    port: int | None = None,
    checkpoint: str | None = None,
    canary: str | None = None,
    share: float = 0.0,
) -> dict[str, Any]:
    """The Serve configuration for the fugu configuration in `path`. `checkpoint`, `canary` and its `share` stand in for
    those of the file: paths on the nodes, or addresses that `actors.storage` knows.

    The checkpoints are the router's `user_config`: deploying with others changes them in running replicas, without a
    request that fails.

    Raises:
        ConfigError: the file is wrong; a key is written out in it; a public address without keys.
    """
    raw = read_yaml(path)
    config = parse_config(raw, path.parent, str(path), _Environment())
    _no_secrets(raw, path)
    raw = deepcopy(raw)
    router = raw.get("router") or {}
    # Where they are is told apart from everything else, which a redeployment would start anew.
    files = router.pop("checkpoint", None), (router.pop("canary", None) or {})
    check_pins(config.router, files[0] or checkpoint)
    # Pins stay in the configuration: a pin never changes, and gateways must know which there are.
    router |= named_pins(router)
    if isinstance(conductor := raw.get("conductor"), dict):
        conductor |= named_pins(conductor)
    raw["serve"] = {key: value for key, value in (raw.get("serve") or {}).items() if key not in ("host", "port")}
    base = path.parent.resolve()
    base = base.relative_to(CODE) if base.is_relative_to(CODE) else base
    served = {
        "checkpoint": checkpoint or _on_nodes(files[0], base),
        "canary": canary or _on_nodes(files[1].get("checkpoint"), base),
        "share": share or files[1].get("share", 0.0),
    }
    if served["canary"] is None and served["share"]:
        raise ConfigError("a share without a canary: give its checkpoint, too")
    decides = _decides(config, checkpoint)
    settings = config.serve.model_copy(
        update={key: value for key, value in (("host", host), ("port", port)) if value is not None}
    )
    check_bind(settings)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.host, "port": settings.port, "keep_alive_timeout_s": 90},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": "fugu",
                "route_prefix": "/",
                "import_path": "serve.deploy:build",
                "args": {"config": raw, "base": str(base), "decides": decides},
                "deployments": [{"name": "Router", "user_config": served}] if decides != "nothing" else [],
            }
        ],
    }


def text(config: Mapping[str, Any]) -> str:
    """As YAML, in the order in which it was made."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)


def _decides(config: FuguConfig, checkpoint: str | None) -> str:
    """What `serve.deploy.Arguments.decides` is, read from a checkpoint that can be read from here."""
    written = config.router.checkpoint
    if checkpoint is None and written is None:
        return "nothing"
    given = None if checkpoint is None else local_copy(checkpoint)
    readable = next((file for file in (given, written) if file is not None and file.is_file()), None)
    if readable is None:
        raise ConfigError(
            f"{checkpoint or written} cannot be read from here, which is needed to tell whether it has roles; "
            "set router.checkpoint to a copy of it or of one like it"
        )
    if why_no_roles(RouterConfig(checkpoint=readable)) is None:
        return "roles"
    return "workers" if len(config.workers) > 1 else "nothing"


def _on_nodes(file: str | None, base: Path) -> str | None:
    """A checkpoint's place for the nodes: within the code it lies where theirs does."""
    return file if file is None or "://" in file else os.path.normpath(base / file)


def _no_secrets(raw: Mapping[str, Any], path: Path) -> None:
    """Raises:
    ConfigError: a key is written out, and would travel and be kept with the file.
    """
    for where, value in _secrets(raw):
        if isinstance(value, str) and "${" not in value and len(value) >= 8:
            raise ConfigError(f"{path}: {where}: is written out; put it into the nodes' environment and name it ${{…}}")


def _secrets(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for worker in raw["workers"]:
        yield f"workers.{worker['name']}.api_key", worker.get("api_key")
        for name, value in (worker.get("headers") or {}).items():
            yield f"workers.{worker['name']}.headers.{name}", value
    for index, key in enumerate((raw.get("serve") or {}).get("api_keys") or ()):
        yield f"serve.api_keys.{index}", key


class _Environment(dict[str, str]):
    """Every variable is set: the cluster's nodes have them."""

    def get(self, name: str, default: Any = None) -> Any:
        return _LATER
