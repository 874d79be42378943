"""One request on the account of its key: reserved before, settled after, whatever became of it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from actors.config import FuguConfig
from actors.estimate import Estimate, estimate_tokens
from actors.messages import Usage
from actors.structured import native
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
    """What a request may cost, as told before it is made: the dearest of the workers it may use, and of the one that
    writes the plans of `fugu-ultra`, for every call that it may take, and for every repair where JSON is asked for and
    the worker's API does not see to it. An estimate, not a bound: its input is counted in bytes, and retries come on
    top."""

    def __init__(self, config: FuguConfig, prices: Prices) -> None:
        self._config = config
        self._prices = prices
        self._trusted = frozenset(spec.name for spec in config.active if native(spec) == "trusted")

    def usd(self, job: Job, estimate: Estimate) -> float:
        calls, repairs = self._calls(job), self._repairs(job)
        once = Usage(estimate.input, estimate.output)
        # The answer, and what is wrong with it, are read again.
        again = Usage(estimate.input + estimate.output, estimate.output)

        def usd(name: str) -> float:
            repair = 0.0 if name in self._trusted else repairs * (self._prices.usd(name, again) or 0.0)
            return calls * (self._prices.usd(name, once) or 0.0) + repair

        names, own = job.wishes.allowed, job.wishes.knobs.budget_usd
        if not job.model.startswith(ULTRA):
            return max(map(usd, names))
        writer = None if self._config.conductor is None else self._config.conductor.worker
        most = max(map(usd, names if writer is None else (*names, writer)))
        return most if own is None else min(most, own)

    def _repairs(self, job: Job) -> int:
        """Of the calls, those whose answer has a form. In a session any turn may answer; of a workflow the last step
        does."""
        wanted = job.request.response_format
        if wanted is None or wanted.kind == "text":
            return 0
        return self._calls(job) if not job.model.startswith(ULTRA) else self._rounds(job)

    def _rounds(self, job: Job) -> int:
        conductor = self._config.conductor
        return job.wishes.knobs.max_rounds or (1 if conductor is None else conductor.max_rounds)

    def _calls(self, job: Job) -> int:
        if job.model.startswith(TRINITY):
            return self._config.router.max_turns
        conductor, knobs = self._config.conductor, job.wishes.knobs
        if not job.model.startswith(ULTRA) or conductor is None:
            return 1
        steps, most = knobs.max_steps or conductor.max_steps, knobs.max_calls or conductor.max_calls
        calls = self._rounds(job) * (1 + steps)
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
