"""The SSE codec: any chunk boundary gives the same events."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import ProtocolError
from actors.sse import DONE, ServerSentEvent, SSEDecoder, encode_comment, encode_event

STREAM = (
    b"\xef\xbb\xbf: hello\r\n\r\n"
    b"data: first\r\n\r\n"
    b"event: delta\rid: 7\rdata:  two\rdata: lines\r\r"
    b"data\n\nretry: 1500\nunknown: x\nid: bad\0id\ndata:caf\xc3\xa9\n\n"
    b"event: nothing\n\n"
    b"data: [DONE]"
)
EVENTS = [
    ServerSentEvent("first"),
    ServerSentEvent(" two\nlines", "delta", "7"),
    ServerSentEvent("", id="7"),
    ServerSentEvent("café", id="7", retry=1500),
    ServerSentEvent("[DONE]", id="7"),
]


def decode(pieces: list[bytes], **options: int) -> list[ServerSentEvent]:
    decoder = SSEDecoder(**options)
    return [*itertools.chain.from_iterable(map(decoder.feed, pieces)), *decoder.finish()]


def cut(raw: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({c % (len(raw) + 1) for c in cuts}), len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(edges)]


def test_every_field_and_line_ending() -> None:
    assert decode([STREAM]) == EVENTS


def test_byte_by_byte() -> None:
    assert decode([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, 10_000), max_size=30))
def test_any_chunk_boundary(cuts: list[int]) -> None:
    assert decode(cut(STREAM, cuts)) == EVENTS


line_free = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]))


@given(
    st.lists(st.tuples(st.text(), st.none() | line_free.filter(bool)), max_size=8),
    st.lists(st.integers(0, 10_000), max_size=20),
    st.sampled_from([b"\n", b"\r", b"\r\n"]),
)
def test_what_is_encoded_is_decoded(events: list[tuple[str, str | None]], cuts: list[int], ending: bytes) -> None:
    raw = b"".join(encode_event(data, event=event) + encode_comment("keep\nalive") for data, event in events)
    raw = raw.replace(b"\n", ending)
    expected = [(d.replace("\r\n", "\n").replace("\r", "\n"), e or "message") for d, e in events]
    assert [(e.data, e.event) for e in decode(cut(raw, cuts))] == expected


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=10))
def test_garbage_never_crashes_and_ignores_boundaries(raw: bytes, cuts: list[int]) -> None:
    assert decode(cut(raw, cuts)) == decode([raw])


def test_the_end_of_a_stream_needs_no_blank_line() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: a\n\ndata: b") == [ServerSentEvent("a")]
    assert decoder.finish() == [ServerSentEvent("b")]
    assert decoder.finish() == []


@pytest.mark.parametrize("piece", [b"x" * 10, b"data: y\n"])
def test_events_are_bounded(piece: bytes) -> None:
    with pytest.raises(ProtocolError, match="larger than 100 bytes"):
        decode([piece] * 200, max_event_bytes=100)


def test_a_bound_is_per_event() -> None:
    assert len(decode([b"data: 0123456789\n\n"] * 50, max_event_bytes=40)) == 50


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b"])
def test_names_cannot_forge_fields(bad: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        encode_event("x", event=bad)


def test_encoding() -> None:
    assert encode_event("a\r\nb", event="e", id="1") == b"event: e\nid: 1\ndata: a\ndata: b\n\n"
    assert encode_event(b"[DONE]") == DONE
    assert encode_comment() == b": \n\n"
