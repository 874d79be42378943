"""What a call costs, where that is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import WorkerSpec
from actors.messages import Usage
from actors.prices import pricing

USAGE = Usage(input_tokens=1000, output_tokens=100, cached_input_tokens=400)


def spec(**fields: Any) -> WorkerSpec:
    return WorkerSpec.model_validate({"name": "w", "provider": "openai", "model": "gpt-5", **fields})


def test_the_configuration_comes_first() -> None:
    price = {"input": 10.0, "output": 100.0, "cached_input": 1.0}
    assert pricing(spec(price=price))(USAGE) == pytest.approx((600 * 10 + 400 * 1 + 100 * 100) / 1e6)


def test_the_list_where_the_configuration_says_nothing() -> None:
    cost = pricing(spec())(USAGE)
    # gpt-5 as its maker published it: 1.25 in, 0.125 cached, 10 out, per million.
    assert cost == pytest.approx((600 * 1.25 + 400 * 0.125 + 100 * 10) / 1e6)


def test_what_is_written_to_a_cache_has_a_price_of_its_own() -> None:
    usage = Usage(1000, 100, 400, cache_written_tokens=500)
    claude = {"provider": "anthropic", "model": "claude-opus-4-5"}
    # 5 in, 0.5 read from the cache, 6.25 written to it, 25 out, per million, as its maker published it.
    listed = (100 * 5 + 400 * 0.5 + 500 * 6.25 + 100 * 25) / 1e6
    assert pricing(spec(**claude))(usage) == pytest.approx(listed)
    price = {"input": 5.0, "output": 25.0, "cached_input": 0.5, "cache_write": 6.25}
    assert pricing(spec(**claude, price=price))(usage) == pytest.approx(listed)
    # Kept for an hour it is 10 per million, where it is told how much that is.
    lasting = replace(usage, cache_hour_tokens=300)
    dearer = listed + 300 * 3.75 / 1e6
    assert pricing(spec(**claude))(lasting) == pricing(spec(**claude, price=price))(lasting) == pytest.approx(dearer)
    own = pricing(spec(**claude, price=price | {"cache_hour": 7.25}))
    assert own(lasting) == pytest.approx(listed + 300 * 1.0 / 1e6)
    del price["cache_write"]
    assert pricing(spec(**claude, price=price))(usage) == pytest.approx(listed - 500 * 1.25 / 1e6)


@given(st.builds(Usage, *[st.integers(0, 50)] * 6), st.sampled_from([None, {"input": 5.0, "output": 25.0}]))
def test_no_usage_that_a_provider_may_tell_costs_less_than_its_output(usage: Usage, price: Any) -> None:
    cost = pricing(spec(provider="anthropic", model="claude-opus-4-5", price=price))(usage)
    assert cost is not None
    assert cost >= usage.output_tokens * 25 / 1e6 - 1e-12


@pytest.mark.parametrize(
    "fields",
    [
        {"base_url": "http://127.0.0.1:8000/v1"},
        {"base_url": "http://localhost/v1"},
        {"model": "no-such-model"},
        {"provider": "local", "base_url": None},
    ],
)
def test_unknown_is_not_nothing(fields: dict[str, Any]) -> None:
    assert pricing(spec(**fields))(USAGE) is None
