"""`fugu-trinity` behind the gateway, over workers whose behaviour each test scripts. No Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.config import FuguConfig, RouterConfig
from actors.errors import CircuitOpenError, FuguError, WorkerUnavailableError
from actors.marks import mark
from actors.messages import ChatReply, ChatRequest, Chunk, Timing, ToolCall, Usage
from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint
from serve.api.health import Readiness
from serve.app import needs_router
from serve.checkpoint import why_no_roles
from serve.gateway import Gateway
from serve.router import OrderDecider, Question, RouterClient
from serve.trace import Choice
from tests.serve.test_gateway import events, get, post

QUEUED = 0.125
ADVICE = "<suggestion>split off the tens</suggestion><next>worker</next>"


class Player:
    """Answers by the role it is given; the values are texts or errors. `wait` seconds before each."""

    def __init__(
        self, name: str, *, wait: float = 0, calls: tuple[ToolCall, ...] = (), **says: str | FuguError
    ) -> None:
        self.name = name
        self.wait = wait
        self.calls = calls
        self.says: dict[str, str | FuguError] = {
            "worker": f"42 by {name}",
            "thinker": ADVICE,
            "verifier": "ACCEPT",
            **says,
        }
        self.requests: list[ChatRequest] = []
        self.roles: list[str] = []
        self.asked = asyncio.Event()
        self.cancelled = 0

    async def complete(self, request: ChatRequest) -> ChatReply:
        shown = request.messages[-1].text
        role = "thinker" if "Do not solve" in shown else "verifier" if "Judge the response" in shown else "worker"
        self.requests.append(request)
        self.roles.append(role)
        self.asked.set()
        try:
            await asyncio.sleep(self.wait)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        said = self.says[role]
        if isinstance(said, FuguError):
            raise said
        calls = self.calls if role == "worker" else ()
        usage = {"worker": Usage(100, 10, 20, 4), "thinker": Usage(30, 3), "verifier": Usage(50, 5, 7, 1)}[role]
        timing = Timing(QUEUED, 0.1, 0.2)
        finish = "tool_calls" if calls else "stop"
        return ChatReply(self.name, said, "", calls, finish, usage, 0.25, timing, attempts=2)  # type: ignore[arg-type]

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        raise AssertionError("a session's turns are not streamed")


class Plan:
    """Decides (worker, role) turn by turn, and keeps what it was asked."""

    def __init__(self, *turns: tuple[str, str | None]) -> None:
        self.turns = list(turns)
        self.questions: list[Question] = []

    async def choose(self, question: Question) -> Choice:
        self.questions.append(question)
        worker, role = self.turns[min(len(self.questions), len(self.turns)) - 1]
        names = sorted(question.allowed)
        chosen = worker if worker in names else names[0]
        return Choice(chosen, {name: 0.5 if name == chosen else 0.25 for name in names}, "head", role, 0.01)

    async def status(self) -> FuguError | None:
        return None


def trinity(*workers: Player, plan: Any, keep_alive: float = 15, limit: float = 60, **router: Any) -> Gateway:
    specs = [{"name": worker.name, "provider": "openai", "model": "m"} for worker in workers]
    serve = {"keep_alive": keep_alive, "request_timeout": limit}
    config = FuguConfig.model_validate({"workers": specs, "router": router, "serve": serve})
    return Gateway(config, workers, plan, Readiness({}), no_roles=None)


async def ask(app: Gateway, **fields: Any) -> Any:
    return await post(app, model="fugu-trinity", **fields)


THREE = (("a", "thinker"), ("b", "worker"), ("a", "verifier"))


async def test_a_whole_session() -> None:
    a, b = Player("a"), Player("b", worker="42 <idea>carry</idea>")
    plan = Plan(*THREE)
    response = await ask(trinity(a, b, plan=plan), fugu={"trace": True})
    assert response.status_code == 200
    body = response.json()
    assert body["model"] == "fugu-trinity"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "42", "refusal": None}
    assert (a.roles, b.roles) == (["thinker", "verifier"], ["worker"])
    assert "split off the tens" in b.requests[0].messages[-1].text
    # What the first call read and what the answering one wrote is visible; the rest is orchestration, and counted.
    assert body["usage"] == {
        "prompt_tokens": 30,
        "completion_tokens": 10,
        "total_tokens": 198,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "orchestration_input_tokens": 150,
            "orchestration_input_cached_tokens": 27,
        },
        "completion_tokens_details": {"reasoning_tokens": 4, "orchestration_output_tokens": 8},
    }
    trace = body["fugu"]
    assert [(turn["worker"], turn["role"], turn["overridden"]) for turn in trace["turns"]] == [
        ("a", "thinker", False),
        ("b", "worker", True),
        ("a", "verifier", False),
    ]
    assert trace["turns"][1]["usage"]["total_tokens"] == 110
    assert trace["turns"][1]["cost_usd"] == 0.25
    assert trace["turns"][1]["probabilities"] == {"a": 0.25, "b": 0.5}
    assert (trace["worker"], trace["role"], trace["accepted"]) == ("b", "worker", True)
    assert (trace["cost_usd"], trace["upstream_calls"], trace["cached"]) == (0.75, 6, False)
    assert trace["usage"] == body["usage"]
    assert [attempt["worker"] for attempt in trace["attempts"]] == ["a", "b", "a"]
    assert trace["timings"]["decision_s"] == pytest.approx(0.03)
    assert trace["timings"]["first_byte_s"] == trace["timings"]["total_s"]
    assert [question.roles for question in plan.questions] == [True] * 3
    # The idea of a turn is what the router reads before the next; ours is never the caller's.
    assert "carry" in plan.questions[2].messages[-1].text


async def test_usage_always_sums_up() -> None:
    plan = Plan(("a", "worker"), ("a", "verifier"))
    app = trinity(Player("a", verifier="REVISE: no"), plan=plan, max_turns=4)
    body = (await ask(app, fugu={"trace": True})).json()
    usage, turns = body["usage"], body["fugu"]["turns"]
    orchestration = (
        usage["prompt_tokens_details"]["orchestration_input_tokens"]
        + usage["completion_tokens_details"]["orchestration_output_tokens"]
    )
    assert usage["prompt_tokens"] + usage["completion_tokens"] + orchestration == usage["total_tokens"]
    assert usage["total_tokens"] == sum(turn["usage"]["total_tokens"] for turn in turns)
    assert len(turns) == 4
    assert body["fugu"]["accepted"] is False


async def test_a_streamed_session_shows_its_turns_where_asked() -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    app = trinity(Player("a"), Player("b"), plan=Plan(*THREE))
    shown = events(await ask(app, fugu={"show_turns": True, "trace": True}, **options))
    deltas = [chunk["choices"][0]["delta"] for chunk in shown[:-1] if chunk["choices"]]
    assert deltas == [
        {"role": "assistant", "content": "", "reasoning_content": f"[thinker: a]\n{ADVICE}\n\n"},
        {"reasoning_content": "[worker: b]\n\n"},
        {"reasoning_content": "[verifier: a]\nACCEPT\n\n"},
        {"content": "42 by b"},
        {},
    ]
    assert shown[4]["choices"][0]["finish_reason"] == "stop"
    assert shown[5]["usage"]["total_tokens"] == 198
    assert len(shown[6]["fugu"]["turns"]) == 3
    assert shown[-1] == "[DONE]"
    plain = events(await ask(trinity(Player("a"), Player("b"), plan=Plan(*THREE)), stream=True))
    assert [chunk["choices"][0]["delta"] for chunk in plain[:-1]] == [{"role": "assistant", "content": "42 by b"}, {}]
    whole = (await ask(trinity(Player("a"), Player("b"), plan=Plan(*THREE)), fugu={"show_turns": True})).json()
    message = whole["choices"][0]["message"]
    assert message["reasoning_content"] == "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert message["content"] == "42 by b"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call_ends_the_session(stream: bool) -> None:
    call = ToolCall("c1", "look", '{"a":1}')
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    app = trinity(Player("a", worker="", calls=(call,)), plan=Plan(("a", "worker")))
    response = await ask(app, tools=tools, stream=stream)
    if stream:
        first, last, done = events(response)
        assert done == "[DONE]"
        calls, reason = first["choices"][0]["delta"]["tool_calls"], last["choices"][0]["finish_reason"]
        assert calls[0].pop("index") == 0
    else:
        choice = response.json()["choices"][0]
        calls, reason = choice["message"]["tool_calls"], choice["finish_reason"]
    expected = {"id": mark("c1", "a"), "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
    assert (calls, reason) == ([expected], "tool_calls")


async def test_masks_and_seeds_hold_for_every_turn() -> None:
    async def seeds(seed: int | None) -> list[int | None]:
        plan, denied = Plan(("b", "thinker"), ("b", "worker"), ("b", "verifier")), Player("b")
        app = trinity(Player("a"), denied, Player("c"), plan=plan)
        wishes = {"deny": ["b"], "choose": "sample", **({} if seed is None else {"seed": seed})}
        assert (await ask(app, fugu=wishes)).status_code == 200
        assert [question.allowed for question in plan.questions] == [{"a", "c"}] * 3
        assert {question.choose for question in plan.questions} == {"sample"}
        assert denied.requests == []
        return [question.seed for question in plan.questions]

    first, second, other = await seeds(7), await seeds(7), await seeds(8)
    assert first == second
    assert first[0] == 7
    assert len({*first, *other}) == 6
    assert await seeds(None) == [None] * 3


async def test_a_failed_worker_is_replaced_and_named() -> None:
    down = Player("a", worker=WorkerUnavailableError("a is down", worker="a"))
    app = trinity(down, Player("b"), plan=Plan(("a", "worker"), ("b", "verifier")))
    trace = (await ask(app, fugu={"trace": True})).json()["fugu"]
    assert trace["turns"][0]["worker"] == "b"
    assert trace["turns"][0]["failed"] == [{"worker": "a", "code": "worker_unavailable"}]
    assert [(attempt["worker"], attempt["ok"]) for attempt in trace["attempts"]] == [
        ("a", False),
        ("b", True),
        ("b", True),
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_nobody_can_answer(stream: bool) -> None:
    rests = CircuitOpenError("rests", worker="a", retry_after=9)
    app = trinity(Player("a", worker=rests), plan=Plan(("a", "thinker"), ("a", "worker")))
    response = await ask(app, stream=stream, fugu={"trace": True})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "9"
    assert response.json()["error"]["code"] == "all_workers_failed"
    assert [turn["role"] for turn in response.json()["fugu"]["turns"]] == ["thinker"]


async def test_a_later_failure_leaves_the_answer() -> None:
    down = Player("a", verifier=WorkerUnavailableError("is down", worker="a"))
    body = (await ask(trinity(down, plan=Plan(("a", "worker"), ("a", "verifier"))), fugu={"trace": True})).json()
    assert body["choices"][0]["message"]["content"] == "42 by a"
    assert body["fugu"]["warnings"] == ["turn 2: no worker could answer. a: is down; the answer so far stands"]


async def test_keep_alives_while_they_think() -> None:
    app = trinity(
        Player("a", wait=0.25), plan=Plan(*[("a", "thinker"), ("a", "worker"), ("a", "verifier")]), keep_alive=0.1
    )
    response = await ask(app, stream=True)
    assert response.text.startswith(": keep-alive\n\n")
    assert response.text.count(": keep-alive\n\n") >= 5
    assert events(response)[0]["choices"][0]["delta"]["content"] == "42 by a"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_an_end_before_time_reaches_the_call_in_flight(stream: bool, end: str) -> None:
    slow = Player("b", wait=30)
    app = trinity(Player("a"), slow, plan=Plan(*THREE), limit=0.3 if end == "deadline" else 60)
    task = asyncio.create_task(ask(app, stream=stream, fugu={"trace": True}))
    await asyncio.wait_for(slow.asked.wait(), 5)
    if end == "cancel":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        response = await task
        assert response.status_code == 504
        assert [turn["role"] for turn in response.json()["fugu"]["turns"]] == ["thinker"]
    assert slow.cancelled == 1


async def test_a_router_that_does_not_answer_ends_no_session() -> None:
    class Gone:
        @property
        def decide(self) -> Any:
            raise RuntimeError("gone")

    decider = RouterClient(Gone(), ["a", "b"], 1.0)
    a = Player("a")
    body = (await ask(trinity(a, Player("b"), plan=decider), fugu={"trace": True})).json()
    assert body["choices"][0]["message"]["content"] == "42 by a"
    # An answer and its check, by the order of the file.
    assert a.roles == ["worker", "verifier"]
    assert "the router did not decide" in body["fugu"]["turns"][0]["warnings"][0]


async def test_the_only_worker_still_gets_a_role() -> None:
    asked: list[Question] = []

    class Handle:
        class decide:  # noqa: N801 - as Serve's handles are called
            @staticmethod
            async def remote(question: Question) -> FuguError:
                asked.append(question)
                return FuguError("not today")

    app = trinity(Player("a"), plan=RouterClient(Handle(), ["a"], 1.0))
    assert (await ask(app)).status_code == 200
    assert len(asked) == 2
    assert (await post(app)).status_code == 200
    assert len(asked) == 2, "nothing is to be decided for fugu"


async def test_without_the_guard_there_may_be_no_answer() -> None:
    app = trinity(Player("a"), plan=Plan(("a", "verifier")), guard=False)
    response = await ask(app)
    assert response.status_code == 500
    assert "router.guard" in response.json()["error"]["message"]
    assert (await ask(trinity(Player("a"), plan=Plan(("a", "verifier"))))).status_code == 200


async def test_models_are_those_that_are_served() -> None:
    with_roles = trinity(Player("a"), plan=Plan(("a", "worker")))
    assert [m["id"] for m in (await get(with_roles, "/v1/models")).json()["data"]] == ["fugu", "fugu-trinity"]
    assert (await get(with_roles, "/v1/models/fugu-trinity")).json()["id"] == "fugu-trinity"
    config = FuguConfig.model_validate({"workers": [{"name": "a", "provider": "openai", "model": "m"}]})
    without = Gateway(config, [Player("a")], OrderDecider(["a"]), Readiness({}), no_roles="it has no roles")
    assert [m["id"] for m in (await get(without, "/v1/models")).json()["data"]] == ["fugu"]
    for response in (await ask(without), await get(without, "/v1/models/fugu-trinity")):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["message"] == "model: 'fugu-trinity' is not served here: it has no roles; use 'fugu'"
    error = (await post(with_roles, model="gpt")).json()["error"]
    assert error["message"] == "model: 'gpt' is not served here; use 'fugu' or 'fugu-trinity'"


def head(folder: Path, *, roles: bool) -> Path:
    info = CheckpointInfo(("a",), "none", "0", roles=roles)
    save_checkpoint(folder / "head.safetensors", Checkpoint(info, torch.ones(info.rows, 4)))
    return folder / "head.safetensors"


def broken(folder: Path) -> Path:
    (folder / "head.safetensors").write_bytes(b"no checkpoint")
    return folder / "head.safetensors"


@pytest.mark.parametrize(
    ("make", "why", "router"),
    [
        (lambda folder: None, "nothing is trained", False),
        (lambda folder: head(folder, roles=True), None, True),
        (lambda folder: head(folder, roles=False), "has no roles", False),
        (lambda folder: folder / "missing", "cannot be read", False),
        (broken, "cannot be read", False),
    ],
)
def test_roles_are_read_from_the_checkpoint(
    make: Callable[[Path], Path | None], why: str | None, router: bool, tmp_path: Path
) -> None:
    config = FuguConfig.model_validate(
        {"workers": [{"name": "a", "provider": "openai", "model": "m"}], "router": {"checkpoint": make(tmp_path)}}
    )
    told = why_no_roles(config.router)
    assert told is None if why is None else why in (told or "")
    # One worker alone needs deciding about only where it may play several roles.
    assert needs_router(config) is router
    assert RouterConfig().max_turns == 5
