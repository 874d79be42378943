"""The response cache: bounded, aging, equal calls made once, and cancellation that hits only who is cancelled."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.cache import ResponseCache
from tests.actors.virtual import run_virtual


class Source:
    """Makes values, slowly, and counts."""

    def __init__(self, seconds: float = 1.0, error: Exception | None = None) -> None:
        self.started = self.cancelled = 0
        self._seconds = seconds
        self._error = error

    async def __call__(self) -> str:
        self.started += 1
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._error is not None:
            raise self._error
        return f"value {self.started}"


def make(entries: int = 10, ttl: float = 100.0) -> ResponseCache[str]:
    return ResponseCache(entries, ttl, clock=asyncio.get_running_loop().time)


def test_equal_calls_at_the_same_time_are_made_once() -> None:
    async def main() -> None:
        cache, source = make(), Source()
        results = await asyncio.gather(*(cache.get_or_make("k", source) for _ in range(5)))
        assert results == [("value 1", False)] + [("value 1", True)] * 4
        assert await cache.get_or_make("k", source) == ("value 1", True)
        assert source.started == 1

    run_virtual(main)


def test_a_cancelled_leader_does_not_take_the_others_with_it() -> None:
    async def main() -> None:
        cache, source = make(), Source()
        leader = asyncio.create_task(cache.get_or_make("k", source))
        await asyncio.sleep(0.1)
        follower = asyncio.create_task(cache.get_or_make("k", source))
        await asyncio.sleep(0.1)
        leader.cancel()
        assert await follower == ("value 1", True)
        assert (source.started, source.cancelled) == (1, 0)
        with pytest.raises(asyncio.CancelledError):
            await leader

    run_virtual(main)


def test_the_call_ends_when_the_last_waiter_leaves_and_a_new_one_starts_anew() -> None:
    async def main() -> None:
        cache, source = make(), Source()
        waiters = [asyncio.create_task(cache.get_or_make("k", source)) for _ in range(3)]
        await asyncio.sleep(0.5)
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        later = asyncio.create_task(cache.get_or_make("k", source))
        assert await later == ("value 2", False)
        assert (source.started, source.cancelled) == (2, 1)

    run_virtual(main)


def test_errors_reach_everyone_and_are_not_kept() -> None:
    async def main() -> None:
        cache, source = make(), Source(error=ValueError("no"))
        results = await asyncio.gather(*(cache.get_or_make("k", source) for _ in range(3)), return_exceptions=True)
        assert [str(result) for result in results] == ["no"] * 3
        assert source.started == 1
        with pytest.raises(ValueError, match="no"):
            await cache.get_or_make("k", source)
        assert source.started == 2

    run_virtual(main)


def test_the_least_recently_used_goes_first_and_nothing_grows_old() -> None:
    async def main() -> None:
        cache = make(entries=2, ttl=10)
        cache.put("a", "1")
        cache.put("b", "2")
        assert cache.get("a") == "1"
        cache.put("c", "3")
        assert [cache.get(key) for key in "abc"] == ["1", None, "3"]
        await asyncio.sleep(10)
        assert cache.get("a") is None
        assert len(cache) == 1  # c is old too, but was not asked for

    run_virtual(main)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9)), max_size=60), st.integers(1, 5))
def test_never_more_than_its_bound_and_never_a_wrong_value(puts: list[tuple[int, int]], bound: int) -> None:
    async def main() -> None:
        cache, newest = make(entries=bound), {}
        for key, value in puts:
            cache.put(str(key), str(value))
            newest[str(key)] = str(value)
            assert len(cache) <= bound
            assert cache.get(str(key)) == str(value)
        for key, value in newest.items():
            assert cache.get(key) in (None, value)

    run_virtual(main)
