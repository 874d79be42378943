"""The head dies and is started again: `python -m tests.cluster.head_restart redis | rocksdb | nothing`.

Two machines (tests/cluster/machines.py): a head on which only Ray runs, and one that serves. Every process on the head
is killed while requests come in, then `fugu up` starts it again. What it knew was kept by a Redis on a third machine,
by Ray's embedded store on shared storage, or by nothing: then `fugu deploy` is needed, too. In each case keys and what
they have used are what they were. What happened is printed.

Needs redis-server for the first: apt-get install redis-server
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.cluster.machines import (
    HEAD,
    LAPTOP,
    PORT,
    SHARED,
    WORKER,
    Asking,
    ask,
    checkpoint_file,
    cluster_file,
    enter,
    fugu,
    machine,
    pool_file,
    processes,
    run_inside,
    ssh,
    status,
    step,
    until,
    which,
)

KINDS = ("redis", "rocksdb", "nothing")
PASSWORD = "redis-password-51c7"
# As many as matter of the programs that Ray starts; the brackets keep the pattern from matching itself.
_OF_RAY = "[g]cs_server|[r]aylet|[r]ay::|[r]ay/dashboard|[r]ay/_private|[r]ay/autoscaler|[h]aproxy"
WAIT_SECONDS = 240.0


def why_not(kind: str) -> str | None:
    from tests.cluster import machines

    if kind == "redis" and which("redis-server") is None:
        return "not installed: redis-server (apt-get install redis-server)"
    return machines.why_not()


def inside(kind: str) -> None:
    enter()
    step(f"two machines; the head's knowledge is kept by {kind}")
    both, head, running = {}, {}, []
    if kind == "redis":
        server = ["redis-server", "--bind", LAPTOP, "--requirepass", PASSWORD, "--save", "", "--dir", str(SHARED)]
        running.append(subprocess.Popen(server, stdout=subprocess.DEVNULL))
        head = {"RAY_REDIS_ADDRESS": f"{LAPTOP}:6379", "FUGU_REDIS_PASSWORD": PASSWORD}
    if kind == "rocksdb":
        head = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": f"{SHARED}/gcs"}
    if kind != "nothing":
        both = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
    purposes = '{"egress": 1000, "serve": 1000}'
    running += [machine(HEAD, {**both, **head}), machine(WORKER, {**both, "FUGU_RESOURCES": purposes})]
    try:
        print(json.dumps({"kind": kind, **work(kind)}))
        for address in (HEAD, WORKER):
            left = processes(address)
            assert not left, f"{address} still runs {left}"
    finally:
        for each in reversed(running):
            each.kill()
            each.wait()


def work(kind: str) -> dict[str, Any]:
    """Until the head is back and everything is as it was."""
    pool = pool_file(limits={"requests_per_minute": 6000}, price={"input": 1000.0, "output": 1000.0})
    checkpoint, cluster = checkpoint_file(), cluster_file()
    deploy = ["deploy", str(pool), "--cluster", str(cluster), "--host", "0.0.0.0", "--checkpoint", str(checkpoint)]
    deploy += ["--wait", f"{WAIT_SECONDS:g}"]
    step("fugu up")
    fugu("up", str(cluster))
    until("the worker has joined", lambda: "raylet" in " ".join(processes(WORKER)), WAIT_SECONDS)
    step("fugu deploy")
    fugu(*deploy)
    os.environ["FUGU_STATE"] = str(SHARED / "state")
    key = fugu("keys", "create", "reader", "--rpm", "6000", "--budget", "1000", quiet=True).split()[-1]
    until("the new key is known", lambda: ask(WORKER, "question 0", key)[0] == 200, 30)
    asking = Asking(WORKER, key)
    until("ten requests were answered", lambda: asking.answered >= 10, 60)
    # /readyz starts every provider actor; one that only then starts would be started anew by a new head.
    until("every worker is ready", _ready, 120)
    actors = _pids(WORKER, "ray::ProviderActor")
    assert len(actors) == 2
    step("the head dies")
    ssh(HEAD, f"pkill -9 -f '{_OF_RAY}'")
    until("nothing runs there", lambda: not processes(HEAD), 30)
    died = time.monotonic()
    before = asking.answered
    time.sleep(5)
    while_down = asking.answered - before
    step("fugu up")
    fugu("up", str(cluster))
    # With what the head knew the node comes back to it; else it ends, and is started again by the new one.
    until("the worker has joined", lambda: _joined(cluster), WAIT_SECONDS)
    if kind == "nothing":
        step("fugu deploy")
        fugu(*deploy)
    step("fugu status")
    fugu("status", "--cluster", str(cluster), "--wait", f"{WAIT_SECONDS:g}")
    # What serves is told by the controller; that router and workers can be reached again is another matter.
    until("router and workers answer", lambda: str(checkpoint) in status(cluster) and _ready(), WAIT_SECONDS)
    seconds = time.monotonic() - died
    before = asking.answered
    until("ten more requests were answered", lambda: asking.answered >= before + 10, 60)
    asking.stop()
    used = _used()
    told = {
        "seconds": round(seconds),
        "answered_while_down": while_down,
        "requests": dict(asking.ended),
        "key_requests": used["requests"],
        "key_usd": used["usd"],
        "same_provider_actors": _pids(WORKER, "ray::ProviderActor") == actors,
    }
    # A request that was cut off may have been metered or not; every answered one was.
    assert used["requests"] >= asking.answered + 1
    assert used["usd"] > 0
    if kind != "nothing":
        assert told["same_provider_actors"], "with their limits and everything that they counted"
    step("fugu down")
    fugu("down", str(cluster), "--yes")
    return told


def _used() -> dict[str, Any]:
    from serve.keys import KeyBook

    ((_, used),) = KeyBook(SHARED / "state" / "keys.sqlite").list()
    return {"requests": used.requests, "usd": used.usd}


def _joined(cluster: Path) -> bool:
    """By the table of nodes: the launcher names the worker's address whether it has joined or not."""
    return any(re.search(rf"[│|]\s*{re.escape(WORKER)}\s", line) for line in status(cluster).splitlines())


def _ready() -> bool:
    """Whether `/readyz` says that the router and every worker answer."""
    import httpx

    try:
        return httpx.get(f"http://{WORKER}:{PORT}/readyz", timeout=60, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _pids(address: str, title: str) -> list[int]:
    found = ssh(address, "ps -eo pid,args").stdout.splitlines()
    return sorted(int(line.split()[0]) for line in found if title in line)


if __name__ == "__main__":
    if sys.argv[1] == "inside":
        inside(sys.argv[2])
    else:
        sys.exit(why_not(sys.argv[1]) or run_inside(__spec__.name, sys.argv[1]))
