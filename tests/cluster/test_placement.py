"""What is asked of a node, on a Ray that has no special nodes."""

from __future__ import annotations

import pytest

from actors.config import PlacementConfig, WorkerSpec
from actors.placement import SHARE, cpus, provider_resources, resources
from training.fanout import cluster_lanes

pytestmark = pytest.mark.ray

REQUIRED = PlacementConfig(required=True)


def test_one_machine_needs_no_resources(ray_session: None) -> None:
    anywhere = PlacementConfig()
    assert resources("rollout", anywhere) == {}
    assert cpus("rollout", anywhere) == 4
    assert cluster_lanes(anywhere, 2048) == 4


def test_what_is_required_is_asked_for(ray_session: None) -> None:
    assert resources("rollout", REQUIRED) == {"rollout": SHARE}
    assert cpus("rollout", REQUIRED) == 1
    assert cluster_lanes(REQUIRED, 2048) == 32, "lanes that wait are what a cluster grows by"
    assert cluster_lanes(REQUIRED, 1) == 1


def test_models_of_our_own_stand_with_the_router(ray_session: None) -> None:
    remote = WorkerSpec(name="a", provider="openai", model="m")
    ours = WorkerSpec(name="b", provider="local", model="m")
    assert provider_resources([remote], REQUIRED) == {"egress": SHARE}
    assert provider_resources([ours], REQUIRED) == {"serve": SHARE}
