"""Small pieces of ASGI: reading a bounded body, sending JSON, errors in OpenAI's envelope."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from actors.errors import BudgetSpentError, FuguError, PayloadTooLargeError, RequestError, RequestTimeoutError
from serve.environment import READ_SECONDS
from serve.translate import dumps

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """Header names in lower case; of repeated headers the last."""
    return dict(scope["headers"])


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The caller's `x-request-id` if it is short and plain, else a new one."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if _SANE_ID.match(given) else secrets.token_hex(16)


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The whole body.

    Raises:
        PayloadTooLargeError: it is longer than `limit` bytes, by its own account or in fact.
        RequestTimeoutError: it did not arrive in a minute.
        RequestError: the client went away or sent a `content-length` that is not a number.
    """
    too_large = PayloadTooLargeError(f"the body is larger than {limit} bytes")
    declared = headers.get(b"content-length")
    if declared is not None:
        if not declared.isdigit():
            raise RequestError("content-length: must be a number")
        if len(declared) > 18 or int(declared) > limit:
            raise too_large
    pieces, size = [], 0
    try:
        async with asyncio.timeout(READ_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestError("the client went away before its body was complete")
                piece = message.get("body", b"")
                size += len(piece)
                if size > limit:
                    raise too_large
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces) if len(pieces) > 1 else piece
    except TimeoutError:
        raise RequestTimeoutError(f"the body did not arrive within {READ_SECONDS:g} s") from None


async def send_json(send: Send, status: int, body: bytes, extra: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_error(
    send: Send,
    error: FuguError,
    trace: Mapping[str, Any] | None = None,
    body: bytes | None = None,
    extra: tuple[tuple[bytes, bytes], ...] = (),
) -> None:
    """The error's envelope (or `body`, a dialect's own) with its status, `extra` headers, and `Retry-After` (whole
    seconds, rounded up) where it is known."""
    if body is None:
        envelope = error.envelope()
        body = dumps(envelope if trace is None else envelope | {"fugu": trace})
    headers = list(extra)
    if error.retry_after is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if isinstance(error, BudgetSpentError):
        # OpenAI's and Anthropic's clients try a 429 again unless they are told not to.
        headers.append((b"x-should-retry", b"false"))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.http_status in (408, 413):
        # Part of the body may still be on its way: nothing more can be read from this connection.
        headers.append((b"connection", b"close"))
    await send_json(send, error.http_status, body, tuple(headers))


def where_of(error: BaseException) -> str:
    """Kind and place of an error without its message, which could quote the request."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    place = f" at {step.tb_frame.f_code.co_filename}:{step.tb_lineno}" if step is not None else ""
    return f"{type(error).__name__}{place}"
