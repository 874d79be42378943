"""The vllm adapter on real vLLM, with the embedded model and a random LoRA adapter over it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs this in its own environment")

from actors.adapters.base import CallContext
from actors.adapters.vllm import VllmAdapter, VllmEngine
from actors.config import WorkerSpec
from actors.errors import ContextLengthError, WorkerRejectedError
from actors.messages import ChatRequest, Message, ResponseFormat
from actors.model_files import resolve_model
from orchestrator.conductor_prompt import PromptSettings, conductor_messages
from orchestrator.plan_grammar import plan_regex
from orchestrator.workflow import parse_workflow
from tests.actors.tiny_chat import random_adapter

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.model,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]
CAPITAL = "What is the capital of France? Answer in one sentence."


def ask(text: str, **settings: Any) -> ChatRequest:
    return ChatRequest((Message("user", text),), **settings)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, VllmAdapter]]:
    folder = resolve_model("SmolLM2-135M-Instruct").folder
    adapter = random_adapter(folder, tmp_path_factory.mktemp("adapter"), seed=1, scale=0.05)
    # In a thread, as the provider actor does it: loading takes long and the event loop must go on.
    engine = await asyncio.to_thread(VllmEngine.load, folder, adapters={"special": adapter}, context=1024)
    specs = [
        WorkerSpec(name="plain", provider="vllm", model="m"),
        WorkerSpec(name="special", provider="vllm", model="m", adapter=adapter),
    ]
    workers = {spec.name: VllmAdapter(spec, engine) for spec in specs}
    yield workers
    await workers["plain"].close()


async def test_chat(workers: dict[str, VllmAdapter]) -> None:
    reply = await workers["plain"].complete(ask(CAPITAL, temperature=0, max_tokens=30), CallContext())
    assert "Paris" in reply.text
    assert (reply.finish_reason, reply.worker) == ("stop", "plain")
    assert reply.usage.input_tokens > 30
    assert 5 < reply.usage.output_tokens <= 30


async def test_streaming_adds_up(workers: dict[str, VllmAdapter]) -> None:
    request = ask("Tell me a story.", temperature=0.8, seed=5, max_tokens=30)
    chunks = [chunk async for chunk in workers["plain"].stream(request, CallContext())]
    final = chunks[-1].final
    assert final is not None
    assert len(chunks) > 5
    assert "".join(chunk.text for chunk in chunks) == final.text
    assert (final.finish_reason, final.usage.output_tokens) == ("length", 30)


async def test_a_seed_repeats_an_answer(workers: dict[str, VllmAdapter]) -> None:
    request = ask("Say something odd.", temperature=1.0, seed=7, max_tokens=20)
    first, again, other = [
        await workers["plain"].complete(asked, CallContext()) for asked in (request, request, request.with_(seed=8))
    ]
    assert first.text == again.text != other.text


async def test_an_adapter_changes_the_answer_of_its_worker_only(workers: dict[str, VllmAdapter]) -> None:
    request = ask(CAPITAL, temperature=0, max_tokens=20)
    alone = await workers["plain"].complete(request, CallContext())
    plain, special = await asyncio.gather(
        *(workers[name].complete(request, CallContext()) for name in ("plain", "special"))
    )
    # Word for word at first; a batch rounds otherwise than a lone request, and later on that can turn a close choice.
    assert plain.text[:30] == alone.text[:30] == "The capital of France is Paris"
    assert special.text not in (plain.text, alone.text)


async def test_a_stop_string_stays_out(workers: dict[str, VllmAdapter]) -> None:
    reply = await workers["plain"].complete(ask(CAPITAL, temperature=0, max_tokens=30, stop=("Par",)), CallContext())
    assert reply.stop_sequence == "Par"
    assert "Par" not in reply.text
    assert reply.text.endswith(" ")
    assert reply.finish_reason == "stop"


async def test_a_response_format_is_kept(workers: dict[str, VllmAdapter]) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    request = ask(CAPITAL, temperature=0, max_tokens=60, response_format=ResponseFormat("json_schema", schema=schema))
    reply = await workers["plain"].complete(request, CallContext())
    assert list(json.loads(reply.text)) == ["city"]
    assert reply.dropped == ()


async def test_a_plan_under_its_grammar_always_parses(workers: dict[str, VllmAdapter]) -> None:
    pool = ("alpha", "beta", "gamma", "delta")
    allowed = frozenset({"beta", "delta"})
    question = (Message("user", "Reverse the word lamp, then count its letters."),)
    for style in ("paper", "compact"):
        grammar = plan_regex(pool, allowed=allowed, max_steps=3, thought=style == "paper", characters=400)
        prompt = conductor_messages(question, pool, PromptSettings(style, examples=False))
        request = ChatRequest(prompt, temperature=1.0, max_tokens=500, extra={"structured_outputs": {"regex": grammar}})
        # An untrained model at temperature 1: without the grammar hardly one of these would parse.
        asked = (workers["plain"].complete(request.with_(seed=seed), CallContext()) for seed in range(4))
        for reply in await asyncio.gather(*asked):
            assert reply.dropped == ()
            assert reply.finish_reason == "stop"
            plan = parse_workflow(reply.text, pool, allowed=allowed, max_steps=3)
            assert {step.worker for step in plan.steps} <= allowed
    # As it is served, with long plans: an engine has seconds to compile it.
    served = {"structured_outputs": {"regex": plan_regex(pool, allow_self=True, allow_empty=True)}}
    reply = await workers["plain"].complete(ask("Plan.", max_tokens=12, extra=served), CallContext())
    assert reply.finish_reason == "length"


async def test_cancelling_ends_the_generation(workers: dict[str, VllmAdapter]) -> None:
    llm = workers["plain"]._engine._llm
    request = ask("Count from 1 to 1000.", temperature=0, max_tokens=900)
    async with aclosing(workers["plain"].stream(request, CallContext())) as chunks:
        await anext(chunks)
        assert llm.get_num_unfinished_requests() == 1
    waiting = asyncio.create_task(workers["plain"].complete(request, CallContext()))
    await asyncio.sleep(0.5)
    assert llm.get_num_unfinished_requests() == 1
    start = time.monotonic()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert llm.get_num_unfinished_requests() == 0
    assert time.monotonic() - start < 1


async def test_what_is_refused(workers: dict[str, VllmAdapter]) -> None:
    with pytest.raises(ContextLengthError, match="1024"):
        await workers["plain"].complete(ask("a b " * 1000), CallContext())
    with pytest.raises(WorkerRejectedError, match="top_k"):
        await workers["plain"].complete(ask("hi", extra={"top_k": -7}), CallContext())
    reply = await workers["plain"].complete(ask("hi", max_tokens=2, extra={"top_k": 5, "unknown": 1}), CallContext())
    assert reply.dropped == ("unknown",)
