"""From a provider's failure to our error tree: transport errors, HTTP statuses, error bodies, how long to wait."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from actors import ratelimit_headers
from actors.errors import (
    ProtocolError,
    RateLimitedError,
    WorkerAuthError,
    WorkerError,
    WorkerRejectedError,
    WorkerTimeoutError,
    WorkerUnavailableError,
    scrub,
)

MAX_RETRY_AFTER_S = 86_400.0

# Anthropic's error types (its errors page) as the HTTP status each is documented with.
_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
# Reported with 400 or 429, but what is wrong is our key or its account, and waiting does not help.
_ACCOUNT_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "API_KEY_INVALID"})


@dataclass(frozen=True, slots=True)
class Blame:
    """What a provider says about a failure: its words, its code, the field, seconds to wait, and a status if the
    body names one."""

    message: str = ""
    code: str = ""
    param: str | None = None
    retry_after: float | None = None
    status: int | None = None


def read_error(body: Any) -> Blame | None:
    """The error in a provider's body, or None where there is none. Knows OpenAI's, Anthropic's and Gemini's shapes
    and the variants of compatible servers (a list around it, a bare string, `message` or `detail` at the top)."""
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if isinstance(error, str) and error:
        return Blame(error)
    if not isinstance(error, dict) or not error:
        flat = body.get("message") or body.get("detail")
        return Blame(flat if isinstance(flat, str) else str(flat)) if flat else None
    details = [item for item in error.get("details") or () if isinstance(item, dict)]
    reasons = [str(item["reason"]) for item in details if "reason" in item]
    code, kind = error.get("code"), error.get("type")
    status = code if isinstance(code, int) else _STATUS_OF_TYPE.get(str(kind))
    words = [str(word) for word in (*reasons, code, error.get("status"), kind) if isinstance(word, str)]
    param = error.get("param")
    message = error.get("message")
    return Blame(
        message=message if isinstance(message, str) else "",
        code=next((word for word in words if word in _ACCOUNT_CODES), words[0] if words else ""),
        param=param if isinstance(param, str) else None,
        retry_after=_retry_delay(details),
        status=status if status is not None and 400 <= status < 600 else None,
    )


def _retry_delay(details: list[dict[str, Any]]) -> float | None:
    """Gemini's RetryInfo: `"retryDelay": "7.5s"`."""
    given = next((item["retryDelay"] for item in details if isinstance(item.get("retryDelay"), str)), None)
    return ratelimit_headers.seconds_until(given, 0.0)


def from_status(
    status: int, blame: Blame | None, headers: Mapping[str, str], *, worker: str, secrets: tuple[str, ...] = ()
) -> WorkerError:
    """The error for an answer with this status (400 and above, or a redirect). `headers` have lower-case names."""
    blame = blame or Blame()
    said = f": {scrub(blame.message, *secrets)}" if blame.message else ""
    wait = retry_after(headers, blame)
    if blame.code in _ACCOUNT_CODES or status in (401, 402, 403):
        return WorkerAuthError(f"the provider refused our key or account ({status}){said}", worker=worker)
    if status == 429:
        return RateLimitedError(f"the provider's rate limit is reached{said}", worker=worker, retry_after=wait)
    if status in (408, 504):
        return WorkerTimeoutError(f"the provider itself timed out ({status}){said}", phase="total", worker=worker)
    if status in (400, 413, 422):
        message = f"the provider rejected the request ({status}){said}"
        return WorkerRejectedError(message, param=blame.param, worker=worker)
    if status in (409, 425) or (status >= 500 and status != 501):
        return WorkerUnavailableError(f"the provider is unavailable ({status}){said}", worker=worker, retry_after=wait)
    if 300 <= status < 400:
        return WorkerError(f"the provider redirects ({status}), which is not followed: check base_url", worker=worker)
    return WorkerError(
        f"the provider does not know this model or path ({status}): check model and base_url{said}", worker=worker
    )


def from_exception(error: Exception, *, worker: str, where: str, secrets: tuple[str, ...] = ()) -> WorkerError:
    """The error for a transport failure. `where` is host and port."""
    said = scrub(str(error), *secrets)
    if isinstance(error, httpx.ConnectTimeout):
        return WorkerTimeoutError(f"no connection to {where} in time", phase="connect", worker=worker)
    if isinstance(error, httpx.TimeoutException):
        return WorkerTimeoutError(f"{where} fell silent", phase="idle", worker=worker)
    if isinstance(error, httpx.ConnectError | httpx.ProxyError):
        return WorkerUnavailableError(f"cannot connect to {where}: {said}", worker=worker)
    if isinstance(error, httpx.UnsupportedProtocol | httpx.DecodingError):
        return ProtocolError(f"{where}: {said}", worker=worker)
    broken = WorkerUnavailableError(f"the connection to {where} broke: {said}", worker=worker)
    broken.broke = True
    return broken


def retry_after(headers: Mapping[str, str], blame: Blame | None = None, wall: float | None = None) -> float | None:
    """Seconds to wait before the next try, or None where the provider does not say.

    In order: `retry-after-ms`, `retry-after` (seconds or an HTTP date), Gemini's RetryInfo in the body, then the
    reset times of those limits that have nothing left. `wall` is the time now in Unix seconds.
    """
    wall = time.time() if wall is None else wall
    wait = ratelimit_headers.retry_after(headers, wall)
    if wait is None and blame is not None:
        wait = blame.retry_after
    if wait is None and (reported := ratelimit_headers.read_rate_limits(headers, wall)) is not None:
        resets = ((reported.requests_left, reported.requests_reset), (reported.tokens_left, reported.tokens_reset))
        wait = max((reset for left, reset in resets if left == 0 and reset is not None), default=None)
    return None if wait is None else min(wait, MAX_RETRY_AFTER_S)
