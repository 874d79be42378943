"""A cluster of three nodes on this machine, on which things die: `python -m tests.cluster.three_nodes FOLDER PART…`.

A process of its own, because a test session has one Ray, and that is another. What happened goes to FOLDER/report.json,
which tests/cluster/test_nodes.py looks at. The parts: `driver` or `node` (what an
evolution loses), `serve`.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# How soon a node that is gone is noticed: the defaults take a quarter of a minute.
os.environ |= {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}

import httpx
import psutil
import yaml

from actors.config import ServeConfig
from serve.environment import free_ports, prepare
from tests.loopback import Behaviour, LoopbackProvider, Recorded

WORKERS = ("sums", "words", "maps")
KEY = "cluster-test-key-2b81"
BOUND = 60.0
EVOLVE_SECONDS = 200.0
DEPLOY_SECONDS = 240.0


def prepared(folder: Path) -> None:
    """The environment of all that runs here. Before ray is imported."""
    # Not in `folder`: below pytest's own, the paths of HAProxy's sockets would be longer than it takes.
    own = Path(tempfile.mkdtemp(prefix="fugu-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    prepare(ServeConfig(), own)
    os.environ |= {"FUGU_STATE": str(folder / "state"), "FUGU_CACHE": str(folder / "cache"), "CLUSTER_KEY": KEY}


def main(folder: Path, parts: list[str]) -> None:
    prepared(folder)
    import ray
    from ray.cluster_utils import Cluster

    report: dict[str, Any] = {}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=2, resources={"rollout": 1000})
        serving = cluster.add_node(num_cpus=2, resources={"rollout": 1000, "egress": 1000, "serve": 1000})
        ray.init(address=cluster.address, namespace="fugu", log_to_driver=False, logging_level="ERROR")
        with LoopbackProvider() as upstream:
            backbone(folder)
            for what in ("driver", "node"):
                if what in parts:
                    report["evolve"] = evolve_twice(
                        folder, what, cluster.address, upstream, lambda: cluster.remove_node(lost, False)
                    )
            upstream.clear()
            if "serve" in parts:
                with served(folder, _workers(upstream)) as url:
                    report["placed"] = where_everything_is(serving.node_id)
                    report["update"] = update_the_checkpoint(folder, upstream, url)
                    report["kills"] = kill_in_turn(upstream, url)
                    cluster.add_node(num_cpus=2, resources={"egress": 1000, "serve": 1000})
                    report["kills"]["node"] = burst(upstream, url, lambda: cluster.remove_node(serving, False))
                    report["after"] = until_it_answers(url)
    finally:
        (folder / "report.json").write_text(json.dumps(report, indent=1))
        ray.shutdown()
        cluster.shutdown()


def backbone(folder: Path) -> None:
    """FOLDER/tiny, which evolution and router read with."""
    from tests.orchestrator.tiny import tiny_folder

    (folder / "tiny").mkdir()
    tiny_folder(folder / "tiny")


# --- evolution ---


def evolve_twice(
    folder: Path, what: str, address: str, upstream: LoopbackProvider, lose: Callable[[], None]
) -> dict[str, Any]:
    """The same evolution undisturbed, and with `what` lost in the middle of a generation: the `node`, or its `driver`,
    whose command is then given again."""
    from tests.training.problems import world
    from tests.training.test_evolve import repeatable
    from tests.training.test_live import configured

    world(folder / "outcomes")
    configured(folder, upstream)
    found: dict[str, Any] = {}
    for name in ("undisturbed", what):
        upstream.clear()
        upstream.default = Behaviour(text=_speaks, delay=0.15)
        at: dict[str, Any] = {}
        out = folder / name
        began = time.monotonic()
        if name == "driver":
            command = [sys.executable, "-m", __spec__.name, str(folder), "drive", address]
            driver = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _lose_midway(out, upstream, driver.kill, at)
            at["exit"] = driver.wait(BOUND)
            done = evolve(folder, name, resume=True)
        elif name == "node":
            killer = threading.Thread(target=_lose_midway, args=(out, upstream, lose, at))
            killer.start()
            done = evolve(folder, name)
            killer.join(BOUND)
        else:
            done = evolve(folder, name)
        found[name] = {
            "seconds": time.monotonic() - began,
            "history": repeatable(done.folder / "history.jsonl"),
            "checkpoint": content(done.out),
            **at,
        }
    same = found["undisturbed"].pop("checkpoint") == found[what].pop("checkpoint")
    found[what]["same_checkpoint"] = same
    return found


def evolve(folder: Path, name: str, *, resume: bool = False, seed: int = 1, config: str = "config.yaml") -> Any:
    """The evolution, on the Ray that this process is connected to."""
    from tests.training.test_live import settings
    from training.evolution import Settings
    from training.evolve import run

    given = {"mode": "fugu-trinity", "generations": 3, "max_turns": 3, "choose": "sample", "resume": resume}
    search = Settings(sigma=0.3, population=8, seed=seed)
    return run(settings(folder, folder / name, folder / config, search=search, **given))


def drive(folder: Path, address: str) -> None:
    """The driver that is killed: a process of its own."""
    import ray

    ray.init(address=address, namespace="fugu", log_to_driver=False, logging_level="ERROR")
    evolve(folder, "driver")


def _speaks(request: Recorded) -> str:
    from tests.training.test_live import speaks

    return speaks(request)


def content(checkpoint: Path) -> Any:
    """Metadata and numbers; the file's own order of its metadata is not always the same."""
    from safetensors import safe_open

    with safe_open(checkpoint, "np") as file:
        return [
            sorted(file.metadata().items()),
            [(name, file.get_tensor(name).tobytes()) for name in sorted(file.keys())],
        ]


