"""What every call of a request takes, noted in its trace, the calls that came to nothing too.

What a call took that was broken off is partly a guess. Read: what the provider had said by then, else the estimate of
`actors.estimate`. Written: what the provider had said or what was received, whichever is more, and for the time that it
was silent before its first piece as much as a model writes that thinks where nobody sees it. So a caller who hangs up
on an answer, or before it begins, has paid for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from actors.errors import StreamBrokenError, WorkerError, WorkerTimeoutError
from actors.estimate import estimate_tokens, size_tokens, text_size
from actors.messages import ChatReply, ChatRequest, Chunk, Usage, Worker
from serve.prices import Prices
from serve.trace import Spent, Trace

# What large models commonly write.
_TOKENS_PER_SECOND = 100


class Counted:
    """A worker whose calls are noted in a trace. `clock` in seconds."""

    def __init__(
        self, worker: Worker, trace: Trace, prices: Prices, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.name = worker.name
        self._worker = worker
        self._trace = trace
        self._prices = prices
        self._clock = clock

    async def complete(self, request: ChatRequest) -> ChatReply:
        received = _Received(self._clock())
        try:
            reply = await self._worker.complete(request)
        except BaseException as error:
            self._lost(request, received, error)
            raise
        self._whole(reply)
        return reply

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        received, whole = _Received(self._clock()), False
        try:
            async with aclosing(cast(AsyncGenerator[Chunk, None], self._worker.stream(request))) as chunks:
                async for chunk in chunks:
                    if chunk.final is not None:
                        whole = True
                        self._whole(chunk.final)
                    else:
                        received.take(chunk, self._clock())
                    yield chunk
        except BaseException as error:
            if not whole:
                self._lost(request, received, error)
            raise
        if not whole:
            self._lost(request, received, StreamBrokenError("it ended without saying so", worker=self.name))

    def _whole(self, reply: ChatReply) -> None:
        self._trace.spent.append(Spent(reply.usage, reply.cost_usd, estimated=reply.estimated))
        if not reply.cached:
            self._trace.waits.append((self.name, reply.timing.queued_s))

    def _lost(self, request: ChatRequest, received: _Received, error: BaseException) -> None:
        known = error.usage if isinstance(error, WorkerError) else None
        if known is None and not received.begun and not _may_be_charged(error):
            return
        usage = received.usage(request, self._clock()) if known is None else known
        self._trace.spent.append(Spent(usage, self._prices.usd(self.name, usage), estimated=known is None))


def _may_be_charged(error: BaseException) -> bool:
    """Of a call that nothing was heard of: the provider may be at work on it. One that says no, or cannot be reached,
    charges nothing."""
    if isinstance(error, WorkerTimeoutError):
        return error.phase != "connect"
    return isinstance(error, (asyncio.CancelledError, GeneratorExit))


@dataclass(slots=True)
class _Received:
    """What has come of an answer. `asked` and `first` are when it was asked for and when its first piece came."""

    asked: float
    first: float | None = None
    told: Usage = field(default_factory=Usage)
    size: int = 0

    @property
    def begun(self) -> bool:
        return self.first is not None

    def take(self, chunk: Chunk, now: float) -> None:
        if self.first is None:
            self.first = now
        if chunk.usage is not None:
            self.told = chunk.usage
        self.size += text_size(chunk.text) + text_size(chunk.reasoning) + text_size(chunk.refusal)
        self.size += sum(text_size(call.name or "") + text_size(call.arguments) for call in chunk.tool_calls)

    def usage(self, request: ChatRequest, now: float) -> Usage:
        silent = int(_TOKENS_PER_SECOND * ((now if self.first is None else self.first) - self.asked))
        written = size_tokens(self.size) + silent
        if request.max_tokens is not None:
            written = min(written, request.max_tokens)
        return Usage(
            self.told.input_tokens or estimate_tokens(request).input,
            max(written, self.told.output_tokens),
            self.told.cached_input_tokens,
            self.told.reasoning_tokens,
            self.told.cache_written_tokens,
        )
