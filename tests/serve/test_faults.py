"""Providers that fail in every way, under every dialect and model: nothing hangs, nothing leaks, no byte is wrong.

`FUGU_FAULTS` is how many requests are made (900); most calls of a worker meet a fault of their own, so that more than a
thousand are injected. A sixth as many are made of workers behind an actor's connection, who try again.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.config import FuguConfig
from serve.keys import Key, KeyBook
from tests.faults import PATHS, Reader, body_of, faulty, number_in, plan_of, wants_plan
from tests.loopback import Behaviour, LoopbackProvider, Recorded
from tests.serve.linked import serving

REQUESTS = int(os.environ.get("FUGU_FAULTS", "900"))
MODELS = {"fugu": 8, "fugu-trinity": 1, "fugu-ultra": 1}
"""Which are asked for, how often."""
AT_ONCE = 24
LONGEST = 20.0
TIMEOUT = {"connect": 1.0, "first_byte": 0.5, "whole": 0.5, "idle": 0.4, "total": 5.0}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("over_link", "requests"), [(False, REQUESTS), (True, REQUESTS // 6)])
async def test_injected_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over_link: bool, requests: int) -> None:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    seed = int(os.environ.get("FUGU_FAULTS_SEED", "7"))
    faults: list[bool] = []
    calls: Counter[tuple[int, str]] = Counter()
    book = KeyBook(tmp_path / "keys.sqlite")
    key, secret = book.create(Key("", "faults", tokens_per_minute=10**8, monthly_usd=10**6))
    with LoopbackProvider(record=False) as provider:

        def choose(request: Recorded) -> Behaviour:
            number = number_in(request)
            # Every call for a request fails in a way of its own.
            calls[number, request.dialect] += 1
            rng = random.Random(f"{seed}/{number}/{request.dialect}/{calls[number, request.dialect]}")
            behaviour = faulty(rng, number, request.stream, tools="tools" in request.body)
            faults.append(_is_fault(behaviour))
            return replace(behaviour, text=plan_of(number)) if wants_plan(request) else behaviour

        provider.chooses = choose
        common = {
            "timeout": TIMEOUT,
            "price": {"input": 1.0, "output": 2.0},
            "retry": {"attempts": 2 if over_link else 1, "min_wait": 0.01, "max_wait": 0.02},
            "breaker": {"failures": 10**6, "cooldown": 0.1},
            "limits": {"concurrency": 64, "tokens_per_minute": 10**8},
        }
        config = FuguConfig.model_validate(
            {
                "workers": [
                    {"name": "o", "provider": "openai", "model": "m", "base_url": provider.url_for("openai"), **common},
                    {
                        "name": "a",
                        "provider": "anthropic",
                        "model": "claude-opus-4-8",
                        "base_url": provider.url_for("anthropic"),
                        **common,
                    },
                ],
                "serve": {"keep_alive": 0.2},
                "conductor": {"worker": "o", "style": "compact"},
            }
        )
        rng = random.Random(seed)
        seen: Counter[str] = Counter()
        whole: Counter[str] = Counter()
        free = asyncio.Semaphore(AT_ONCE)

        async def one(http: httpx.AsyncClient, number: int, path: str, stream: bool, model: str) -> None:
            reader = Reader(path, stream)
            async with free, asyncio.timeout(LONGEST):
                response = await http.post(path, json=body_of(path, number, stream, model=model))
            reader.read(response.status_code, response.content)
            reader.check(number)
            seen[reader.error or "whole"] += 1
            whole[model] += reader.whole

        keyed = {"authorization": f"Bearer {secret}"}
        models = rng.choices(list(MODELS), list(MODELS.values()), k=requests)
        asks = [(number, rng.choice(PATHS), rng.random() < 0.6, model) for number, model in enumerate(models)]
        async with serving(tmp_path, config, over_link=over_link) as served:
            transport = httpx.ASGITransport(app=served.app, raise_app_exceptions=False)  # type: ignore[arg-type]
            options: Any = {"transport": transport, "base_url": "http://fugu", "timeout": None, "headers": keyed}
            async with httpx.AsyncClient(**options) as http:
                await asyncio.gather(*(one(http, *each) for each in asks))
            for runtime in served.runtimes.values():
                limiter = runtime.limiter
                # What was cancelled behind a connection ends a moment after its caller knows.
                for _ in range(50 if over_link else 0):
                    if (limiter.running, limiter.waiting) != (0, 0):
                        await asyncio.sleep(0.02)
                assert (limiter.running, limiter.waiting) == (0, 0), "every grant was given back"
                limiter._clock = lambda: time.monotonic() + 3600
                assert (limiter.requests_used, limiter.tokens_used) == (0, 0), "a minute later nothing is held"
        print(dict(seen), dict(whole), f"{sum(faults)} faults in {len(faults)} calls")
        assert sum(seen.values()) == requests
        assert seen["whole"] > requests / 4, seen
        assert len(seen) > 2, seen
        assert sum(faults) >= requests * 1000 // 900
        assert all(whole[model] > models.count(model) / 4 for model in MODELS), whole
        _check_account(tmp_path / "keys.sqlite", key, requests)
        assert provider.wait_for(lambda: provider.in_flight == 0)


def _is_fault(behaviour: Behaviour) -> bool:
    broken = behaviour.break_after is not None or behaviour.error_after is not None or not behaviour.terminator
    silent = behaviour.never or behaviour.chunk_delay > TIMEOUT["idle"]
    return behaviour.status != 200 or behaviour.body is not None or broken or silent


def _check_account(path: Path, key: Key, requests: int) -> None:
    """Nothing is held any more, and of its minute the key has used what its month says."""
    ((listed, used),) = KeyBook(path).list()
    assert (listed.id, used.requests) == (key.id, requests)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM held").fetchone() == (0,)
        recent, tokens = connection.execute("SELECT COUNT(*), SUM(tokens) FROM recent").fetchone()
    if recent == requests:
        assert tokens == used.usage.total_tokens
    # Cached input is told beside the input, and costs the same here.
    priced = (used.usage.input_tokens + 2 * used.usage.output_tokens) / 1e6
    assert 0 < used.usd <= priced + 1e-9