def _lose_midway(out: Path, upstream: LoopbackProvider, lose: Callable[[], None], at: dict[str, Any]) -> None:
    """Once the first generation is written and calls of the next are under way."""
    history = out / "router.evolve" / "history.jsonl"
    deadline = time.monotonic() + EVOLVE_SECONDS
    while time.monotonic() < deadline and not (history.exists() and history.read_text().count("\n") >= 1):
        time.sleep(0.02)
    while time.monotonic() < deadline and upstream.in_flight < 4:
        time.sleep(0.005)
    at["in_flight"] = upstream.in_flight
    at["generations_done"] = history.read_text().count("\n")
    lose()


# --- serving ---


@contextmanager
def served(folder: Path, workers: list[dict[str, Any]]) -> Iterator[str]:
    """An application as `serve deploy` deploys it, behind the head's proxy; two heads that decide the opposite."""
    from ray import serve

    deploy(folder, workers)
    url = f"http://127.0.0.1:{_port(folder)}"
    until_it_answers(url)
    try:
        yield url
    finally:
        serve.shutdown()


def _workers(upstream: LoopbackProvider) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "provider": "openai",
            "model": name,
            "base_url": upstream.url_for("openai"),
            "retry": {"attempts": 1},
            "timeout": {"connect": 5, "first_byte": 20, "total": 40},
        }
        for name in WORKERS[:2]
    ]


