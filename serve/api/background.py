"""Responses that are made while nobody waits for them (`background: true`), and found by their id."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from actors.errors import DeadlineError, FuguError
from actors.spans import span
from serve.api.conversations import Conversations
from serve.api.http import where_of
from serve.api.job import Done, Engine, Job
from serve.api.kept_events import Recorder
from serve.api.responses import ResponsesDialect, ResponsesExchange
from serve.metering import Metered
from serve.metrics import Meter
from serve.trace import Spent

log = logging.getLogger("fugu.gateway")

# How soon a cancelled response ends; how long one whose gateway died looks as if it were still being made.
_LOOK_SECONDS = 0.5


class Background:
    """The responses that this gateway is making. `limit` seconds is the longest that one may take."""

    def __init__(self, conversations: Conversations, limit: float, meter: Meter) -> None:
        self._conversations = conversations
        self._limit = limit
        self._meter = meter
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, job: Job, exchange: ResponsesExchange, engine: Engine, metered: Metered | None) -> bytes:
        """Begin; the body to answer with."""
        await self._conversations.beat(exchange.id, exchange.caller)
        body = await exchange.keep_as("in_progress")
        recorder = Recorder(self._conversations.events, exchange.id, exchange.caller)
        if exchange.stream:
            await recorder.add(exchange.opening())
        task = asyncio.create_task(self._make(job, exchange, engine, metered, recorder))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return body

    def events(self, exchange: ResponsesExchange) -> AsyncGenerator[bytes, None]:
        """The events of one that was begun with `stream`, as they come. Who stops reading stops nothing else."""
        return self._conversations.events.read(exchange.id, exchange.caller, self._conversations)

    async def _make(
        self,
        job: Job,
        exchange: ResponsesExchange,
        engine: Engine,
        metered: Metered | None,
        recorder: Recorder,
    ) -> None:
        making = asyncio.create_task(self._answer(job, exchange, engine, recorder))
        outcome = "cancelled"
        try:
            while not making.done():
                await asyncio.wait((making,), timeout=_LOOK_SECONDS)
                if not making.done() and await exchange.was_cancelled():
                    return
                await recorder.flush()
                await self._conversations.beat(exchange.id, exchange.caller)
        finally:
            making.cancel()
            with suppress(asyncio.CancelledError):
                outcome = await making
            self._meter.request(ResponsesDialect.path, job.model, outcome, job.trace, time.perf_counter())
            if metered is not None:
                await metered.settle(job.trace)

    async def _answer(self, job: Job, exchange: ResponsesExchange, engine: Engine, recorder: Recorder) -> str:
        """Make it; "ok" or the code of what failed."""
        with span("background") as background:
            failure = await self._answered(job, exchange, engine, recorder)
            if failure is not None and background is not None:
                background.fail(failure)
        return "ok" if failure is None else failure.code

    async def _answered(
        self, job: Job, exchange: ResponsesExchange, engine: Engine, recorder: Recorder
    ) -> FuguError | None:
        try:
            try:
                async with asyncio.timeout(self._limit), aclosing(engine.run(job)) as events:
                    async for event in events:
                        if isinstance(event, Done):
                            job.trace.ended = Spent(event.total, event.cost_usd)
                            if not await exchange.was_cancelled():
                                await exchange.keep(event)
                                if exchange.stream:
                                    await recorder.last(exchange.end(event))
                        elif exchange.stream:
                            await recorder.add(exchange.chunk(event))
            except TimeoutError:
                raise DeadlineError(f"no complete answer within {self._limit:g} s") from None
        except FuguError as error:
            failure = error
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.error("response %s failed: %s", exchange.id, where_of(error))
            failure = FuguError("internal error; the server's log has more")
        else:
            return None
        await exchange.keep_as("failed", failure)
        if exchange.stream:
            await recorder.last(exchange.broken(failure, None))
        return failure
