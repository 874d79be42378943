"""Providers that fail in every way, and callers who know what the right answer was: for tests and for the soak.

As a program, `python -m tests.faults --share 0.1 --seed 7`, it is a provider in a process of its own: prints its port,
answers "request N." with the words of N (`text_of`), or with a workflow of two steps where it is asked for one, fails
the given share of the requests, and ends with its input.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from dataclasses import replace
from typing import Any, Literal

from actors.messages import ToolCall
from actors.sse import SSEDecoder
from orchestrator.conductor_prompt import COMPACT_SYSTEM
from orchestrator.workflow import Step, Workflow, render_workflow
from tests.loopback import Behaviour, LoopbackProvider, Recorded

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PATHS = (CHAT, RESPONSES, MESSAGES)
TOOLS = {
    CHAT: [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
    RESPONSES: [{"type": "function", "name": "look", "parameters": {"type": "object"}}],
    MESSAGES: [{"name": "look", "input_schema": {"type": "object"}}],
}
Kind = Literal["clean", "paced", "faulty"]
PACED = 0.1
"""The share of the requests that are answered slowly, a word every `PACE` seconds."""
PACE = 0.05


def text_of(number: int) -> str:
    """What the right answer to a request says; no two alike."""
    return " ".join(f"w{number}x{at}" for at in range(12))


def body_of(path: str, number: int, stream: bool, *, model: str = "fugu", store: bool = False) -> dict[str, Any]:
    """A request that `number_in` knows again. Tools are offered to `fugu` alone: the other models answer a call of one
    worker's by asking the caller in the middle of their work, and there is then no text to compare."""
    body: dict[str, Any] = {"model": model, "stream": stream} | ({"tools": TOOLS[path]} if model == "fugu" else {})
    question = f"request {number}."
    if path == RESPONSES:
        return {**body, "input": question, "store": store}
    return {**body, "messages": [{"role": "user", "content": question}], "max_tokens": 100}


def number_in(request: Recorded) -> int:
    found = re.search(r"request (\d+)\.", json.dumps(request.body["messages"]))
    assert found is not None, "every request has its number"
    return int(found.group(1))


def kind_of(seed: int, share: float, number: int) -> Kind:
    """What becomes of a request when the given share of them fails."""
    drawn = random.Random(f"{seed}/{number}").random()
    if drawn < share:
        return "faulty"
    return "paced" if drawn < share + PACED else "clean"


def behaviour_of(seed: int, share: float, request: Recorded) -> Behaviour:
    """The same for every attempt of a request at a provider; a faulty one fails in another way at each of them."""
    number = number_in(request)
    kind = kind_of(seed, share, number)
    if kind == "faulty":
        rng = random.Random(f"{seed}/{number}/{request.dialect}")
        return faulty(rng, number, request.stream, tools="tools" in request.body)
    right = Behaviour(text=plan_of(number) if wants_plan(request) else text_of(number))
    return right if kind == "clean" else replace(right, delay=PACE, chunk_delay=PACE)


def wants_plan(request: Recorded) -> bool:
    return COMPACT_SYSTEM in json.dumps([request.body.get("system"), request.body["messages"]])


def plan_of(number: int) -> str:
    """A worker's work and another one's that reads it, each asked for the words of the number."""
    question = f"request {number}."
    return render_workflow(Workflow((Step("0", question), Step("1", question, (0,)))), ("0", "1"))


def faulty(rng: random.Random, number: int, stream: bool, *, tools: bool = True) -> Behaviour:
    right = Behaviour(text=text_of(number), reasoning="hm" if rng.random() < 0.3 else "")
    if rng.random() < 0.2 and tools:
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

    def read(self, status: int, content: bytes) -> None:
        """Raises:
        AssertionError, ValueError, KeyError, TypeError: the answer is none of this dialect.
        """
        if status != 200:
            self.error = json.loads(content)["error"]["type"]
        elif self.stream:
            for event in SSEDecoder().feed(content):
                if event.data == "[DONE]":
                    assert self.whole or self.error
                else:
                    assert not (self.whole and self.path != CHAT), "nothing follows the end"
                    self.take(json.loads(event.data))
        else:
            self.take_whole(json.loads(content))
            self.whole = True

    def check(self, number: int) -> None:
        """An end or an error, and not both; the right text or, with an error, its beginning.

        Raises:
            AssertionError: it is not so.
        """
        assert self.whole != bool(self.error), f"{self.path} {number}: an end or an error, and not both"
        if self.whole:
            assert self.text == text_of(number), f"{self.path} {number}"
        else:
            assert text_of(number).startswith(self.text), f"{self.path} {number}: what was sent stands, once"

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    with LoopbackProvider(record=False) as provider:
        provider.chooses = lambda request: behaviour_of(arguments.seed, arguments.share, request)
        print(provider.port, flush=True)
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
