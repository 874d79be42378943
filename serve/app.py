"""`build_app`: the Serve application of a configuration; `Server`: one that runs, and how it starts and stops.

    server = Server.start(config)             # starts a Ray of its own, or joins `address`
    server.wait_ready(timeout=60)
    ...
    server.stop()                             # drains, then stops what `start` started and nothing else

`serve.environment.prepare` comes first, before anything imports ray.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.config import HTTPOptions

from actors.config import FuguConfig, Replicas
from actors.errors import ConfigError, FuguError
from actors.placement import resources
from actors.pool import WorkerPool
from actors.telemetry import check_installed
from serve.auth import check_bind
from serve.checkpoint import check_pins, why_no_roles
from serve.conductor import why_no_conductor
from serve.gateway import GatewayReplica
from serve.memory import ActorStore
from serve.router import RouterReplica, Served

log = logging.getLogger("fugu.app")

APP = "fugu"
ROUTER = "Router"
NAMESPACE = "fugu"
# Ray's object store holds nothing but the odd long conversation on its way to the router.
OBJECT_STORE_BYTES = 100 * 1024 * 1024
DEPLOY_FAILED = "DEPLOY_FAILED"
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def build_app(config: FuguConfig, *, gpu: bool = False, where: Mapping[str, float] | None = None) -> serve.Application:
    """Gateway and, where there is something to decide, router. `gpu`: the cluster has one for the router. `where`: what
    replicas ask of a node, beside CPUs and GPUs.

    Without a checkpoint, or with one worker left and no roles, no router is deployed.
    """
    served = Served.of(config.router).json() if needs_router(config) else None
    return assemble(config, served, why_no_roles(config.router), gpu=gpu, where=where or {})


def assemble(
    config: FuguConfig,
    served: Mapping[str, Any] | None,
    no_roles: str | None,
    *,
    gpu: bool,
    where: Mapping[str, float],
) -> serve.Application:
    """The application, with a router if something is `served` (`serve.router.Served.json`; empty: told later, by the
    deployment's `user_config`)."""
    settings = config.serve
    router = None
    if served is not None:
        actor = {"num_cpus": 0, "num_gpus": settings.gpus_per_router if gpu else 0, "resources": dict(where)}
        router = serve.deployment(
            name=ROUTER,
            ray_actor_options=actor,
            max_ongoing_requests=max(256, 4 * config.router.max_batch),
            user_config=dict(served) or None,
            **_replicas(settings.router_replicas),
        )(RouterReplica).bind(config.router, [spec.name for spec in config.workers], config.telemetry)
    gateway = serve.deployment(
        name="Gateway",
        ray_actor_options={"num_cpus": 0, "resources": dict(where)},
        # The gateway refuses what is beyond its limit, in words; Serve's own limit must not be met first.
        max_ongoing_requests=settings.max_ongoing_requests + 256,
        graceful_shutdown_timeout_s=settings.drain + 2,
        graceful_shutdown_wait_loop_s=0.25,
        **_replicas(settings.gateway_replicas),
    )(serve.ingress()(GatewayReplica))
    return gateway.bind(config, router, no_roles)


def needs_router(config: FuguConfig) -> bool:
    """Whether there is something to decide: among workers, or what role the only one takes."""
    several = len(config.active) > 1
    return config.router.checkpoint is not None and (several or why_no_roles(config.router) is None)


def _replicas(bounds: Replicas) -> dict[str, Any]:
    if bounds.min == bounds.max:
        return {"num_replicas": bounds.min}
    return {
        "autoscaling_config": {
            "min_replicas": bounds.min,
            "max_replicas": bounds.max,
            "target_ongoing_requests": bounds.target_ongoing,
        }
    }


@dataclass
class Server:
    """A running application. `owns_ray`: Ray was started for it and ends with it; `stopped`: `stop` came to its end."""

    config: FuguConfig
    url: str
    owns_ray: bool
    stopped: bool = False
    _pool: WorkerPool | None = None

    @classmethod
    def start(
        cls,
        config: FuguConfig,
        *,
        address: str | None = None,
        dashboard: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Server:
        """Start Ray (or join the one at `address`), the provider actors and the application.

        Raises:
            ConfigError: a public address without keys, a port that is taken, no Ray at `address`, or what sends
                traces is not installed.
        """
        check_bind(config.serve)
        check_pins(config.router, config.router.checkpoint)
        check_installed(config.telemetry)
        settings = config.serve
        if address is None:
            check_port_free(settings.host, settings.port)
            progress("starting Ray")
            init_ray(dashboard)
        else:
            progress(f"joining Ray at {address}")
            _join_ray(address)
        server = cls(config, _url(settings.host, settings.port), address is None)
        try:
            progress("starting the workers")
            conducted = why_no_conductor(config) is None
            server._pool = WorkerPool.connect(config, namespace=NAMESPACE, with_conductor=conducted)
            # Models load while Serve starts.
            threading.Thread(target=_get_ready, args=(server._pool,), name="workers", daemon=True).start()
            progress("starting the gateway")
            serve.start(
                proxy_location="EveryNode",
                http_options=HTTPOptions(host=settings.host, port=settings.port, keep_alive_timeout_s=90),
                logging_config=LOGGING,
            )
            gpu = ray.cluster_resources().get("GPU", 0) > 0
            app = build_app(config, gpu=gpu, where=resources(config.placement.serve, config.placement))
            serve._run(app, _blocking=False, name=APP, route_prefix="/", logging_config=LOGGING)
        except BaseException:
            server.stop(drain=False)
            raise
        return server

    def wait_ready(self, timeout: float, progress: Callable[[str], None] = lambda _: None) -> None:
        """Wait until `/readyz` says so.

        Raises:
            FuguError: a part failed for good (a checkpoint that does not fit), or the time is over; says which.
        """
        deadline = time.monotonic() + timeout
        state = ""
        with httpx.Client(base_url=self.url, timeout=5.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                parts = _parts(client)
                if parts is not None and all(part == "ready" for part in parts.values()):
                    return
                state = "; ".join(f"{part}: {why}" for part, why in (parts or {}).items() if why != "ready")
                progress(state or "starting the gateway")
                failures = [
                    why.removeprefix("failed: ") for why in (parts or {}).values() if why.startswith("failed: ")
                ]
                if failures:
                    raise ConfigError("; ".join(failures))
                _check_deployed()
                time.sleep(0.2)
        raise FuguError(f"not ready after {timeout:g} s ({state or 'the gateway does not answer'})")

    def stop(self, *, drain: bool = True) -> None:
        """Let running requests finish (at most `serve.drain` seconds, none with `drain=False`), then stop the
        application, its provider actors, and Ray if it was started here."""
        if ray.is_initialized():
            if drain or not self.owns_ray:
                _quietly("deleting the application", lambda: serve.delete(APP))
            if self._pool is not None:
                _quietly("stopping the workers", self._pool.shutdown)
            if self.config.conductor is not None:
                _quietly("stopping the memory", ActorStore(self.config.conductor.memory, namespace=NAMESPACE).shutdown)
            # Serve's controller, proxies and HAProxy end with the Ray they run in; in someone else's they stay.
            ray.shutdown()


def _get_ready(pool: WorkerPool) -> None:
    # What fails here is found again, and told, by the gateway's readiness.
    with suppress(FuguError):
        asyncio.run(pool.ready())


def _parts(client: httpx.Client) -> dict[str, str] | None:
    """What `/readyz` says of each part; None where nothing of ours answers yet."""
    try:
        parts: dict[str, str] = client.get("/readyz").json()["parts"]
    except (httpx.HTTPError, ValueError, KeyError):
        return None
    return parts


def _check_deployed() -> None:
    """Raises:
    FuguError: Serve gave up on a deployment, whose constructor failed again and again.
    """
    application = serve.status().applications.get(APP)
    if application is None or application.status.value != DEPLOY_FAILED:
        return
    names = [name for name, each in application.deployments.items() if each.status.value == DEPLOY_FAILED]
    node: Any = ray._private.worker._global_node
    logs = Path(node.get_logs_dir_path()) / "serve"
    raise FuguError(f"{' and '.join(names) or 'the application'} could not start; the logs in {logs} say why")


def check_port_free(host: str, port: int) -> None:
    """Raises:
    ConfigError: something listens on it already, or the address is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another with serve.port or --port"
            ) from None


def init_ray(dashboard: bool) -> None:
    """Start a Ray of our own: no dashboard unless asked for, little memory, nothing on the console."""
    with _quiet_ray():
        ray.init(
            address="local",
            namespace=NAMESPACE,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )


def _join_ray(address: str) -> None:
    try:
        with _quiet_ray():
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray at {address}: {error}") from None


@contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray takes SIGTERM for itself (it prints a stack and dies); the handlers that were in place stay."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _url(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"


def _quietly(what: str, action: Callable[[], Any]) -> None:
    """Stopping goes on whatever one step says; the log tells of it."""
    try:
        action()
    except Exception as error:
        log.warning("%s: %s", what, type(error).__name__)
