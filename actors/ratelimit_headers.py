"""What providers say about their own budget in response headers: OpenAI's `x-ratelimit-*`, Anthropic's
`anthropic-ratelimit-*`, and `retry-after`. Header names are in lower case; values that make no sense are ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime

_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)(ms|s|m|h|d))")
_MILLISECOND_EPOCH = 1e11
_EPOCH = 1e9


@dataclass(frozen=True, slots=True)
class Reported:
    """Whole limits, what is left of them, and the seconds until they are full again; None where not said."""

    request_limit: int | None = None
    requests_left: int | None = None
    requests_reset: float | None = None
    token_limit: int | None = None
    tokens_left: int | None = None
    tokens_reset: float | None = None


def read_rate_limits(headers: Mapping[str, str], wall: float) -> Reported | None:
    """What the headers say about requests and tokens, or None if they say nothing. `wall` is the time now (Unix
    seconds), for headers that give points in time."""
    if any(name.startswith("x-ratelimit-") for name in headers):
        style = "x-ratelimit-{0}-{1}"
    elif any(name.startswith("anthropic-ratelimit-") for name in headers):
        style = "anthropic-ratelimit-{1}-{0}"
    else:
        return None

    def count(what: str, of: str) -> int | None:
        return _count(headers.get(style.format(what, of)))

    def reset(of: str) -> float | None:
        return seconds_until(headers.get(style.format("reset", of)), wall)

    tokens_left, tokens_reset = count("remaining", "tokens"), reset("tokens")
    # Anthropic counts input and output apart as well; either being empty stops every call.
    for kind in ("input-tokens", "output-tokens"):
        if count("remaining", kind) == 0:
            tokens_left, tokens_reset = 0, reset(kind)
    return Reported(
        request_limit=count("limit", "requests"),
        requests_left=count("remaining", "requests"),
        requests_reset=reset("requests"),
        token_limit=count("limit", "tokens"),
        tokens_left=tokens_left,
        tokens_reset=tokens_reset,
    )


def seconds_until(text: str | None, wall: float) -> float | None:
    """A point in time or a duration as seconds from now, never negative: `6m0s`, `20ms`, `1.5`, Unix seconds or
    milliseconds, an RFC 3339 time or an HTTP date."""
    if not text:
        return None
    text = text.strip()
    number = _number(text)
    if number is not None:
        if number >= _MILLISECOND_EPOCH:
            return max(0.0, number / 1000 - wall)
        return max(0.0, number - wall if number >= _EPOCH else number)
    if _DURATION.sub("", text) == "":
        return sum(float(amount) * _UNIT_SECONDS[unit] for amount, unit in _DURATION.findall(text))
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            return max(0.0, parse(text).timestamp() - wall)
        except (ValueError, OverflowError):
            continue
    return None


def retry_after(headers: Mapping[str, str], wall: float) -> float | None:
    """Seconds that the provider asks to wait, from `retry-after-ms` or `retry-after`."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return max(0.0, milliseconds / 1000)
    return seconds_until(headers.get("retry-after"), wall)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _count(text: str | None) -> int | None:
    number = _number(text or "")
    return None if number is None else max(0, int(number))
