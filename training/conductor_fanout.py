"""Rollouts over the cluster: parts of a batch are Ray tasks, whose workers are the provider actors with their limits.

Every wait has a bound. A part that is lost with its process or node is played again; the provider actors' response
caches (`cache` in a worker's configuration) spare its calls. What comes back is in the order of what was written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.config import FuguConfig
from actors.errors import ConfigError, DataError
from actors.messages import Worker
from actors.pool import WorkerPool
from training.conductor_rollouts import Played, RolloutSettings, Written, play
from training.lost import pause

logger = logging.getLogger(__name__)

# Of a CPU: a part mostly waits for workers; the rest is grading.
_CPUS = 0.2


@dataclass(frozen=True)
class _Lane:
    """What every part needs."""

    config: FuguConfig
    pool: tuple[str, ...]
    settings: RolloutSettings


@ray.remote(num_cpus=_CPUS, max_retries=0, scheduling_strategy="SPREAD")
def play_part(lane: _Lane, written: Sequence[Written], concurrency: int) -> list[Played]:
    """Play a part, `concurrency` rollouts at the same time."""
    workers: Mapping[str, Worker] = WorkerPool.connect(lane.config).workers

    async def all_of_them() -> list[Played]:
        turn = asyncio.Semaphore(concurrency)

        async def one(text: Written) -> Played:
            async with turn:
                return await play(text, lane.pool, workers, lane.settings)

        return await asyncio.gather(*(one(text) for text in written))

    return asyncio.run(all_of_them())


class RayRollouts:
    """Plays on the cluster that this process is connected to, in at most `lanes` parts at a time (None: one for each
    CPU), `concurrency` rollouts in each. A part may take `seconds` in all."""

    def __init__(
        self,
        config: FuguConfig,
        pool: Sequence[str],
        settings: RolloutSettings,
        *,
        lanes: int | None = None,
        concurrency: int = 16,
        seconds: float = 3600.0,
    ) -> None:
        if min(concurrency, 1 if lanes is None else lanes) < 1:
            raise ConfigError("lanes and rollouts at once must be at least 1")
        self._lane = ray.put(_Lane(config, tuple(pool), settings))
        self._lanes = lanes or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._concurrency, self._seconds = concurrency, seconds

    def play(self, written: Sequence[Written]) -> list[Played]:
        """Raises:
        DataError: parts were lost again and again, or took too long.
        """
        size = max(1, -(-len(written) // self._lanes))
        left = [range(start, min(start + size, len(written))) for start in range(0, len(written), size)]
        found: dict[int, Played] = {}
        losses = 0
        while left:
            before = len(found)
            left, reason = self._round(written, left, found)
            losses = losses + 1 if len(found) == before else 0
            time.sleep(pause(losses, reason))
        return [found[index] for index in range(len(written))]

    def _round(
        self, written: Sequence[Written], parts: Sequence[range], found: dict[int, Played]
    ) -> tuple[list[range], RayError | None]:
        """Play these parts at the same time; returns those that were lost, and why the last of them was."""
        task: Any = play_part
        running = {task.remote(self._lane, [written[i] for i in part], self._concurrency): part for part in parts}
        lost: list[range] = []
        reason: RayError | None = None
        until = time.monotonic() + self._seconds
        try:
            while running:
                ready, _ = ray.wait(list(running), num_returns=1, timeout=max(0.0, until - time.monotonic()))
                if not ready:
                    raise DataError(
                        f"rollouts took longer than {self._seconds:g} s; allow more, or look at the workers"
                    )
                part = running.pop(ready[0])
                try:
                    found.update(zip(part, ray.get(ready[0]), strict=True))
                except RayTaskError as error:
                    raise error.as_instanceof_cause() from None  # a fault of ours, not of the cluster's
                except RayError as error:
                    logger.warning("rollouts were lost (%s) and are played again", type(error).__name__)
                    lost.append(part)
                    reason = error
        finally:
            for reference in running:
                ray.cancel(reference, force=False)
        return lost, reason
