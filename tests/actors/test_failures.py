"""Reading providers' errors: the shapes of their bodies and every way of saying when to come back."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from actors.adapters.failures import Blame, from_exception, from_status, read_error, retry_after
from actors.errors import ProtocolError, WorkerTimeoutError, WorkerUnavailableError

NOW = 1_700_000_000.0  # 2023-11-14T22:13:20Z


@pytest.mark.parametrize(
    ("headers", "blame", "expected"),
    [
        ({}, None, None),
        ({"retry-after": "12"}, None, 12.0),
        ({"retry-after": "1.5"}, None, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, None, 0.25),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, None, 30.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:00:00 GMT"}, None, 0.0),
        ({"retry-after": "soon"}, None, None),
        ({"retry-after": "99999999"}, None, 86_400.0),
        ({}, Blame(retry_after=7.5), 7.5),
        ({"retry-after": "2"}, Blame(retry_after=7.5), 2.0),
        (
            {
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-requests-reset": "2023-11-14T22:14:00Z",
                "anthropic-ratelimit-tokens-remaining": "100",
                "anthropic-ratelimit-tokens-reset": "2023-11-14T23:00:00Z",
            },
            None,
            40.0,
        ),
        (
            {
                "anthropic-ratelimit-output-tokens-remaining": "0",
                "anthropic-ratelimit-output-tokens-reset": "2023-11-14T22:13:25Z",
            },
            None,
            5.0,
        ),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "20ms",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "1m2.5s",
            },
            None,
            62.5,
        ),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "60s"}, None, None),
    ],
)
def test_when_to_come_back(headers: dict[str, str], blame: Blame | None, expected: float | None) -> None:
    assert retry_after(headers, blame, NOW) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            {"error": {"message": "m", "type": "t", "param": "temperature", "code": "c"}},
            Blame("m", "c", "temperature"),
        ),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "m"}},
            Blame("m", "overloaded_error", status=529),
        ),
        ([{"error": {"code": 503, "message": "m", "status": "UNAVAILABLE"}}], Blame("m", "UNAVAILABLE", status=503)),
        ({"error": "plain"}, Blame("plain")),
        ({"object": "error", "message": "m", "code": 40303}, Blame("m")),
        ({"detail": [{"msg": "field required"}]}, Blame("[{'msg': 'field required'}]")),
        ({"error": {"message": None, "code": 40303}}, Blame()),
        ({"error": {}}, None),
        ({"choices": []}, None),
        ("text", None),
        ([], None),
        (None, None),
    ],
)
def test_shapes_of_error_bodies(body: Any, expected: Blame | None) -> None:
    assert read_error(body) == expected


def test_the_field_to_blame_is_kept() -> None:
    error = from_status(400, Blame("bad", param="temperature"), {}, worker="w")
    assert error.param == "temperature"


def test_what_the_provider_says_is_cut_and_scrubbed() -> None:
    error = from_status(500, Blame("x" * 5000 + " my-own-secret"), {}, worker="w", secrets=("my-own-secret",))
    assert len(error.message) < 400
    error = from_status(
        401, Blame("bad key my-own-secret\nAIzaSyA1234567890"), {}, worker="w", secrets=("my-own-secret",)
    )
    assert error.message.endswith("bad key *** ***")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectTimeout("x"), WorkerTimeoutError),
        (httpx.ReadTimeout("x"), WorkerTimeoutError),
        (httpx.ConnectError("refused"), WorkerUnavailableError),
        (httpx.ProxyError("x"), WorkerUnavailableError),
        (httpx.ReadError("reset"), WorkerUnavailableError),
        (httpx.RemoteProtocolError("x"), WorkerUnavailableError),
        (httpx.UnsupportedProtocol("x"), ProtocolError),
        (httpx.DecodingError("x"), ProtocolError),
    ],
)
def test_transport_errors(error: Exception, kind: type[Exception]) -> None:
    mapped = from_exception(error, worker="w", where="host:1")
    assert type(mapped) is kind
    assert "host:1" in mapped.message
