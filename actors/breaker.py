"""A circuit breaker: a worker that keeps failing rests, so that callers fall back at once instead of waiting for it.

closed ──failures in a row──▶ open ──cooldown──▶ half-open ──success──▶ closed
                               ▲                     │
                               └───────failure───────┘
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from actors.errors import CircuitOpenError

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Not for threads. Every `enter` that returns is followed by one of `success`, `failure` and `neutral`.

    Args:
        failures: this many failures in a row open the circuit.
        cooldown: seconds that it stays open; then one call may try.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        failures: int,
        cooldown: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        worker: str | None = None,
    ) -> None:
        self._threshold = failures
        self._cooldown = cooldown
        self._clock = clock
        self._worker = worker
        self._failures = 0
        self._opened_at: float | None = None
        self._probing = False

    @property
    def state(self) -> State:
        if self._opened_at is None:
            return "closed"
        return "half_open" if self._clock() >= self._opened_at + self._cooldown else "open"

    def enter(self) -> bool:
        """Ask to make a call. True if it is the one that tries a resting worker; pass that on to the call's end.

        Raises:
            CircuitOpenError: the worker rests, or another call is trying it at this moment.
        """
        if self._opened_at is None:
            return False
        left = self._opened_at + self._cooldown - self._clock()
        if left > 0 or self._probing:
            raise CircuitOpenError(
                f"rests after {self._failures} failures in a row",
                worker=self._worker,
                retry_after=round(max(left, 1.0), 3),
            )
        self._probing = True
        return True

    def success(self, probe: bool) -> None:
        """The worker answered, be it with a refusal of the request."""
        # A call from before the circuit opened says nothing of how the worker is now.
        if self._opened_at is None or probe:
            self._failures, self._opened_at = 0, None
        self._probing = self._probing and not probe

    def failure(self, probe: bool) -> None:
        """The worker failed: unreachable, too slow, or not speaking its wire format."""
        self._failures += 1
        if probe or (self._opened_at is None and self._failures >= self._threshold):
            self._opened_at = self._clock()
        self._probing = self._probing and not probe

    def neutral(self, probe: bool) -> None:
        """The call ended without saying anything about the worker: cancelled, or turned away by a rate limit."""
        self._probing = self._probing and not probe
