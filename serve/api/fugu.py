"""`fugu`: one decision, one worker answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from actors.messages import ChatReply
from orchestrator import dispatch
from serve.api.job import Deciding, Done, Event, Job


class FuguEngine:
    """See `serve.api.job.Engine`."""

    def __init__(self, deciding: Deciding) -> None:
        self._deciding = deciding

    async def run(self, job: Job) -> AsyncGenerator[Event, None]:
        trace = job.trace
        trace.choice, order = await self._deciding.choose(job.request.messages, job.wishes, seed=job.wishes.seed)
        workers = [self._deciding.workers[name] for name in order]
        if not job.stream:
            reply = await dispatch.complete(workers, job.request, record=trace.record, clock=time.perf_counter)
            yield _done(job, reply)
            return
        chunks = dispatch.stream(workers, job.request, record=trace.record, clock=time.perf_counter)
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.final is None:
                    yield chunk
                    continue
                if chunk.text or chunk.reasoning or chunk.tool_calls:
                    yield replace(chunk, final=None)
                yield _done(job, chunk.final)


def _done(job: Job, reply: ChatReply) -> Done:
    told = job.trace.body(reply, time.perf_counter()) if job.wishes.trace else None
    return Done(reply, reply.usage, reply.usage, reply.cost_usd, told)
