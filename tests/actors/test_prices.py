"""What a call costs, where that is known."""

from __future__ import annotations

from typing import Any

import pytest

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
