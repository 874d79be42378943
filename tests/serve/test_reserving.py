"""What a key's minute reserves for a request that takes several calls."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.config import FuguConfig
from actors.errors import KeyLimitError
from actors.estimate import estimate_tokens
from actors.messages import ChatRequest, Message, Usage
from serve.keys import KeyBook
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.linked import serving
from tests.serve.test_keys import body, made

EACH = estimate_tokens(ChatRequest((Message("user", "hello"),), max_tokens=50)).total
WRITING = Behaviour(text="no plan and no verdict", usage=Usage(8, 50), delay=0.2)


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))


def config_of(provider: LoopbackProvider, **conductor: Any) -> FuguConfig:
    worker = {"name": "a", "provider": "openai", "model": "m", "base_url": provider.url_for("openai")}
    return FuguConfig.model_validate({"workers": [worker], "conductor": {"worker": "a", **conductor}})


async def ask_at_once(folder: Path, config: FuguConfig, limit: int, requests: int, **fields: Any) -> list[int]:
    """The statuses. What the key used in its minute is at most its limit, whatever was admitted."""
    path = folder / "keys.sqlite"
    _, secret = made(path, tokens_per_minute=limit)
    async with serving(folder, config) as served, served.client(secret) as http:
        asking = (http.post("/v1/chat/completions", json=body(**fields)) for _ in range(requests))
        answers = await asyncio.gather(*asking)
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == KeyLimitError.code
    ((_, used),) = KeyBook(path).list()
    assert used.usage.total_tokens <= limit
    return sorted(answer.status_code for answer in answers)


# A session has five turns; a workflow of no plan is three writings and an answer, where five steps would be allowed.
@pytest.mark.parametrize(("model", "calls", "most"), [("fugu-trinity", 5, 5), ("fugu-ultra", 4, 8)])
async def test_requests_at_once_stay_within_the_minute(tmp_path: Path, model: str, calls: int, most: int) -> None:
    with LoopbackProvider(WRITING) as provider:
        statuses = await ask_at_once(tmp_path, config_of(provider), 2 * most * EACH, 4, model=model)
        assert statuses == [200, 200, 429, 429]
        assert len(provider.requests) == 2 * calls


async def test_a_requests_own_budget_of_tokens_is_the_most_it_reserves(tmp_path: Path) -> None:
    with LoopbackProvider(WRITING) as provider:
        fields = {"model": "fugu-ultra", "fugu": {"budget_tokens": 2 * EACH}}
        assert await ask_at_once(tmp_path, config_of(provider), 4 * EACH, 3, **fields) == [200, 200, 429]


async def test_a_request_that_may_take_more_than_a_minute_has_it_to_itself(tmp_path: Path) -> None:
    """One after the other they pass as long as there is room for a call."""
    path = tmp_path / "keys.sqlite"
    _, secret = made(path, tokens_per_minute=4 * EACH)
    with LoopbackProvider(Behaviour(text="short", usage=Usage(2, 1), delay=0.2)) as provider:
        async with serving(tmp_path, config_of(provider)) as served, served.client(secret) as http:
            fields = body(model="fugu-trinity")
            answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=fields) for _ in range(2)))
            assert sorted(answer.status_code for answer in answers) == [200, 429]
            assert (await http.post("/v1/chat/completions", json=fields)).status_code == 200
