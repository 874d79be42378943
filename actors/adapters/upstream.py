"""One worker's provider over HTTP: send JSON, get JSON or a stream of events, and nothing but `WorkerError`s.

Every wait is bounded by the worker's `timeout`: `connect` inside the transport, then `first_byte` from the start of
the call to the first byte of the body (`whole` where the answer is not streamed), `idle` between two reads, `total` for
everything.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from types import TracebackType
from typing import Any

import httpx
import orjson

from actors.adapters.base import CallContext
from actors.adapters.failures import from_exception, from_status, read_error
from actors.config import WorkerSpec
from actors.errors import ConfigError, ProtocolError, WorkerError, WorkerRejectedError, WorkerTimeoutError
from actors.sse import ServerSentEvent, SSEDecoder

MAX_BODY_BYTES = 64 * 1024 * 1024
# How long to wait for the end of a body whose last event has been read, so that its connection can be kept.
_LINGER_S = 0.05


class Upstream:
    """`auth` are the headers that carry the key and the dialect's version; `spec.headers` overrides them.

    Raises:
        ConfigError: the key or a header's value holds a character that no HTTP header can (often a line break).
    """

    def __init__(self, spec: WorkerSpec, transport: httpx.AsyncBaseTransport, auth: Mapping[str, str]) -> None:
        self.spec = spec
        self.transport = transport
        given = {name.lower(): value.get_secret_value() for name, value in spec.headers.items()}
        headers = {
            "content-type": "application/json",
            "accept": "application/json, text/event-stream",
            "accept-encoding": "identity",
            "user-agent": "fugu-ray",
            **auth,
            **given,
        }
        for name, value in headers.items():
            if not value.isprintable() or not value.isascii():
                raise ConfigError(f"worker {spec.name}: the value of header {name} cannot be sent; see its key")
        key = spec.api_key.get_secret_value() if spec.api_key else ""
        self.secrets: tuple[str, ...] = tuple(filter(None, (key, *given.values())))
        self._headers = headers
        self._urls: dict[str, httpx.URL] = {}
        where = httpx.URL(spec.url)
        self.where = f"{where.host}:{where.port}" if where.port else where.host

    async def post(self, path: str, body: Mapping[str, Any], context: CallContext) -> dict[str, Any]:
        """The JSON object that the provider answers with.

        Raises:
            WorkerError: whatever went wrong.
        """
        async with self.open(path, body, context, self.spec.timeout.until_whole) as response:
            raw = await response.read_all()
        return self._object(raw, response.content_type)

    def open(self, path: str, body: Mapping[str, Any], context: CallContext, patience: float) -> UpstreamResponse:
        """A call as an async context manager; leaving it closes the connection or gives it back. `patience` is how many
        seconds the first byte may take."""
        return UpstreamResponse(self, self._request(path, body, context.headers), context, patience)

    def _request(self, path: str, body: Mapping[str, Any], more: Mapping[str, str]) -> httpx.Request:
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = httpx.URL(self.spec.url + path)
        try:
            content = orjson.dumps(body)
        except TypeError as error:
            message = f"the request cannot be written as JSON: {error}"
            raise WorkerRejectedError(message, worker=self.spec.name) from None
        timeout = self.spec.timeout
        extensions: dict[str, Any] = {
            "timeout": {"connect": timeout.connect, "read": None, "write": None, "pool": None}
        }
        headers = {**self._headers, **more} if more else self._headers
        return httpx.Request("POST", url, headers=headers, content=content, extensions=extensions)

    def _object(self, raw: bytes, content_type: str) -> dict[str, Any]:
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            kind = content_type or "no content type"
            raise ProtocolError(f"{self.where} sent no valid JSON ({kind})", worker=self.spec.name) from None
        if not isinstance(body, dict):
            raise ProtocolError(f"{self.where} sent JSON that is not an object", worker=self.spec.name)
        self.raise_error_in(body)
        return body

    def raise_error_in(self, body: Mapping[str, Any]) -> None:
        """Raise the error that a body reports although its status was 200, as the errors inside streams do."""
        if "error" in body and body["error"] and (blame := read_error(body)) is not None:
            raise from_status(blame.status or 500, blame, {}, worker=self.spec.name, secrets=self.secrets)

    def event_object(self, data: str) -> dict[str, Any]:
        """An event's data as a JSON object, its error raised if it reports one."""
        event = orjson.loads(data)
        self.raise_error_in(event)
        return event

    @contextlib.contextmanager
    def parsing(self) -> Iterator[None]:
        """Around code that reads a provider's JSON as its documentation says it is: whatever in it is of another
        type or missing becomes a `ProtocolError`."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise self.malformed(f"{type(error).__name__} while reading it") from error

    def malformed(self, what: str) -> ProtocolError:
        return ProtocolError(f"{self.where} sent a reply that is not in its wire format: {what}", worker=self.spec.name)


class UpstreamResponse:
    """An answer being read. Enter it to send the request; inside, the status is 200 and headers have been told."""

    def __init__(self, upstream: Upstream, request: httpx.Request, context: CallContext, patience: float) -> None:
        self._upstream = upstream
        self._request = request
        self._context = context
        self._timeout = upstream.spec.timeout
        self._patience = patience
        self._response: httpx.Response | None = None
        self._body: AsyncIterator[bytes] | None = None
        self._decoder = SSEDecoder()
        self._phase = "first_byte"
        self._ended = False
        self._sent = False
        self.content_type = ""

    async def __aenter__(self) -> UpstreamResponse:
        now = asyncio.get_running_loop().time()
        self._deadline = now + self._timeout.total
        self._first_byte = min(now + self._patience, self._deadline)
        self._request.extensions["on_sent"] = self._on_sent
        try:
            with self._errors():
                async with asyncio.timeout_at(self._first_byte):
                    self._response = await self._upstream.transport.handle_async_request(self._request)
            await self._begin(self._response)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._ended:
                # The rest is the end of the body, as a rule already here; reading it keeps the connection.
                with contextlib.suppress(WorkerError, TimeoutError):
                    async with asyncio.timeout(_LINGER_S):
                        await self._read()
        finally:
            await self._close()

    async def _close(self) -> None:
        if self._response is not None:
            with contextlib.suppress(httpx.HTTPError):
                await self._response.aclose()

    def _on_sent(self) -> None:
        if not self._sent:
            self._sent = True
            self._context.on_sent()

    async def _begin(self, response: httpx.Response) -> None:
        self._on_sent()
        headers = dict(response.headers.items())
        self._context.on_headers(headers)
        self.content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        encoded = headers.get("content-encoding", "identity") != "identity"
        stream = response.aiter_bytes() if encoded else response.stream
        self._body = aiter(stream)  # type: ignore[arg-type]
        if response.status_code != 200:
            raw = b""
            with contextlib.suppress(WorkerError):
                raw = await self.read_all(limit=1024 * 1024)
            try:
                blame = read_error(orjson.loads(raw))
            except orjson.JSONDecodeError:
                blame = None
            spec = self._upstream.spec
            raise from_status(response.status_code, blame, headers, worker=spec.name, secrets=self._upstream.secrets)

    async def _read(self) -> bytes | None:
        """The next bytes of the body, or None at its end."""
        assert self._body is not None
        now = asyncio.get_running_loop().time()
        idle = min(now + self._timeout.idle, self._deadline)
        deadline = self._first_byte if self._phase == "first_byte" else idle
        with self._errors():
            async with asyncio.timeout_at(deadline):
                async for chunk in self._body:
                    self._phase = "idle"
                    return chunk
        self._ended = True
        return None

    async def read_all(self, limit: int = MAX_BODY_BYTES) -> bytes:
        """The whole body.

        Raises:
            WorkerError: it broke, fell silent or is larger than `limit` bytes.
        """
        pieces, size = [], 0
        while (chunk := await self._read()) is not None:
            pieces.append(chunk)
            size += len(chunk)
            if size > limit:
                where = self._upstream.where
                raise ProtocolError(f"{where} sent more than {limit} bytes", worker=self._upstream.spec.name)
        return b"".join(pieces)

    async def events(self) -> list[ServerSentEvent] | None:
        """The events of one read, in order (possibly none), or None at the end of the stream.

        Raises:
            WorkerError: the body is not an event stream, broke or fell silent.
        """
        if self._ended:
            return None
        if self.content_type not in ("text/event-stream", ""):
            if self.content_type == "application/json":
                self._upstream._object(await self.read_all(), self.content_type)
            raise self._upstream.malformed(f"asked for a stream, got {self.content_type[:60]}")
        chunk = await self._read()
        try:
            return self._decoder.finish() or None if chunk is None else self._decoder.feed(chunk)
        except ProtocolError as error:
            error.worker = self._upstream.spec.name
            raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        spec, where = self._upstream.spec, self._upstream.where
        try:
            yield
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise from_exception(error, worker=spec.name, where=where, secrets=self._upstream.secrets) from error
        except TimeoutError:
            late = asyncio.get_running_loop().time() >= self._deadline
            phase = "total" if late else self._phase
            seconds = self._patience if phase == "first_byte" else getattr(self._timeout, phase)
            words = {"first_byte": "no answer", "idle": "the answer stopped", "total": "no complete answer"}
            message = f"{where}: {words[phase]} for {seconds:g} s"
            raise WorkerTimeoutError(message, phase=phase, worker=spec.name) from None
