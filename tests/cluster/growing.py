"""A cluster that begins with a head alone: `python -m tests.cluster.growing`.

In namespaces of its own (the test provider of Ray's autoscaler wants a fixed port) it starts a head with an autoscaler
whose nodes are raylets on this machine, no CPU anywhere and no node for rollouts. Then an evolution is run whose
configuration says `placement: {required: true}`. What waits makes the autoscaler start nodes: one that reaches the
providers, and as many for rollouts as the lanes fill. Prints a report as JSON.

Needs root on Linux: apt-get install iproute2 util-linux
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# 16 lanes of a fifth of a CPU each: more than fit on three nodes.
CONCURRENCY = 1024
NODES = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
    "serving": {
        "resources": {"CPU": 1, "egress": 1000, "serve": 1000},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    },
    "cpu-rollout": {"resources": {"CPU": 1, "rollout": 1000}, "node_config": {}, "min_workers": 0, "max_workers": 4},
}
CLUSTER = {
    "cluster_name": "growing",
    "max_workers": 6,
    "upscaling_speed": 10,
    "idle_timeout_minutes": 10,
    # These nodes are not set up by ssh.
    "provider": {
        "type": "fake_multinode",
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "foreground_node_launch": True,
    },
    "available_node_types": NODES,
    "head_node_type": "ray.head.default",
    "auth": {},
    "docker": {},
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
}


def main() -> None:
    """Run `inside` where port 6379, /tmp and all processes are this program's alone."""
    with tempfile.TemporaryDirectory(prefix="fugu-growing-", dir="/var/tmp") as folder:
        command = ["unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child"]
        command += [sys.executable, "-m", __spec__.name, folder]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FUGU_"))}
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode)


def inside(folder: Path) -> None:
    # Ray takes the address that leads outside for a node's own.
    network = "ip link set lo up; ip link add br0 type bridge; ip link set br0 up; ip addr add 10.88.1.1/24 dev br0"
    subprocess.run(["sh", "-ec", f"mount -t tmpfs tmpfs /tmp; {network}; ip route add default dev br0"], check=True)
    os.environ |= {
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "FUGU_STATE": str(folder / "state"),
        "FUGU_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    import yaml

    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(CLUSTER))
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--autoscaling-config={file}"]
    start += ["--port=6379", "--num-cpus=0", "--include-dashboard=false", "--object-store-memory=150000000"]
    subprocess.run(start, check=True, stdout=sys.stderr)
    print(json.dumps(evolved(folder)))


def evolved(folder: Path) -> dict[str, Any]:
    import ray
    import yaml

    from tests.cluster.three_nodes import backbone
    from tests.loopback import Behaviour, LoopbackProvider
    from tests.training.problems import world
    from tests.training.test_live import configured, settings, speaks
    from training.evolution import Settings
    from training.evolve import run

    world(folder / "outcomes")
    backbone(folder)
    most = _Most()
    with LoopbackProvider(record=False) as upstream:
        upstream.default = Behaviour(text=speaks, delay=2.0)
        path = configured(folder, upstream)
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"placement": {"required": True}}))
        ray.init(address="auto", namespace="fugu", log_to_driver=False, logging_level="ERROR")
        before = _alive()
        watching = threading.Thread(target=most.watch, daemon=True)
        watching.start()
        began = time.monotonic()
        search = Settings(sigma=0.3, population=8)
        done = run(
            settings(folder, folder / "out", path, search=search, generations=2, size=16, concurrency=CONCURRENCY)
        )
        seconds = time.monotonic() - began
    return {
        "before": before,
        "most": most.seen,
        "seconds": seconds,
        "generations": done.json()["generations"],
        "written": done.out.exists(),
    }


class _Most:
    """The most nodes of each kind that were there at once."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def watch(self) -> None:
        while True:
            for kind, count in _alive().items():
                self.seen[kind] = max(count, self.seen.get(kind, 0))
            time.sleep(0.5)


def _alive() -> dict[str, int]:
    """Nodes by what they are for."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {
        "nodes": len(nodes),
        **{kind: sum(each.get(kind, 0) > 0 for each in nodes) for kind in ("egress", "rollout")},
    }


if __name__ == "__main__":
    if sys.argv[1:]:
        inside(Path(sys.argv[1]))
    else:
        main()
