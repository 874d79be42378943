"""The error tree: every error crosses a process boundary whole, has its status, and hides secrets."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import errors
from actors.errors import (
    AllWorkersFailedError,
    CircuitOpenError,
    FuguError,
    LimitReachedError,
    RateLimitedError,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
    scrub,
)


def every_error() -> list[FuguError]:
    made: list[FuguError] = []
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, FuguError):
            if value is WorkerTimeoutError:
                made.append(WorkerTimeoutError("slow", phase="connect", worker="w"))
            elif value is AllWorkersFailedError:
                made.append(AllWorkersFailedError({"w": RateLimitedError("no", worker="w", retry_after=2.0)}))
            else:
                made.append(value("what, where, what to do", param="p", worker="w", retry_after=1.5))
    return made


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_crosses_processes_with_everything(error: FuguError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.envelope() == error.envelope()
    assert (copy.worker, copy.retry_after, copy.http_status) == (error.worker, error.retry_after, error.http_status)
    assert 400 <= error.http_status < 600
    assert set(error.envelope()["error"]) >= {"message", "type", "param", "code"}


def test_the_drawing_in_the_docstring_is_the_tree() -> None:
    drawing = errors.__doc__ or ""
    for error in every_error():
        line = next((line for line in drawing.splitlines() if f" {type(error).__name__} " in f"{line} "), None)
        assert line is not None, f"{type(error).__name__} is not drawn"
        assert str(type(error).status) in line or isinstance(error, AllWorkersFailedError)


def test_every_error_has_a_code_of_its_own_kind() -> None:
    codes: dict[str, list[type]] = {}
    for error in every_error():
        codes.setdefault(error.code, []).append(type(error))
    for kinds in codes.values():
        first = kinds[0]
        assert all(issubclass(kind, first) or issubclass(first, kind) for kind in kinds), kinds


@pytest.mark.parametrize(
    ("failures", "status", "retry_after"),
    [
        ([RateLimitedError("a", retry_after=9), LimitReachedError("b", retry_after=4)], 429, 4),
        ([RateLimitedError("a"), CircuitOpenError("b", retry_after=6)], 503, 6),
        ([RateLimitedError("a", retry_after=2), WorkerUnavailableError("b")], 502, 2),
        ([WorkerRejectedError("a")], 400, None),
        ([WorkerTimeoutError("a", phase="total")], 504, None),
        ([WorkerUnavailableError("a"), WorkerTimeoutError("b", phase="connect")], 502, None),
    ],
)
def test_all_failed_takes_the_status_that_tells_most(
    failures: list[WorkerError], status: int, retry_after: float | None
) -> None:
    error = AllWorkersFailedError({f"w{i}": failure for i, failure in enumerate(failures)})
    assert error.http_status == status
    assert error.retry_after == retry_after
    assert len(error.envelope()["error"]["failures"]) == len(failures)


@given(st.text(alphabet="abcdefghij0123456789-_", min_size=12, max_size=40), st.text(), st.text())
def test_scrub_takes_out_what_it_is_told(secret: str, before: str, after: str) -> None:
    assert secret not in scrub(f"{before} {secret} {after}", secret)


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: sk-proj-abcdefgh12345678",
        "header Authorization: Bearer abcdefgh12345678 refused",
        "x-api-key: abcdefgh12345678",
        "https://host/v1beta/models/m:generateContent?key=abcdefgh12345678",
        "AIzaSyabcdefgh12345678",
    ],
)
def test_scrub_knows_the_usual_keys(text: str) -> None:
    assert "abcdefgh12345678" not in scrub(text)


@given(st.text(max_size=2000))
def test_scrub_gives_one_short_line(text: str) -> None:
    clean = scrub(text)
    assert len(clean) <= 300
    assert "\n" not in clean
