"""What a request's trace says at the gateway: its own span, and the span of every decision.

Tokens and cost are told here under names of ours: those of the conventions belong to the spans of the calls, where
they can be summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from actors.errors import FuguError
from actors.spans import Span, running
from serve.trace import Choice, Trace

if TYPE_CHECKING:
    from actors.otel import Telemetry

_CARRIED = (b"traceparent", b"tracestate")


@contextmanager
def request_span(
    telemetry: Telemetry | None, path: str, headers: Mapping[bytes, bytes], id: str
) -> Iterator[Span | None]:
    """The span of a request to `path`, the span around while the block runs: part of the caller's trace where the
    headers name one. None where nothing is traced."""
    if telemetry is None:
        yield None
        return
    carried = {name.decode(): headers[name].decode("latin-1") for name in _CARRIED if name in headers}
    told = {"http.request.method": "POST", "http.route": path, "url.path": path, "fugu.request_id": id}
    with running(telemetry.begin(f"POST {path}", "server", carried, told)) as span:
        yield span


def tell_request(span: Span, model: str, outcome: str, trace: Trace, status: int, error: FuguError | None) -> None:
    """Put into a request's span what became of it. `status` is the answer's, 0 where none was begun; what was the
    caller's own fault is told, and is no failure of the span (OpenTelemetry's conventions for HTTP servers)."""
    choice, taken = trace.choice, trace.taken if trace.spent else None
    span.set(
        {
            "http.response.status_code": status or None,
            "fugu.model": model or None,
            "fugu.outcome": outcome,
            "fugu.worker": trace.record.worker,
            "fugu.decision.source": choice.source if choice else None,
            "fugu.failed_calls": len(trace.failures),
            "fugu.time_to_first_token_s": trace.first_piece_s,
            "fugu.usage.input_tokens": taken.usage.input_tokens if taken else None,
            "fugu.usage.output_tokens": taken.usage.output_tokens if taken else None,
            "fugu.cost_usd": taken.usd if taken else None,
            "fugu.estimated": (taken is not None and taken.estimated) or None,
        }
    )
    if error is None:
        return
    if 400 <= status < 500:
        span.set({"error.type": error.code})
    else:
        span.fail(error)


def tell_choice(span: Span | None, choice: Choice) -> None:
    """Put into a decision's span what it came to."""
    if span is None:
        return
    scores = {f"fugu.decision.score.{name}": round(share, 6) for name, share in choice.probabilities.items()}
    told = {
        "fugu.decision.worker": choice.worker,
        "fugu.decision.source": choice.source,
        "fugu.decision.role": choice.role,
        "fugu.decision.domain": choice.domain,
    }
    span.set(told | scores)
    for warning in choice.warnings:
        span.event(warning)
