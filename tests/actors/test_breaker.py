"""The circuit opens after failures in a row, tries one call after the cooldown, and closes on success."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.breaker import CircuitBreaker
from actors.errors import CircuitOpenError


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(3, 10.0, clock=clock, worker="w")


def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        breaker.failure(breaker.enter())


def test_only_failures_in_a_row_open_it(breaker: CircuitBreaker) -> None:
    fail(breaker, 2)
    breaker.success(breaker.enter())
    fail(breaker, 2)
    assert breaker.state == "closed"
    fail(breaker, 1)
    assert breaker.state == "open"
    with pytest.raises(CircuitOpenError, match="3 failures") as caught:
        breaker.enter()
    assert (caught.value.worker, caught.value.retry_after) == ("w", 10.0)


def test_one_call_tries_after_the_cooldown(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 10
    assert breaker.state == "half_open"
    assert breaker.enter() is True
    with pytest.raises(CircuitOpenError):
        breaker.enter()
    breaker.success(True)
    assert breaker.state == "closed"
    assert breaker.enter() is False


def test_a_failing_try_rests_for_another_cooldown(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 11
    breaker.failure(breaker.enter())
    clock.now += 9
    with pytest.raises(CircuitOpenError) as caught:
        breaker.enter()
    assert caught.value.retry_after == 1.0
    clock.now += 1
    assert breaker.enter() is True


def test_a_cancelled_try_lets_the_next_one_try(breaker: CircuitBreaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now += 10
    breaker.neutral(breaker.enter())
    assert breaker.enter() is True


def test_calls_from_before_do_not_close_or_extend_it(breaker: CircuitBreaker, clock: Clock) -> None:
    early = [breaker.enter() for _ in range(2)]
    fail(breaker, 3)
    breaker.success(early[0])
    assert breaker.state == "open"
    clock.now += 9
    breaker.failure(early[1])
    clock.now += 1
    assert breaker.state == "half_open"


@given(st.lists(st.sampled_from(["success", "failure", "neutral", "wait"]), max_size=60))
def test_never_stuck_whatever_happens(events: list[str]) -> None:
    clock = Clock()
    breaker = CircuitBreaker(2, 5.0, clock=clock)
    waits: list[float] = []
    for event in events:
        if event == "wait":
            clock.now += 5
            continue
        try:
            probe = breaker.enter()
        except CircuitOpenError as error:
            waits.append(error.retry_after or 0.0)
            continue
        getattr(breaker, event)(probe)
    assert all(0 < wait <= 5 for wait in waits)
    clock.now += 5
    breaker.success(breaker.enter())
    assert breaker.state == "closed"
