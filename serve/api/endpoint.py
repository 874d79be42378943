"""A path that answers conversations, straight on ASGI: the same for every dialect.

Until the first byte of the answer a failure is an HTTP error; after it, an event in the stream. No answer ends without
its dialect's end or a typed error.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from starlette.types import Receive, Scope, Send

from actors.config import ServeConfig
from actors.errors import DeadlineError, FuguError, RequestError
from actors.messages import ChatRequest, Chunk
from actors.spans import Span, current
from actors.structured import shape_of
from serve import sse
from serve.api.background import Background
from serve.api.http import headers_of, read_body, request_id, send_error, send_json, where_of
from serve.api.job import Deciding, Done, Engine, Event, Job
from serve.api.models import Served, check_served
from serve.api.responses import ResponsesExchange
from serve.api.wishes import WishReader
from serve.auth import Caller, Keys
from serve.metering import Holds, Metered, admit
from serve.metrics import Meter
from serve.schema import FuguBody
from serve.trace import Spent, Trace
from serve.tracing import request_span, tell_request

if TYPE_CHECKING:
    from actors.otel import Telemetry

log = logging.getLogger("fugu.gateway")


class Exchange(Protocol):
    """One request in a dialect, read, and the writer of its answer. `dropped` names fields that no answer of ours can
    carry the effect of."""

    @property
    def model(self) -> str: ...

    @property
    def stream(self) -> bool: ...

    @property
    def fugu(self) -> FuguBody | None: ...

    def request(self) -> tuple[ChatRequest, tuple[str, ...]]:
        """The request for a worker, and the fields that were dropped.

        Raises:
            RequestError: it cannot be said to a worker; names the field.
        """

    def whole(self, done: Done) -> bytes:
        """The body of a plain answer."""

    async def keep(self, done: Done) -> None:
        """Keep what the caller may ask for later; before the answer's end is told, so that it can."""

    def chunk(self, chunk: Chunk) -> bytes:
        """The events for a piece of the answer; empty if it has nothing to say."""

    def end(self, done: Done) -> bytes:
        """The last events of a complete stream."""

    def broken(self, error: FuguError, trace: Mapping[str, Any] | None) -> bytes:
        """The last events of a stream that failed after it began."""

    def alive(self) -> bytes:
        """What says that the answer is still on its way."""


class Dialect(Protocol):
    """A wire format. `path` is what it answers on, `schema_field` where a caller says what JSON the answer must be."""

    path: str
    schema_field: str

    def credential(self, headers: Mapping[bytes, bytes]) -> bytes | None:
        """The `Authorization` header, or what stands for it."""

    async def read(self, raw: bytes, id: str, caller: Caller) -> Exchange:
        """Raises:
        RequestError: the body is not of this dialect; `param` names the field.
        """

    def error(self, error: FuguError, trace: Mapping[str, Any] | None, id: str) -> bytes | None:
        """The body of an HTTP error; None is OpenAI's envelope."""


