"""Spans of a request's trace, for code that need not know whether anybody traces.

    with span("step 2") as step:          # None where nothing is traced, at the price of a context variable
        ...
        if step is not None:
            step.set({"fugu.worker": name})

The span around is found by a context variable, so that it follows coroutines and the tasks that they start. An async
generator must not set it: its body runs in the context of whoever asks for the next value. There a child is begun and
ended by hand. From one process to another a span travels as W3C trace headers, handed on explicitly.

`actors.otel` has the real ones; nothing here imports OpenTelemetry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol

Kind = Literal["internal", "server", "client"]
Attributes = Mapping[str, Any]


class Span(Protocol):
    """A part of a request. `content`: prompts and answers are wanted on it. `calls` is how many workers were asked
    right below it, so that the second one can be told as a fallback."""

    content: bool
    calls: int

    def child(
        self, name: str, kind: Kind = "internal", attributes: Attributes | None = None, began_ns: int | None = None
    ) -> Span:
        """A part of this part, begun now or at `began_ns` (nanoseconds of the epoch)."""

    def set(self, attributes: Attributes) -> None:
        """Attributes whose value is None are left out."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something that happened now."""

    def fail(self, error: BaseException) -> None:
        """It failed. Only errors of ours are told in words, which are safe to show."""

    def end(self, ended_ns: int | None = None) -> None:
        """What comes after it is not noted."""

    def headers(self) -> dict[str, str]:
        """`traceparent` (and `tracestate`), for who goes on below this span."""


_current: ContextVar[Span | None] = ContextVar("fugu_span", default=None)


def current() -> Span | None:
    """The span around; None where nothing is traced."""
    return _current.get()


def headers() -> dict[str, str] | None:
    """The trace headers of the span around."""
    around = _current.get()
    return None if around is None else around.headers()


@contextmanager
def under(around: Span | None) -> Iterator[None]:
    """Spans that begin inside, and in tasks that are started inside, are parts of `around`."""
    token = _current.set(around)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def running(part: Span) -> Iterator[Span]:
    """`part` is the span around inside, and ends with it; an error that leaves it is noted."""
    try:
        with under(part):
            yield part
    except BaseException as error:
        part.fail(error)
        raise
    finally:
        part.end()


@contextmanager
def span(name: str, kind: Kind = "internal") -> Iterator[Span | None]:
    """A part of the span around, while the block runs."""
    around = _current.get()
    if around is None:
        yield None
        return
    with running(around.child(name, kind)) as part:
        yield part
