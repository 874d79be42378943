"""Where on a cluster something runs: custom resources that say what a node is for (see cluster.yaml)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.config import PlacementConfig, WorkerSpec
from actors.errors import ClusterError

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


@contextmanager
def reserved(bundles: Sequence[Mapping[str, float]], seconds: float) -> Iterator[PlacementGroup]:
    """A place for each bundle of resources, on as few nodes as they fit on, all of them or none. When the context ends
    they are given back, and what still runs there is ended.

    Raises:
        ClusterError: the cluster had no room for them within `seconds`.
    """
    group = placement_group([dict(each) for each in bundles], strategy="PACK")
    try:
        if not group.wait(seconds):
            raise ClusterError(
                f"no room for {_listed(bundles)} together within {seconds:g} s: the cluster has "
                f"{_listed([ray.cluster_resources()])}, and free now {_listed([ray.available_resources()])}; "
                "ask for less, end what runs there, or add nodes"
            )
        yield group
    finally:
        remove_placement_group(group)


def at(group: PlacementGroup | None, bundle: int) -> dict[str, Any]:
    """The options of a task or actor that runs in this bundle of a group; none where there is no group."""
    if group is None:
        return {}
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)}


def _listed(bundles: Sequence[Mapping[str, float]]) -> str:
    """Without a node's own names and bytes, which nobody asks for."""
    texts = [
        ", ".join(f"{amount:g} {name}" for name, amount in sorted(each.items()) if _asked(name)) for each in bundles
    ]
    return " and ".join(f"[{text or 'nothing'}]" for text in texts)


def _asked(name: str) -> bool:
    return not name.startswith(("node:", "accelerator_type:")) and "memory" not in name and "_group_" not in name
