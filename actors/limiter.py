"""Request, token and concurrency limits over an exact sliding window.

A token bucket that holds R and refills R a minute lets almost 2R through in one minute (R saved up, R refilled).
Providers count windows, so this limiter keeps a log of what was admitted and admits only what fits.

Why the upstream never sees more than R requests (T tokens) in any window of W seconds
---------------------------------------------------------------------------------------
An admitted call occupies its amount from the grant until `sent + W + slack`, where `sent` is the moment the adapter
says that the request has left; a call that was granted and has not been reported sent occupies it without end. The
request reaches the upstream at some time a with grant <= a <= sent + slack (`slack` bounds the network's delay).
Take any upstream window [x, x + W) and the requests that arrive in it; let g be the latest of their grants, of call
L. At the time g every other call C of them was already granted, and a(C) >= x while g <= a(L) < x + W, so
g < a(C) + W <= sent(C) + slack + W: C still occupied its amount when L was granted. The sum of all of them was
therefore within the limit at g. A settled call occupies its true usage, so the same holds for tokens wherever the
estimate was not too low; where it was, the excess delays later calls.

The clock is injected and nothing here knows of Ray or HTTP. All times are seconds of that clock, except the wall
times the journal keeps.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from actors.errors import LimitReachedError, WorkerRejectedError
from actors.ratelimit_headers import read_rate_limits

WINDOW = 60.0
SLACK = 1.0
MAX_WAITING = 10_000
_LONGEST_PAUSE = 3600.0


@dataclass(frozen=True, slots=True)
class Share:
    """One shard's exact part of a worker's limits. `None` is no limit. `of` is how many shards there are: what the
    provider reports is for all of them together."""

    requests: int | None = None
    tokens: int | None = None
    concurrency: int = 32
    max_wait: float = 60.0
    of: int = 1


def split(limit: int | None, shard: int, shards: int) -> int | None:
    """The part of `limit` that shard number `shard` (from 0) has; the parts add up to the limit exactly."""
    return None if limit is None else limit // shards + (shard < limit % shards)


class Log(Protocol):
    """What survives a restart (`actors.journal.Journal`). Amounts are what a call occupies from now on."""

    def granted(self, key: int, tokens: int) -> None: ...

    def sent(self, key: int) -> None: ...

    def settled(self, key: int, requests: int, tokens: int) -> None: ...


class Grant:
    """The right to make one upstream call. Report `sent()`, then end it with `settle` or `refund`, once."""

    __slots__ = ("_limiter", "counted", "key", "left", "open", "requests", "stamp", "tokens")

    def __init__(self, limiter: Limiter, key: int, requests: int, tokens: int) -> None:
        self._limiter = limiter
        self.key = key
        self.requests = requests
        self.tokens = tokens
        self.stamp = 0.0  # set with `left`
        self.left = False
        self.open = True
        self.counted = True

    def sent(self) -> None:
        """The request has left for the upstream: its window begins. Reporting it again changes nothing."""
        if self.open and not self.left:
            self._limiter._sent(self)

    def settle(self, tokens: int) -> None:
        """The call is over and used `tokens`. A call never reported as sent counts as sent now."""
        if self.open:
            self._limiter._settle(self, 1, max(0, tokens))

    def refund(self) -> None:
        """The request never reached the upstream: everything is given back."""
        if self.open:
            self._limiter._settle(self, 0, 0)


@dataclass(slots=True)
class _Waiter:
    tokens: int
    deadline: float
    future: asyncio.Future[Grant]
    alarm: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Cap:
    """What the provider said is left of its own budget, until it resets."""

    left: int
    until: float


class Limiter:
    """Admits calls in the order they came, none overtaking (so a large one is not starved by small ones).

    Args:
        share: this shard's limits.
        clock: seconds, never going back. Timers run on the event loop.
        window, slack: seconds; see the module's proof.
        log: where grants are written so that a restart remembers them.
        worker: the name that errors carry.
    """

    def __init__(
        self,
        share: Share,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        window: float = WINDOW,
        slack: float = SLACK,
        log: Log | None = None,
        worker: str | None = None,
    ) -> None:
        self.share = share
        self.window = window
        self.slack = slack
        self._span = window + slack
        self._clock = clock
        self._wall = wall
        self._log = log
        self._worker = worker
        self._metered = share.requests is not None or share.tokens is not None
        # Sent calls in the order of their stamps, so that expiry takes from the left only.
        self._past: deque[Grant] = deque()
        self._unsent: dict[int, Grant] = {}
        self._requests = 0
        self._tokens = 0
        self._running = 0
        self._next_key = 1
        self._waiting: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._paused_until = 0.0
        self._request_cap: _Cap | None = None
        self._token_cap: _Cap | None = None
        self._request_limit = share.requests
        self._token_limit = share.tokens

    # What it holds

    @property
    def running(self) -> int:
        """Calls granted and not over."""
        return self._running

    @property
    def waiting(self) -> int:
        return sum(1 for waiter in self._waiting if not waiter.future.done())

    @property
    def requests_used(self) -> int:
        """Requests occupied now: in flight or sent within the window."""
        self._expire(self._clock())
        return self._requests

    @property
    def tokens_used(self) -> int:
        self._expire(self._clock())
        return self._tokens

    @property
    def token_limit(self) -> int | None:
        """The token limit in force: the configured one, or less where the provider says so."""
        return self._token_limit

    @property
    def paused_for(self) -> float:
        """Seconds until the pause that the provider asked for is over."""
        return max(0.0, self._paused_until - self._clock())

    def live(self) -> Iterator[tuple[int, float | None, int, int]]:
        """Everything occupied now, as (key, age in seconds or None while unsent, requests, tokens)."""
        now = self._clock()
        self._expire(now)
        for grant in self._past:
            if grant.requests or grant.tokens:
                yield grant.key, now - grant.stamp, grant.requests, grant.tokens
        for grant in self._unsent.values():
            yield grant.key, None, grant.requests, grant.tokens

    # Before the first call

    def restore(self, entries: list[tuple[float, int, int]]) -> None:
        """Take over what an earlier life of this limiter had admitted: (age in seconds, requests, tokens) each."""
        now = self._clock()
        for age, requests, tokens in sorted(entries, reverse=True):
            self._occupy(now - max(0.0, age), requests, tokens)

    def assume_full(self) -> None:
        """Count the window as used up as of now: for a restart that does not know what was admitted before."""
        self._occupy(self._clock(), self.share.requests or 0, self.share.tokens or 0)

    def _occupy(self, stamp: float, requests: int, tokens: int) -> None:
        grant = Grant(self, self._take_key(), requests, tokens)
        grant.stamp, grant.left, grant.open = stamp, True, False
        self._past.append(grant)
        self._requests += requests
        self._tokens += tokens

    # A call's life

    async def reserve(self, tokens: int, *, max_wait: float | None = None) -> Grant:
        """Wait for the right to make a call that is estimated at `tokens`.

        Raises:
            WorkerRejectedError: the estimate alone is above the whole limit, so it would wait for ever.
            LimitReachedError: not admitted within `max_wait` (the share's, unless given), or certain not to be;
                `retry_after` says when to try again.
        """
        limit = self._token_limit
        if limit is not None and tokens > limit:
            raise self._too_large(tokens)
        now = self._clock()
        if not self._waiting and self._fits(tokens, now):
            return self._grant(tokens)
        deadline = now + (self.share.max_wait if max_wait is None else max_wait)
        self._refuse_the_hopeless(now, deadline)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(tokens, deadline, loop.create_future())
        waiter.alarm = loop.call_later(deadline - now, self._give_up, waiter)
        self._waiting.append(waiter)
        self._pump()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            future = waiter.future
            if future.cancelled() or not future.done():
                future.cancel()
                self._pump()
            elif future.exception() is None:
                future.result().refund()
            raise
        finally:
            waiter.alarm.cancel()

    def _refuse_the_hopeless(self, now: float, deadline: float) -> None:
        if len(self._waiting) >= MAX_WAITING:
            raise self._limit_reached("too many calls are waiting for their turn", 1.0)
        if self._paused_until > deadline:
            raise self._limit_reached("the provider asked for a pause", self._paused_until - now)
        # Each waiter ahead takes one request that comes free; refunds are rare and only make it sooner.
        limit = self._request_limit
        if limit is None:
            return
        needed = self._requests - limit + len(self._waiting) + 1
        if 0 < needed <= len(self._past):
            free_at = self._past[needed - 1].stamp + self._span
            if free_at > deadline:
                raise self._limit_reached(f"all {limit} requests per {self.window:g} s are used up", free_at - now)

    def _give_up(self, waiter: _Waiter) -> None:
        """The waiter's time is over."""
        if waiter.future.done():
            return
        now = self._clock()
        soonest = self._next_change(now)
        again = 1.0 if soonest is None else max(0.1, soonest - now)
        waiter.future.set_exception(self._limit_reached("waited for its turn as long as max_wait allows", again))
        self._pump()

    def _too_large(self, tokens: int) -> WorkerRejectedError:
        return WorkerRejectedError(
            f"the request needs about {tokens} tokens, more than the {self._token_limit} that may be used per "
            f"{self.window:g} s here; shorten it or lower max_tokens",
            worker=self._worker,
        )

    def _limit_reached(self, why: str, retry_after: float) -> LimitReachedError:
        return LimitReachedError(
            f"over the limit set for this worker: {why}", worker=self._worker, retry_after=round(retry_after, 3)
        )

    def _grant(self, tokens: int) -> Grant:
        key = self._next_key
        self._next_key = key + 1
        grant = Grant(self, key, 1, tokens)
        self._running += 1
        if self._metered:
            self._requests += 1
            self._tokens += tokens
            self._unsent[key] = grant
            if self._request_cap is not None:
                self._request_cap.left -= 1
            if self._token_cap is not None:
                self._token_cap.left -= tokens
            if self._log is not None:
                self._log.granted(key, tokens)
        return grant

    def _sent(self, grant: Grant) -> None:
        grant.stamp = self._clock()
        grant.left = True
        if self._metered:
            del self._unsent[grant.key]
            self._past.append(grant)
            if self._log is not None:
                self._log.sent(grant.key)
            if self._waiting and self._timer is None:
                self._arm()

    def _settle(self, grant: Grant, requests: int, tokens: int) -> None:
        if requests and not grant.left:
            self._sent(grant)
        grant.open = False
        self._running -= 1
        if self._request_cap is not None:
            self._request_cap.left += grant.requests - requests
        if self._token_cap is not None:
            self._token_cap.left += grant.tokens - tokens
        if self._metered and grant.counted:
            self._requests += requests - grant.requests
            self._tokens += tokens - grant.tokens
            grant.requests, grant.tokens = requests, tokens
            self._unsent.pop(grant.key, None)
            if self._log is not None:
                self._log.settled(grant.key, requests, tokens)
        if self._waiting:
            self._pump()

    # What the provider says

    def pause(self, seconds: float) -> None:
        """Admit nothing for this long (a `retry-after`). A shorter pause never ends a longer one early, and a caller
        that cannot wait so long is refused at once, so that another worker may answer."""
        now = self._clock()
        self._paused_until = max(self._paused_until, now + min(max(0.0, seconds), _LONGEST_PAUSE))
        for waiter in self._waiting:
            if waiter.deadline < self._paused_until and not waiter.future.done():
                error = self._limit_reached("the provider asked for a pause", self._paused_until - now)
                waiter.future.set_exception(error)
        if self._waiting:
            self._pump()

    def observe(self, headers: Mapping[str, str]) -> None:
        """Learn from the rate-limit headers of a response (names in lower case). They only ever tighten what the
        configuration allows."""
        reported = read_rate_limits(headers, self._wall())
        if reported is None:
            return
        now = self._clock()
        if reported.request_limit is not None:
            self._request_limit = self._tighter(self.share.requests, reported.request_limit)
        if reported.token_limit is not None:
            self._token_limit = self._tighter(self.share.tokens, reported.token_limit)
        # Granted calls that have not left yet cannot be in the provider's count: they come off what it says is left.
        unsent = self._unsent.values()
        if reported.requests_left is not None:
            self._request_cap = self._cap(reported.requests_left, len(unsent), reported.requests_reset, now)
        if reported.tokens_left is not None:
            pending = sum(grant.tokens for grant in unsent)
            self._token_cap = self._cap(reported.tokens_left, pending, reported.tokens_reset, now)
        if self._waiting:
            self._pump()

    def _tighter(self, configured: int | None, reported: int | None) -> int | None:
        if reported is None or configured is None:
            return configured
        return min(configured, max(1, reported // self.share.of))

    def _cap(self, left: int, pending: int, reset: float | None, now: float) -> _Cap:
        """What may still be granted until the provider's budget resets. It holds for one window at most: a budget
        that is empty for longer shows itself as a 429 with its own `retry-after`."""
        lasts = self.window if reset is None else min(reset, self.window)
        return _Cap(left // self.share.of - pending, now + lasts)

    # Admitting

    def _take_key(self) -> int:
        self._next_key += 1
        return self._next_key - 1

    def _expire(self, now: float) -> None:
        past, edge = self._past, now - self._span
        while past and past[0].stamp <= edge:
            grant = past.popleft()
            grant.counted = False
            self._requests -= grant.requests
            self._tokens -= grant.tokens

    def _fits(self, tokens: int, now: float) -> bool:
        if self._running >= self.share.concurrency or now < self._paused_until:
            return False
        self._expire(now)
        if self._request_limit is not None and self._requests >= self._request_limit:
            return False
        if self._token_limit is not None and self._tokens + tokens > self._token_limit:
            return False
        return self._within_caps(tokens, now)

    def _within_caps(self, tokens: int, now: float) -> bool:
        if self._request_cap is not None and now >= self._request_cap.until:
            self._request_cap = None
        if self._token_cap is not None and now >= self._token_cap.until:
            self._token_cap = None
        return (self._request_cap is None or self._request_cap.left >= 1) and (
            self._token_cap is None or self._token_cap.left >= tokens
        )

    def _pump(self) -> None:
        """Admit waiters in their order until one does not fit, then set the alarm for when it may."""
        now = self._clock()
        while self._waiting:
            head = self._waiting[0]
            if head.future.done():
                self._waiting.popleft()
            elif self._token_limit is not None and head.tokens > self._token_limit:
                head.future.set_exception(self._too_large(head.tokens))
            elif self._fits(head.tokens, now):
                head.future.set_result(self._grant(head.tokens))
            else:
                break
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        now = self._clock()
        soonest = self._next_change(now)
        if soonest is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.001, soonest - now), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._pump()

    def _next_change(self, now: float) -> float | None:
        """When more may be admitted without any call ending first; None if only the end of a call can help."""
        if now < self._paused_until:
            return self._paused_until
        times = [cap.until for cap in (self._request_cap, self._token_cap) if cap is not None]
        if self._past:
            times.append(self._past[0].stamp + self._span)
        return min(times, default=None)
