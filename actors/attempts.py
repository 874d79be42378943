"""One call to a worker on its way: its attempts, and what each of them took.

What fails before the first byte is tried again while that can help; nothing is after it. However an attempt ends, its
grant is settled or given back and the breaker is told; for one that failed, what the provider may charge is estimated.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Literal, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from actors.adapters.base import CallContext
from actors.chat_span import server
from actors.errors import (
    FuguError,
    ProtocolError,
    RateLimitedError,
    RequestError,
    StreamBrokenError,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
)
from actors.estimate import estimate_tokens, silent_tokens, text_tokens
from actors.limiter import Grant
from actors.messages import ChatReply, ChatRequest, Chunk, Usage
from actors.spans import Span, current
from actors.spending import Taken, listener

if TYPE_CHECKING:
    from actors.worker import WorkerRuntime

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SENDING_ENDS = 0.05


class Call:
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


def _kind_and_place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
