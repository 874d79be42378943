"""What a pool tells about its workers: state, limits, counters, and the result of a check."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from actors.errors import FuguError
from actors.messages import ChatReply, Usage


@dataclass(slots=True)
class Counters:
    """Totals since the actor started. `failures` counts by error code, `upstream_calls` includes retries."""

    requests: int = 0
    successes: int = 0
    cancelled: int = 0
    cached: int = 0
    retries: int = 0
    upstream_calls: int = 0
    usage: Usage = field(default_factory=Usage)
    cost_usd: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counters) -> None:
        self.requests += other.requests
        self.successes += other.successes
        self.cancelled += other.cancelled
        self.cached += other.cached
        self.retries += other.retries
        self.upstream_calls += other.upstream_calls
        self.usage += other.usage
        self.cost_usd += other.cost_usd
        self.failures += other.failures


@dataclass(slots=True)
class WorkerStatus:
    """One worker, all its shards together. `state` is the breaker's, or `down` where an actor does not answer;
    `reason` then says why. Limits are those of the configuration, `used` what counts against them now, and
    `paused_for` the seconds that the provider asked to wait. `journal` is false where a restart would not know what
    was admitted before and waits for a whole window."""

    name: str
    provider: str
    model: str
    state: Literal["closed", "open", "half_open", "down"] = "closed"
    reason: str = ""
    shards: int = 1
    running: int = 0
    waiting: int = 0
    concurrency: int = 0
    requests_used: int = 0
    requests_limit: int | None = None
    tokens_used: int = 0
    tokens_limit: int | None = None
    paused_for: float = 0.0
    journal: bool = True
    counters: Counters = field(default_factory=Counters)

    @property
    def healthy(self) -> bool:
        """Whether a request has a chance: the actor is up and the circuit is not open."""
        return self.state in ("closed", "half_open")

    def add(self, shard: WorkerStatus) -> None:
        """Take in another shard of the same worker. The worker is as well as its best shard."""
        if shard.healthy and not self.healthy:
            self.state, self.reason = shard.state, shard.reason
        self.shards += shard.shards
        self.running += shard.running
        self.waiting += shard.waiting
        self.concurrency += shard.concurrency
        self.requests_used += shard.requests_used
        self.tokens_used += shard.tokens_used
        self.requests_limit = _sum(self.requests_limit, shard.requests_limit)
        self.tokens_limit = _sum(self.tokens_limit, shard.tokens_limit)
        self.paused_for = max(self.paused_for, shard.paused_for)
        self.journal = self.journal and shard.journal
        self.counters.add(shard.counters)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One real call: its reply, or the error and the seconds until it."""

    name: str
    seconds: float
    reply: ChatReply | None = None
    error: FuguError | None = None

    @property
    def ok(self) -> bool:
        return self.error is None


def _sum(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left + right
