"""HAProxy as Ray's template and our mends of it make it: a gateway that dies under a request."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from actors.config import ServeConfig
from serve import environment
from serve.environment import free_ports, haproxy_binary, settings

pytestmark = pytest.mark.skipif(haproxy_binary() is None, reason="there is no HAProxy")

# The lines of Ray's template that matter here; `test_the_mended_lines_are_rays` holds them against it.
LINES = (
    "    acl routes path -i /-/routes",
    "    http-reuse always",
    "    option redispatch 1",
    "backend default_backend",
    "    http-request return status 404 content-type text/plain lf-string \"Path '%[path]' not found. "
    'Ping http://.../-/routes for available routes."',
)
CONFIG = """global
    tune.bufsize {bufsize}
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    option redispatch 1
    retry-on {retry_on}
    errorfile 502 {folder}/500.http
    errorfile 503 {folder}/500.http
frontend http_frontend
    bind 127.0.0.1:{port}
    acl routes path -i /-/routes
    use_backend gateways unless {{ path /none }}
    default_backend default_backend
backend default_backend
{not_found}
backend gateways
    http-reuse always
    server one 127.0.0.1:{one}
    server other 127.0.0.1:{other}
"""


class Gateway:
    """Answers "/" with its name and "/wait" when `go` is set; its death closes everything that it has open."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waiting = 0
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self, port: int) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=1 << 24)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.partition(b":")[2]))
                if head.startswith(b"POST /wait"):
                    self.waiting += 1
                    self.asked.set()
                    await self.go.wait()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n" + self.name.encode())
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def die(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()


class Caller:
    """One connection to the proxy, which an earlier request has used."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Caller:
        made = cls(*await asyncio.open_connection("127.0.0.1", port))
        await made.send("/", b"x")
        assert (await made.answer())[0] == 200
        return made

    async def send(self, path: str, body: bytes, *, pause: float = 0.0) -> None:
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        if pause:
            # As most HTTP clients do: the body is another write, and another packet.
            self._writer.write(head)
            await self._writer.drain()
            await asyncio.sleep(pause)
            head = b""
        self._writer.write(head + body)
        await self._writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        """Status and body; status 0 where the connection was closed without a word."""
        async with asyncio.timeout(20):
            try:
                head = await self._reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return 0, b""
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            return int(head.split()[1]), await self._reader.readexactly(int(length.partition(b":")[2]))

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def proxied(folder: Path) -> AsyncIterator[tuple[int, Gateway, Gateway]]:
    port, one, other = free_ports(3)
    made = settings(ServeConfig(), folder, free_ports(4))
    file = folder / "haproxy.cfg"
    file.write_text(
        CONFIG.format(
            bufsize=made["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"],
            retry_on=made["RAY_SERVE_HAPROXY_RETRY_ON"],
            folder=folder,
            not_found=LINES[-1],
            port=port,
            one=one,
            other=other,
        )
    )
    gateways = Gateway("one"), Gateway("two")
    for gateway, where in zip(gateways, (one, other), strict=True):
        await gateway.start(where)
    with (folder / "log").open("wb") as log:
        command = [made["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(file)]
        proxy = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        for _ in range(100):
            try:
                (await Caller.connect(port)).close()
                break
            except OSError:
                await asyncio.sleep(0.1)
        yield port, *gateways
    finally:
        proxy.kill()
        await proxy.wait()
        for gateway in gateways:
            gateway.die()


async def waiting(callers: list[Caller], gateways: tuple[Gateway, ...], size: int, pause: float) -> None:
    """All of them have asked, and each question is at a gateway."""
    for caller in callers:
        await caller.send("/wait", b"x" * size, pause=pause)
    async with asyncio.timeout(10):
        while sum(gateway.waiting for gateway in gateways) < len(callers):
            asked = [asyncio.create_task(gateway.asked.wait()) for gateway in gateways]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            for gateway, task in zip(gateways, asked, strict=True):
                gateway.asked.clear()
                task.cancel()


@pytest.mark.parametrize("pause", [0.0, 0.1])
@pytest.mark.parametrize("size", [300, 50_000])
async def test_another_gateway_is_asked(tmp_path: Path, size: int, pause: float) -> None:
    async with proxied(tmp_path) as (port, one, other):
        callers = [await Caller.connect(port) for _ in range(4)]
        await waiting(callers, (one, other), size, pause)
        assert one.waiting
        one.die()
        other.go.set()
        assert [await caller.answer() for caller in callers] == [(200, b"two")] * 4


@pytest.mark.parametrize("pause", [0.0, 0.1])
async def test_with_no_gateway_left_the_answer_is_an_error_in_json(tmp_path: Path, pause: float) -> None:
    async with proxied(tmp_path) as (port, one, other):
        callers = [await Caller.connect(port) for _ in range(4)]
        await waiting(callers, (one, other), 300, pause)
        one.die()
        other.die()
        for caller in callers:
            status, body = await caller.answer()
            assert status == 503
            assert json.loads(body)["error"]["code"] == "gateway_unavailable"


async def test_what_was_too_long_to_keep_is_answered_with_an_error(tmp_path: Path) -> None:
    async with proxied(tmp_path) as (port, one, other):
        callers = [await Caller.connect(port) for _ in range(4)]
        await waiting(callers, (one, other), 400_000, 0.0)
        one.die()
        other.die()
        for caller in callers:
            status, body = await caller.answer()
            assert status == 503
            assert json.loads(body)["error"]["code"] == "gateway_unavailable"


async def test_a_body_that_does_not_come_is_told_as_a_gateway_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "READ_SECONDS", 1.0)
    async with proxied(tmp_path) as (port, one, other):
        caller = await Caller.connect(port)
        await caller.send("/wait", b"x" * 300, pause=3)
        status, body = await caller.answer()
        assert (status, json.loads(body)["error"]["code"]) == (408, "request_timeout")
        assert one.waiting + other.waiting == 0


async def test_before_anything_is_deployed_a_caller_is_asked_to_come_again(tmp_path: Path) -> None:
    async with proxied(tmp_path) as (port, one, other):
        caller = await Caller.connect(port)
        await caller.send("/none", b"x")
        status, body = await caller.answer()
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (503, "gateway_unavailable")
        assert error["message"] == "no server is deployed here yet; try again"
        assert one.waiting + other.waiting == 0


def test_the_mended_lines_are_rays() -> None:
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    theirs = HAPROXY_CONFIG_TEMPLATE.splitlines()
    for line in LINES:
        assert line in theirs
        assert line in CONFIG.format_map(defaultdict(str, not_found=LINES[-1])).splitlines()
