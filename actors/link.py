"""The way of calls into a provider actor: one authenticated stream connection per client process and actor.

Ray starts, names, finds and restarts the actors and hands out their address; the calls themselves do not go through
it. A call costs less than a tenth of the CPU of a Ray actor call this way (`benchmarks/link.py`), and so does every
piece of a stream. It also gives what a call between actors does not: a client that dies is noticed at once, because
the kernel closes its connection, and a slow reader holds back the writer.

A frame is a length (4 bytes, big-endian) and a pickle. Pickles can run code, so before the first frame both sides
prove with an HMAC that they hold the actor's token, which is made afresh by every actor and travels through Ray only;
nothing but fixed-length bytes is read until then. As with Ray's own connections, the network is trusted not to read
along.

    client → server   (CALL | STREAM, id, worker, request, headers)   (CANCEL, id)   (TAKEN, id, batches)   (PING,)
    server → client   (id, ChatReply | FuguError)   (id, (Chunk, …))   (id, Taken)   (0, None)

`headers` are those of the trace that a call is part of, None where it is not traced.

Here is what both sides share; they are `actors.link_client` and `actors.link_server`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import pickle
import socket
from dataclasses import dataclass, field
from typing import Any, cast

CALL, STREAM, CANCEL, TAKEN, PING = range(5)

NONCE = 32
HANDSHAKE_SECONDS = 5.0
# A stream may be this many batches ahead of its reader; the reader tells after every few that it has taken them.
WINDOW = 64
TELL_AFTER = 8
_LARGEST_FRAME = 1 << 29


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an actor listens. `token` is secret and not shown."""

    host: str
    port: int
    token: bytes = field(repr=False)


def proof(token: bytes, side: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """What shows that a side (`client` or `server`) holds the token."""
    return hmac.digest(token, side + client_nonce + server_nonce, hashlib.sha256)


class Framed(asyncio.Protocol):
    """Hands the bytes that come to `handshake` until it trusts the peer, then cuts them into frames for `received`."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self.trusted = False
        self._heard_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        _keep_alive(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        buffer = self._buffer
        buffer += data
        while not self.trusted:
            if not self.handshake(buffer):
                return None
        start = 0
        while len(buffer) - start >= 4:
            end = start + 4 + int.from_bytes(buffer[start : start + 4], "big")
            if end - start > _LARGEST_FRAME:
                return self.drop()
            if len(buffer) < end:
                break
            self.received(pickle.loads(memoryview(buffer)[start + 4 : end]))
            start = end
        if start:
            del buffer[:start]
        return None

    def handshake(self, buffer: bytearray) -> bool:
        """Go on with the handshake. False when more bytes are needed or the peer was dropped."""
        raise NotImplementedError

    def received(self, message: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def send(self, message: tuple[Any, ...]) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        data = pickle.dumps(message, protocol=5)
        self._transport.write(len(data).to_bytes(4, "big") + data)

    def drop(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice within half a minute that the other machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # macOS calls the idle time TCP_KEEPALIVE and lacks the last one.
    for names, value in ((("TCP_KEEPIDLE", "TCP_KEEPALIVE"), 10), (("TCP_KEEPINTVL",), 5), (("TCP_KEEPCNT",), 4)):
        option = next((getattr(socket, name) for name in names if hasattr(socket, name)), None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
