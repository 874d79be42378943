"""The transport seam: what goes over it, whom it trusts, and which error each fault becomes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from actors.errors import ConfigError
from actors.transport import AiohttpTransport, environment_proxy
from tests.loopback import Behaviour, LoopbackProvider


@pytest.fixture
def provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as made:
        yield made


def ask(url: str, **extensions: object) -> httpx.Request:
    body = b'{"model": "m", "messages": [1]}'
    return httpx.Request("POST", url, content=body, headers={"cookie": "mine=1"}, extensions=extensions)


async def send(transport: httpx.AsyncBaseTransport, request: httpx.Request) -> httpx.Response:
    response = await transport.handle_async_request(request)
    await response.aread()
    return response


@pytest.fixture
def url(provider: LoopbackProvider) -> str:
    return f"{provider.url_for('openai')}/chat/completions"


async def test_cookies_are_not_kept_and_redirects_not_followed(provider: LoopbackProvider, url: str) -> None:
    transport = AiohttpTransport(max_connections=2)
    provider.enqueue(Behaviour(status=307, headers={"location": url, "set-cookie": "theirs=2"}))
    assert (await send(transport, ask(url))).status_code == 307
    assert (await send(transport, ask(url))).status_code == 200
    assert [request.headers["cookie"] for request in provider.requests] == ["mine=1", "mine=1"]
    assert provider.connections == 1
    await transport.aclose()


async def test_it_tells_when_the_request_has_left(provider: LoopbackProvider, url: str) -> None:
    provider.default = Behaviour(never=True)
    transport = AiohttpTransport(max_connections=2)
    sent = asyncio.Event()
    call = asyncio.ensure_future(send(transport, ask(url, on_sent=sent.set)))
    await asyncio.wait_for(sent.wait(), 5)
    assert not call.done()
    call.cancel()
    await transport.aclose()


async def test_a_stale_connection_is_an_error_that_says_so(provider: LoopbackProvider, url: str) -> None:
    # The server closes the kept connection; the next call must either notice or fail, never hang.
    provider.default = Behaviour(close=True)
    transport = AiohttpTransport(max_connections=2)
    for _ in range(5):
        try:
            assert (await asyncio.wait_for(send(transport, ask(url)), 5)).status_code == 200
        except (httpx.RemoteProtocolError, httpx.ReadError):
            continue
    await transport.aclose()


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(break_after=5, break_how="fin"), httpx.RemoteProtocolError),
        (Behaviour(break_after=5, break_how="half"), httpx.RemoteProtocolError),
        (Behaviour(break_after=5, break_how="rst"), (httpx.ReadError, httpx.RemoteProtocolError)),
    ],
)
async def test_broken_bodies(provider: LoopbackProvider, url: str, behaviour: Behaviour, kind: type[Exception]) -> None:
    provider.default = behaviour
    transport = AiohttpTransport(max_connections=2)
    with pytest.raises(kind):
        await send(transport, ask(url))
    await transport.aclose()


async def test_a_connection_that_is_never_accepted() -> None:
    # 192.0.2.0/24 is reserved for documentation (RFC 5737): nothing answers, or there is no route at all.
    transport = AiohttpTransport(max_connections=2)
    with pytest.raises((httpx.ConnectTimeout, httpx.ConnectError)):
        await asyncio.wait_for(send(transport, ask("http://192.0.2.1/v1", timeout={"connect": 0.3})), 5)
    await transport.aclose()


async def test_waiting_for_a_slot_does_not_count_as_sent(provider: LoopbackProvider, url: str) -> None:
    provider.default = Behaviour(never=True)
    transport = AiohttpTransport(max_connections=1)
    first = asyncio.ensure_future(send(transport, ask(url)))
    assert await asyncio.to_thread(provider.wait_for, lambda: provider.in_flight == 1)
    sent: list[int] = []
    request = ask(url, on_sent=lambda: sent.append(1), timeout={"connect": 0.2})
    with pytest.raises(httpx.ConnectTimeout):
        await send(transport, request)
    assert sent == []
    first.cancel()
    await transport.aclose()


async def test_certificates_are_verified(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    address = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    trusting = AiohttpTransport(max_connections=1, verify=False)
    assert (await send(trusting, ask(address))).content == b"{}"
    transport = AiohttpTransport(max_connections=1)
    with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
        await send(transport, ask(address))
    await trusting.aclose()
    await transport.aclose()
    server.close()


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody vouches for, with its key, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_proxies_of_the_environment(no_proxies: pytest.MonkeyPatch) -> None:
    assert environment_proxy("https://api.example.com/v1") is None
    no_proxies.setenv("HTTPS_PROXY", "proxy.example.com:3128")
    no_proxies.setenv("NO_PROXY", "internal.example.com")
    assert environment_proxy("https://api.example.com/v1") == "http://proxy.example.com:3128"
    assert environment_proxy("http://api.example.com/v1") is None
    assert environment_proxy("https://internal.example.com/v1") is None
    no_proxies.setenv("ALL_PROXY", "socks5://proxy.example.com:1080")
    with pytest.raises(ConfigError, match=r"socks5 proxy for api\.example\.com"):
        environment_proxy("http://api.example.com/v1")


async def test_requests_go_through_the_proxy(provider: LoopbackProvider, no_proxies: pytest.MonkeyPatch) -> None:
    no_proxies.setenv("http_proxy", f"http://127.0.0.1:{provider.port}")
    address = "http://provider.invalid/v1/chat/completions"
    transport = AiohttpTransport(max_connections=1, proxy=environment_proxy(address))
    assert (await send(transport, ask(address))).status_code == 200
    assert provider.requests[0].path == address
    assert provider.requests[0].headers["host"] == "provider.invalid"
    await transport.aclose()
