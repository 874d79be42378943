"""`fugu status`: what runs on a Ray, gathered within seconds whatever does not answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from rich.console import Console
from rich.table import Table

from actors.errors import ConfigError, FuguError
from actors.status import WorkerStatus
from serve.app import APP, ROUTER

_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 1.0
# Custom resources that say what a node is for (cluster.yaml).
_KINDS = ("egress", "serve", "train", "rollout")
_PROVIDER = "fugu-provider:"


def show(address: str, wait: float, console: Console) -> bool:
    """Print it; returns whether every application runs, after at most `wait` seconds.

    Raises:
        ConfigError: there is no Ray at `address`.
    """
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray at {address}: {error}") from None
    try:
        ready = _wait(wait)
        console.print(nodes_table(ray.nodes()))
        console.print(_deployments())
        if (served := _served()) is not None:
            console.print(served, soft_wrap=True, markup=False)
        console.print(workers_table(asyncio.run(workers())))
        console.print(_jobs())
    finally:
        ray.shutdown()
    return ready


def nodes_table(nodes: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("node", "for", "CPU", "GPU", "memory, GB", title=f"{sum(n['Alive'] for n in nodes)} nodes")
    for node in nodes:
        if not node["Alive"]:
            continue
        has = node["Resources"]
        head = "node:__internal_head__" in has
        kinds = [kind for kind in _KINDS if has.get(kind)] or (["head"] if head else ["anything"])
        memory = has.get("memory", 0) / 1e9
        table.add_row(
            node["NodeManagerAddress"],
            ", ".join(kinds),
            f"{has.get('CPU', 0):g}",
            f"{has.get('GPU', 0):g}",
            f"{memory:.0f}",
        )
    return table


def _wait(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        applications = serve.status().applications
        states = [application.status.value for application in applications.values()]
        if states and all(state == "RUNNING" for state in states):
            return True
        if time.monotonic() >= deadline or "DEPLOY_FAILED" in states:
            return not states and seconds == 0
        time.sleep(_POLL_SECONDS)


def _deployments() -> Table:
    table = Table("deployment", "state", "replicas", "", title="deployments")
    for name, application in serve.status().applications.items():
        table.add_row(name, application.status.value, "", application.message.strip()[-200:])
        for deployment, each in application.deployments.items():
            counts = ", ".join(f"{count} {state.lower()}" for state, count in each.replica_states.items())
            table.add_row(f"  {deployment}", each.status.value, counts, each.message.strip()[-200:])
    return table


def _served() -> str | None:
    """Which checkpoints decide; None where no router is deployed."""
    application = serve.status().applications.get(APP)
    if application is None or ROUTER not in application.deployments:
        return None
    try:
        found = router_state(_ANSWER_SECONDS)
    # Serve and Ray each have errors of their own for a replica that does not answer.
    except Exception as error:
        return f"router: does not answer ({type(error).__name__})"
    text = f"router: {found.get('checkpoint', 'nothing')}"
    if found.get("canary"):
        text += f"; {found['share']:.1%} of the conversations: {found['canary']}"
    return text if found["refused"] is None else f"{text}; the newest was refused: {found['refused']}"


def router_state(seconds: float) -> dict[str, Any]:
    """What the router says that it decides with (`serve.router.RouterReplica.serving`).

    Raises:
        Exception: one of Ray's or Serve's, where it does not answer.
    """
    handle = serve.get_deployment_handle(ROUTER, APP)
    # With the throughput settings a handle works inside a running loop only, which is not to end before Serve does.
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    found: dict[str, Any] = handle.serving.remote().result(timeout_s=seconds)
    return found


async def workers() -> list[WorkerStatus]:
    """The state of every worker on this Ray, shards of one worker together."""
    named = ray.util.list_named_actors(all_namespaces=True)
    actors = sorted((each["name"], each["namespace"]) for each in named if each["name"].startswith(_PROVIDER))
    merged: dict[tuple[str, str], WorkerStatus] = {}
    for (name, _), answer in zip(actors, await asyncio.gather(*(_status(*actor) for actor in actors)), strict=True):
        # Another configuration of the same worker is another actor.
        digest = name.split(":")[2]
        for status in answer:
            key = (digest, status.name)
            if key in merged:
                merged[key].add(status)
            else:
                merged[key] = status
    return list(merged.values())


async def _status(name: str, namespace: str) -> list[WorkerStatus]:
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            answer = await ray.get_actor(name, namespace=namespace).status.remote()
    except (RayError, ValueError, TimeoutError) as error:
        answer = FuguError(f"does not answer ({type(error).__name__})")
    if isinstance(answer, FuguError):
        return [WorkerStatus(name.split(":")[1], "", "", state="down", reason=answer.message)]
    return list(answer)


def workers_table(found: Sequence[WorkerStatus]) -> Table:
    table = Table("worker", "state", "running", "requests, min", "tokens, min", "answered", "USD", "", title="workers")
    for each in found:
        counters = each.counters
        table.add_row(
            each.name,
            each.state,
            f"{each.running}/{each.concurrency}" + (f" +{each.waiting}" if each.waiting else ""),
            _share(each.requests_used, each.requests_limit),
            _share(each.tokens_used, each.tokens_limit),
            f"{counters.successes}/{counters.requests}",
            f"{counters.cost_usd:.4f}",
            each.reason or ", ".join(f"{count}x {code}" for code, count in counters.failures.items()),
        )
    return table


def _share(used: int, limit: int | None) -> str:
    return str(used) if limit is None else f"{used}/{limit}"


def _jobs() -> Table:
    """Jobs of `fugu submit` with the last line that each printed: its progress."""
    from ray.job_submission import JobSubmissionClient

    table = Table("job", "state", "since", "last line", title="jobs")
    try:
        client = JobSubmissionClient()
        for job in sorted(client.list_jobs(), key=lambda job: job.start_time or 0, reverse=True)[:20]:
            if job.submission_id is None:
                continue
            lines = [line for line in client.get_job_logs(job.submission_id).splitlines() if line.strip()]
            minutes = (time.time() - (job.start_time or 0) / 1000) / 60
            last = lines[-1].split("\r")[-1].strip()[-100:] if lines else ""
            table.add_row(job.submission_id, job.status.value, f"{minutes:.0f} min", last)
    except (ConnectionError, RuntimeError) as error:
        table.caption = f"not known: this Ray has no dashboard ({type(error).__name__})"
    return table
