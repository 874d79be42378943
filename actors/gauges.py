"""What a provider actor tells Prometheus of its workers, through Ray's metrics endpoint; sums over shards are theirs.

fugu_worker_state{worker, shard}      the breaker: 0 closed, 1 half open, 2 open
fugu_worker_running{worker, shard}    calls at the provider
fugu_worker_waiting{worker, shard}    calls that wait for the worker's limits
"""

from __future__ import annotations

from collections.abc import Iterable

from ray.util.metrics import Gauge

from actors.status import WorkerStatus

EVERY_SECONDS = 5.0
_STATES = {"closed": 0, "half_open": 1, "open": 2}
_TAGS = ("worker", "shard")


class WorkerGauges:
    """See the module docstring. Needs a Ray process."""

    def __init__(self, shard: int) -> None:
        self._shard = str(shard)
        self._state = Gauge("fugu_worker_state", "Circuit breaker: 0 closed, 1 half open, 2 open", _TAGS)
        self._running = Gauge("fugu_worker_running", "Calls at the provider", _TAGS)
        self._waiting = Gauge("fugu_worker_waiting", "Calls that wait for limits", _TAGS)

    def tell(self, workers: Iterable[WorkerStatus]) -> None:
        for worker in workers:
            tags = {"worker": worker.name, "shard": self._shard}
            self._state.set(_STATES[worker.state], tags)
            self._running.set(worker.running, tags)
            self._waiting.set(worker.waiting, tags)
