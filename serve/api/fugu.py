"""`fugu`: one decision, one worker answers; inside a tool loop the one that asked, without a decision."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from actors.messages import ChatReply, Worker
from orchestrator import dispatch
from orchestrator.dispatch import rank
from serve.api.job import Deciding, Done, Event, Job
from serve.sticky import Marks, marked_chunk, marked_reply


class FuguEngine:
    """See `serve.api.job.Engine`."""

    def __init__(self, deciding: Deciding) -> None:
        self._deciding = deciding
        self._marks = Marks(deciding.workers)

    async def run(self, job: Job) -> AsyncGenerator[Event, None]:
        trace, record = job.trace, job.trace.record
        request, asker = self._marks.restore(job.request)
        if request is not job.request:
            job = replace(job, request=request)
        workers = await self._decide(job, asker)
        if not job.stream:
            reply = await dispatch.complete(workers, request, record=record, clock=time.perf_counter)
            yield await self._done(job, reply)
            return
        chunks = dispatch.stream(workers, request, record=trace.record, clock=time.perf_counter)
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.final is None:
                    yield marked_chunk(chunk, record.worker or "")
                    continue
                if chunk.text or chunk.reasoning or chunk.tool_calls or chunk.thoughts or chunk.refusal:
                    yield marked_chunk(replace(chunk, final=None), record.worker or "")
                yield await self._done(job, chunk.final)

    async def _decide(self, job: Job, asker: str | None) -> list[Worker]:
        deciding, wishes = self._deciding, job.wishes
        if asker is not None and asker in wishes.allowed:
            job.trace.choice = deciding.staying(asker)
            order = rank(asker, {}, wishes.allowed, deciding.router.fallbacks)
        else:
            before = await deciding.answers.before(job.request, job.caller.id)
            job.trace.choice, order = await deciding.choose(job.request, wishes, seed=wishes.seed, before=before)
        job.trace.decisions.append(job.trace.choice)
        return [deciding.counted(deciding.workers[name], job.trace, "answer") for name in order]

    async def _done(self, job: Job, reply: ChatReply) -> Done:
        worker = job.trace.record.worker or reply.worker
        await self._deciding.answers.remember(job.request, reply, worker, job.caller.id)
        told = job.trace.body(reply, time.perf_counter()) if job.wishes.trace else None
        return Done.of(marked_reply(reply, worker), reply.usage, job.trace, told)
