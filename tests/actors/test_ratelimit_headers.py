"""What providers say about their budgets, in all the ways they say it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.ratelimit_headers import Reported, read_rate_limits, retry_after, seconds_until

WALL = 1_700_000_000.0  # 2023-11-14T22:13:20Z


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("20ms", 0.02),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400.0),
        ("2.5", 2.5),
        ("0", 0.0),
        ("-4", 0.0),
        ("1700000030", 30.0),
        ("1700000030000", 30.0),
        ("2023-11-14T22:13:50Z", 30.0),
        ("2023-11-14T23:13:50+01:00", 30.0),
        ("2020-01-01T00:00:00Z", 0.0),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("", None),
        (None, None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("5 parsecs", None),
    ],
)
def test_points_and_stretches_of_time(text: str | None, seconds: float | None) -> None:
    assert seconds_until(text, WALL) == (None if seconds is None else pytest.approx(seconds))


def test_openai_headers() -> None:
    headers = {
        "content-type": "application/json",
        "x-ratelimit-limit-requests": "500",
        "x-ratelimit-remaining-requests": "499",
        "x-ratelimit-reset-requests": "120ms",
        "x-ratelimit-limit-tokens": "200000",
        "x-ratelimit-remaining-tokens": "199980",
        "x-ratelimit-reset-tokens": "6ms",
    }
    assert read_rate_limits(headers, WALL) == Reported(500, 499, 0.12, 200000, 199980, 0.006)


def test_anthropic_headers() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "49",
        "anthropic-ratelimit-requests-reset": "2023-11-14T22:13:50Z",
        "anthropic-ratelimit-tokens-limit": "80000",
        "anthropic-ratelimit-tokens-remaining": "70000",
        "anthropic-ratelimit-tokens-reset": "2023-11-14T22:14:20Z",
        "anthropic-ratelimit-output-tokens-remaining": "8000",
    }
    assert read_rate_limits(headers, WALL) == Reported(50, 49, 30.0, 80000, 70000, 60.0)
    headers |= {
        "anthropic-ratelimit-output-tokens-remaining": "0",
        "anthropic-ratelimit-output-tokens-reset": "2023-11-14T22:13:22Z",
    }
    empty = read_rate_limits(headers, WALL)
    assert empty is not None
    assert (empty.tokens_left, empty.tokens_reset) == (0, 2.0)


def test_headers_that_say_nothing() -> None:
    assert read_rate_limits({"content-type": "text/plain"}, WALL) is None
    assert read_rate_limits({"x-ratelimit-remaining-requests": "many"}, WALL) == Reported()


def test_retry_after() -> None:
    assert retry_after({"retry-after": "7"}, WALL) == 7
    assert retry_after({"retry-after": "7", "retry-after-ms": "1500"}, WALL) == 1.5
    assert retry_after({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, WALL) == 30
    assert retry_after({}, WALL) is None


@given(st.text(max_size=30))
def test_nonsense_is_ignored(text: str) -> None:
    seconds = seconds_until(text, WALL)
    assert seconds is None or 0 <= seconds < float("inf")
    headers = {
        f"x-ratelimit-{what}-{of}": text for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
    }
    read_rate_limits(headers, WALL)
