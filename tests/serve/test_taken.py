"""What a call took beside its answer is told and charged: attempts that came to nothing, and answers put right."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from actors.config import FuguConfig
from actors.estimate import estimate_tokens, silent_tokens
from actors.messages import ChatRequest, Message, ResponseFormat, Usage
from serve.keys import KeyBook, Used
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.linked import serving
from tests.serve.test_gateway import events
from tests.serve.test_keys import body, made

ASKED = ChatRequest((Message("user", "hello"),), max_tokens=50)
READ = estimate_tokens(ASKED).input
RIGHT = Behaviour(text="yes", usage=Usage(10, 5))
SILENT = 0.5
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SHAPED = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}

both_ways = pytest.mark.parametrize("over_link", [False, True])
both_kinds = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    return tmp_path / "keys.sqlite"


def config_of(provider: LoopbackProvider, **fields: Any) -> FuguConfig:
    worker = {
        "name": "a",
        "provider": "openai",
        "model": "m",
        "base_url": provider.url_for("openai"),
        "price": {"input": 1000.0, "output": 2000.0},
        "timeout": {"first_byte": SILENT, "whole": SILENT, "idle": SILENT},
        "retry": {"attempts": 2, "min_wait": 0.01, "max_wait": 0.02},
        **fields,
    }
    return FuguConfig.model_validate({"workers": [worker]})


def used_of(path: Path) -> Used:
    ((_, used),) = KeyBook(path).list()
    assert used.usd == pytest.approx((used.usage.input_tokens * 1000 + used.usage.output_tokens * 2000) / 1e6)
    return used


async def ask(path: Path, over_link: bool, stream: bool, *behaviours: Behaviour, **fields: Any) -> tuple[int, Used]:
    """The status (of a stream that broke 200), and what the key was charged; the caller is told the same."""
    _, secret = made(path)
    with LoopbackProvider() as provider:
        provider.enqueue(*behaviours)
        wanted = body(stream=stream, fugu={"trace": True}, **fields)
        if stream:
            wanted["stream_options"] = {"include_usage": True}
        async with serving(path.parent, config_of(provider), over_link=over_link) as served:
            response = await served.client(secret).post("/v1/chat/completions", json=wanted)
        assert len(provider.requests) == len(behaviours)
    used = used_of(path)
    if response.status_code == 200:
        if stream:
            told = [event for event in events(response) if event != "[DONE]"]
            usage, trace = (next(each[name] for each in told if each.get(name)) for name in ("usage", "fugu"))
        else:
            usage, trace = response.json()["usage"], response.json()["fugu"]
        assert usage["total_tokens"] == trace["usage"]["total_tokens"] == used.usage.total_tokens
        assert trace["cost_usd"] == pytest.approx(used.usd)
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (10, 5)
    return response.status_code, used


@both_ways
@both_kinds
async def test_an_attempt_that_timed_out_before_a_retry_answered(path: Path, over_link: bool, stream: bool) -> None:
    status, used = await ask(path, over_link, stream, Behaviour(never=True), RIGHT)
    assert (status, used.usage.input_tokens) == (200, 10 + READ)
    assert silent_tokens(SILENT / 2) <= used.usage.output_tokens - 5 <= 50, "as much as a model writes meanwhile"
    assert used.estimated_usd == pytest.approx(used.usd - 0.02)


@both_ways
@both_kinds
async def test_an_attempt_that_broke_before_a_retry_answered(path: Path, over_link: bool, stream: bool) -> None:
    breaks = Behaviour(text="y", break_after=0 if stream else 20)
    status, used = await ask(path, over_link, stream, breaks, RIGHT)
    assert (status, used.usage.input_tokens) == (200, 10 + READ)


@both_kinds
async def test_a_refusal_before_a_retry_answered_costs_nothing(path: Path, stream: bool) -> None:
    _, used = await ask(path, True, stream, Behaviour(status=503), RIGHT)
    assert (used.usage, used.estimated_usd) == (Usage(10, 5), 0.0)


@both_ways
@both_kinds
async def test_attempts_that_all_timed_out(path: Path, over_link: bool, stream: bool) -> None:
    status, used = await ask(path, over_link, stream, Behaviour(never=True), Behaviour(never=True))
    assert (status, used.usage.input_tokens) == (504, 2 * READ)
    assert used.usage.output_tokens >= silent_tokens(SILENT)


@both_kinds
async def test_the_attempt_that_was_refused_at_last_is_not_charged(path: Path, stream: bool) -> None:
    status, used = await ask(path, True, stream, Behaviour(never=True), Behaviour(status=401))
    assert (status, used.usage.input_tokens) == (502, READ)


@both_ways
async def test_who_waits_in_the_queue_in_vain_pays_nothing(path: Path, over_link: bool) -> None:
    _, secret = made(path)
    with LoopbackProvider(Behaviour(text="yes", usage=Usage(10, 5), delay=0.6)) as provider:
        config = config_of(provider, limits={"concurrency": 1}, timeout={"total": 1.0})
        async with serving(path.parent, config, over_link=over_link) as served, served.client(secret) as http:
            asking = [asyncio.create_task(http.post("/v1/chat/completions", json=body())) for _ in range(3)]
            answers = await asyncio.gather(*asking)
        assert sorted(answer.status_code for answer in answers) == [200, 504, 504]
        assert len(provider.requests) == 2
    # One answered, one cut off, and one that was never sent.
    assert used_of(path).usage.input_tokens == 10 + READ


WRONG = Behaviour(text="no", usage=Usage(40, 20))
SHAPED_READ = estimate_tokens(ASKED.with_(response_format=ResponseFormat("json_schema", schema=SCHEMA))).input


@both_ways
@both_kinds
@pytest.mark.parametrize("second", ["refused", "silent", "too long"])
async def test_a_first_answer_whose_repair_failed(path: Path, over_link: bool, stream: bool, second: str) -> None:
    fails = {
        "refused": Behaviour(status=401),
        "silent": Behaviour(never=True),
        "too long": Behaviour(status=400, error="This model's maximum context length is 10 tokens.",
                              error_code="context_length_exceeded"),
    }[second]  # fmt: skip
    behaviours = (WRONG, fails, fails) if second == "silent" else (WRONG, fails)
    _, used = await ask(path, over_link, stream, *behaviours, response_format=SHAPED)
    if second == "silent":
        assert used.usage.input_tokens >= 40 + 2 * SHAPED_READ
        assert used.usd - used.estimated_usd == pytest.approx(0.08)
    else:
        assert (used.usage, used.estimated_usd) == (Usage(40, 20), 0.0)


@both_ways
@both_kinds
async def test_a_first_answer_whose_repair_was_cancelled(path: Path, over_link: bool, stream: bool) -> None:
    _, secret = made(path)
    with LoopbackProvider() as provider:
        provider.enqueue(WRONG, Behaviour(never=True))
        config = config_of(provider, timeout={})
        async with serving(path.parent, config, over_link=over_link) as served, served.client(secret) as http:
            fields = body(stream=stream, response_format=SHAPED)
            task = asyncio.create_task(http.post("/v1/chat/completions", json=fields))
            assert await asyncio.to_thread(provider.wait_for, lambda: len(provider.requests) == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    used = used_of(path)
    assert used.usage.input_tokens == 40 + SHAPED_READ
    assert used.usd - used.estimated_usd == pytest.approx(0.08), "what the provider has told is no guess"


@both_ways
@both_kinds
async def test_an_answer_put_right_is_charged_once(path: Path, over_link: bool, stream: bool) -> None:
    right = Behaviour(text='{"a": 1}', usage=Usage(70, 9))
    _, secret = made(path)
    with LoopbackProvider() as provider:
        provider.enqueue(WRONG, right)
        async with serving(path.parent, config_of(provider), over_link=over_link) as served:
            fields = body(stream=stream, response_format=SHAPED)
            await served.client(secret).post("/v1/chat/completions", json=fields)
    assert (used_of(path).usage, used_of(path).estimated_usd) == (Usage(110, 29), 0.0)


@both_kinds
@pytest.mark.parametrize("where", ["chat/completions", "responses", "messages"])
async def test_who_took_one_call_is_told_of_no_orchestration(path: Path, where: str, stream: bool) -> None:
    """The counts are there, and 0."""
    asked = {"model": "fugu", "input": "hello"} if where == "responses" else body()
    if stream and where == "chat/completions":
        asked["stream_options"] = {"include_usage": True}
    with LoopbackProvider(RIGHT) as provider:
        async with serving(path.parent, config_of(provider)) as served:
            response = await served.client().post(f"/v1/{where}", json=asked | {"stream": stream})
    kinds = ("orchestration_input_tokens", "orchestration_input_cached_tokens", "orchestration_output_tokens")
    for kind in kinds:
        assert re.findall(rf'"{kind}":(\d+)', response.text) == ["0"], kind
