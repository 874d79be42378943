"""One request on the account of its key: reserved before, settled after, whatever became of it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from actors.estimate import Estimate, estimate_tokens
from actors.messages import ChatRequest, Usage
from serve.auth import Caller
from serve.keys import Key, KeyBook
from serve.trace import Trace

log = logging.getLogger("fugu.gateway")


@dataclass(slots=True)
class Metered:
    """A reservation."""

    book: KeyBook
    key: Key
    number: int
    estimate: Estimate

    async def settle(self, trace: Trace) -> None:
        """Once, at the end. A request that ended early is charged with the calls that were completed for it, and one
        that broke off while it was streamed with what it read, its cost unknown."""
        usd: float | None
        if trace.ended is not None:
            usage, usd = trace.ended.usage, trace.ended.usd
        elif trace.spent:
            usage = sum((each.usage for each in trace.spent), Usage())
            costs = [each.usd for each in trace.spent]
            usd = None if None in costs else sum(cost for cost in costs if cost is not None)
        elif trace.record.worker is not None:
            usage, usd = Usage(input_tokens=self.estimate.input), None
        else:
            usage, usd = Usage(), 0.0
        settling = asyncio.ensure_future(self.book.settle(self.key, self.number, usage, usd))
        try:
            await asyncio.shield(settling)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # The answer stands; the reservation falls out of the minute by itself.
            log.error("usage of key %s was not written: %s", self.key.id, type(error).__name__)


async def admit(book: KeyBook | None, caller: Caller, request: ChatRequest) -> Metered | None:
    """Reserve a request on its key; None where the key has no account.

    Raises:
        KeyLimitError, BudgetSpentError, RequestError: see `serve.keys.KeyBook.admit`.
    """
    if book is None or caller.key is None:
        return None
    estimate = estimate_tokens(request, limit=caller.key.tokens_per_minute)
    return Metered(book, caller.key, await book.admit(caller.key, estimate.total), estimate)
