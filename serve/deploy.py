"""What `serve deploy` builds on the cluster: `import_path: serve.deploy:build` (see `serve.emit`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve

from actors.config import FuguConfig, Strict
from actors.config_file import load_config, parse_config
from actors.placement import resources
from serve.app import assemble, build_app

CODE = Path(__file__).resolve().parents[1]


class Arguments(Strict):
    """Either a `file` on the nodes, or the `config` itself as it was written, its `${NAME}` still to be filled in from
    the node's environment, so that no key travels. Relative paths in it are relative to `base`, and that to the code.

    `decides` is what the checkpoints, which come as the router's `user_config`, decide: nothing, workers, or workers
    and roles.
    """

    file: Path | None = None
    config: dict[str, Any] | None = None
    base: Path = Path()
    decides: Literal["nothing", "workers", "roles"] = "nothing"


def build(args: dict[str, Any]) -> serve.Application:
    """The application that `args` (`Arguments`) describe, on the nodes where the configuration wants it.

    Raises:
        ConfigError: the configuration is wrong, or a key that it names is not in the environment of this node.
    """
    # Serve would make the model itself only from an annotation that is not text.
    arguments = Arguments.model_validate(args)
    gpu = ray.cluster_resources().get("GPU", 0) > 0
    if arguments.config is None:
        config = load_config(CODE / (arguments.file or "configs/embedded.yaml"))
        return build_app(config, gpu=gpu, where=_where(config))
    config = parse_config(arguments.config, CODE / arguments.base, "the deployed configuration")
    no_roles = None if arguments.decides == "roles" else "the deployed checkpoint has no roles"
    served: dict[str, Any] | None = None if arguments.decides == "nothing" else {}
    return assemble(config, served, no_roles, gpu=gpu, where=_where(config))


def _where(config: FuguConfig) -> dict[str, float]:
    return resources(config.placement.serve, config.placement)
