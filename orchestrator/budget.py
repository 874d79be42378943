"""What one request may spend, and what it has spent: seconds, USD, tokens and calls.

A `Budget` is the caller's limit; an `Account` is kept while the request runs and may be shared by several workflows of
one request (rounds, recursion). A call is admitted before it is made and settled after, so that calls running at the
same time cannot spend the same money. Estimates lean upward (`actors.estimate`): the limit holds, not quite the last
of it is used. Only the USD limit can be passed, by the calls in flight, where no prices are known beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from actors.errors import BudgetError, CircuitOpenError, ContextLengthError, DeadlineError, FuguError, LimitReachedError
from actors.estimate import estimate_tokens
from actors.messages import ChatReply, ChatRequest, Usage
from actors.spending import Note

Clock = Callable[[], float]
# USD for a call to a worker with so many input and output tokens; None where its price is unknown.
Price = Callable[[str, int, int], float | None]
Resource = Literal["seconds", "usd", "tokens", "calls"]

MAX_ATTEMPTS = 3  # upstream calls that one admitted call may make at most, where calls are limited
MIN_OUTPUT_TOKENS = 16  # with less than that for its answer a worker is not asked at all

_NOTHING_SENT = (LimitReachedError, CircuitOpenError, ContextLengthError)


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits; None is no limit. Tokens are input and output of every call together."""

    seconds: float | None = None
    usd: float | None = None
    tokens: int | None = None
    calls: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "usd", "tokens", "calls"):
            limit = getattr(self, name)
            # Written so that NaN is refused too.
            if limit is not None and not limit > 0:
                raise BudgetError(f"the budget's {name} must be above 0", param=f"budget.{name}")


@dataclass(frozen=True, slots=True)
class Grant:
    """An admitted call: the request narrowed to what is left, and what is set aside for it until it is settled."""

    worker: str
    request: ChatRequest
    usd: float = 0.0
    tokens: int = 0
    calls: int = 1


class Account:
    """The running count of one request. Not for several threads."""

    def __init__(self, budget: Budget, *, clock: Clock = time.monotonic, price: Price | None = None) -> None:
        self.budget = budget
        self._clock = clock
        self._price = price
        self._began = clock()
        self.usd = 0.0
        self.tokens = 0
        self.calls = 0
        self._held_usd, self._held_tokens, self._held_calls = 0.0, 0, 0

    @property
    def seconds_left(self) -> float | None:
        """Never negative; None without a limit."""
        if self.budget.seconds is None:
            return None
        return max(0.0, self._began + self.budget.seconds - self._clock())

    def admit(self, worker: str, request: ChatRequest, *, shares: int = 1) -> Grant:
        """Set aside what a call needs. `shares` is how many calls are still to come, this one included: each gets its
        part of what is left, and as the last of them makes the answer, one upstream call is kept for it.

        Raises:
            DeadlineError: the time is over.
            BudgetError: too little is left for this call.
        """
        if self.seconds_left == 0.0:
            raise DeadlineError(f"the request's budget of {self.budget.seconds:g} s is used up")
        calls, request = self._admit_calls(request, shares)
        tokens, request = self._admit_tokens(request, shares)
        usd = self._admit_usd(worker, request)
        self._hold(usd, tokens, calls)
        return Grant(worker, request, usd, tokens, calls)

    def settle(self, grant: Grant, reply: ChatReply | None, error: BaseException | None = None) -> None:
        """Put what the call really took in the place of what was set aside. Of a failed call counts what its error
        knows, beside what was told of (`told_by`), and its upstream calls in full, unless the error says that nothing
        was sent. What a cancelled call took is not known: all of it is counted in full."""
        self._hold(-grant.usd, -grant.tokens, -grant.calls)
        if reply is not None:
            self.calls += reply.attempts
            self.tokens += reply.usage.total_tokens
            self.usd += reply.cost_usd or 0.0
        elif not isinstance(error, _NOTHING_SENT):
            self.calls += grant.calls
            if not isinstance(error, FuguError):  # cancelled: it may have been answered all the same
                self.tokens += grant.tokens
                self.usd += grant.usd
            elif error.usage is not None:
                self._took(grant.worker, error.usage)

    def told_by(self, worker: str) -> Note:
        """Who counts what a call to this worker takes beside its answer: attempts that came to nothing
        (`actors.spending.told_to`)."""
        return lambda taken: None if taken.within else self._took(worker, taken.usage)

    def _took(self, worker: str, usage: Usage) -> None:
        self.tokens += usage.total_tokens
        self.usd += self.price(worker, usage) or 0.0

    def price(self, worker: str, usage: Usage) -> float | None:
        """USD for what a call took; None where the worker's price is unknown."""
        return None if self._price is None else self._price(worker, usage.input_tokens, usage.output_tokens)

    def _admit_calls(self, request: ChatRequest, shares: int) -> tuple[int, ChatRequest]:
        if self.budget.calls is None:
            return 1, request
        left = self.budget.calls - self.calls - self._held_calls
        if left < min(shares, 2):
            raise _used_up("calls", f"{self.budget.calls} calls")
        attempts = min(max(1, left // shares), request.max_attempts or MAX_ATTEMPTS)
        return attempts, request.with_(max_attempts=attempts)

    def _admit_tokens(self, request: ChatRequest, shares: int) -> tuple[int, ChatRequest]:
        if self.budget.tokens is None:
            return 0, request
        left = self.budget.tokens - self.tokens - self._held_tokens
        read = estimate_tokens(request).input
        room = left // shares - read
        if room < MIN_OUTPUT_TOKENS:
            raise _used_up("tokens", f"{self.budget.tokens} tokens")
        room = room if request.max_tokens is None else min(room, request.max_tokens)
        return read + room, request.with_(max_tokens=room)

    def _admit_usd(self, worker: str, request: ChatRequest) -> float:
        if self.budget.usd is None:
            return 0.0
        left = self.budget.usd - self.usd - self._held_usd
        estimate = estimate_tokens(request)
        price = self._price(worker, estimate.input, estimate.output) if self._price is not None else None
        if left <= 0 or (price is not None and price > left):
            raise _used_up("usd", f"{self.budget.usd:g} USD")
        return price or 0.0

    def _hold(self, usd: float, tokens: int, calls: int) -> None:
        self._held_usd += usd
        self._held_tokens += tokens
        self._held_calls += calls


def _used_up(what: Resource, limit: str) -> BudgetError:
    return BudgetError(f"the request's budget of {limit} leaves too little for another call", param=f"budget.{what}")
