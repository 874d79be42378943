"""One request on the account of its key: reserved before, settled after, whatever became of it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from actors.config import FuguConfig
from actors.estimate import Estimate, estimate_tokens
from actors.messages import Usage
from serve.api.job import Job
from serve.api.session import TRINITY
from serve.api.ultra import ULTRA
from serve.keys import Key, KeyBook
from serve.prices import Prices
from serve.trace import Trace

log = logging.getLogger("fugu.gateway")


@dataclass(slots=True)
class Metered:
    """A reservation."""

    book: KeyBook
    key: Key
    number: int

    async def settle(self, trace: Trace) -> None:
        """Once, at the end, with every call that was made, whether the answer came or not (`serve.counted`)."""
        taken = trace.taken
        settling = asyncio.ensure_future(
            self.book.settle(self.key, self.number, taken.usage, taken.usd, estimated_usd=trace.estimated_usd)
        )
        try:
            await asyncio.shield(settling)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # The answer stands; the reservation falls out of the minute by itself, and counts as spent.
            log.error("usage of key %s was not written: %s", self.key.id, type(error).__name__)


class Holds:
    """What a request may cost, as told before it is made: the dearest of the workers it may use, for every call that it
    may take. An estimate, not a bound: its input is counted in bytes, and repairs and retries come on top."""

    def __init__(self, config: FuguConfig, prices: Prices) -> None:
        self._config = config
        self._prices = prices

    def usd(self, job: Job, estimate: Estimate) -> float:
        usage = Usage(estimate.input, estimate.output)
        usd = self._calls(job) * max(self._prices.usd(name, usage) or 0.0 for name in job.wishes.allowed)
        own = job.wishes.knobs.budget_usd
        return usd if own is None or not job.model.startswith(ULTRA) else min(usd, own)

    def _calls(self, job: Job) -> int:
        if job.model.startswith(TRINITY):
            return self._config.router.max_turns
        conductor, knobs = self._config.conductor, job.wishes.knobs
        if not job.model.startswith(ULTRA) or conductor is None:
            return 1
        rounds, steps = knobs.max_rounds or conductor.max_rounds, knobs.max_steps or conductor.max_steps
        most = knobs.max_calls or conductor.max_calls
        calls = rounds * (1 + steps)
        return calls if most is None else min(calls, most)


async def admit(book: KeyBook | None, job: Job, holds: Holds) -> Metered | None:
    """Reserve a request on its key; None where the key has no account.

    Raises:
        KeyLimitError, BudgetSpentError, RequestError: see `serve.keys.KeyBook.admit`.
    """
    key = job.caller.key
    if book is None or key is None:
        return None
    estimate = estimate_tokens(job.request, limit=key.tokens_per_minute)
    # The list of prices is read when it is first asked for.
    usd = 0.0 if key.monthly_usd is None else await asyncio.to_thread(holds.usd, job, estimate)
    return Metered(book, key, await book.admit(key, estimate.total, usd))
