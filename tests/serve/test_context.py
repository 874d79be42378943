"""A request that is too long for a worker goes to one that can hold it."""

from __future__ import annotations

from typing import Any

import pytest

from actors.config import FuguConfig
from actors.errors import ContextLengthError, FuguError, WorkerUnavailableError
from serve.api.health import Readiness
from serve.gateway import Gateway
from tests.serve.test_gateway import Fixed, Scripted, post
from tests.serve.test_session import Plan, Player

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "description": "x" * 6000}}}


def served(*says: str | FuguError, roles: bool = False) -> tuple[Gateway, Any, Any, Any]:
    """Two workers, of 1,000 and 100,000 tokens, a decider that prefers the small one, and the gateway over them;
    `says` is what the large one does."""
    decider: Any = Fixed("small", {"small": 0.9, "large": 0.1})
    workers: list[Any] = [Scripted("small", "by small"), Scripted("large", *(says or ("by large",)))]
    if roles:
        decider, workers = Plan(("small", "worker"), ("small", "verifier")), [Player("small"), Player("large")]
    specs = [
        {"name": name, "provider": "openai", "model": "m", "context": context}
        for name, context in (("small", 1000), ("large", 100_000))
    ]
    config = FuguConfig.model_validate({"workers": specs})
    app = Gateway(config, workers, decider, Readiness({}), no_roles=None if roles else "none")
    return app, decider, *workers


def asks(words: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": words}], **fields}


@pytest.mark.parametrize(
    "fields",
    [asks("word " * 1200), asks("short", max_tokens=2000), asks("short", tools=[TOOL])],
    ids=["its text", "with its answer", "with its tools"],
)
async def test_who_is_likely_too_small_is_not_chosen(fields: dict[str, Any]) -> None:
    app, decider, small, large = served()
    assert (await post(app, **fields)).json()["choices"][0]["message"]["content"] == "by large"
    assert [question.allowed for question in decider.questions] == [{"large"}]
    assert (len(small.requests), len(large.requests)) == (0, 1)
    fits = await post(app, **asks("short", max_tokens=100))
    assert fits.json()["choices"][0]["message"]["content"] == "by small"


async def test_who_is_likely_too_small_is_asked_when_nobody_else_can_answer() -> None:
    app, _, small, large = served(WorkerUnavailableError("is down", worker="large"))
    told = (await post(app, **asks("word " * 1200), fugu={"trace": True})).json()
    assert told["choices"][0]["message"]["content"] == "by small"
    assert [attempt["worker"] for attempt in told["fugu"]["attempts"]] == ["large", "small"]
    alone = await post(app, **asks("word " * 1200), fugu={"allow": ["small"]})
    assert alone.json()["choices"][0]["message"]["content"] == "by small"
    assert (len(small.requests), len(large.requests)) == (2, 1)


async def test_who_is_certainly_too_small_is_never_asked() -> None:
    app, _, small, large = served(ContextLengthError("too long", param="messages"))
    refused = await post(app, **asks("x" * 16_100))
    assert (refused.status_code, len(large.requests)) == (400, 1)
    alone = await post(app, **asks("x" * 16_100), fugu={"allow": ["small"]})
    error = alone.json()["error"]
    assert (alone.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert small.requests == []


async def test_every_turn_of_a_session_goes_to_who_can_hold_it() -> None:
    app, _, small, large = served(roles=True)
    answer = await post(app, model="fugu-trinity", **asks("word " * 1200))
    assert answer.json()["choices"][0]["message"]["content"] == "42 by large"
    assert (small.roles, large.roles) == ([], ["worker", "verifier"])
