"""`fugu up` for real, on this machine: `python -m tests.cluster.local_up`.

Two machines (tests/cluster/machines.py) and a cluster file for them, made of cluster/onprem.yaml. Then what a user
does, in the order of the README: `fugu up`, `fugu deploy`, `fugu submit train evolve`, `fugu deploy` with the
checkpoint that it wrote, under requests over the network, `fugu status`, `fugu up` again (which changes nothing),
`fugu down`. At the end no process of Ray may be left on either machine. Each step says when it began, in seconds.
"""

from __future__ import annotations

import sys

from tests.cluster.machines import (
    HEAD,
    SHARED,
    WORKER,
    Asking,
    ask,
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
)

JOB_SECONDS = 400.0


def inside() -> None:
    enter()
    step("two machines")
    machines = [
        machine(HEAD, {"FUGU_RESOURCES": '{"egress": 1000, "serve": 1000}'}),
        machine(WORKER, {"FUGU_RESOURCES": '{"rollout": 1000}'}),
    ]
    try:
        work()
        step("nothing of Ray is left")
        for address in (HEAD, WORKER):
            left = processes(address)
            assert not left, f"{address} still runs {left}"
    finally:
        for each in machines:
            each.kill()
            each.wait()


def work() -> None:
    """What a user does, with `fugu` alone."""
    pool, cluster = pool_file(), cluster_file()

    def told() -> str:
        return status(cluster)

    step("fugu up")
    fugu("up", str(cluster))
    until("the worker has joined", lambda: "raylet" in " ".join(processes(WORKER)), 240, told)
    where = ["--cluster", str(cluster), "--host", "0.0.0.0", "--wait", "300"]
    step("fugu deploy")
    fugu("deploy", str(pool), *where)
    answered("order")
    step("fugu submit train evolve")
    out = SHARED / "bucket" / "router.safetensors"
    at = f"file://{out}"  # as s3:// would be: no machine need have mounted it
    evolve = ["train", "evolve", "--config", str(pool), "--outcomes", f"file://{SHARED}/outcomes", "--out", at]
    evolve += ["--mode", "fugu", "--generations", "2", "--population", "4", "--size", "4", "--backbone"]
    evolve += [str(SHARED / "tiny"), "--read-tokens", "128", "--quiet"]
    fugu("submit", "--cluster", str(cluster), "--name", "evolution", *evolve)
    # The file is the last thing that the job writes; asking for its state costs more than it does.
    until("the evolution has written its checkpoint", out.exists, JOB_SECONDS, told)
    assert (out.with_name("router.evolve") / "state.pkl").exists(), "what it would have gone on from"
    step("fugu deploy --checkpoint")
    asking = Asking(HEAD)
    fugu("deploy", str(pool), *where, "--checkpoint", at)
    until("the head decides", lambda: answered() == "head", 60)
    asking.stop()
    print(f"  requests meanwhile, by status: {asking.ended}")
    assert set(asking.ended) == {200}
    step("fugu status")
    found = told()
    print(found)
    for word in (HEAD, WORKER, "evolution", "SUCCEEDED", "HEALTHY", at):
        assert word in found, f"status says nothing of {word}"
    step("fugu up, again")
    before = started(HEAD), started(WORKER)
    fugu("up", str(cluster))
    assert (started(HEAD), started(WORKER)) == before, "nothing has changed, and nothing is started anew"
    answered("head")
    step("fugu down")
    fugu("down", str(cluster), "--yes")


def answered(decided: str | None = None) -> str:
    """A request over the network; by what it was decided who answers, which is `decided`."""
    code, reply = ask(HEAD, "question 3")
    assert code == 200, reply
    trace = reply["fugu"]
    print(f"  {HEAD} answered through {trace['worker']}, decided by {trace['source']}")
    assert reply["choices"][0]["message"]["content"] in ("x", "y")
    assert decided in (None, trace["source"])
    return str(trace["source"])


def started(address: str) -> list[int]:
    """The processes of Ray and of the server on a machine."""
    found = ssh(address, "ps -eo pid,args").stdout.splitlines()
    wanted = ("raylet/raylet", "gcs_server", "ServeReplica")
    return sorted(int(line.split()[0]) for line in found if any(word in line for word in wanted))


if __name__ == "__main__":
    if sys.argv[1:] == ["inside"]:
        inside()
    else:
        sys.exit(run_inside(__spec__.name))