def deploy(folder: Path, workers: list[dict[str, Any]], **options: Any) -> None:
    """What `serve deploy` does with the file that `fugu serve --emit-serve-config` prints. The `workers` are called as
    the first two of `WORKERS`."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from serve.emit import serve_config, text

    if not (folder / "yes.safetensors").exists():
        _heads(folder)
    replicas = {"min": 2, "max": 2}
    config = {
        "workers": workers,
        "router": {"backbone": str(folder / "tiny"), "checkpoint": str(folder / "yes.safetensors"), "max_tokens": 128},
        "serve": {"api_keys": ["${CLUSTER_KEY}"], "port": _port(folder), "gateway_replicas": replicas, "drain": 5},
    }
    path = folder / "pool.yaml"
    path.write_text(yaml.safe_dump(config))
    made = yaml.safe_load(text(serve_config(path, **options))) | {"proxy_location": "HeadOnly"}
    http = made.pop("http_options")
    serve.start(proxy_location="HeadOnly", http_options=http)
    made["http_options"] = http
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(made), _blocking=False)
    wanted = made["applications"][0]["deployments"][0]["user_config"]
    deadline = time.monotonic() + DEPLOY_SECONDS
    while _serving() != wanted:
        assert time.monotonic() < deadline, serve.status()
        time.sleep(0.2)


def _serving() -> dict[str, Any] | None:
    """What the router says that it decides with, once the application runs."""
    from ray import serve

    from serve.overview import router_state

    application = serve.status().applications.get("fugu")
    if application is None or application.status.value != "RUNNING":
        return None
    found = router_state(BOUND)
    assert found.pop("refused") is None
    return found


def _port(folder: Path) -> int:
    file = folder / "port"
    if not file.exists():
        file.write_text(str(free_ports(1)[0]))
    return int(file.read_text())


def _heads(folder: Path) -> None:
    import torch

    from actors.model_files import resolve_model
    from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint
    from tests.orchestrator.tiny import DIMENSION

    files = resolve_model(str(folder / "tiny"))
    info = CheckpointInfo(workers=WORKERS[:2], backbone=files.id, revision=files.revision)
    weight = torch.randn(info.rows, DIMENSION, generator=torch.Generator().manual_seed(1))
    save_checkpoint(folder / "yes.safetensors", Checkpoint(info=info, weight=weight))
    save_checkpoint(folder / "no.safetensors", Checkpoint(info=info, weight=-weight))


def ask(url: str, prompt: str, timeout: float = BOUND) -> dict[str, Any]:
    """How a request ended: its status, error code, worker and source; `hung` where nothing came in time."""
    body = {"model": "fugu", "messages": [{"role": "user", "content": prompt}], "fugu": {"trace": True}}
    began = time.monotonic()
    try:
        reply = httpx.post(
            f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=timeout
        )
        told = reply.json()
    except httpx.TimeoutException:
        return {"prompt": prompt, "ended": "hung"}
    except (httpx.HTTPError, ValueError) as error:
        return {"prompt": prompt, "ended": f"untyped: {type(error).__name__}"}
    seconds = time.monotonic() - began
    if reply.status_code == 200:
        trace = told["fugu"]
        told = {"ended": "answered", "worker": trace["worker"], "source": trace["source"]}
    else:
        told = {"ended": "typed", "code": told["error"]["code"], "status": reply.status_code}
    return {"prompt": prompt, "seconds": seconds, **told}


def until_it_answers(url: str) -> dict[str, Any]:
    deadline = time.monotonic() + BOUND
    while True:
        last = ask(url, "hello")
        if last["ended"] == "answered" or time.monotonic() > deadline:
            return last
        time.sleep(0.2)


def update_the_checkpoint(folder: Path, upstream: LoopbackProvider, url: str) -> dict[str, Any]:
    """Requests without a pause while the checkpoint changes to its opposite, and then to half and half."""
    upstream.default = Behaviour(delay=0.02)
    prompts = [f"question {number}" for number in range(12)]
    before = [ask(url, prompt) for prompt in prompts]
    stop = threading.Event()

    def keep_asking(number: int) -> list[dict[str, Any]]:
        found = []
        while not stop.is_set():
            found.append(ask(url, f"{number} {len(found)}"))
        return found

    pids = _pids("ray::ServeReplica")
    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(keep_asking, number) for number in range(3)]
        workers = _workers(upstream)
        deploy(folder, workers, checkpoint=str(folder / "no.safetensors"))
        after = [ask(url, prompt) for prompt in prompts]
        deploy(folder, workers, canary=str(folder / "no.safetensors"), share=0.5)
        tried = [ask(url, prompt) for prompt in prompts]
        stop.set()
        during = [each for future in asking for each in future.result()]
    return {
        "before": before,
        "after": after,
        "tried": tried,
        "during": [each["ended"] for each in during],
        "replicas_kept": _pids("ray::ServeReplica") == pids,
    }


def kill_in_turn(upstream: LoopbackProvider, url: str) -> dict[str, Any]:
    found = {}
    for title in ("ray::ProviderActor", "ray::ServeReplica:fugu:Router", "ray::ServeReplica:fugu:Gateway"):
        found[title] = burst(upstream, url, lambda title=title: _kill_one(title))
        until_it_answers(url)
    found["ray::ServeController"] = burst(upstream, url, lambda: _kill_one("ray::ServeController"))
    return found


def burst(upstream: LoopbackProvider, url: str, kill: Callable[[], None]) -> dict[str, Any]:
    """Twelve requests, with the kill while all of them that could get there are at the provider, and twelve more."""
    upstream.clear()
    upstream.default = Behaviour(delay=1.0)
    with ThreadPoolExecutor(24) as threads:
        asked = [threads.submit(ask, url, f"burst {number}") for number in range(12)]
        upstream.wait_for(lambda: upstream.in_flight >= 10, 10)
        reached = upstream.in_flight
        kill()
        asked += [threads.submit(ask, url, f"later {number}") for number in range(12)]
        ended = [each.result() for each in asked]
    return {"in_flight": reached, "ended": ended}


def where_everything_is(node: str) -> dict[str, Any]:
    """The nodes of our actors, by class."""
    from ray._private.state import actors

    found: dict[str, list[str]] = {}
    for actor in actors().values():
        if actor["State"] == "ALIVE":
            found.setdefault(actor["ActorClassName"], []).append(actor["Address"]["NodeID"])
    return {"serving": node, "actors": found}


def processes(title: str) -> list[psutil.Process]:
    """Of the cluster's, those whose title begins so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def _pids(title: str) -> list[int]:
    return sorted(process.pid for process in processes(title))


def _kill_one(title: str) -> None:
    processes(title)[0].kill()


if __name__ == "__main__":
    if sys.argv[2] == "drive":
        drive(Path(sys.argv[1]), sys.argv[3])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
