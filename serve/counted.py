"""What every call of a request takes, noted in its trace, the calls that came to nothing too.

A worker tells of attempts before the one that ends the call, and of a first answer that it has to put right
(`actors.spending`). What a call took that was broken off is partly a guess. Read: what the provider had said by then,
else the estimate of `actors.estimate`. Written: what the provider had said or what was received, whichever is more, and
for the time that it was silent before its first piece as much as a model writes that thinks where nobody sees it. So a
caller who hangs up on an answer, or before it begins, has paid for it. Who listens outside (`told_to`) is told of what
neither the reply nor the error says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from actors.errors import FuguError, StreamBrokenError, WorkerTimeoutError
from actors.estimate import estimate_tokens, silent_tokens, size_tokens, text_size
from actors.messages import ChatReply, ChatRequest, Chunk, Usage, Worker
from actors.spending import Taken, listener, told_to
from serve.prices import Prices
from serve.trace import Call, Spent, Trace


class Counted:
    """A worker whose calls are noted in a trace. `role` is that of its calls (`serve.trace.Call`), None where they have
    none of their own; `clock` in seconds."""

    def __init__(
        self,
        worker: Worker,
        trace: Trace,
        prices: Prices,
        clock: Callable[[], float] = time.perf_counter,
        *,
        role: str | None = None,
    ) -> None:
        self.name = worker.name
        self._worker = worker
        self._trace = trace
        self._prices = prices
        self._clock = clock
        self._role = role

    async def complete(self, request: ChatRequest) -> ChatReply:
        received = _Received(self._clock)
        try:
            with told_to(received.told_of):
                reply = await self._worker.complete(request)
        except BaseException as error:
            self._lost(request, received, error)
            raise
        self._whole(received, reply)
        return reply

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        received, whole = _Received(self._clock), False
        try:
            async with aclosing(cast(AsyncGenerator[Chunk, None], self._worker.stream(request))) as chunks:
                with told_to(received.told_of):
                    chunk = await anext(chunks, None)
                while chunk is not None:
                    if chunk.final is not None:
                        whole = True
                        self._whole(received, chunk.final)
                    else:
                        received.take(chunk)
                    yield chunk
                    chunk = await anext(chunks, None)
        except BaseException as error:
            if not whole:
                self._lost(request, received, error)
            raise
        if not whole:
            self._lost(request, received, StreamBrokenError("it ended without saying so", worker=self.name))

    def _whole(self, received: _Received, reply: ChatReply) -> None:
        self._spend(received, [taken for taken in received.close() if not taken.within])
        self._trace.spent.append(Spent(reply.usage, reply.cost_usd, estimated=reply.estimated))
        if not reply.cached:
            self._trace.waits.append((self.name, reply.timing.queued_s))
        if self._role is not None:
            choice = self._trace.choice
            self._trace.calls.append(Call(self.name, self._role, None if choice is None else choice.domain))

    def _lost(self, request: ChatRequest, received: _Received, error: BaseException) -> None:
        known = None
        if isinstance(error, FuguError):
            known = error.usage
            self._trace.failures.append((self.name, error.code))
            if error.queued_s is not None:
                self._trace.waits.append((self.name, error.queued_s))
        self._spend(
            received, [replace(each, within=False) for each in received.close() if known is None or not each.within]
        )
        if known is not None:
            self._spend(received, [Taken(known, estimated=False, within=True)])
        if (known is None) if received.begun else _may_be_charged(error):
            # Who breaks a call off has to count it in full.
            self._spend(received, [Taken(received.usage(request), True, within=not isinstance(error, FuguError))])

    def _spend(self, received: _Received, taken: Iterable[Taken]) -> None:
        for each in taken:
            self._trace.spent.append(Spent(each.usage, self._prices.usd(self.name, each.usage), each.estimated))
            if received.outer is not None and not each.within:
                received.outer(each)


def _may_be_charged(error: BaseException) -> bool:
    """Of an attempt that nothing was heard of: the provider may be at work on it. One that says no, or cannot be
    reached, charges nothing."""
    if isinstance(error, FuguError) and error.may_cost is not None:
        return error.may_cost
    if isinstance(error, WorkerTimeoutError):
        return error.phase != "connect"
    return isinstance(error, (asyncio.CancelledError, GeneratorExit))


class _Received:
    """What has come of an answer; `clock` in seconds. It was asked for when the worker last told of something."""

    __slots__ = ("_asked", "_clock", "_closed", "_first", "_size", "_taken", "_told", "outer")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.outer = listener()
        self._clock = clock
        self._asked = clock()
        self._first: float | None = None
        self._told = Usage()
        self._size = 0
        self._taken: list[Taken] = []
        self._closed = False

    @property
    def begun(self) -> bool:
        return self._first is not None

    def told_of(self, taken: Taken) -> None:
        """Not what comes once the call is over: an answer that several wait for is the first one's to pay, while it
        waits."""
        if not self._closed:
            self._taken.append(taken)
            self._asked = self._clock()

    def close(self) -> list[Taken]:
        """What was told of."""
        self._closed = True
        return self._taken

    def take(self, chunk: Chunk) -> None:
        if self._first is None:
            self._first = self._clock()
        if chunk.usage is not None:
            self._told = chunk.usage
        self._size += text_size(chunk.text) + text_size(chunk.reasoning) + text_size(chunk.refusal)
        self._size += sum(text_size(call.name or "") + text_size(call.arguments) for call in chunk.tool_calls)

    def usage(self, request: ChatRequest) -> Usage:
        silent = silent_tokens((self._clock() if self._first is None else self._first) - self._asked)
        written = size_tokens(self._size) + silent
        if request.max_tokens is not None:
            written = min(written, request.max_tokens)
        return Usage(
            self._told.input_tokens or estimate_tokens(request).input,
            max(written, self._told.output_tokens),
            self._told.cached_input_tokens,
            self._told.reasoning_tokens,
            self._told.cache_written_tokens,
            self._told.cache_hour_tokens,
        )
