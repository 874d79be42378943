"""An OpenTelemetry collector on the loopback interface: takes OTLP over HTTP (protobuf) and keeps the spans. As a
program (`python -m tests.collector`) it prints each request's spans as a tree."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SpanProto
from opentelemetry.proto.trace.v1.trace_pb2 import Status

ERROR = Status.STATUS_CODE_ERROR


@dataclass(frozen=True)
class Seen:
    """A span as it came. Times in nanoseconds; `parent` is "" for one without."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    failed: bool
    said: str
    attributes: dict[str, Any]
    events: tuple[str, ...]
    resource: dict[str, Any] = field(repr=False)


class Collector:
    """`spans` are those of all exports so far, `headers` those of each export; `status` is what it answers."""

    def __init__(self, port: int = 0) -> None:
        self.spans: list[Seen] = []
        self.raw: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.status = 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector._take(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(collector.status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="collector", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def clear(self) -> None:
        self.spans, self.raw, self.headers, self.paths, self.status = [], [], [], [], 200

    def _take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.paths.append(path)
        self.headers.append(headers)
        self.raw.append(body)
        if self.status == 200:
            self.spans = [*self.spans, *_read(ExportTraceServiceRequest.FromString(body))]

    def wait_for(self, condition: Callable[[list[Seen]], Any], timeout: float = 15.0) -> list[Seen]:
        """All spans, once `condition` holds for them; fails after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not condition(self.spans):
            assert time.monotonic() < deadline, f"did not come: {[(each.name, each.parent) for each in self.spans]}"
            time.sleep(0.02)
        return self.spans


def children(spans: list[Seen], parent: Seen, name: str = "") -> list[Seen]:
    """The parts of `parent`, in the order in which they began; only those whose name begins so."""
    found = [each for each in spans if each.parent == parent.id and each.name.startswith(name)]
    return sorted(found, key=lambda each: each.began)


def _read(request: ExportTraceServiceRequest) -> list[Seen]:
    seen = []
    for part in request.resource_spans:
        resource = {each.key: _value(each.value) for each in part.resource.attributes}
        for scope in part.scope_spans:
            for span in scope.spans:
                seen.append(
                    Seen(
                        span.name,
                        SpanProto.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        span.status.code == ERROR,
                        span.status.message,
                        {each.key: _value(each.value) for each in span.attributes},
                        tuple(event.name for event in span.events),
                        resource,
                    )
                )
    return seen


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


def tree(spans: list[Seen], above: Seen, depth: int = 0) -> str:
    """A span and its parts, a line each."""
    told = " ".join(f"{name}={value}" for name, value in above.attributes.items())
    failed = " FAILED" if above.failed else ""
    line = f"{'  ' * depth}{above.name}{failed} {(above.ended - above.began) / 1e6:.1f} ms  {told}\n"
    return line + "".join(tree(spans, part, depth + 1) for part in children(spans, above))


def main() -> None:
    """Print requests as they come, each once its own span is there and a second is over for its parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=4318)
    with Collector(parser.parse_args().port) as collector, contextlib.suppress(KeyboardInterrupt):
        print(f"endpoint: {collector.url}", flush=True)
        while True:
            time.sleep(2)
            spans, now = collector.spans, time.time_ns()
            for root in [each for each in spans if each.kind == "server" and each.ended < now - 3e9]:
                if root.name.startswith("POST"):
                    print(tree(spans, root), flush=True)
                    collector.spans = [each for each in collector.spans if each.trace != root.trace]


if __name__ == "__main__":
    main()
