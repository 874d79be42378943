"""One worker inside a provider actor, without Ray: cache, circuit breaker, limits, retries, adapter, settlement.

A call passes, in this order: the response cache (if the worker has one), then for every attempt the breaker and the
limiter, then the adapter. What fails before the first byte is tried again while that can help; nothing is after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from actors.adapters.base import Adapter, CallContext
from actors.breaker import CircuitBreaker
from actors.cache import ResponseCache
from actors.chat_span import server
from actors.config import WorkerSpec
from actors.errors import (
    FuguError,
    ProtocolError,
    RateLimitedError,
    RequestError,
    ShapeError,
    StreamBrokenError,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from actors.estimate import estimate_tokens, silent_tokens, text_tokens
from actors.journal import Journal
from actors.limiter import SLACK, WINDOW, Grant, Limiter, Share, split
from actors.marks import worker_tag
from actors.messages import ChatReply, ChatRequest, Chunk, Message, Thought, Timing, ToolCallDelta, Usage
from actors.prices import pricing
from actors.spans import Span, current
from actors.spending import Taken, listener, tell
from actors.status import Counters, WorkerStatus
from actors.structured import joined, native, repaired, shape_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SENDING_ENDS = 0.05


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
        call = _Call(self, request)
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
            call = _Call(self, request)
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

    def _finish(self, call: _Call, reply: ChatReply) -> ChatReply:
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


class _Call:
    """One request on its way: its attempts and what it holds. `first_byte`, `queued` are seconds."""

    __slots__ = (
        "_estimate", "_grant", "_headers_at", "_iterator", "_lost", "_note", "_probe", "_rt", "_sent_at", "_span",
        "_spec", "_until", "_written", "attempts", "begin", "first_byte", "queued", "request",
    )  # fmt: skip

    def __init__(self, runtime: WorkerRuntime, request: ChatRequest) -> None:
        self._rt = runtime
        self._spec = runtime.spec
        self.request = request
        self.begin = runtime.clock()
        self._until = asyncio.get_running_loop().time() + runtime.spec.timeout.total
        self._estimate = estimate_tokens(request, limit=runtime.limiter.token_limit)
        self._grant: Grant | None = None
        self._probe = False
        self._note = listener()
        self._lost: Usage | None = None
        self._span: Span | None = None
        self._iterator: AsyncIterator[Chunk] | None = None
        self._written = 0
        self._sent_at = 0.0
        self._headers_at = 0.0
        self.attempts = 0
        self.queued = 0.0
        self.first_byte = 0.0

    # Around the attempts

    async def bounded(self, call: Awaitable[Result]) -> Result:
        """Await within `timeout.total` of the call's beginning."""
        try:
            async with asyncio.timeout_at(self._until):
                return await call
        except TimeoutError:
            raise self._told(self._too_long()) from None
        except FuguError as error:
            self._told(error)
            raise

    def _told(self, error: FuguError) -> FuguError:
        error.may_cost = self._lost is not None
        if self.attempts or self.queued:  # and did not find the circuit open
            error.queued_s = self.queued
        return error

    async def retrying(self, attempt: Callable[[], Awaitable[Result]]) -> Result:
        """Make attempts until one succeeds or another cannot help: the error is not of a kind that passes, the
        attempts are used up, the worker's circuit has opened, or the wait would be longer than a caller who has other
        workers wants to wait. The waits grow exponentially with full jitter and are never below `retry-after`."""
        try:
            return await attempt()
        except FuguError as error:
            # Nearly every call ends above; tenacity is brought in once the first attempt has failed.
            first: FuguError | None = error

        async def again() -> Result:
            nonlocal first
            if first is not None:
                error, first = first, None
                raise error
            self._rt.counters.retries += 1
            if self._lost is not None and self._note is not None:
                self._note(Taken(self._lost, estimated=True))
            self._lost = None
            return await attempt()

        retrying = AsyncRetrying(
            retry=retry_if_exception(self._may_pass), wait=self._wait, stop=self._no_more, reraise=True
        )
        return await retrying(again)

    def _may_pass(self, error: BaseException) -> bool:
        if not isinstance(error, FuguError) or not error.retryable or self._rt.breaker.state == "open":
            return False
        return (error.retry_after or 0.0) <= self._spec.retry.max_wait

    def _wait(self, state: RetryCallState) -> float:
        retry = self._spec.retry
        longest = min(retry.max_wait, retry.min_wait * 2.0**state.attempt_number)
        jittered = self._rt.rng.uniform(retry.min_wait, max(retry.min_wait, longest))
        error = state.outcome.exception() if state.outcome is not None else None
        return max(jittered, getattr(error, "retry_after", None) or 0.0)

    def _no_more(self, state: RetryCallState) -> bool:
        attempts = self._spec.retry.attempts
        if state.attempt_number >= min(attempts, self.request.max_attempts or attempts):
            return True
        return asyncio.get_running_loop().time() + state.upcoming_sleep >= self._until

    # One attempt

    async def complete(self) -> ChatReply:
        await self._enter()
        try:
            reply = await self._rt.adapter.complete(self.request, self._context())
        except BaseException as error:
            raise self._failed(error) from None
        self._succeeded(reply)
        return reply

    async def open(self) -> Chunk:
        """Start a stream and wait for its first chunk."""
        await self._enter()
        self._iterator = self._rt.adapter.stream(self.request, self._context())
        try:
            chunk = await anext(self._iterator)
        except BaseException as error:
            await self._close_iterator()
            if isinstance(error, StopAsyncIteration):
                error = ProtocolError("the stream ended before it began", worker=self._spec.name)
            raise self._failed(error) from None
        self._received(chunk)
        return chunk

    async def next_chunk(self) -> Chunk:
        """The next chunk of an open stream. Raises StreamBrokenError."""
        assert self._iterator is not None
        try:
            async with asyncio.timeout_at(self._until):
                chunk = await anext(self._iterator)
        except (StopAsyncIteration, TimeoutError, FuguError, asyncio.CancelledError) as error:
            if isinstance(error, StopAsyncIteration):
                error = StreamBrokenError("the stream ended before it was complete", worker=self._spec.name)
            elif isinstance(error, TimeoutError):
                error = StreamBrokenError(self._too_long().message, worker=self._spec.name)
            elif isinstance(error, FuguError) and not isinstance(error, StreamBrokenError):
                error = StreamBrokenError(error.message, worker=self._spec.name)
            if isinstance(error, FuguError):
                error.queued_s = self.queued
            raise self._failed(error) from None
        self._received(chunk)
        return chunk

    async def leave(self) -> None:
        """The caller is done with the stream, complete or not."""
        if self._iterator is not None and self._grant is not None and self._grant.open:
            self._failed(asyncio.CancelledError())
        await self._close_iterator()

    async def _close_iterator(self) -> None:
        iterator, self._iterator = self._iterator, None
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()

    async def _enter(self) -> None:
        runtime = self._rt
        self._probe = runtime.breaker.enter()
        queued_at = runtime.clock()
        self._sent_at = self._headers_at = 0.0
        self._written = 0
        self._lost = None
        try:
            self._grant = await runtime.limiter.reserve(self._estimate.total)
        except BaseException:
            runtime.breaker.neutral(self._probe)
            raise
        finally:
            self.queued += runtime.clock() - queued_at
        self.attempts += 1
        runtime.counters.upstream_calls += 1
        around = current()
        if around is not None:
            waited = {"fugu.attempt": self.attempts, "fugu.limiter.wait_s": round(runtime.clock() - queued_at, 6)}
            kind: Literal["client", "internal"] = "client" if self._spec.url else "internal"
            self._span = around.child("attempt", kind, {**waited, **server(self._spec)})

    def _context(self) -> CallContext:
        """What the adapter reports, bound to this attempt: one that has failed may still tell of itself."""
        grant = self._grant
        assert grant is not None

        def on_sent() -> None:
            if grant is self._grant and not self._sent_at:
                self._sent_at = self._rt.clock()
            grant.sent()

        def on_headers(headers: dict[str, str]) -> None:
            on_sent()
            if grant is self._grant:
                self._headers_at = self._rt.clock()
            self._rt.limiter.observe(headers)

        return CallContext(on_sent, on_headers, {} if self._span is None else self._span.headers())

    def _received(self, chunk: Chunk) -> None:
        if not self.first_byte:
            self.first_byte = self._rt.clock() - (self._sent_at or self.begin)
        if chunk.final is not None:
            self._succeeded(chunk.final)
        else:
            self._written += len(chunk.text) + len(chunk.reasoning) + len(chunk.refusal)

    def _succeeded(self, reply: ChatReply) -> None:
        assert self._grant is not None
        if not self.first_byte:
            self.first_byte = (self._headers_at or self._rt.clock()) - (self._sent_at or self.begin)
        self._grant.settle(self.usage(reply)[0].total_tokens)
        self._rt.breaker.success(self._probe)
        if self._span is not None:
            self._span.end()

    def usage(self, reply: ChatReply) -> tuple[Usage, bool]:
        """What an answer took, and whether that is an estimate: a provider that tells no usage is not taken to be
        free."""
        if reply.usage.total_tokens:
            return reply.usage, False
        calls = sum(text_tokens(call.name) + text_tokens(call.arguments) for call in reply.tool_calls)
        reasoning = text_tokens(reply.reasoning)
        written = text_tokens(reply.text) + text_tokens(reply.refusal) + reasoning + calls
        return Usage(self._estimate.input, written, reasoning_tokens=reasoning), True

    def _failed(self, error: BaseException) -> BaseException:
        """Give back what was not used, tell the breaker, and return what to raise."""
        runtime, grant = self._rt, self._grant
        assert grant is not None
        loop = asyncio.get_running_loop()
        overdue = loop.time() >= self._until
        if not isinstance(error, (FuguError, asyncio.CancelledError, GeneratorExit)):
            # A fault of ours. Its text may hold anything, so only its kind and place are told.
            logger.error("worker %s: %s", self._spec.name, _kind_and_place(error))
            error = WorkerError(f"internal error ({type(error).__name__})", worker=self._spec.name)
        if isinstance(error, WorkerTimeoutError) or overdue:
            used = grant.tokens  # the provider may go on writing
        else:
            used = self._estimate.input + self._written // 2
        self._lost = self._loss(error) if grant.left else None
        if grant.left:
            grant.settle(used)
        elif isinstance(error, asyncio.CancelledError):
            # The transport may be handing over the last bytes at this moment and say so in a little while.
            loop.call_later(_SENDING_ENDS, lambda: grant.settle(used) if grant.left else grant.refund())
        else:
            grant.refund()
        if isinstance(error, RateLimitedError):
            runtime.breaker.neutral(self._probe)
            if error.retry_after is not None:
                runtime.limiter.pause(error.retry_after)
        elif isinstance(error, (WorkerRejectedError, RequestError)):
            runtime.breaker.success(self._probe)
        elif isinstance(error, FuguError) or overdue:
            runtime.breaker.failure(self._probe)
        else:
            runtime.breaker.neutral(self._probe)
        if self._span is not None:
            self._span.fail(error)
            self._span.end()
        return error

    def _loss(self, error: BaseException) -> Usage | None:
        """What an attempt took that failed before its first piece; None where the provider said no. A call that ran
        out of time was cancelled."""
        timed_out = isinstance(error, WorkerTimeoutError) and error.phase != "connect"
        broke = isinstance(error, WorkerUnavailableError) and error.broke and self._headers_at
        if not (timed_out or broke or isinstance(error, asyncio.CancelledError)):
            return None
        written = silent_tokens(self._rt.clock() - self._sent_at)
        most = self.request.max_tokens
        return Usage(self._estimate.input, written if most is None else min(written, most))

    def _too_long(self) -> WorkerTimeoutError:
        total = self._spec.timeout.total
        return WorkerTimeoutError(f"took longer than {total:g} s in all", phase="total", worker=self._spec.name)


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


def _kind_and_place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
