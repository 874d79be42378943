"""Responses that are streamed while they are made in the background: who reads may leave and go on. No Ray."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from actors.errors import StreamBrokenError
from actors.messages import ChatReply, ChatRequest, Chunk, Usage
from serve.api.conversations import Conversations, Record
from serve.auth import ANYONE
from serve.store import SqliteStore
from tests.serve.test_gateway import KEY, Scripted, gateway
from tests.serve.test_responses import Says, client_of, until

pytestmark = pytest.mark.timeout(60)


class Halting:
    """Says one word, waits to be told to go on, says another."""

    name = "a"

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.left = asyncio.Event()

    async def complete(self, request: ChatRequest) -> ChatReply:
        raise AssertionError("it is streamed")

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        try:
            yield Chunk("one ")
            await self.go_on.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise
        yield Chunk("two")
        yield Chunk(final=ChatReply("a", "one two", usage=Usage(1, 2)))


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))


@asynccontextmanager
async def serving(worker: Any, **serve: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client over real sockets: the test transport of httpx gives an answer once it is whole."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(gateway(worker, serve=serve), log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve([listening]))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    try:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=20) as client:
            yield client
    finally:
        server.should_exit = server.force_exit = True
        await task


async def begun(client: openai.AsyncOpenAI) -> tuple[str, list[Any]]:
    """The id of a response whose reader leaves after the first word, and the events that he has read."""
    stream: Any = await client.responses.create(model="fugu", input="?", background=True, stream=True)
    seen: list[Any] = []
    async for event in stream:
        seen.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    return seen[0].response.id, seen


async def test_a_reader_leaves_and_goes_on() -> None:
    worker = Halting()
    async with serving(worker) as client:
        id, seen = await begun(client)
        assert seen[0].response.status == "in_progress"
        assert not worker.left.is_set(), "it is made all the same"
        worker.go_on.set()
        rest = [
            e async for e in await client.responses.retrieve(id, stream=True, starting_after=seen[-1].sequence_number)
        ]
        assert [event.sequence_number for event in [*seen, *rest]] == list(range(len(seen) + len(rest)))
        assert [event.type for event in [*seen, *rest]] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        last: Any = rest[-1]
        kept = await client.responses.retrieve(id)
        assert (last.response.output_text, kept.output_text, kept.status) == ("one two", "one two", "completed")
        again = [event async for event in await client.responses.retrieve(id, stream=True)]
        assert [event.model_dump() for event in again] == [event.model_dump() for event in [*seen, *rest]]


async def test_the_sdks_own_helper_takes_it_up() -> None:
    worker = Halting()
    async with serving(worker) as client:
        id, seen = await begun(client)
        worker.go_on.set()
        async with client.responses.stream(response_id=id, starting_after=seen[-1].sequence_number) as stream:
            types = [event.type async for event in stream]
        assert types[-1] == "response.completed"


async def test_cancelled_and_deleted_ones_end() -> None:
    worker = Halting()
    async with serving(worker) as client:
        id, seen = await begun(client)
        reading = asyncio.create_task(_rest(client, id, seen[-1].sequence_number))
        await asyncio.sleep(0.2)
        assert (await client.responses.cancel(id)).status == "cancelled"
        assert await asyncio.wait_for(reading, 5) == []
        await asyncio.wait_for(worker.left.wait(), 5)
        await client.responses.delete(id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(id, stream=True)


async def _rest(client: openai.AsyncOpenAI, id: str, after: int) -> list[Any]:
    return [event async for event in await client.responses.retrieve(id, stream=True, starting_after=after)]


async def test_a_failure_is_the_last_event() -> None:
    client = client_of(Scripted("a", "half", StreamBrokenError("cut", worker="a")))
    stream: Any = await client.responses.create(model="fugu", input="?", background=True, stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "cut"
    assert (await client.responses.retrieve(events[0].response.id)).status == "failed"


async def test_what_cannot_be_streamed_again_says_so() -> None:
    keys = {"api_keys": [KEY, "another-key-77"]}
    client = client_of(Says("a", Chunk("one")), serve=keys)
    plain = await client.responses.create(model="fugu", input="?")
    silent = await client.responses.create(model="fugu", input="?", background=True)
    for made in (plain, silent):
        with pytest.raises(openai.BadRequestError, match="background and stream"):
            await client.responses.retrieve(made.id, stream=True)
    await until(client, silent.id, "completed")
    id = (await begun(client))[0]
    with pytest.raises(openai.NotFoundError):
        await client_of(Says("a"), key="another-key-77", serve=keys).responses.retrieve(id, stream=True)
    with pytest.raises(openai.BadRequestError, match="starting_after"):
        await client.get(f"/responses/{id}?stream=true&starting_after=x", cast_to=object)


async def test_the_end_of_one_whose_gateway_died(tmp_path: Path) -> None:
    """Nobody writes its events any more: whoever reads is told, instead of waiting for ever."""
    conversations = Conversations(SqliteStore(tmp_path / "kept.sqlite"), 60)
    body = {"id": "resp_1", "status": "in_progress", "background": True}
    await conversations.keep(Record(body, [], [], None), ANYONE)
    await conversations.events.put("resp_1", 0, b"event: response.created\ndata: {}\n\n", ANYONE)
    events = [event async for event in conversations.events.read("resp_1", ANYONE, conversations)]
    assert len(events) == 2
    assert events[1].startswith(b"event: response.failed\n")
    assert b'"sequence_number":1' in events[1]


async def test_who_reads_again_is_kept_alive_as_configured() -> None:
    worker = Halting()
    async with serving(worker, keep_alive=0.2) as client:
        id, _ = await begun(client)
        async with client.responses.with_streaming_response.retrieve(id, stream=True) as answer:
            async with asyncio.timeout(5):
                told = [line async for line in until_alive(answer)]
        assert told[-1] == ": keep-alive"
        worker.go_on.set()


async def until_alive(answer: Any) -> AsyncIterator[str]:
    async for line in answer.iter_lines():
        yield line
        if line.startswith(":"):
            return
