"""Events between a run and a reader who may be slow."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.events import Events


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 8))
def test_all_is_read_in_order_and_little_waits_unread(reader_first: list[bool], most: int) -> None:
    async def main() -> None:
        events: Events[int] = Events(most)
        unread: list[int] = []
        read: list[int] = []

        async def write() -> None:
            for number, wait in enumerate(reader_first):
                events.put(number)
                unread.append(number)
                assert len(unread) <= most
                if wait:
                    await asyncio.sleep(0)
                await events.room()
            events.close()

        writing = asyncio.create_task(write())
        while (event := await events.read()) is not None:
            assert unread.pop(0) == event
            read.append(event)
            if event % 3 == 0:
                await asyncio.sleep(0)
        await writing
        assert read == list(range(len(reader_first)))
        assert await events.read() is None

    asyncio.run(main())


async def test_what_few_tell_never_waits() -> None:
    events: Events[int] = Events(2)
    for number in range(5):
        events.put(number)
    waiting = asyncio.create_task(events.room())
    for number in range(3):
        assert await events.read() == number
        await asyncio.sleep(0)
        assert not waiting.done()
    assert await events.read() == 3
    await asyncio.wait_for(waiting, 1)