class Endpoint:
    """Answers one dialect. `engines` maps served models to what answers them."""

    def __init__(
        self,
        dialect: Dialect,
        deciding: Deciding,
        engines: Mapping[str, Engine],
        keys: Keys,
        wishes: WishReader,
        background: Background,
        meter: Meter,
        *,
        served: Served,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._dialect = dialect
        self._deciding = deciding
        self._engines = engines
        self._config: ServeConfig = deciding.config.serve
        self._keys = keys
        self._holds = Holds(deciding.config, deciding.prices)
        self._wishes = wishes
        self._background = background
        self._meter = meter
        self._served = served
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        trace = Trace(request_id(headers), time.perf_counter())
        with request_span(self._telemetry, self._dialect.path, headers, trace.request_id) as span:
            await self._respond(headers, trace, span, receive, send)

    async def _respond(
        self, headers: Mapping[bytes, bytes], trace: Trace, span: Span | None, receive: Receive, send: Send
    ) -> None:
        answer = _Answer(send, self._dialect, trace.request_id)
        traced = later = False
        metered: Metered | None = None
        model, outcome = "", "ok"
        failure: FuguError | None = None
        try:
            caller = await self._keys.enter(self._dialect.credential(headers))
            _check_content_type(headers)
            raw = await read_body(headers, receive, self._config.max_body_bytes)
            exchange = await self._dialect.read(raw, trace.request_id, caller)
            check_served(exchange.model, self._served)
            caller.check_model(exchange.model)
            model = exchange.model
            wishes = self._wishes.read(exchange.fugu or FuguBody(), headers, caller)
            self._wishes.check_writer(exchange.model, caller.key)
            traced = wishes.trace
            request, trace.dropped = exchange.request()
            await self._check_schema(request)
            job = Job(exchange.model, request, wishes, trace, exchange.stream, caller)
            metered = await admit(self._keys.book, job, self._holds)
            if isinstance(exchange, ResponsesExchange) and exchange.background:
                begun = await self._background.start(job, exchange, self._engines[job.model], metered)
                metered, later = None, True  # settled and counted when it is made
                if exchange.stream:
                    await self._tell(self._background.events(exchange), exchange, answer)
                else:
                    await answer.whole(begun)
                return
            limit = self._config.request_timeout
            try:
                async with asyncio.timeout(limit):
                    await self._answer(job, exchange, answer)
            except TimeoutError:
                raise DeadlineError(f"no complete answer within {limit:g} s") from None
        except FuguError as error:
            outcome, failure = error.code, error
            await answer.fail(error, trace if traced else None)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception as error:
            # A fault of ours: the caller learns that it happened, the log learns where, neither sees the request.
            failure = FuguError("internal error; the server's log has more")
            outcome = failure.code
            log.error("request %s failed: %s", trace.request_id, where_of(error))
            await answer.fail(failure, trace if traced else None)
        finally:
            self._deciding.resting.learn(trace.record)
            if not later:
                self._meter.request(self._dialect.path, model, outcome, trace, time.perf_counter())
            if span is not None:
                tell_request(span, model, outcome, trace, answer.status, failure)
            if metered is not None:
                await metered.settle(trace)

    async def _check_schema(self, request: ChatRequest) -> None:
        """A schema that no answer can be checked against costs nobody anything.

        Raises:
            RequestError: see `actors.json_schema.JsonSchema`.
        """
        try:
            await shape_of(request)
        except RequestError as error:
            field = self._dialect.schema_field
            raise RequestError(f"{field}: {error.message.partition(': ')[2]}", param=field) from None

    async def refuse(self, scope: Scope, send: Send, error: FuguError) -> None:
        """Answer with an error and do nothing."""
        trace = Trace(request_id(headers_of(scope)), time.perf_counter())
        self._meter.request(self._dialect.path, "", error.code, trace, trace.started)
        await _Answer(send, self._dialect, trace.request_id).fail(error, None)

    async def _answer(self, job: Job, exchange: Exchange, answer: _Answer) -> None:
        events = self._engines[job.model].run(job)
        if not exchange.stream:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Done):
                        _note_end(job.trace, event)
                        await exchange.keep(event)
                        await answer.whole(exchange.whole(event))
            return
        await self._tell(_written(events, exchange, job.trace), exchange, answer)

    async def _tell(self, events: AsyncGenerator[bytes, None], exchange: Exchange, answer: _Answer) -> None:
        answer.exchange = exchange
        lines = sse.with_keep_alive(events, self._config.keep_alive, exchange.alive)
        async with aclosing(lines):
            async for line in lines:
                await answer.event(line)
        await answer.done()


async def _written(
    events: AsyncGenerator[Event, None], exchange: Exchange, trace: Trace
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Done):
                _note_end(trace, event)
                await exchange.keep(event)
                yield exchange.end(event)
                continue
            if trace.first_piece_s is None and (event.text or event.tool_calls or event.refusal):
                _note_first_piece(trace)
            yield exchange.chunk(event)


def _note_first_piece(trace: Trace) -> None:
    trace.first_piece_s = round(time.perf_counter() - trace.started, 6)
    around = current()
    if around is not None:
        around.event("first token")


def _note_end(trace: Trace, done: Done) -> None:
    trace.ended = Spent(done.total, done.cost_usd)


class CountEndpoint:
    """Answers how many tokens a body of a dialect has. `count` makes the answer of it, for its caller."""

    def __init__(
        self, dialect: Dialect, keys: Keys, config: ServeConfig, count: Callable[[bytes, Caller], Awaitable[bytes]]
    ) -> None:
        self._dialect = dialect
        self._keys = keys
        self._config = config
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        answer = _Answer(send, self._dialect, request_id(headers))
        try:
            caller = await self._keys.enter(self._dialect.credential(headers))
            _check_content_type(headers)
            raw = await read_body(headers, receive, self._config.max_body_bytes)
            await answer.whole(await self._count(raw, caller))
        except FuguError as error:
            await answer.fail(error, None)

    async def refuse(self, scope: Scope, send: Send, error: FuguError) -> None:
        await _Answer(send, self._dialect, request_id(headers_of(scope))).fail(error, None)


class _Answer:
    """The response as far as it has gone out: whole, or a stream that can still tell of an error."""

    def __init__(self, send: Send, dialect: Dialect, id: str) -> None:
        self._send = send
        self._dialect = dialect
        self._id = id
        self._streaming = False
        self.exchange: Exchange | None = None
        self.status = 0
        """Of the answer that was begun, with its errors; 0 where none was."""

    async def whole(self, body: bytes) -> None:
        self.status = 200
        await send_json(self._send, 200, body)

    async def event(self, event: bytes) -> None:
        if not self._streaming:
            self._streaming = True
            self.status = 200
            await self._send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def done(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})

    async def fail(self, error: FuguError, trace: Trace | None) -> None:
        told = None if trace is None else trace.body(None, time.perf_counter())
        if not self._streaming or self.exchange is None:
            self.status = error.http_status
            await send_error(self._send, error, told, self._dialect.error(error, told, self._id))
            return
        await self.event(self.exchange.broken(error, told))
        await self.done()


def _check_content_type(headers: Mapping[bytes, bytes]) -> None:
    # Not pedantry: a page in someone's browser can post text/plain to this machine without asking, but not JSON.
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise RequestError("content-type: must be application/json", param="content-type")
