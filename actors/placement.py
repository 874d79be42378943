"""Where on a cluster something runs: custom resources that say what a node is for (see cluster.yaml)."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from actors.config import PlacementConfig, WorkerSpec

# So little that a node's thousand never run out; what bounds the work on a node is its CPUs and GPUs.
SHARE = 0.001


def resources(name: str, placement: PlacementConfig) -> dict[str, float]:
    """What a task or actor asks for to run on the nodes called `name`; nothing where this Ray has no such node, unless
    the configuration requires it."""
    if placement.required or ray.cluster_resources().get(name, 0) > 0:
        return {name: SHARE}
    return {}


def provider_resources(group: Sequence[WorkerSpec], placement: PlacementConfig) -> dict[str, float]:
    """For the actor of `group`: models of our own stand with the router, the others where the outside is reached."""
    ours = group[0].provider in ("local", "vllm")
    return resources(placement.serve if ours else placement.providers, placement)


def cpus(name: str, placement: PlacementConfig) -> int:
    """The CPUs of the nodes called `name`, of all where there are none of that name; at least 1."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    named = [each for each in nodes if each.get(name, 0) > 0]
    return max(1, int(sum(each.get("CPU", 0) for each in (named or ([] if placement.required else nodes)))))
