"""One worker inside a provider actor, without Ray: its parts, and the way of a call through them.

A call passes, in this order: the response cache (if the worker has one), then for every attempt (`actors.attempts`)
the breaker and the limiter, then the adapter. JSON that was asked for is checked (`actors.structured`), and repaired
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

from actors.adapters.base import Adapter
from actors.attempts import Call
from actors.breaker import CircuitBreaker
from actors.cache import ResponseCache
from actors.config import WorkerSpec
from actors.errors import FuguError, ShapeError, StreamBrokenError
from actors.journal import Journal
from actors.limiter import SLACK, WINDOW, Limiter, Share, split
from actors.marks import worker_tag
from actors.messages import ChatReply, ChatRequest, Chunk, Message, Thought, Timing, ToolCallDelta
from actors.prices import pricing
from actors.spending import Taken, tell
from actors.status import Counters, WorkerStatus
from actors.structured import joined, native, repaired, shape_of


class WorkerRuntime:
    """Calls one worker within its limits.

    Args:
        spec: the worker; its limits are this shard's only in part, see `shard`.
        adapter: the wire format or engine behind it.
        shard: the number of this shard, 0 <= shard < spec.shards.
        clock: seconds, never going back. rng: where the jitter of retries comes from.
        window, slack: of the limiter.
        journal: where grants are kept over restarts. reconstructed: whether this actor was restarted; then a
            journal that is not there means that the past is unknown, not that there was none.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        adapter: Adapter,
        *,
        shard: int = 0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        window: float = WINDOW,
        slack: float = SLACK,
        journal: Journal | None = None,
        reconstructed: bool = False,
    ) -> None:
        self.spec = spec
        self.counters = Counters()
        self.adapter = adapter
        self.clock = clock
        self.rng = rng or random.Random()
        limits, of = spec.limits, spec.shards
        self._share = Share(
            requests=split(limits.requests_per_minute, shard, of),
            tokens=split(limits.tokens_per_minute, shard, of),
            concurrency=split(limits.concurrency, shard, of) or 1,
            max_wait=limits.max_wait,
            of=of,
        )
        self._journal = journal
        self.limiter = Limiter(self._share, clock=clock, window=window, slack=slack, log=journal, worker=spec.name)
        if journal is not None:
            known = journal.exists or not reconstructed
            past = journal.recover()
            if known and past is not None:
                self.limiter.restore(past)
            else:
                self.limiter.assume_full()
            journal.start(self.limiter.live)
        self.breaker = CircuitBreaker(spec.breaker.failures, spec.breaker.cooldown, clock=clock, worker=spec.name)
        self._cost = pricing(spec)
        self._cache: ResponseCache[ChatReply] | None = None
        if spec.cache is not None:
            self._cache = ResponseCache(spec.cache.entries, spec.cache.ttl, clock=clock)

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            name=self.spec.name,
            provider=self.spec.provider,
            model=self.spec.model,
            state=self.breaker.state,
            running=self.limiter.running,
            waiting=self.limiter.waiting,
            concurrency=self._share.concurrency,
            requests_used=self.limiter.requests_used,
            requests_limit=self._share.requests,
            tokens_used=self.limiter.tokens_used,
            tokens_limit=self._share.tokens,
            paused_for=self.limiter.paused_for,
            journal=self._journal is None or self._journal.working,
            counters=self.counters,
        )

    async def close(self) -> None:
        await self.adapter.close()
        if self._journal is not None:
            self._journal.close()

    # Whole replies

    async def complete(self, request: ChatRequest) -> ChatReply:
        """Answer a request. Raises `actors.errors.WorkerError`s; cancelling it ends the upstream call."""
        request = prepare(request, self.spec)
        with self._counting():
            if self._cache is None:
                return await self._call(request)
            begin = self.clock()
            reply, shared = await self._cache.get_or_make(request.fingerprint(), lambda: self._call(request))
            return self._from_cache(reply, begin) if shared else reply

    async def _call(self, request: ChatRequest) -> ChatReply:
        shape = await shape_of(request)
        if shape is None:
            return await self._one(request)
        if native(self.spec, request.response_format) == "none":
            request = shape.asked(request)
        reply, wrong = await shape.checked(await self._one(request))
        if wrong is None:
            return reply
        if request.max_attempts is None or request.max_attempts > reply.attempts:
            tell(Taken(reply.usage, reply.estimated, within=True))
            try:
                second, wrong = await shape.checked(await self._one(repaired(request, reply, wrong[1])))
            except FuguError as error:
                error.usage = reply.usage
                error.queued_s = (error.queued_s or 0.0) + reply.timing.queued_s
                raise
            reply = joined(reply, second)
        if wrong is not None:
            misshapen = ShapeError(f"its answer is not the JSON that was asked for: {wrong[0]}", worker=self.spec.name)
            misshapen.usage = reply.usage
            raise misshapen
        return reply

    async def _one(self, request: ChatRequest) -> ChatReply:
        call = Call(self, request)
        reply = await call.bounded(call.retrying(call.complete))
        return self._finish(call, reply)

    # Streams

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        """Answer a request piece by piece; the last chunk carries the reply as a whole. Closing the iterator ends the
        upstream call. JSON of a worker that is not held to it while it writes comes whole, checked, at the end.

        Raises `StreamBrokenError` for whatever fails after the first chunk, other `WorkerError`s before it.
        """
        shape = await shape_of(request)
        if shape is not None and native(self.spec, request.response_format) != "trusted":
            for chunk in as_chunks(await self.complete(request)):
                yield chunk
            return
        request = prepare(request, self.spec)
        with self._counting():
            key = request.fingerprint() if self._cache is not None else ""
            begin = self.clock()
            if self._cache is not None and (kept := self._cache.get(key)) is not None:
                for chunk in as_chunks(self._from_cache(kept, begin)):
                    yield chunk
                return
            call = Call(self, request)
            try:
                chunk = await call.bounded(call.retrying(call.open))
                while chunk.final is None:
                    if chunk.thoughts:
                        chunk = replace(chunk, thoughts=_by(chunk.thoughts, self.spec.name))
                    yield chunk
                    chunk = await call.next_chunk()
            finally:
                await call.leave()
            reply = self._finish(call, chunk.final)
            if shape is not None and (wrong := (await shape.checked(reply))[1]) is not None:
                broken = StreamBrokenError(
                    f"its answer is not the JSON that was asked for: {wrong[0]}", worker=self.spec.name
                )
                broken.usage = reply.usage
                raise broken
            if self._cache is not None:
                self._cache.put(key, reply)
        yield replace(chunk, final=reply)

    # Bookkeeping

    def _finish(self, call: Call, reply: ChatReply) -> ChatReply:
        usage, estimated = call.usage(reply)
        cost = self._cost(usage)
        self.counters.usage += usage
        self.counters.cost_usd += cost or 0.0
        return replace(
            reply,
            worker=self.spec.name,
            thoughts=_by(reply.thoughts, self.spec.name),
            usage=usage,
            estimated=estimated,
            cost_usd=cost,
            attempts=call.attempts,
            timing=Timing(call.queued, call.first_byte, self.clock() - call.begin),
        )

    def _from_cache(self, reply: ChatReply, begin: float) -> ChatReply:
        self.counters.cached += 1
        cost = None if reply.cost_usd is None else 0.0
        timing = Timing(total_s=self.clock() - begin)
        return replace(reply, cached=True, attempts=0, cost_usd=cost, timing=timing)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        self.counters.requests += 1
        try:
            yield
        except FuguError as error:
            self.counters.failures[error.code] += 1
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.counters.cancelled += 1
            raise
        self.counters.successes += 1


