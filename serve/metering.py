"""One request on the account of its key: reserved before, settled after, whatever became of it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from actors.config import ConductorConfig, FuguConfig
from actors.estimate import Estimate, estimate_tokens
from actors.messages import Usage
from actors.structured import native
from serve.api.job import Job
from serve.api.session import TRINITY
from serve.api.ultra import ULTRA
from serve.conductor import budget_of, most_calls, rounds_of
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
    """What a request may take, as told before it is made: of tokens, and of money at the dearest of the workers it may
    use, and of the one that writes the plans of `fugu-ultra`, for every call that it may take, and for every repair
    where JSON is asked for and the worker's API does not see to it; no more than the request's own budgets. An
    estimate, not a bound: its input is counted in bytes, and calls that fail come on top."""

    def __init__(self, config: FuguConfig, prices: Prices) -> None:
        self._config = config
        self._prices = prices
        self._specs = {spec.name: spec for spec in config.active}

    def usd(self, job: Job, estimate: Estimate) -> float:
        calls, repairs = self._calls(job), self._repairs(job)
        once, again = _once(estimate), _again(estimate)
        trusted = self._trusted(job) if repairs else frozenset()

        def usd(name: str) -> float:
            repair = 0.0 if name in trusted else repairs * (self._prices.usd(name, again) or 0.0)
            return calls * (self._prices.usd(name, once) or 0.0) + repair

        names = job.wishes.allowed
        conductor = self._conductor(job)
        if conductor is None:
            return max(map(usd, names))
        writer, own = conductor.worker, budget_of(conductor, job.wishes.knobs).usd
        most = max(map(usd, names if writer is None else (*names, writer)))
        return most if own is None else min(most, own)

    def tokens(self, job: Job, estimate: Estimate) -> int:
        repairs = self._repairs(job)
        if repairs and self._trusted(job).issuperset(job.wishes.allowed):
            repairs = 0
        most = self._calls(job) * estimate.total + repairs * _again(estimate).total_tokens
        conductor = self._conductor(job)
        own = None if conductor is None else budget_of(conductor, job.wishes.knobs).tokens
        return most if own is None else min(most, own)

    def _conductor(self, job: Job) -> ConductorConfig | None:
        return self._config.conductor if job.model.startswith(ULTRA) else None

    def _trusted(self, job: Job) -> frozenset[str]:
        """The workers whose API sees to what this request wants: no vendor's takes every schema."""
        wanted = job.request.response_format
        return frozenset(name for name, spec in self._specs.items() if native(spec, wanted) == "trusted")

    def _repairs(self, job: Job) -> int:
        """Of the calls, those whose answer has a form. In a session any turn may answer; of a workflow the last step
        does."""
        wanted = job.request.response_format
        if wanted is None or wanted.kind == "text":
            return 0
        conductor = self._conductor(job)
        return self._calls(job) if conductor is None else rounds_of(conductor, job.wishes.knobs)

    def _calls(self, job: Job) -> int:
        if job.model.startswith(TRINITY):
            return self._config.router.max_turns
        conductor, knobs = self._conductor(job), job.wishes.knobs
        if conductor is None:
            return 1
        calls, most = most_calls(conductor, knobs), budget_of(conductor, knobs).calls
        return calls if most is None else min(calls, most)


def _once(estimate: Estimate) -> Usage:
    return Usage(estimate.input, estimate.output)


def _again(estimate: Estimate) -> Usage:
    """Of a repair: the answer, and what is wrong with it, are read again."""
    return Usage(estimate.input + estimate.output, estimate.output)


async def admit(book: KeyBook | None, job: Job, holds: Holds) -> Metered | None:
    """Reserve a request on its key; None where the key has no account. A request that may take more than the key's
    tokens of a minute in all needs room for its first call, and reserves what is left.

    Raises:
        KeyLimitError, BudgetSpentError, RequestError: see `serve.keys.KeyBook.admit`.
    """
    key = job.caller.key
    if book is None or key is None:
        return None
    limit = key.tokens_per_minute
    estimate = estimate_tokens(job.request, limit=limit)
    most = holds.tokens(job, estimate)
    least = most if limit is None or most <= limit else min(most, estimate.total)
    # The list of prices is read when it is first asked for.
    usd = 0.0 if key.monthly_usd is None else await asyncio.to_thread(holds.usd, job, estimate)
    return Metered(book, key, await book.admit(key, least, usd, most=most))
