"""The Ray actor of a provider: a thin shell around the workers that it hosts.

Ray starts, finds and restarts it; requests reach it over `actors.link`. A remote worker has actors of its own, one per
shard; local workers on the same model share one actor and one engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from actors.adapters.build import build_adapters
from actors.config import WorkerSpec
from actors.errors import ConfigError, FuguError, WorkerUnavailableError
from actors.gauges import EVERY_SECONDS, WorkerGauges
from actors.journal import Journal, journal_path
from actors.limiter import SLACK, WINDOW
from actors.link import Endpoint
from actors.link_server import LinkServer
from actors.status import WorkerStatus
from actors.telemetry import TelemetryConfig, open_telemetry
from actors.worker import WorkerRuntime

if TYPE_CHECKING:
    from actors.otel import Telemetry

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LimitWindow:
    """Seconds of the limiters' windows. Providers count minutes; tests cannot wait for those."""

    window: float = WINDOW
    slack: float = SLACK


@ray.remote
class ProviderActor:
    """Hosts `specs` (one group, see `actors.pool.group`). Methods return errors as values, and never raise them."""

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        shard: int,
        limits: LimitWindow,
        telemetry: TelemetryConfig | None = None,
    ) -> None:
        self._specs = specs
        self._telemetry_config = telemetry
        self._telemetry: Telemetry | None = None
        self._shard = shard
        self._limits = limits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray calls a deprecated part of itself here
            self._reconstructed = ray.get_runtime_context().was_current_actor_reconstructed
        self._starting = asyncio.Lock()
        self._runtimes: dict[str, WorkerRuntime] = {}
        self._endpoint: Endpoint | None = None
        self._server: LinkServer | None = None
        self._asked = time.monotonic()
        self._retiring: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None

    async def endpoint(self) -> Endpoint | FuguError:
        """Where to call, once every worker of the group is ready. A start that failed is tried again when asked."""
        self._asked = time.monotonic()
        async with self._starting:
            if self._endpoint is None:
                try:
                    self._endpoint = await self._start()
                except FuguError as error:
                    return error
                except Exception as error:
                    # The traceback stays in this actor's log: a caller gets no more than the kind of fault.
                    logger.exception("cannot start %s", ", ".join(spec.name for spec in self._specs))
                    names = ", ".join(spec.name for spec in self._specs)
                    return ConfigError(f"cannot start {names}: {type(error).__name__}; the log of its actor says more")
        return self._endpoint

    async def _start(self) -> Endpoint:
        if self._telemetry is None:
            self._telemetry = open_telemetry(self._telemetry_config, f"provider {self._specs[0].name}")
        adapters = await build_adapters(self._specs)
        for spec in self._specs:
            self._runtimes[spec.name] = WorkerRuntime(
                spec,
                adapters[spec.name],
                shard=self._shard,
                window=self._limits.window,
                slack=self._limits.slack,
                journal=self._journal(spec),
                reconstructed=self._reconstructed,
            )
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell_gauges())
        self._server = LinkServer(dict(self._runtimes), self._telemetry)
        return await self._server.start(ray.util.get_node_ip_address())

    async def _tell_gauges(self) -> None:
        gauges = WorkerGauges(self._shard)
        while True:
            gauges.tell(runtime.status() for runtime in self._runtimes.values())
            await asyncio.sleep(EVERY_SECONDS)

    def _journal(self, spec: WorkerSpec) -> Journal | None:
        if spec.limits.requests_per_minute is None and spec.limits.tokens_per_minute is None:
            return None
        return Journal(journal_path(spec, self._shard), span=self._limits.window + self._limits.slack)

    async def close_telemetry(self) -> None:
        """Send what has been noted for traces; nothing is noted any more."""
        if self._telemetry is not None:
            await asyncio.to_thread(self._telemetry.close)

    async def status(self) -> list[WorkerStatus] | FuguError:
        """This shard's part of every worker it hosts."""
        if not self._runtimes:
            return WorkerUnavailableError("is still starting")
        return [runtime.status() for runtime in self._runtimes.values()]

    async def retire(self, after: float) -> None:
        """End for good once nobody has been connected for `after` seconds. Returns at once."""
        if self._retiring is None:
            self._retiring = asyncio.create_task(self._end_when_unused(after))

    async def _end_when_unused(self, after: float) -> None:
        used = time.monotonic()
        while time.monotonic() - max(used, self._asked) < after:
            await asyncio.sleep(after / 20)
            if self._server is not None and self._server.connected:
                used = time.monotonic()
        logger.warning("the actor of %s ends: nobody is connected to it, and nobody will be", self._specs[0].name)
        await self.close_telemetry()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