def prepare(request: ChatRequest, spec: WorkerSpec) -> ChatRequest:
    """The request with the worker's own system text, which follows the caller's, and its defaults filled in. Thoughts
    that another worker signed are left out: no provider takes those of another."""
    changes: dict[str, Any] = {}
    if any(message.thoughts for message in request.messages):
        tag = worker_tag(spec.name)
        request = request.with_(messages=tuple(_with_own_thoughts(message, tag) for message in request.messages))
    for name in ("temperature", "top_p", "max_tokens"):
        default = getattr(spec.defaults, name)
        if default is not None and getattr(request, name) is None:
            changes[name] = default
    if spec.system:
        own = 0
        while own < len(request.messages) and request.messages[own].role in ("system", "developer"):
            own += 1
        changes["messages"] = (*request.messages[:own], Message("system", spec.system), *request.messages[own:])
    return request.with_(**changes) if changes else request


def _with_own_thoughts(message: Message, tag: str) -> Message:
    own = tuple(thought for thought in message.thoughts if thought.origin == tag)
    return message if len(own) == len(message.thoughts) else replace(message, thoughts=own)


def _by(thoughts: tuple[Thought, ...], worker: str) -> tuple[Thought, ...]:
    return tuple(replace(thought, origin=worker_tag(worker)) for thought in thoughts)


def as_chunks(reply: ChatReply) -> Iterator[Chunk]:
    """A whole reply as a stream."""
    calls = tuple(ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(reply.tool_calls))
    if reply.text or reply.reasoning or calls or reply.thoughts or reply.refusal:
        yield Chunk(reply.text, reply.reasoning, calls, thoughts=reply.thoughts, refusal=reply.refusal)
    yield Chunk(final=reply)
