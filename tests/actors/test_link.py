"""The connection into an actor: real sockets, no Ray. Calls, streams, cancellation, back-pressure, and who may talk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import link_client, link_server
from actors.errors import RateLimitedError, StreamBrokenError, WorkerError
from actors.link import Endpoint
from actors.link_client import Link, LinkLostError
from actors.link_server import LinkServer, merge
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ToolCallDelta, Usage


def ask(text: str) -> ChatRequest:
    return ChatRequest((Message("user", text),))


class Runtime:
    """Answers by what it is asked; notes what was begun and cancelled."""

    def __init__(self) -> None:
        self.begun = 0
        self.produced = 0
        self.cancelled = asyncio.Event()

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.begun += 1
        match request.messages[0].text.split():
            case ["limited"]:
                raise RateLimitedError("slow down", worker="w", retry_after=3.5)
            case ["fault"]:
                raise KeyError("secret")
            case ["wait"]:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    self.cancelled.set()
                    raise
        return ChatReply("w", request.messages[0].text.upper())

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        self.begun += 1
        kind, count, pause = request.messages[0].text.split()
        try:
            for i in range(int(count)):
                self.produced += 1
                yield Chunk(f"{i} ")
                await asyncio.sleep(float(pause))
            if kind == "broken":
                raise StreamBrokenError("reset", worker="w")
            yield Chunk(final=ChatReply("w", "all"))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[Link, Runtime, LinkServer, Endpoint]]:
    runtime = Runtime()
    server = LinkServer({"w": runtime})
    endpoint = await server.start("127.0.0.1")
    link = await Link.connect(endpoint)
    try:
        yield link, runtime, server, endpoint
    finally:
        await link.close()
        await server.close()


async def test_calls_run_at_the_same_time_and_do_not_mix() -> None:
    async with connected() as (link, runtime, _, _):
        texts = [f"text {i} " + "x" * (i * 997) for i in range(100)]
        replies = await asyncio.gather(*(link.complete("w", ask(text)) for text in texts))
        assert [reply.text for reply in replies] == [text.upper() for text in texts]
        assert runtime.begun == 100
        assert link.running == 0


async def test_a_request_of_many_megabytes_passes() -> None:
    async with connected() as (link, _, _, _):
        text = "y" * 20_000_000
        assert (await link.complete("w", ask(text))).text == text.upper()


async def test_errors_arrive_with_their_fields_and_faults_without_content() -> None:
    async with connected() as (link, _, _, _):
        with pytest.raises(RateLimitedError) as caught:
            await link.complete("w", ask("limited"))
        assert (caught.value.worker, caught.value.retry_after) == ("w", 3.5)
        with pytest.raises(WorkerError, match="KeyError") as fault:
            await link.complete("w", ask("fault"))
        assert "secret" not in str(fault.value)
        with pytest.raises(WorkerError, match="KeyError"):
            await link.complete("nobody", ask("x"))


async def test_a_stream_arrives_in_order_and_soon() -> None:
    async with connected() as (link, _, _, _):
        loop, texts, stamps = asyncio.get_running_loop(), [], []
        begin = loop.time()
        async for chunk in link.stream("w", ask("fine 40 0.005")):
            texts.append(chunk.text)
            stamps.append(loop.time() - begin)
            last = chunk
        assert "".join(texts) == "".join(f"{i} " for i in range(40))
        assert last.final is not None
        assert len(texts) < 40  # pieces that came close together travel together
        assert stamps[0] < stamps[-1] / 2  # the first did not wait for them


async def test_a_broken_stream_hands_over_what_came_before() -> None:
    async with connected() as (link, _, _, _):
        texts = []

        async def read() -> None:
            async for chunk in link.stream("w", ask("broken 5 0")):
                texts.append(chunk.text)

        with pytest.raises(StreamBrokenError, match="reset"):
            await read()
        assert "".join(texts) == "0 1 2 3 4 "


async def test_cancelling_a_call_cancels_it_over_there() -> None:
    async with connected() as (link, runtime, _, _):
        task = asyncio.create_task(link.complete("w", ask("wait")))
        await asyncio.sleep(0.05)
        task.cancel()
        async with asyncio.timeout(0.5):
            await runtime.cancelled.wait()
        assert link.running == 0


async def test_closing_a_stream_cancels_it_over_there() -> None:
    async with connected() as (link, runtime, _, _):
        stream = link.stream("w", ask("fine 1000 0.05"))
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(0.5):
            await runtime.cancelled.wait()
        assert link.running == 0


async def test_a_client_that_is_gone_cancels_its_calls() -> None:
    async with connected() as (link, runtime, _, _):
        task = asyncio.create_task(link.complete("w", ask("wait")))
        await asyncio.sleep(0.05)
        link.drop()  # as the kernel does for a killed process
        async with asyncio.timeout(0.5):
            await runtime.cancelled.wait()
        with pytest.raises(LinkLostError):
            await task


async def test_a_server_that_is_gone_fails_what_runs_and_what_comes() -> None:
    async with connected() as (link, _, server, _):
        waiting = asyncio.create_task(link.complete("w", ask("wait")))
        stream = link.stream("w", ask("fine 1000 0.05"))
        await anext(stream)
        await server.close()
        with pytest.raises(LinkLostError):
            await waiting
        with pytest.raises(LinkLostError):
            await anext(stream)
        assert link.lost
        with pytest.raises(LinkLostError):
            await link.complete("w", ask("x"))


async def test_a_slow_reader_holds_the_writer_back() -> None:
    async with connected() as (link, runtime, _, _):
        stream = link.stream("w", ask("fine 3000 0.0005"))
        await anext(stream)
        for _ in range(30):
            before = runtime.produced
            await asyncio.sleep(0.2)
            if runtime.produced == before:
                break
        held = runtime.produced
        assert held < 2500
        await asyncio.sleep(0.3)
        assert runtime.produced == held
        text = "".join([chunk.text async for chunk in stream])
        assert text == "".join(f"{i} " for i in range(1, 3000))


async def test_a_hanging_server_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_client, "_PING_SECONDS", 0.05)
    async with connected() as (link, _, _, _):
        # Answers to pings keep it alive although the call itself takes long.
        task = asyncio.create_task(link.complete("w", ask("wait")))
        await asyncio.sleep(0.5)
        assert not task.done()
        monkeypatch.setattr(link_server._ServerConnection, "received", lambda *_: None)
        with pytest.raises(LinkLostError):
            await asyncio.wait_for(task, 2)


class Bomb:
    """Unpickling this leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


