"""Spans by OpenTelemetry, sent in batches by a thread of its own. Import it only where traces are on.

No request ever waits for the collector: spans go into a bounded queue, which drops the oldest when the collector
cannot keep up or is away, and a thread sends them every second.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from actors.errors import FuguError
from actors.spans import Attributes, Kind, Span
from actors.telemetry import TelemetryConfig

QUEUE = 2048
BATCH = 256
EVERY_SECONDS = 1.0
EXPORT_SECONDS = 5.0
CLOSE_SECONDS = 3.0

_KINDS = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_PROPAGATOR = TraceContextTextMapPropagator()


class Telemetry:
    """Makes the spans of one process. Nothing of it is global: Ray's own use of OpenTelemetry is left alone."""

    def __init__(self, config: TelemetryConfig, process: str) -> None:
        secrets = {name.lower(): value.get_secret_value() for name, value in config.headers.items()}
        exporter = OTLPSpanExporter(config.url, headers=secrets or None, timeout=EXPORT_SECONDS)
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sampling)),
            resource=Resource.create(
                {
                    "service.name": config.service,
                    "service.instance.id": f"{socket.gethostname()}:{os.getpid()}",
                    "fugu.process": process,
                }
            ),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=QUEUE,
                max_export_batch_size=BATCH,
                schedule_delay_millis=1000 * EVERY_SECONDS,
            )
        )
        self._tracer = self._provider.get_tracer("fugu")
        self._content = config.content

    def begin(self, name: str, kind: Kind, headers: Mapping[str, str], attributes: Attributes | None = None) -> Span:
        """A request's first span in this process, part of the trace that `headers` name, if they name one."""
        span = self._tracer.start_span(name, _PROPAGATOR.extract(headers), _KINDS[kind], _given(attributes))
        return OtelSpan(self._tracer, span, self._content)

    def joined(self, headers: Mapping[str, str]) -> Span:
        """Another process's span, to begin parts of; nothing can be noted on it here."""
        span = trace.get_current_span(_PROPAGATOR.extract(headers))
        return OtelSpan(self._tracer, span, self._content)

    def close(self) -> None:
        """Send what has not been sent, for a few seconds at most. Blocks."""
        closing = threading.Thread(target=self._provider.shutdown, name="telemetry", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


class OtelSpan:
    """See `actors.spans.Span`."""

    __slots__ = ("_span", "_tracer", "calls", "content")

    def __init__(self, tracer: Tracer, span: trace.Span, content: bool) -> None:
        self._tracer = tracer
        self._span = span
        self.content = content
        self.calls = 0

    def child(
        self, name: str, kind: Kind = "internal", attributes: Attributes | None = None, began_ns: int | None = None
    ) -> Span:
        around = trace.set_span_in_context(self._span)
        span = self._tracer.start_span(name, around, _KINDS[kind], _given(attributes), start_time=began_ns)
        return OtelSpan(self._tracer, span, self.content)

    def set(self, attributes: Attributes) -> None:
        if self._span.is_recording():
            self._span.set_attributes(_given(attributes))

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        if self._span.is_recording():
            self._span.add_event(name, _given(attributes))

    def fail(self, error: BaseException) -> None:
        if self._span.is_recording():
            said = _text(error.message) if isinstance(error, FuguError) else None
            self._span.set_attribute("error.type", error_type(error))
            self._span.set_status(Status(StatusCode.ERROR, said))

    def end(self, ended_ns: int | None = None) -> None:
        if self._span.is_recording():
            self._span.end(ended_ns)

    def headers(self) -> dict[str, str]:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self._span))
        return carrier


def error_type(error: BaseException) -> str:
    """The error's code, or what kind of thing it is."""
    if isinstance(error, FuguError):
        return error.code
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    return type(error).__name__


def _given(attributes: Attributes | None) -> dict[str, Any]:
    return {name: _sendable(value) for name, value in (attributes or {}).items() if value is not None}


def _sendable(value: Any) -> Any:
    """One value that cannot be encoded would cost its whole batch."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return value


def _text(value: str) -> str:
    return value if value.isascii() else value.encode("utf-8", "replace").decode()
