"""Server-sent events: an incremental decoder and an encoder, both plain functions of bytes.

Follows "Server-sent events" of the HTML standard: lines end in LF, CR or CRLF, a leading byte order mark is
ignored, comment lines and unknown fields are skipped, several data lines join with a newline. Two liberties:
`SSEDecoder.finish` also gives the event of a stream that ends without its last blank line (servers do that),
and an event may not exceed a size, so that a broken server cannot fill the memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.errors import ProtocolError

DONE = b"data: [DONE]\n\n"
MAX_EVENT_BYTES = 16 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """`event` is "message" where the server named none; `id` is the last event id seen so far; `retry` the
    reconnection time in milliseconds, if this event set one."""

    data: str
    event: str = "message"
    id: str = ""
    retry: int | None = None


class SSEDecoder:
    """Feed it bytes, cut anywhere; it gives whole events.

    Raises:
        ProtocolError: an event, or a single line, is larger than `max_event_bytes`.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max = max_event_bytes
        self._pieces: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._at_start = True
        self._data: list[bytes] = []
        self._event = ""
        self._id = ""
        self._retry: int | None = None

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """The events that `chunk` completes, in order."""
        if not chunk:
            return []
        if self._after_cr:
            # The CR that ended the previous chunk may have been half of a CRLF.
            self._after_cr = False
            if chunk[0] == 0x0A:
                chunk = chunk[1:]
        if b"\n" not in chunk and b"\r" not in chunk:
            # Joined only once the line is whole: one huge line in small pieces stays linear.
            self._pieces.append(chunk)
            self._grow(len(chunk))
            return []
        self._after_cr = chunk.endswith(b"\r")
        self._pieces.append(chunk)
        lines = b"".join(self._pieces).splitlines(keepends=True)
        self._pieces.clear()
        if not lines[-1].endswith((b"\n", b"\r")):
            self._pieces.append(lines.pop())
        events = []
        for line in lines:
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                events.append(event)
        self._size = sum(map(len, self._data)) + sum(map(len, self._pieces))
        self._grow(0)
        return events

    def finish(self) -> list[ServerSentEvent]:
        """The event of a stream that ended without its closing blank line, if there is one."""
        if self._pieces:
            line = b"".join(self._pieces)
            self._pieces.clear()
            self._line(line)
        event = self._line(b"")
        return [] if event is None else [event]

    def _grow(self, by: int) -> None:
        self._size += by
        if self._size > self._max:
            raise ProtocolError(f"an event of the stream is larger than {self._max} bytes")

    def _line(self, line: bytes) -> ServerSentEvent | None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit():
            self._retry = int(value[:9])
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        name, self._event = self._event, ""
        retry, self._retry = self._retry, None
        if not self._data:
            return None
        data = b"\n".join(self._data)
        self._data.clear()
        if len(data) > self._max:
            raise ProtocolError(f"an event of the stream is larger than {self._max} bytes")
        return ServerSentEvent(data.decode("utf-8", "replace"), name or "message", self._id, retry)


def encode_event(data: str | bytes, *, event: str | None = None, id: str | None = None) -> bytes:
    """One event as bytes. Line breaks of any kind in `data` become separate data lines (read back as LF).

    Raises:
        ValueError: `event` or `id` holds a line break, which would let it forge fields.
    """
    raw = data.encode() if isinstance(data, str) else data
    if event is None and id is None and b"\n" not in raw and b"\r" not in raw:
        return b"data: " + raw + b"\n\n"
    lines = []
    for name, value in (("event", event), ("id", id)):
        if value is not None:
            if "\n" in value or "\r" in value or "\0" in value:
                raise ValueError(f"the {name} of a server-sent event cannot hold a line break")
            lines.append(f"{name}: {value}".encode())
    normal = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines += [b"data: " + line for line in normal.split(b"\n")]
    return b"\n".join(lines) + b"\n\n"


def encode_comment(text: str = "") -> bytes:
    """A comment, which clients ignore: keeps an idle connection alive."""
    return b"".join(f": {line}\n".encode() for line in (text.splitlines() or [""])) + b"\n"