async def test_nothing_is_unpickled_for_who_does_not_hold_the_token(tmp_path: Path) -> None:
    async with connected() as (_, runtime, _, endpoint):
        with pytest.raises((LinkLostError, TimeoutError)):
            await Link.connect(replace(endpoint, token=b"wrong" * 7), timeout=1)
        bomb = pickle.dumps(Bomb(tmp_path / "mark"))
        frame = len(bomb).to_bytes(4, "big") + bomb
        for opening in (b"", b"\0" * 32, b"\0" * 64):
            reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            writer.write(opening + frame + b"\0" * 128)
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), 2)
            writer.close()
        assert not (tmp_path / "mark").exists()
        assert runtime.begun == 0
        assert endpoint.token.hex() not in repr(endpoint)
        assert repr(endpoint.token) not in repr(endpoint)


async def test_a_client_does_not_trust_a_stranger_on_the_port() -> None:
    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(32)
        writer.write(b"\0" * 200)

    server = await asyncio.start_server(stranger, "127.0.0.1", 0)
    endpoint = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1], b"t" * 32)
    with pytest.raises((LinkLostError, TimeoutError)):
        await Link.connect(endpoint, timeout=1)
    server.close()


async def test_who_says_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_server, "HANDSHAKE_SECONDS", 0.1)
    async with connected() as (_, _, _, endpoint):
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()


deltas = st.builds(ToolCallDelta, st.integers(0, 2), arguments=st.text(max_size=3))
chunks = st.one_of(
    st.builds(Chunk, text=st.text(min_size=1, max_size=3), usage=st.none() | st.builds(Usage, st.integers(1, 3))),
    st.builds(Chunk, reasoning=st.text(min_size=1, max_size=3)),
    st.builds(Chunk, tool_calls=st.lists(deltas, min_size=1, max_size=2).map(tuple)),
    st.builds(Chunk, text=st.text(max_size=2), reasoning=st.text(max_size=2)),
)


@given(st.lists(chunks, max_size=12))
def test_merging_changes_nothing_but_the_number_of_chunks(pieces: list[Chunk]) -> None:
    def content(chunks: list[Chunk]) -> list[tuple[str, object]]:
        """Each character and each tool delta with its kind, in order."""
        flat: list[tuple[str, object]] = []
        for chunk in chunks:
            flat += [("text", character) for character in chunk.text]
            flat += [("reasoning", character) for character in chunk.reasoning]
            flat += [("tool", delta) for delta in chunk.tool_calls]
        return flat

    final = Chunk(final=ChatReply("w"))
    merged = merge([*pieces, final])
    assert content(list(merged)) == content(pieces)
    assert merged[-1] is final
    told = [[chunk.usage for chunk in each if chunk.usage is not None] for each in (merged, pieces)]
    assert told[0][-1:] == told[1][-1:], "the newest stays"
    assert len(merged) <= len(pieces) + 1
