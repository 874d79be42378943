"""The fallback rule: which worker is asked, and who is asked next when it fails.

Pure asyncio over `actors.messages.Worker`; no Ray, no torch, the clock comes from outside. A worker that
fails before its first byte is followed by the next by probability; after the first byte nothing is retried,
so that no text is ever repeated.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

from actors.errors import (
    AllWorkersFailedError,
    CircuitOpenError,
    ContextLengthError,
    FuguError,
    ProtocolError,
    StreamBrokenError,
    WorkerError,
)
from actors.messages import ChatReply, ChatRequest, Chunk, Worker

Clock = Callable[[], float]

# What lets the next worker try: the worker's own failure, or a conversation too long for this one.
_NEXT = (WorkerError, ContextLengthError)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One worker that was asked. Times in seconds: `started_s` since the dispatch began, `first_byte_s` and
    `seconds` since this attempt began. `error` is None for the worker that answered."""

    worker: str
    started_s: float
    seconds: float
    first_byte_s: float | None = None
    error: FuguError | None = None


@dataclass(slots=True)
class Record:
    """What happened, filled while a dispatch runs; readable at any moment, after a failure or a cancel
    too."""

    attempts: list[Attempt] = field(default_factory=list)
    worker: str | None = None


class Resting:
    """Workers known to rest (open circuit), each until a time on the given clock. Learned from their own
    refusals, so that a resting worker is not chosen again before it may try."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def learn(self, record: Record) -> None:
        for attempt in record.attempts:
            if isinstance(attempt.error, CircuitOpenError):
                self._until[attempt.worker] = self._clock() + (attempt.error.retry_after or 1.0)
            elif attempt.error is None:
                self._until.pop(attempt.worker, None)

    def awake(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names that do not rest; all of them if every one rests (someone has to say why it cannot
        answer)."""
        names = tuple(names)
        if not self._until:
            return names
        now = self._clock()
        return tuple(name for name in names if self._until.get(name, now) <= now) or names


def rank(
    first: str | None, probabilities: Mapping[str, float], allowed: Sequence[str], fallbacks: int
) -> tuple[str, ...]:
    """The workers to try, in order: `first` (what the decision chose), then the others by falling
    probability, equal ones in the order of `allowed`; workers without a probability come last. At most
    `fallbacks` after the first."""
    others = sorted((name for name in allowed if name != first), key=lambda name: -probabilities.get(name, -1.0))
    chosen = [first, *others] if first is not None and first in allowed else others
    return tuple(chosen[: fallbacks + 1])


async def complete(workers: Sequence[Worker], request: ChatRequest, *, record: Record, clock: Clock) -> ChatReply:
    """Ask the workers in turn until one answers.

    Raises:
        AllWorkersFailedError: each one failed (or the single failure itself where the conversation is too
            long for every one of them).
    """
    began = clock()
    failures: dict[str, FuguError] = {}
    for worker in workers:
        started = clock()
        try:
            reply = await worker.complete(request)
        except _NEXT as error:
            failures[worker.name] = error
            record.attempts.append(Attempt(worker.name, started - began, clock() - started, error=error))
            continue
        record.worker = worker.name
        record.attempts.append(
            Attempt(worker.name, started - began, clock() - started, reply.timing.queued_s + reply.timing.first_byte_s)
        )
        return reply
    raise _all_failed(failures)


async def stream(
    workers: Sequence[Worker], request: ChatRequest, *, record: Record, clock: Clock
) -> AsyncGenerator[Chunk, None]:
    """Stream from the first worker that gets as far as its first chunk. Closing the generator ends the
    upstream call.

    Raises:
        AllWorkersFailedError: as `complete`, before anything was yielded.
        FuguError: the worker's own error, after something was yielded; `StreamBrokenError` if its stream
            ended without a final chunk.
    """
    began = clock()
    failures: dict[str, FuguError] = {}
    for worker in workers:
        started = clock()
        async with aclosing(cast(AsyncGenerator[Chunk, None], worker.stream(request))) as chunks:
            try:
                chunk = await _first(chunks, worker.name)
            except _NEXT as error:
                failures[worker.name] = error
                record.attempts.append(Attempt(worker.name, started - began, clock() - started, error=error))
                continue
            first_byte = clock() - started
            record.worker = worker.name
            try:
                while chunk.final is None:
                    yield chunk
                    chunk = await _next(chunks, worker.name)
            except FuguError as error:
                record.attempts.append(Attempt(worker.name, started - began, clock() - started, first_byte, error))
                raise
            record.attempts.append(Attempt(worker.name, started - began, clock() - started, first_byte))
            yield chunk
            return
    raise _all_failed(failures)


async def _first(chunks: AsyncGenerator[Chunk, None], worker: str) -> Chunk:
    try:
        return await anext(chunks)
    except StopAsyncIteration:
        raise ProtocolError(f"{worker} ended without an answer", worker=worker) from None


async def _next(chunks: AsyncGenerator[Chunk, None], worker: str) -> Chunk:
    try:
        return await anext(chunks)
    except StopAsyncIteration:
        raise StreamBrokenError(f"{worker} ended its answer without saying so", worker=worker) from None


def _all_failed(failures: Mapping[str, FuguError]) -> FuguError:
    errors = list(failures.values())
    if errors and all(isinstance(error, ContextLengthError) for error in errors):
        return errors[-1]
    return AllWorkersFailedError(failures)
