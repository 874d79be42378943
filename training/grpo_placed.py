"""A GRPO run on a cluster: the learner and its vLLM engines are reserved together, and run where training belongs.

On one machine, or a cluster without nodes for training, the run is in this process and nothing is reserved. Elsewhere
it is a Ray task in the first bundle of a placement group; the engines that it starts have the others. The group is
there as a whole or not at all, so that no engine waits for room that its own learner holds.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.config import FuguConfig
from actors.config_file import load_config
from actors.errors import ClusterError, ConfigError, FuguError
from training.commands import adapter_at
from training.grpo_train import GrpoReport, GrpoRun
from training.grpo_train import run as run_here

RESERVE_SECONDS = 900.0
"""How long a cluster may take to make room, starting a node included."""


def run(
    settings: GrpoRun, *, out: str | None = None, state: str | None = None, reserve: float = RESERVE_SECONDS
) -> GrpoReport:
    """`training.grpo_train.run`, on the nodes for training where the Ray at `settings.address` has such. There Ctrl-C
    costs the steps since the last checkpoint, and paths of the run must mean the same on all nodes. `out` and `state`
    stand over the settings' own and may be addresses such as s3://.

    Raises:
        ClusterError: no room for learner and engines within `reserve` seconds, or the learner was lost.
        FuguError: as `training.grpo_train.run`.
    """
    from training.label import connected

    if settings.address is None:
        return _run_at(settings, out, state)
    config = load_config(settings.config)
    with connected(settings.address, logs=True):
        # After Ray is there: what it is told on import depends on it.
        from actors.placement import resources

        where = resources(config.placement.train, config.placement)
        return _there(settings, (out, state), config, where, reserve) if where else _run_at(settings, out, state)


def bundles(settings: GrpoRun, config: FuguConfig, where: dict[str, float]) -> list[dict[str, float]]:
    """What the learner asks for, and then each engine."""
    how = settings.vllm
    engines = [] if how is None else [{"CPU": 1, "GPU": how.gpus, **where}] * how.engines
    gpus = settings.gpus
    if gpus is None:
        used = how.gpus if how is not None and how.gpus < 1 else 0.0
        gpus = 1.0 - used if _has_gpus(config.placement.train) else 0.0
    asked = [{"CPU": 1, "GPU": gpus, **where}, *engines]
    return [{name: amount for name, amount in each.items() if amount > 0} for each in asked]


def _has_gpus(name: str) -> bool:
    """Whether the nodes of this name have GPUs; where there is none yet, one with GPUs is to be started."""
    import ray

    named = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(name, 0) > 0]
    return not named or any(each.get("GPU", 0) > 0 for each in named)


Places = tuple[str | None, str | None]


def _there(
    settings: GrpoRun, places: Places, config: FuguConfig, where: dict[str, float], reserve: float
) -> GrpoReport:
    import ray
    from ray.exceptions import RayError, RayTaskError

    from actors.placement import at, reserved

    asked = bundles(settings, config, where)
    with reserved(asked, reserve) as group:
        task: Any = ray.remote(max_retries=0)(_run_there)
        options = {"num_cpus": 1, "num_gpus": asked[0].get("GPU", 0), **at(group, 0)}
        try:
            report: GrpoReport = ray.get(task.options(**options).remote(settings, places, str(Path.cwd())))
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, FuguError) else error from None
        except RayError as error:
            raise ClusterError(f"the learner was lost ({type(error).__name__}); resume the run") from error
    return report


def _run_there(settings: GrpoRun, places: Places, folder: str) -> GrpoReport:
    """In a process of the learner's node: paths are relative to the folder that the command ran in."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(f"the learner's node has no folder {folder}: {error.strerror}") from None
    return _run_at(settings, *places)


def _run_at(settings: GrpoRun, out: str | None, state: str | None) -> GrpoReport:
    with adapter_at(out, state) as (adapter, kept):
        return run_here(replace(settings, out=adapter or settings.out, state=kept or settings.state))
