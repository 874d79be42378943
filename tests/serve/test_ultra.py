"""`fugu-ultra` behind the gateway, over workers whose behaviour each test scripts. No Ray."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.config import FuguConfig
from actors.errors import CheckpointError, CircuitOpenError, StreamBrokenError, WorkerUnavailableError
from actors.messages import ChatReply, ChatRequest, Chunk, Timing, ToolCall, ToolCallDelta, Usage
from orchestrator.conductor_card import ConductorCard, write_card
from orchestrator.workflow import Step, Workflow, render_workflow
from serve.api.health import Readiness
from serve.client import show_trace
from serve.conductor import Knobs, conducting, why_no_conductor
from serve.gateway import Gateway
from serve.router import Decider, OrderDecider, Question
from serve.store import SqliteStore
from serve.trace import Choice
from tests.serve.test_gateway import events, get, post

NAMES = ("a", "b", "c")
CALL = ToolCall("call_1", "weather", '{"at": "sea"}')
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]

Answer = str | Exception | ToolCall


class Scripted:
    """Answers from a function of the request; streams in pieces of three letters. `wait` seconds before each."""

    def __init__(self, name: str, answer: Answer | Callable[[ChatRequest], Answer], wait: float = 0) -> None:
        self.name = name
        self.wait = wait
        self.answer = answer
        self.requests: list[ChatRequest] = []
        self.cancelled = 0

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.requests.append(request)
        try:
            await asyncio.sleep(self.wait)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        answer = self.answer(request) if callable(self.answer) else self.answer
        if isinstance(answer, Exception):
            raise answer
        calls = (answer,) if isinstance(answer, ToolCall) else ()
        text = "looking" if isinstance(answer, ToolCall) else answer
        finish: Any = "tool_calls" if calls else "stop"
        return ChatReply(self.name, text, "", calls, finish, Usage(100, 10), 0.25, Timing(0.0, 0.1, 0.2))

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        reply = await self.complete(request)
        for start in range(0, len(reply.text), 3):
            yield Chunk(reply.text[start : start + 3])
            if reply.text.endswith("BREAK"):
                raise StreamBrokenError("cut off", worker=self.name)
        deltas = (ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(reply.tool_calls))
        yield Chunk(tool_calls=tuple(deltas))
        yield Chunk(final=reply)


def plan(*steps: tuple[str, str, tuple[int, ...]]) -> str:
    return render_workflow(Workflow(tuple(Step(*step) for step in steps)), NAMES)


CHAIN = plan(("a", "reverse the word", ()), ("b", "count <b>letters</b>", (0,)))


class Ultra:
    """A gateway over workers a, b, c; c writes the plans. `store` outlives it."""

    def __init__(
        self,
        folder: Path,
        writes: Any,
        *,
        a: Any = "pmal",
        b: Any = "four letters",
        decider: Decider | None = None,
        **conductor: Any,
    ):
        left = list(writes) if isinstance(writes, list) else None
        self.a, self.b = Scripted("a", a), Scripted("b", b)
        self.c = Scripted("c", writes if left is None else lambda _: left.pop(0))
        serve = {"keep_alive": conductor.pop("keep_alive", 15), "request_timeout": 60}
        price, priced = {"price": {"input": 1, "output": 10}}, conductor.pop("priced", NAMES)
        known = {"provider": "openai", "model": "m"}
        specs = [{"name": name, **known, **(price if name in priced else {})} for name in NAMES]
        self.config = FuguConfig.model_validate(
            {
                "workers": specs,
                "serve": serve,
                "router": {"checkpoint": "head.safetensors"},
                "conductor": {"worker": "c", **conductor},
            }
        )
        workers = {worker.name: worker for worker in (self.a, self.b, self.c)}
        self.store = SqliteStore(folder / "workflows.sqlite")
        ultra = conducting(self.config, workers), self.store
        self.app = Gateway(
            self.config, list(workers.values()), decider or OrderDecider(NAMES), Readiness({}), ultra=ultra
        )

    async def ask(self, **fields: Any) -> Any:
        return await post(self.app, model="fugu-ultra", **fields)


async def test_a_whole_answer(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, CHAIN)
    response = await ultra.ask(fugu={"trace": True})
    assert response.status_code == 200
    body = response.json()
    assert body["model"] == "fugu-ultra"
    message = body["choices"][0]["message"]
    assert message["content"] == "four letters"
    assert message["reasoning_content"].splitlines()[1:] == [
        "1. a: reverse the word",
        "2. b: count <b>letters</b> (reads 1)",
        "[step 1] a begins",
        "[step 1] a is done (0.0 s)",
        "[step 2] b begins",
        "[step 2] b is done (0.0 s)",
    ]
    assert message["reasoning_content"].startswith("[plan] chain, 2 steps (")
    assert body["usage"] == {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 330,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "orchestration_input_tokens": 200,
            "orchestration_input_cached_tokens": 0,
        },
        "completion_tokens_details": {"reasoning_tokens": 0, "orchestration_output_tokens": 20},
    }
    trace = body["fugu"]
    assert (trace["worker"], trace["conductor"], trace["source"]) == ("b", "c", "order")
    assert (trace["cost_usd"], trace["upstream_calls"], trace["paused"], trace["out_of"]) == (0.75, 3, False, None)
    (round,) = trace["rounds"]
    assert (round["plan"]["topology"], round["plan"]["depth"]) == ("chain", 2)
    assert round["plan"]["steps"][1] == {"worker": "b", "subtask": "count <b>letters</b>", "access": [0]}
    assert round["plan"]["mermaid"].startswith("flowchart TD\n")
    assert "<b>" not in round["plan"]["mermaid"]
    assert [(step["worker"], step["cost_usd"], step["skipped"]) for step in round["steps"]] == [
        ("a", 0.25, None),
        ("b", 0.25, None),
    ]
    assert trace["critical_path_s"] >= trace["planning_s"] >= 0
    assert [attempt["worker"] for attempt in trace["attempts"]] == ["a", "b"]
    # The caller's own sampling settings are for the workers, not for the plan.
    assert ultra.c.requests[0].max_tokens == 1024


async def test_what_is_streamed(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, CHAIN)
    response = await ultra.ask(stream=True, stream_options={"include_usage": True}, fugu={"trace": True})
    told = events(response)
    assert told[-1] == "[DONE]"
    deltas = [event["choices"][0]["delta"] for event in told[:-1] if event["choices"]]
    reasoning = [delta["reasoning_content"] for delta in deltas if delta.get("reasoning_content")]
    pieces = [delta["content"] for delta in deltas if delta.get("content")]
    assert reasoning[0].startswith("[plan] chain")
    assert reasoning[1:] == [
        "[step 1] a begins\n",
        "[step 1] a is done (0.0 s)\n",
        "[step 2] b begins\n",
    ]
    assert pieces == ["fou", "r l", "ett", "ers"], "the last step's pieces come as they are made"
    assert told[-4]["choices"][0]["finish_reason"] == "stop"
    assert told[-3]["usage"]["total_tokens"] == 330
    assert told[-2]["fugu"]["rounds"][0]["plan"]["topology"] == "chain"


async def test_the_first_byte_is_the_answers(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, CHAIN)
    ultra.c.wait, ultra.b.wait = 0.2, 0.1
    told = events(await ultra.ask(stream=True, fugu={"trace": True}))
    assert told[-2]["fugu"]["timings"]["first_byte_s"] > 0.3


async def test_a_reader_sees_plan_and_steps(tmp_path: Path) -> None:
    trace = (await Ultra(tmp_path, CHAIN).ask(fugu={"trace": True})).json()["fugu"]
    console = Console(record=True, width=100, quiet=False, file=io.StringIO())
    show_trace(trace, console)
    lines = console.export_text().splitlines()
    assert "round 1: chain" in lines
    assert "  2. b (reads 1): count <b>letters</b> · 0.00 s" in lines
    bare = (await Ultra(tmp_path, "no").ask(fugu={"trace": True})).json()["fugu"]
    show_trace(bare, console)
    assert "round 1: no workflow in 3 tries" in console.export_text()


async def test_the_turns_can_be_suppressed(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, CHAIN)
    whole = (await ultra.ask(fugu={"show_turns": False})).json()
    assert "reasoning_content" not in whole["choices"][0]["message"]
    told = events(await ultra.ask(stream=True, fugu={"show_turns": False}))
    assert not any("reasoning_content" in event["choices"][0]["delta"] for event in told[:-1])


async def test_a_silent_plan_keeps_the_connection_alive(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, CHAIN, keep_alive=0.02)
    ultra.c.wait = 0.2
    response = await ultra.ask(stream=True)
    assert response.text.count(": ") > 4
    assert response.text.startswith(": ")


async def test_a_plan_is_written_again_and_at_last_done_without(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, ["no", "still no"], retries=1)
    body = (await ultra.ask(fugu={"trace": True})).json()
    assert body["choices"][0]["message"]["content"] == "pmal"
    reasoning = body["choices"][0]["message"]["reasoning_content"]
    assert "one more try" in reasoning
    assert "The best single worker answers." in reasoning
    (round,) = body["fugu"]["rounds"]
    assert [bool(writing["error"]) for writing in round["writings"]] == [True, True]
    assert "2 tries" in round["fallback"]
    assert ultra.a.requests[0].messages[-1].text == "hello"


async def test_workers_that_fail_are_told_with_the_trace(tmp_path: Path) -> None:
    resting = CircuitOpenError("rests", worker="a", retry_after=30)
    ultra = Ultra(tmp_path, CHAIN, a=resting)
    trace = (await ultra.ask(fugu={"trace": True})).json()["fugu"]
    assert trace["rounds"][0]["steps"][0]["failed"] == [{"worker": "a", "code": "circuit_open"}]
    assert trace["rounds"][0]["steps"][0]["worker"] == "b"
    # What it learned of a resting worker holds for the next choice.
    again = (await ultra.ask(fugu={"trace": True})).json()["fugu"]
    assert list(again["probabilities"]) != ["a"]

    down = WorkerUnavailableError("is down", worker="x")
    failed = await Ultra(tmp_path, CHAIN, a=down, b=down).ask(fugu={"trace": True, "deny": ["c"]})
    assert failed.status_code == 502
    assert set(failed.json()["error"]["failures"]) == {"a", "b"}
    assert failed.json()["fugu"]["rounds"][0]["plan"]["topology"] == "chain"


async def test_an_answer_that_breaks_off_is_an_error_and_nothing_is_said_twice(tmp_path: Path) -> None:
    told = events(await Ultra(tmp_path, CHAIN, b="four BREAK").ask(stream=True, fugu={"show_turns": False}))
    assert told[-1] == "[DONE]"
    assert told[-2]["error"]["code"] == "stream_broken"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in told[:-2]) == "fou"


async def test_what_a_request_may_choose(tmp_path: Path) -> None:
    keep = "model_id: []\nsubtasks: []\naccess_list: []"
    three = plan(("a", "x", ()), ("b", "y", ()), ("a", "z", (0, 1)))
    ultra = Ultra(tmp_path, [three, CHAIN, keep])
    trace = (await ultra.ask(fugu={"trace": True, "max_steps": 2, "max_rounds": 2})).json()["fugu"]
    assert "3 steps, and at most 2" in trace["rounds"][0]["writings"][0]["error"]
    assert [round["kept"] for round in trace["rounds"]] == [False, True]

    ultra = Ultra(tmp_path, CHAIN)
    trace = (await ultra.ask(fugu={"trace": True, "max_calls": 2})).json()["fugu"]
    assert (trace["upstream_calls"], trace["out_of"], trace["worker"]) == (2, "calls", "b")

    trace = (await Ultra(tmp_path, CHAIN).ask(fugu={"trace": True, "budget_usd": 0.5})).json()["fugu"]
    assert (trace["out_of"], trace["cost_usd"], trace["warnings"]) == ("usd", 0.5, [])
    unpriced = Ultra(tmp_path, CHAIN, priced=())
    trace = (await unpriced.ask(fugu={"trace": True, "budget_usd": 10})).json()["fugu"]
    assert [warning.split()[-4] for warning in trace["warnings"]] == ["a", "b", "c"]

    # Too few tokens for a plan are still enough for the best single worker; the lower of both limits holds.
    ultra = Ultra(tmp_path, CHAIN, budget_tokens=200)
    trace = (await ultra.ask(fugu={"trace": True, "budget_tokens": 9_000})).json()["fugu"]
    assert "budget of 200 tokens" in trace["rounds"][0]["fallback"]
    assert (trace["worker"], trace["upstream_calls"], len(ultra.c.requests)) == ("a", 1, 0)
    assert 16 <= (ultra.a.requests[0].max_tokens or 0) < 200
    response = await ultra.ask(fugu={"budget_tokens": 10})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "budget.tokens")

    ultra = Ultra(tmp_path, CHAIN, deadline=30)
    ultra.b.wait = 30
    trace = (await ultra.ask(fugu={"trace": True, "deadline_s": 2})).json()["fugu"]
    assert (trace["out_of"], trace["worker"]) == ("seconds", "a")
    assert ultra.b.cancelled == 1

    ultra = Ultra(
        tmp_path, lambda request: CHAIN.replace("[0, 1]", "[1, 1]") if "1, 2" in request.messages[-1].text else "?"
    )
    trace = (await ultra.ask(fugu={"trace": True, "deny": ["a"]})).json()["fugu"]
    assert [step["worker"] for step in trace["rounds"][0]["steps"]] == ["b", "b"]
    assert ultra.a.requests == []

    for field, value in {
        "max_rounds": 0,
        "max_steps": 6,
        "max_recursion": 4,
        "deadline_s": 0,
        "budget_usd": -1,
        "budget_tokens": 0,
        "max_calls": 1.5,
    }.items():
        response = await ultra.ask(fugu={field: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, f"fugu.{field}")


async def test_a_caller_who_leaves_ends_the_calls(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, CHAIN)
    ultra.b.wait = 30
    task = asyncio.create_task(ultra.ask())
    for _ in range(200):
        await asyncio.sleep(0.005)
        if ultra.b.requests:
            break
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ultra.b.cancelled == 1


async def test_a_caller_who_reads_slowly_slows_the_worker_down_and_leaves_nothing_behind(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, CHAIN, b="x" * 30_000)
    made = 0

    class Counted(Scripted):
        async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
            nonlocal made
            async for chunk in super().stream(request):
                made += 1
                yield chunk

    ultra.b.__class__ = Counted
    body = {"model": "fugu-ultra", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    parts = 0

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        nonlocal parts
        parts += 1
        if parts > 20:
            await asyncio.sleep(30)  # the connection takes no more

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
    headers = [(b"content-type", b"application/json"), (b"host", b"x")]
    task = asyncio.create_task(ultra.app({**scope, "headers": headers}, receive, send))
    for _ in range(400):
        await asyncio.sleep(0.005)
        if parts > 20:
            break
    await asyncio.sleep(0.2)
    assert 10 < made < 100, "of ten thousand pieces no more are made than are read, and a few ahead"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    seen = made
    await asyncio.sleep(0.05)
    assert made == seen
    assert len(asyncio.all_tasks()) == 1


# Tools ---------------------------------------------------------------------------------------------------------------


def looks(request: ChatRequest) -> Answer:
    results = [message.text for message in request.messages if message.role == "tool"]
    return f"the sea is {results[-1]}" if results else CALL


def sent_back(message: dict[str, Any], result: str) -> list[dict[str, Any]]:
    called = [{"role": "tool", "tool_call_id": call["id"], "content": result} for call in message["tool_calls"]]
    return [{"role": "user", "content": "hello"}, message, *called]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_in_an_inner_step_survives_the_gateway(tmp_path: Path, stream: bool) -> None:
    first = Ultra(tmp_path, CHAIN, a=looks)
    response = await first.ask(tools=TOOLS, stream=stream, fugu={"show_turns": False})
    if stream:
        told = events(response)[:-1]
        deltas = [event["choices"][0]["delta"] for event in told]
        (call,) = [call for delta in deltas for call in delta.get("tool_calls", ())]
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{k: v for k, v in call.items() if k != "index"}],
        }
        assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"
    else:
        choice = response.json()["choices"][0]
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls"
        assert message["content"] is None, "what an inner agent says beside its calls is not for the caller"
    (call,) = message["tool_calls"]
    assert call["id"].startswith("wf_")
    assert call["function"] == {"name": "weather", "arguments": CALL.arguments}
    assert first.b.requests == []

    second = Ultra(tmp_path, AssertionError("nothing is planned again"), a=looks)
    answer = (await second.ask(tools=TOOLS, messages=sent_back(message, "calm"), fugu={"trace": True})).json()
    assert answer["choices"][0]["message"]["content"] == "four letters"
    assert "the sea is calm" in second.b.requests[0].messages[-1].text
    (round,) = answer["fugu"]["rounds"]
    assert (round["resumed"], round["writings"]) == (True, [])
    assert answer["usage"]["total_tokens"] == 220


async def test_an_unknown_workflow_is_an_error_and_the_conversation_goes_on(tmp_path: Path) -> None:
    message = (await Ultra(tmp_path, CHAIN, a=looks).ask(tools=TOOLS)).json()["choices"][0]["message"]
    (tmp_path / "other").mkdir()
    elsewhere = Ultra(tmp_path / "other", CHAIN)
    response = await elsewhere.ask(tools=TOOLS, messages=sent_back(message, "calm"))
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("workflow_not_found", "messages")
    assert "add a user message" in error["message"]
    # The way that the error names: planned anew, the tool results in view of all.
    conversation = [*sent_back(message, "calm"), {"role": "user", "content": "go on"}]
    response = await elsewhere.ask(tools=TOOLS, messages=conversation)
    assert response.json()["choices"][0]["message"]["content"] == "four letters"
    for worker in (elsewhere.a, elsewhere.b):
        assert [m.text for m in worker.requests[0].messages if m.role == "tool"] == ["calm"]
    assert "calm" in elsewhere.c.requests[0].messages[-1].text


async def test_an_expired_workflow_is_gone(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, CHAIN, a=looks, memory_ttl=0.01)
    message = (await ultra.ask(tools=TOOLS)).json()["choices"][0]["message"]
    await asyncio.sleep(0.05)
    response = await ultra.ask(tools=TOOLS, messages=sent_back(message, "calm"))
    assert response.json()["error"]["code"] == "workflow_not_found"


async def test_a_missing_result_is_the_callers_fault(tmp_path: Path) -> None:
    two = plan(("a", "x", ()), ("b", "y", ()), ("c", "z", (0, 1)))
    ultra = Ultra(
        tmp_path, lambda request: two if request.messages[-1].text.startswith("<question>") else "end", a=looks, b=looks
    )
    message = (await ultra.ask(tools=TOOLS)).json()["choices"][0]["message"]
    assert len(message["tool_calls"]) == 2
    response = await ultra.ask(tools=TOOLS, messages=sent_back(message, "calm")[:-1])
    assert response.status_code == 400
    assert message["tool_calls"][1]["id"] in response.json()["error"]["message"]


# Whether it is served ------------------------------------------------------------------------------------------------


class ByWords(OrderDecider):
    """A head that knows who is good with words, or (`source` order) cannot be reached."""

    def __init__(self, source: str) -> None:
        super().__init__(NAMES)
        self.source = source
        self.asked: list[str] = []

    async def choose(self, question: Question) -> Choice:
        text = question.messages[-1].text
        self.asked.append(text)
        best = "b" if "reverse" in text else "a"
        return Choice(best, {best: 0.9, **{name: 0.05 for name in NAMES if name != best}}, self.source)


@pytest.mark.parametrize(("source", "hands"), [("head", ["b", "a"]), ("order", ["a", "b"])])
async def test_the_router_assigns_the_steps_where_it_can(tmp_path: Path, source: str, hands: list[str]) -> None:
    decider = ByWords(source)
    ultra = Ultra(tmp_path, CHAIN, decider=decider, assign="router")
    trace = (await ultra.ask(fugu={"trace": True})).json()["fugu"]
    (round,) = trace["rounds"]
    assert [step["worker"] for step in round["plan"]["steps"]] == hands
    assert [step["worker"] for step in round["steps"]] == hands
    assert decider.asked[1:] == ["reverse the word", "count <b>letters</b>"]


async def test_the_router_reads_the_conversation_once(tmp_path: Path) -> None:
    decider = ByWords("head")
    ultra = Ultra(tmp_path, plan(("a", "a copy", ())), decider=decider, assign="router")
    messages = [{"role": "user", "content": "reverse lamp"}]
    trace = (await ultra.ask(fugu={"trace": True}, messages=messages)).json()["fugu"]
    assert [step["worker"] for step in trace["rounds"][0]["steps"]] == ["b"]
    assert decider.asked == ["reverse lamp"]


def test_the_router_cannot_assign_without_a_head() -> None:
    workers = [{"name": "a", "provider": "openai", "model": "m"}]
    with pytest.raises(ValueError, match=r"only with a router\.checkpoint"):
        FuguConfig.model_validate({"workers": workers, "conductor": {"worker": "a", "assign": "router"}})


async def test_it_is_listed_where_there_is_a_conductor(tmp_path: Path) -> None:
    ultra = Ultra(tmp_path, CHAIN)
    assert [model["id"] for model in (await get(ultra.app, "/v1/models")).json()["data"]] == ["fugu", "fugu-ultra"]
    without = Gateway(ultra.config, [ultra.a], OrderDecider(["a"]), Readiness({}))
    assert [model["id"] for model in (await get(without, "/v1/models")).json()["data"]] == ["fugu"]
    response = await post(without, model="fugu-ultra")
    assert response.status_code == 404
    assert "no conductor" in response.json()["error"]["message"]


def config(tmp_path: Path, workers: tuple[str, ...] = NAMES, **conductor: Any) -> FuguConfig:
    specs = [{"name": name, "provider": "openai", "model": "m"} for name in workers]
    conductor = {"model": "m", "adapter": tmp_path, **conductor}
    return FuguConfig.model_validate({"workers": specs, "conductor": conductor})


def test_an_adapter_is_served_for_what_it_was_trained_for_only(tmp_path: Path) -> None:
    assert why_no_conductor(config(tmp_path)) is None
    write_card(tmp_path, ConductorCard(("c", "a"), "compact", steps="bare"))
    with pytest.raises(CheckpointError, match=r"style is paper.*trained with compact"):
        why_no_conductor(config(tmp_path))
    with pytest.raises(CheckpointError, match=r"steps is full.*trained with bare"):
        why_no_conductor(config(tmp_path, style="compact"))
    fits = config(tmp_path, style="compact", steps="bare")
    assert why_no_conductor(fits) is None
    # Numbers mean what they meant in training, whatever the order of the file.
    workers = {name: Scripted(name, "x") for name in (*NAMES, "conductor")}
    assert conducting(fits, workers).names == ("c", "a")
    with pytest.raises(CheckpointError, match=r"trained with c, a"):
        why_no_conductor(config(tmp_path, ("x", "y"), style="compact", steps="bare"))
    (tmp_path / "conductor.json").write_text(json.dumps({"workers": []}))
    with pytest.raises(CheckpointError, match=r"conductor\.json"):
        why_no_conductor(fits)


@pytest.mark.parametrize(("provider", "structured"), [("vllm", True), ("openai", False)])
def test_a_worker_on_vllm_writes_plans_under_a_grammar(provider: str, structured: bool) -> None:
    specs = [{"name": "a", "provider": "openai", "model": "m"}, {"name": "c", "provider": provider, "model": "m"}]
    made = FuguConfig.model_validate({"workers": specs, "conductor": {"worker": "c"}})
    workers = {name: Scripted(name, "x") for name in "ac"}
    assert conducting(made, workers).settings(Knobs()).structured is structured


def test_prices_of_the_public_list_bound_a_request_too() -> None:
    """gpt-5 costs 1.25 dollars to read and 10 to write, per million; nobody knows what the other one costs."""
    models = {"a": "gpt-5", "b": "no-such-model", "c": "gpt-5"}
    specs = [{"name": name, "provider": "openai", "model": model} for name, model in models.items()]
    specs[2]["price"] = {"input": 1.0, "output": 2.0}
    made = FuguConfig.model_validate({"workers": specs, "conductor": {"worker": "c"}})
    found = conducting(made, {name: Scripted(name, "x") for name in NAMES})
    assert found.price("a", 1000, 100) == pytest.approx((1000 * 1.25 + 100 * 10) / 1e6)
    assert found.price("c", 1000, 100) == pytest.approx((1000 * 1 + 100 * 2) / 1e6)
    assert found.unpriced(NAMES) == ["b"]


def test_a_disabled_worker_conducts_nothing(tmp_path: Path) -> None:
    spec = {"name": "a", "provider": "openai", "model": "m"}
    made = FuguConfig.model_validate(
        {"workers": [spec, {**spec, "name": "b"}], "conductor": {"worker": "a"}, "disabled": {"a": "KEY is not set"}}
    )
    assert "KEY is not set" in (why_no_conductor(made) or "")
