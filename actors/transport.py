"""The one seam between us and a provider's HTTP server: an `httpx.AsyncBaseTransport`.

Adapters hand it an `httpx.Request` and read the `httpx.Response`; nothing above it knows which library moves the
bytes, and a test may put any other transport in its place. Underneath runs aiohttp, because a call through it
costs a fraction of the CPU of httpx's own transport (`benchmarks/transport.py` measures both), and CPU per call
is what bounds a gateway. We map its errors ourselves: each becomes the httpx error of the same meaning, so that a
connection reset after the request was sent is never mistaken for one that never was.

Request extensions understood: `timeout` as in httpx (only `connect`, which covers name lookup, TCP and TLS; all
other waits are bounded by the caller), and `on_sent`, a function called once the body has been handed to the
connection.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

import aiohttp
import aiohttp.abc
import httpx
import yarl

from actors.config import WorkerSpec
from actors.errors import ConfigError

KEEPALIVE_S = 30.0
DNS_TTL_S = 60


def make_transport(spec: WorkerSpec) -> httpx.AsyncBaseTransport:
    """A transport for one worker: at most `spec.limits.concurrency` connections, certificates verified, redirects
    never followed, cookies never kept, and the proxy that the environment (`HTTPS_PROXY`, `NO_PROXY`, …) names.

    Raises:
        ConfigError: the environment names a proxy of a kind that is not http or https.
    """
    return AiohttpTransport(max_connections=spec.limits.concurrency, proxy=environment_proxy(spec.url))


def environment_proxy(url: str) -> str | None:
    """The proxy for `url` by the usual environment variables, or None. Asked once, not for every request."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is None or parts.hostname is None or urllib.request.proxy_bypass(parts.hostname):
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        kind = proxy.partition("://")[0]
        raise ConfigError(f"the environment names a {kind} proxy for {parts.hostname}: only http(s) is supported")
    return proxy


class AiohttpTransport(httpx.AsyncBaseTransport):
    """See the module docstring. Bound to the event loop that makes the first request."""

    def __init__(self, *, max_connections: int, proxy: str | None = None, verify: bool = True) -> None:
        self._max_connections = max_connections
        self._proxy = proxy
        self._ssl = httpx.create_ssl_context(verify=verify)
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=self._max_connections,
            keepalive_timeout=KEEPALIVE_S,
            ttl_dns_cache=DNS_TTL_S,
            ssl=self._ssl,
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            proxy=self._proxy,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._session is None:
            self._session = self._open()
        extensions = request.extensions
        body = _Body(await request.aread(), extensions.get("on_sent"))
        timeout = aiohttp.ClientTimeout(total=None, connect=extensions.get("timeout", {}).get("connect"))
        try:
            response = await self._session.request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                headers=request.headers.multi_items(),
                data=body,
                allow_redirects=False,
                timeout=timeout,
            )
        except (aiohttp.ClientError, OSError) as error:
            raise _as_httpx(error) from error
        return httpx.Response(
            response.status,
            headers=list(response.raw_headers),
            stream=_ResponseStream(response),
            request=request,
        )

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


class _Body(aiohttp.Payload):
    """A request body that tells when it has been handed to the connection."""

    def __init__(self, value: bytes, on_sent: Callable[[], None] | None) -> None:
        super().__init__(value, content_type="application/json")
        self._on_sent = on_sent
        self._size = len(value)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)

    async def write(self, writer: aiohttp.abc.AbstractStreamWriter) -> None:
        try:
            await writer.write(self._value)
        finally:
            # Also when cancelled while the socket drains: what is buffered may still arrive.
            if self._on_sent is not None:
                self._on_sent()


class _ResponseStream(httpx.AsyncByteStream):
    """Gives the bytes as they come, whatever has arrived at once."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    def __aiter__(self) -> _ResponseStream:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise _as_httpx(error) from error
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


def _as_httpx(error: Exception) -> httpx.HTTPError:
    """aiohttp's error as the httpx error of the same meaning. The more specific classes stand first."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return httpx.ConnectTimeout(str(error))
        case TimeoutError():
            return httpx.ReadTimeout(str(error))
        case aiohttp.ClientProxyConnectionError() | aiohttp.ClientHttpProxyError():
            return httpx.ProxyError(_reason(error))
        case aiohttp.ClientConnectorError():
            return httpx.ConnectError(_reason(error))
        case aiohttp.InvalidURL():
            return httpx.UnsupportedProtocol(str(error))
        case aiohttp.ClientResponseError():
            return httpx.RemoteProtocolError(f"not HTTP: {error.message}")
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientPayloadError():
            return httpx.RemoteProtocolError(_reason(error))
        case _:
            return httpx.ReadError(_reason(error))


def _reason(error: Exception) -> str:
    """The operating system's words where there are some, else the error's own."""
    inner = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
