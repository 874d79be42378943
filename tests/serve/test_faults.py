"""Providers that fail in every way, under every dialect: nothing hangs, nothing leaks, no byte is wrong.

`FUGU_FAULTS` is how many requests are made (300).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.adapters.anthropic import AnthropicAdapter
from actors.adapters.openai import OpenAIAdapter
from actors.config import FuguConfig
from actors.messages import ChatReply, ChatRequest, ToolCall
from actors.sse import SSEDecoder
from actors.transport import make_transport
from actors.worker import WorkerRuntime
from serve.api.health import Readiness
from serve.gateway import Gateway
from serve.router import OrderDecider
from tests.loopback import Behaviour, LoopbackProvider, Recorded

REQUESTS = int(os.environ.get("FUGU_FAULTS", "300"))
AT_ONCE = 24
LONGEST = 20.0
FAULTS = ("reset", "fin", "stall", "slow", "garbage", "429", "500", "401", "error", "cut")
GARBAGE = (b"<html>", b"{}", b"\xff\xfe", b'{"choices": [{}]}', b"data: {\n\n")
TIMEOUT = {"connect": 1.0, "first_byte": 0.5, "idle": 0.4, "total": 5.0}


class Direct:
    """A worker without an actor."""

    def __init__(self, runtime: WorkerRuntime) -> None:
        self.runtime = runtime
        self.name = runtime.spec.name

    async def complete(self, request: ChatRequest) -> ChatReply:
        return await self.runtime.complete(request)

    def stream(self, request: ChatRequest) -> Any:
        return self.runtime.stream(request)


def text_of(number: int) -> str:
    """What the right answer to a request says; no two alike."""
    return " ".join(f"w{number}x{at}" for at in range(12))


def faulty(rng: random.Random, number: int, stream: bool) -> Behaviour:
    right = Behaviour(text=text_of(number), reasoning="hm" if rng.random() < 0.3 else "")
    if rng.random() < 0.2:
        right = replace(right, tool_calls=(ToolCall(f"c{number}", "look", json.dumps({"at": number})),))
    kind = rng.choice(
        ("right", "right", "reset", "fin", "stall", "slow", "garbage", "429", "500", "401", "error", "cut")
    )
    after = rng.randint(0, 12)
    match kind:
        case "reset" | "fin":
            how: Any = "rst" if kind == "reset" else "fin"
            return replace(right, break_after=after if stream else after * 20, break_how=how)
        case "stall":
            return replace(right, never=True) if rng.random() < 0.5 else replace(right, chunk_delay=1.0)
        case "slow":
            return replace(right, chunk_delay=0.005, split=rng.randint(1, 40))
        case "garbage":
            return replace(
                right, body=rng.choice((b"<html>", b"{}", b"\xff\xfe", b'{"choices": [{}]}', b"data: {\n\n"))
            )
        case "429" | "500" | "401":
            return Behaviour(status=int(kind), headers={"retry-after": "0"} if kind == "429" else {})
        case "error":
            return replace(right, error_after=after)
        case "cut":
            return replace(right, terminator=False)
        case _:
            return right


class Reader:
    """What a caller makes of an answer in any dialect: the text, whether it ended as it should, the error's type."""

    def __init__(self, path: str, stream: bool) -> None:
        self.path, self.stream = path, stream
        self.text, self.whole, self.error = "", False, ""

    def read(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            self.error = response.json()["error"]["type"]
        elif self.stream:
            for event in SSEDecoder().feed(response.content):
                if event.data == "[DONE]":
                    assert self.whole or self.error
                else:
                    assert not (self.whole and self.path != CHAT), "nothing follows the end"
                    self.take(json.loads(event.data))
        else:
            self.take_whole(response.json())
            self.whole = True

    def take_whole(self, body: dict[str, Any]) -> None:
        if self.path == CHAT:
            self.text = body["choices"][0]["message"]["content"] or ""
        elif self.path == MESSAGES:
            self.text = "".join(block.get("text", "") for block in body["content"])
        else:
            parts = [part for item in body["output"] for part in item.get("content", ())]
            self.text = "".join(part["text"] for part in parts)

    def take(self, event: dict[str, Any]) -> None:
        kind = event.get("type", "")
        if event.get("error"):
            self.error = event["error"]["type"]
        elif kind == "response.failed":
            self.error = event["response"]["error"]["type"]
        elif self.path == CHAT:
            for choice in event["choices"]:
                self.text += choice["delta"].get("content") or ""
                self.whole = self.whole or choice["finish_reason"] is not None
        elif kind == "response.output_text.delta":
            self.text += event["delta"]
        elif kind == "content_block_delta":
            self.text += event["delta"].get("text", "")
        elif kind in ("message_stop", "response.completed"):
            self.whole = True


CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TOOLS = {
    CHAT: [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
    RESPONSES: [{"type": "function", "name": "look", "parameters": {"type": "object"}}],
    MESSAGES: [{"name": "look", "input_schema": {"type": "object"}}],
}


def body_of(path: str, number: int, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "fugu", "stream": stream, "tools": TOOLS[path]}
    question = f"request {number}."
    if path == RESPONSES:
        return {**body, "input": question, "store": False}
    return {**body, "messages": [{"role": "user", "content": question}], "max_tokens": 100}


@pytest.mark.timeout(600)
async def test_injected_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    seed = int(os.environ.get("FUGU_FAULTS_SEED", "7"))
    with LoopbackProvider(record=False) as provider:

        def choose(request: Recorded) -> Behaviour:
            said = json.dumps(request.body["messages"])
            number = int(said.partition("request ")[2].partition(".")[0])
            # Every attempt of a request fails in a way of its own.
            return faulty(random.Random(f"{seed}/{number}/{request.dialect}"), number, request.stream)

        provider.chooses = choose
        common = {
            "timeout": TIMEOUT,
            "retry": {"attempts": 1},
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
            }
        )
        kinds = {"openai": OpenAIAdapter, "anthropic": AnthropicAdapter}
        workers = [
            Direct(WorkerRuntime(spec, kinds[spec.provider](spec, make_transport(spec)))) for spec in config.active
        ]
        app = Gateway(config, workers, OrderDecider(["o", "a"]), Readiness({}))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)  # type: ignore[arg-type]
        rng = random.Random(seed)
        seen: Counter[str] = Counter()
        free = asyncio.Semaphore(AT_ONCE)

        async def one(http: httpx.AsyncClient, number: int, path: str, stream: bool) -> None:
            reader = Reader(path, stream)
            async with free, asyncio.timeout(LONGEST):
                reader.read(await http.post(path, json=body_of(path, number, stream)))
            assert reader.whole != bool(reader.error), f"{path} {number}: an end or an error, and not both"
            if reader.whole:
                assert reader.text == text_of(number), f"{path} {number}"
            else:
                assert text_of(number).startswith(reader.text), f"{path} {number}: what was sent stands, once"
            seen[reader.error or "whole"] += 1

        async with httpx.AsyncClient(transport=transport, base_url="http://fugu", timeout=None) as http:
            paths = [
                (number, rng.choice((CHAT, RESPONSES, MESSAGES)), rng.random() < 0.6) for number in range(REQUESTS)
            ]
            await asyncio.gather(*(one(http, *each) for each in paths))
        print(dict(seen))
        assert sum(seen.values()) == REQUESTS
        assert seen["whole"] > REQUESTS / 4, seen
        assert len(seen) > 2, seen
        for worker in workers:
            limiter = worker.runtime.limiter
            assert (limiter.running, limiter.waiting) == (0, 0), "every grant was given back"
            await worker.runtime.close()
        assert provider.wait_for(lambda: provider.in_flight == 0)
