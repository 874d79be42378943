"""What a request may spend: admitted before, settled after, never passed by calls at the same time."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import BudgetError, CircuitOpenError, DeadlineError, ShapeError, WorkerUnavailableError
from actors.estimate import estimate_tokens
from actors.messages import ChatReply, ChatRequest, Message, Usage
from actors.spending import Taken
from orchestrator.budget import MAX_ATTEMPTS, MIN_OUTPUT_TOKENS, Account, Budget, Grant

ASK = ChatRequest((Message("user", "What is the longest river?"),))
READ = estimate_tokens(ASK).input


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def reply(tokens: int = 15, usd: float | None = 0.5, attempts: int = 1) -> ChatReply:
    return ChatReply("a", "x", usage=Usage(tokens - 5, 5), cost_usd=usd, attempts=attempts)


@pytest.mark.parametrize("field", ["seconds", "usd", "tokens", "calls"])
@pytest.mark.parametrize("limit", [0, -1, math.nan])
def test_a_limit_is_above_nothing(field: str, limit: float) -> None:
    with pytest.raises(BudgetError, match=field) as raised:
        Budget(**{field: limit})
    assert raised.value.param == f"budget.{field}"


def test_without_limits_everything_is_admitted_and_counted() -> None:
    account = Account(Budget())
    grant = account.admit("a", ASK)
    assert grant.request == ASK
    account.settle(grant, reply(attempts=2))
    account.settle(account.admit("a", ASK), reply(usd=None))
    assert (account.calls, account.tokens, account.usd) == (3, 30, 0.5)
    assert account.seconds_left is None


def test_time() -> None:
    clock = Clock()
    account = Account(Budget(seconds=2), clock=clock)
    clock.now += 1.5
    assert account.seconds_left == pytest.approx(0.5)
    account.admit("a", ASK)
    clock.now += 1
    assert account.seconds_left == 0
    with pytest.raises(DeadlineError, match="2 s"):
        account.admit("a", ASK)


def test_calls_are_shared_and_one_is_kept_for_the_answer() -> None:
    account = Account(Budget(calls=4))
    first = account.admit("a", ASK, shares=3)
    assert (first.calls, first.request.max_attempts) == (1, 1)
    second = account.admit("a", ASK.with_(max_attempts=9), shares=2)
    assert second.calls == 1
    third = account.admit("a", ASK, shares=2)
    with pytest.raises(BudgetError, match="4 calls"):  # the last one is for the answer
        account.admit("a", ASK, shares=2)
    last = account.admit("a", ASK)
    for grant in (first, second, third, last):
        account.settle(grant, reply())
    assert account.calls == 4
    with pytest.raises(BudgetError):
        account.admit("a", ASK)
    assert Account(Budget(calls=100)).admit("a", ASK).calls == MAX_ATTEMPTS
    assert Account(Budget(calls=100)).admit("a", ASK.with_(max_attempts=2)).calls == 2


def test_tokens_are_shared_and_bound_the_answer() -> None:
    account = Account(Budget(tokens=4 * (READ + 100)))
    grant = account.admit("a", ASK, shares=4)
    assert grant.request.max_tokens == 100
    assert account.admit("a", ASK.with_(max_tokens=7), shares=3).request.max_tokens == 7
    tight = Account(Budget(tokens=READ + MIN_OUTPUT_TOKENS - 1))
    with pytest.raises(BudgetError, match="tokens") as raised:
        tight.admit("a", ASK)
    assert raised.value.param == "budget.tokens"


def test_money_with_and_without_prices() -> None:
    blind = Account(Budget(usd=1.0))
    grants = [blind.admit("a", ASK) for _ in range(3)]  # what they will cost is not known
    for grant in grants:
        blind.settle(grant, reply(usd=0.4))
    with pytest.raises(BudgetError, match="1 USD"):
        blind.admit("a", ASK)
    priced = Account(Budget(usd=1.0), price=lambda worker, read, written: 0.6 if worker == "dear" else None)
    dear = priced.admit("dear", ASK)
    with pytest.raises(BudgetError):
        priced.admit("dear", ASK)
    priced.settle(dear, reply(usd=0.1))
    assert priced.admit("dear", ASK).usd == 0.6


def test_what_a_failed_call_took() -> None:
    account = Account(Budget(tokens=10_000, calls=10))
    grant = account.admit("a", ASK)
    account.settle(grant, None, CircuitOpenError("rests", worker="a"))
    assert (account.calls, account.tokens) == (0, 0)
    account.settle(account.admit("a", ASK), None, WorkerUnavailableError("is down", worker="a"))
    assert (account.calls, account.tokens) == (3, 0)
    cut = account.admit("a", ASK.with_(max_tokens=50))
    account.settle(cut, None, TimeoutError())  # cut off: the provider may have done it all
    assert (account.calls, account.tokens) == (6, READ + 50)


def test_what_an_error_or_a_lost_attempt_took_is_counted() -> None:
    account = Account(Budget(usd=1000.0), price=lambda _worker, read, written: (read + 2 * written) / 1e4)
    note = account.told_by("a")
    note(Taken(Usage(100, 10), estimated=True))
    note(Taken(Usage(999, 999), estimated=False, within=True))  # the call's end has it, too
    refused = ShapeError("is no JSON", worker="a")
    refused.usage = Usage(50, 20)
    account.settle(account.admit("a", ASK), None, refused)
    assert account.tokens == 180
    assert account.usd == pytest.approx((120 + 90) / 1e4)


@given(
    st.builds(
        Budget,
        usd=st.none() | st.floats(0.01, 2),
        tokens=st.none() | st.integers(1, 2000),
        calls=st.none() | st.integers(1, 12),
    ),
    st.lists(st.tuples(st.booleans(), st.integers(1, 5), st.none() | st.integers(1, 300)), max_size=30),
    st.randoms(use_true_random=False),
)
def test_limits_hold_whatever_runs_at_the_same_time(
    budget: Budget, moves: list[tuple[bool, int, int | None]], random: object
) -> None:
    """Calls begin and end in any order; each takes at most what it was granted, as a provider does."""
    account = Account(budget, price=lambda _worker, _read, _written: 0.3)
    open_calls: list[Grant] = []

    def end() -> None:
        grant = open_calls.pop(random.randrange(len(open_calls)))  # type: ignore[attr-defined]
        tokens = min(grant.tokens, READ + (grant.request.max_tokens or 0)) if budget.tokens else READ + 20
        account.settle(grant, ChatReply("a", usage=Usage(tokens, 0), cost_usd=0.3, attempts=grant.calls))

    for begin, shares, max_tokens in moves:
        if begin:
            with suppress(BudgetError):
                open_calls.append(account.admit("a", ASK.with_(max_tokens=max_tokens), shares=shares))
        elif open_calls:
            end()
    while open_calls:
        end()
    assert budget.calls is None or account.calls <= budget.calls
    assert budget.tokens is None or account.tokens <= budget.tokens
    assert budget.usd is None or account.usd <= budget.usd + 1e-9
