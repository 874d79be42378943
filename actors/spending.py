"""What a call takes beside its answer: attempts that came to nothing before the next one, and the first answer where
JSON has to be put right. It is told as soon as it is known, since a caller may leave before there is any answer.

    with told_to(note):
        reply = await worker.complete(request)

Who is told is found by a context variable. An async generator sets it around its first step only: the worker it asks
has begun by then, and the rest of its body may run in other contexts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from actors.messages import Usage


@dataclass(frozen=True, slots=True)
class Taken:
    """What a part of a call took. `within`: the usage of the answer, or of the error, that the call ends with has it,
    too."""

    usage: Usage
    estimated: bool
    within: bool = False


Note = Callable[[Taken], None]

_note: ContextVar[Note | None] = ContextVar("fugu_taken", default=None)


def listener() -> Note | None:
    """Who wants to be told; None: nobody."""
    return _note.get()


def tell(taken: Taken) -> None:
    note = _note.get()
    if note is not None:
        note(taken)


@contextmanager
def told_to(note: Note) -> Iterator[None]:
    """Calls that begin inside are told of to `note`."""
    token = _note.set(note)
    try:
        yield
    finally:
        _note.reset(token)
