"""Traces of a gateway and its workers in one process: real links, adapters and exporter, with a provider and a
collector on the loopback interface."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from actors import telemetry as telemetry_module
from actors.adapters.build import build_adapters
from actors.chat_span import CONTENT_CHARACTERS, begin_chat
from actors.config import FuguConfig
from actors.config_file import load_config
from actors.errors import ConfigError, FuguError, WorkerUnavailableError
from actors.link import Endpoint
from actors.link_client import Link
from actors.link_server import LinkServer
from actors.messages import ChatRequest, Message
from actors.otel import CLOSE_SECONDS, Telemetry
from actors.pool import PoolWorker, Shard
from actors.spans import running
from actors.telemetry import TelemetryConfig, open_telemetry
from actors.worker import WorkerRuntime
from orchestrator.workflow import Step, Workflow, render_workflow
from serve.api.health import Readiness
from serve.conductor import conducting
from serve.gateway import Gateway
from serve.router import Question
from serve.store import SqliteStore
from serve.trace import Choice
from tests.collector import Collector, Seen, children
from tests.loopback import Behaviour, LoopbackProvider, Usage

REPOSITORY = Path(__file__).resolve().parents[2]
SECRET = "the-secret-prompt-7c1d"
ANSWER = "the-secret-answer-9e2f"
KEY = "worker-key-31fa8c0d"
TOKEN = "collector-token-5b0e"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
ROUTE = "/v1/chat/completions"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def provider() -> Iterator[LoopbackProvider]:
    with LoopbackProvider(api_key=KEY) as provider:
        yield provider


@pytest.fixture(autouse=True)
def _afresh(collector: Collector, provider: LoopbackProvider) -> None:
    collector.clear()
    provider.clear()
    provider.default = Behaviour(text=ANSWER, usage=Usage(11, 7, 4, 2))


class LinkShard:
    """A provider actor without its actor: the way to it is a link, as ever."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.current: Link | None = None

    async def link(self, _timeout: float) -> Link:
        self.current = await Link.connect(self._endpoint)
        return self.current


class Deciding:
    """Prefers `second`, and deals out the roles it was given."""

    def __init__(self) -> None:
        self.roles: list[str] = []
        self.asked: list[Question] = []

    async def choose(self, question: Question) -> Choice:
        self.asked.append(question)
        shares = {name: {"first": 0.25, "second": 0.75}[name] for name in sorted(question.allowed)}
        role = self.roles.pop(0) if question.roles and self.roles else None
        return Choice(max(shares, key=shares.__getitem__), shares, "head", role, 0.004)

    async def status(self) -> FuguError | None:
        return None


class Traced:
    """A gateway over two workers; `ask` posts to it, `spans` closes everything and gives what the collector got."""

    def __init__(self, app: Gateway, decider: Deciding, telemetry: list[Telemetry], collector: Collector) -> None:
        self.app = app
        self.decider = decider
        self._telemetry = telemetry
        self._collector = collector

    async def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        body = {"model": "fugu", "messages": [{"role": "user", "content": SECRET}], **fields}
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(ROUTE, json=body, headers=headers or {})

    async def spans(self) -> list[Seen]:
        for each in self._telemetry:
            await asyncio.to_thread(each.close)
        return self._collector.spans


@asynccontextmanager
async def traced(
    collector: Collector, provider: LoopbackProvider, folder: Path, *, off: bool = False, **telemetry: Any
) -> AsyncIterator[Traced]:
    spec = {"provider": "openai", "base_url": provider.url_for("openai"), "api_key": KEY}
    slow = {"attempts": 2, "min_wait": 0.01, "max_wait": 0.02}
    config = FuguConfig.model_validate(
        {
            "workers": [
                {"name": name, "model": f"{name}-model", "retry": slow, "price": {"input": 1, "output": 2}, **spec}
                for name in ("first", "second")
            ],
            "conductor": {"worker": "first", "max_rounds": 1},
            "telemetry": None
            if off
            else {"endpoint": collector.url, "headers": {"Authorization": f"Bearer {TOKEN}"}, **telemetry},
        }
    )
    opened: list[Telemetry] = []

    def process(name: str) -> Telemetry | None:
        made = open_telemetry(config.telemetry, name)
        opened.extend([made] if made is not None else [])
        return made

    adapters, servers, workers = {}, [], {}
    for each in config.active:
        adapters |= await build_adapters((each,))
        server = LinkServer({each.name: WorkerRuntime(each, adapters[each.name])}, process(f"provider {each.name}"))
        servers.append(server)
        shard = LinkShard(await server.start("127.0.0.1"))
        workers[each.name] = PoolWorker(each, [cast(Shard, shard)])
    decider = Deciding()
    app = Gateway(
        config,
        list(workers.values()),
        decider,
        Readiness({}),
        no_roles=None,
        ultra=(conducting(config, workers), SqliteStore(folder / "workflows.sqlite")),
        telemetry=process("gateway"),
    )
    try:
        yield Traced(app, decider, opened, collector)
    finally:
        for each in opened:
            await asyncio.to_thread(each.close)
        for server in servers:
            await server.close()
        for adapter in adapters.values():
            await adapter.close()


def one(spans: list[Seen], name: str) -> Seen:
    found = [span for span in spans if span.name == name]
    assert len(found) == 1, [span.name for span in spans]
    return found[0]


async def test_one_trace_from_the_callers_span_to_the_providers_call(
    collector: Collector, provider: LoopbackProvider, tmp_path: Path
) -> None:
    async with traced(collector, provider, tmp_path) as served:
        given = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=x1", "x-request-id": "ask-1"}
        response = await served.ask(given, temperature=0.5, max_tokens=64, seed=9)
        assert response.status_code == 200
        spans = await served.spans()
    assert {span.trace for span in spans} == {TRACE}
    request, decision = one(spans, f"POST {ROUTE}"), one(spans, "decision")
    chat, attempt = one(spans, "chat second-model"), one(spans, "attempt")
    assert len(spans) == 4
    assert (request.parent, request.kind) == (CALLER, "server")
    assert (decision.parent, decision.kind) == (request.id, "internal")
    assert (chat.parent, chat.kind) == (request.id, "client")
    assert (attempt.parent, attempt.kind) == (chat.id, "client")
    assert request.began <= decision.began <= decision.ended <= chat.began <= attempt.began
    assert attempt.ended <= chat.ended <= request.ended
    assert not any(span.failed for span in spans)

    price = (11 + 2 * 7) / 1e6
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": ROUTE,
        "url.path": ROUTE,
        "http.response.status_code": 200,
        "fugu.request_id": "ask-1",
        "fugu.model": "fugu",
        "fugu.outcome": "ok",
        "fugu.worker": "second",
        "fugu.decision.source": "head",
        "fugu.failed_calls": 0,
        "fugu.usage.input_tokens": 11,
        "fugu.usage.output_tokens": 7,
        "fugu.cost_usd": pytest.approx(price),
    }
    assert decision.attributes == {
        "fugu.decision.worker": "second",
        "fugu.decision.source": "head",
        "fugu.decision.score.first": 0.25,
        "fugu.decision.score.second": 0.75,
    }
    waited = chat.attributes.pop("fugu.limiter.wait_s")
    assert 0 <= waited < 5
    assert chat.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "second-model",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 9,
        "gen_ai.response.model": "second-model",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.reasoning.output_tokens": 2,
        "server.address": "127.0.0.1",
        "server.port": provider.port,
        "fugu.worker": "second",
        "fugu.cost_usd": pytest.approx(price),
        "fugu.retries": 0,
    }
    assert attempt.attributes["fugu.attempt"] == 1
    assert request.resource["service.name"] == "fugu"
    assert (request.resource["fugu.process"], attempt.resource["fugu.process"]) == ("gateway", "provider second")

    sent = provider.requests[-1].headers
    assert sent["traceparent"] == f"00-{TRACE}-{attempt.id}-01"
    assert sent["tracestate"] == "vendor=x1"
    assert served.decider.asked[0].headers == {
        "traceparent": f"00-{TRACE}-{decision.id}-01",
        "tracestate": "vendor=x1",
    }
    assert set(collector.paths) == {"/v1/traces"}
    assert {each["authorization"] for each in collector.headers} == {f"Bearer {TOKEN}"}
    assert {each["content-type"] for each in collector.headers} == {"application/x-protobuf"}


async def test_without_a_caller_a_trace_of_its_own(
    collector: Collector, provider: LoopbackProvider, tmp_path: Path
) -> None:
    async with traced(collector, provider, tmp_path) as served:
        await asyncio.gather(*(served.ask() for _ in range(5)))
        await served.ask({"traceparent": "00-nonsense-01"})
        spans = await served.spans()
    roots = [span for span in spans if not span.parent]
    assert len({root.trace for root in roots}) == len(roots) == 6
    for root in roots:
        assert [span.name for span in children(spans, root)] == ["decision", "chat second-model"]


async def test_words_are_told_only_when_asked(collector: Collector, provider: LoopbackProvider, tmp_path: Path) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": SECRET},
        {"role": "assistant", "tool_calls": [_call("call_1", "look", '{"at": "sky"}')]},
        {"role": "tool", "tool_call_id": "call_1", "content": "blue"},
    ]
    async with traced(collector, provider, tmp_path) as served:
        await served.ask(messages=conversation)
        await served.ask(stream=True, model="fugu-ultra")
        await served.spans()
    everything = b"".join(collector.raw)
    for word in (SECRET, ANSWER, "Be brief", "sky", "blue", KEY, TOKEN):
        assert word.encode() not in everything
    assert b"gen_ai.usage.input_tokens" in everything

    collector.clear()
    async with traced(collector, provider, tmp_path, content=True) as served:
        await served.ask(messages=conversation)
        chat = one(await served.spans(), "chat second-model")
    assert json.loads(chat.attributes["gen_ai.input.messages"]) == [
        {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
        {"role": "user", "parts": [{"type": "text", "content": SECRET}]},
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "call_1", "name": "look", "arguments": '{"at": "sky"}'}],
        },
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "call_1", "response": "blue"}]},
    ]
    assert json.loads(chat.attributes["gen_ai.output.messages"]) == [
        {"role": "assistant", "parts": [{"type": "text", "content": ANSWER}], "finish_reason": "stop"}
    ]
    assert KEY.encode() not in b"".join(collector.raw)


async def test_long_and_odd_words_cost_no_span(collector: Collector) -> None:
    """Half a surrogate pair or a number of 70 bits cannot be encoded, and would take its whole batch along."""
    telemetry = open_telemetry(TelemetryConfig(endpoint=collector.url, content=True), "test")
    assert telemetry is not None
    spec = FuguConfig.model_validate({"workers": [{"name": "a", "provider": "gemini", "model": "m"}]}).workers[0]
    long = tuple(Message("user", f"{turn} {'word ' * 2000}") for turn in range(12))
    request = ChatRequest((*long, Message("user", "half a pair: \ud83d")), seed=2**70)
    chat = begin_chat(telemetry.begin("root", "internal", {}), spec, request, streamed=False)
    chat.fail(WorkerUnavailableError("it said \ud83d"))
    chat.end()
    await asyncio.to_thread(telemetry.close)
    (seen,) = collector.spans
    assert seen.said == "it said ?"
    assert seen.attributes["gen_ai.provider.name"] == "gcp.gemini"
    assert (seen.attributes["server.address"], seen.attributes["server.port"]) == (
        "generativelanguage.googleapis.com",
        443,
    )
    assert seen.attributes["gen_ai.request.seed"] == str(2**70)
    told = json.loads(seen.attributes["gen_ai.input.messages"])
    assert told[-1]["parts"][0]["content"] == "half a pair: ?"
    assert len(seen.attributes["gen_ai.input.messages"]) <= CONTENT_CHARACTERS
    assert 1 < len(told) < 12, "the newest of them"


async def test_a_stream_ends_its_span_when_it_ends(
    collector: Collector, provider: LoopbackProvider, tmp_path: Path
) -> None:
    provider.default = Behaviour(text="one two three four five", chunk_delay=0.05, usage=Usage(11, 5))
    async with traced(collector, provider, tmp_path) as served:
        response = await served.ask(stream=True)
        assert "data: [DONE]" in response.text
        spans = await served.spans()
    request, chat = one(spans, f"POST {ROUTE}"), one(spans, "chat second-model")
    attempt = one(spans, "attempt")
    assert (chat.parent, attempt.parent) == (request.id, chat.id)
    for span in (request, chat, attempt):
        assert span.ended - span.began > 0.2e9, "as long as the stream"
        assert not span.failed
    assert 0 < chat.attributes["gen_ai.response.time_to_first_chunk"] < (chat.ended - chat.began) / 1e9 - 0.1
    first = request.attributes["fugu.time_to_first_token_s"]
    assert chat.attributes["gen_ai.response.time_to_first_chunk"] < first < (request.ended - request.began) / 1e9 - 0.1
    assert request.events == ("first token",)
    assert chat.attributes["gen_ai.request.stream"] is True
    assert chat.attributes["gen_ai.usage.output_tokens"] == 5


async def test_a_stream_that_breaks_ends_it_with_the_error(
    collector: Collector, provider: LoopbackProvider, tmp_path: Path
) -> None:
    provider.default = Behaviour(text="one two three four five", chunk_delay=0.02, break_after=3)
    async with traced(collector, provider, tmp_path) as served:
        response = await served.ask(stream=True)
        assert "stream_broken" in response.text
        spans = await served.spans()
    for name in (f"POST {ROUTE}", "chat second-model", "attempt"):
        span = one(spans, name)
        assert span.failed
        assert span.attributes["error.type"] == "stream_broken"
    request = one(spans, f"POST {ROUTE}")
    assert request.attributes["http.response.status_code"] == 200, "it had begun"
    assert (request.attributes["fugu.outcome"], request.attributes["fugu.failed_calls"]) == ("stream_broken", 1)


async def test_a_caller_that_leaves_ends_it(collector: Collector, provider: LoopbackProvider, tmp_path: Path) -> None:
    provider.default = Behaviour(never=True)
    async with traced(collector, provider, tmp_path) as served:
        asking = asyncio.create_task(served.ask(stream=True))
        assert await asyncio.to_thread(provider.wait_for, lambda: provider.requests)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0.2)
        spans = await served.spans()
    for name in (f"POST {ROUTE}", "chat second-model", "attempt"):
        assert one(spans, name).attributes["error.type"] == "cancelled"


async def test_retries_and_a_fallback(collector: Collector, provider: LoopbackProvider, tmp_path: Path) -> None:
    provider.by_model["second-model"] = Behaviour(status=503, error="busy")
    provider.by_model["first-model"] = Behaviour(text=ANSWER)
    async with traced(collector, provider, tmp_path) as served:
        assert (await served.ask()).status_code == 200
        spans = await served.spans()
    request = one(spans, f"POST {ROUTE}")
    second, first = children(spans, request, "chat")
    assert (second.name, first.name) == ("chat second-model", "chat first-model")
    assert second.failed
    assert second.attributes["error.type"] == "worker_unavailable"
    assert "fugu.fallback" not in second.attributes
    assert first.attributes["fugu.fallback"] == 1
    assert not first.failed
    tries = children(spans, second)
    assert [(each.attributes["fugu.attempt"], each.failed) for each in tries] == [(1, True), (2, True)]
    assert {each.attributes["error.type"] for each in tries} == {"worker_unavailable"}
    assert not request.failed
    assert request.attributes["fugu.worker"] == "first"
    assert request.attributes["fugu.failed_calls"] == 1


async def test_failures_by_whose_fault_they_are(
    collector: Collector, provider: LoopbackProvider, tmp_path: Path
) -> None:
    provider.default = Behaviour(status=500, error="broken")
    async with traced(collector, provider, tmp_path) as served:
        assert (await served.ask()).status_code == 502
        assert (await served.ask(temperature=99)).status_code == 400
        spans = await served.spans()
    ours, callers = sorted((span for span in spans if not span.parent), key=lambda span: span.began)
    assert ours.failed
    assert ours.attributes["error.type"] == ours.attributes["fugu.outcome"] == "all_workers_failed"
    assert ours.attributes["http.response.status_code"] == 502
    assert not callers.failed
    assert (callers.attributes["error.type"], callers.attributes["http.response.status_code"]) == (
        "invalid_request",
        400,
    )
    assert children(spans, callers) == []


async def test_every_turn_of_a_session(collector: Collector, provider: LoopbackProvider, tmp_path: Path) -> None:
    provider.enqueue(
        Behaviour(text="Think of primes."), Behaviour(text="Seven."), Behaviour(text="<verdict>ACCEPT</verdict>")
    )
    async with traced(collector, provider, tmp_path) as served:
        served.decider.roles = ["thinker", "worker", "verifier"]
        answer = await served.ask(model="fugu-trinity", fugu={"trace": True})
        assert answer.status_code == 200
        spans = await served.spans()
    turns = children(spans, one(spans, f"POST {ROUTE}"), "turn")
    assert [turn.name for turn in turns] == [f"turn {number}" for number in range(1, len(turns) + 1)]
    told = answer.json()["fugu"]["turns"]
    assert [turn.attributes["fugu.turn.role"] for turn in turns] == [turn["role"] for turn in told]
    assert [turn["role"] for turn in told][:2] == ["thinker", "worker"]
    for turn in turns:
        assert [part.name for part in children(spans, turn)] == ["decision", "chat second-model"]
        assert turn.attributes["fugu.worker"] == "second"
    roles = [children(spans, turn, "decision")[0].attributes.get("fugu.decision.role") for turn in turns]
    assert roles[:3] == ["thinker", "worker", "verifier"]


PLAN = render_workflow(
    Workflow((Step("first", "look at the sky"), Step("second", "look at the sea"), Step("second", "conclude", (0, 1)))),
    ("first", "second"),
)


@pytest.mark.parametrize("stream", [False, True])
async def test_plans_and_steps(collector: Collector, provider: LoopbackProvider, tmp_path: Path, stream: bool) -> None:
    provider.by_model["first-model"] = Behaviour(text=lambda sent: PLAN if b"<question>" in sent.raw else "clouds")
    provider.enqueue(Behaviour(text="No lists in here."))
    async with traced(collector, provider, tmp_path) as served:
        response = await served.ask(model="fugu-ultra", stream=stream)
        assert response.status_code == 200
        spans = await served.spans()
    request = one(spans, f"POST {ROUTE}")
    assert {span.trace for span in spans} == {request.trace}
    assert children(spans, request)[0].name == "decision"
    rejected, plan = children(spans, request, "plan")
    assert rejected.failed
    assert rejected.attributes["error.type"] == "invalid_plan"
    assert plan.attributes == {
        "fugu.plan.round": 1,
        "fugu.plan.depth": 0,
        "fugu.plan.try": 2,
        "fugu.plan.steps": 3,
        "fugu.plan.topology": plan.attributes["fugu.plan.topology"],
    }
    for writing in (rejected, plan):
        assert [part.name for part in children(spans, writing)] == ["chat first-model"]
    steps = {step.name: step for step in children(spans, request, "step")}
    assert sorted(steps) == ["step 1", "step 2", "step 3"]
    workers = {name: [part.name for part in children(spans, step)] for name, step in steps.items()}
    assert workers == {
        "step 1": ["chat first-model"],
        "step 2": ["chat second-model"],
        "step 3": ["chat second-model"],
    }
    assert steps["step 3"].attributes == {
        "fugu.worker": "second",
        "fugu.step.planned_worker": "second",
        "fugu.step.reads": [1, 2],
    }
    assert steps["step 3"].began >= max(steps["step 1"].ended, steps["step 2"].ended)
    assert children(spans, steps["step 3"])[0].attributes["gen_ai.request.stream"] is stream
    calls = [span for span in spans if span.name.startswith("chat")]
    assert (
        sum(call.attributes["gen_ai.usage.input_tokens"] for call in calls)
        == (request.attributes["fugu.usage.input_tokens"])
    )
    assert ("fugu.time_to_first_token_s" in request.attributes) is stream
    assert not any(span.failed for span in spans if span is not rejected)


async def test_a_step_that_nobody_could_do(collector: Collector, provider: LoopbackProvider, tmp_path: Path) -> None:
    plan = render_workflow(Workflow((Step("second", "try"), Step("first", "conclude", (0,)))), ("first", "second"))
    fails = Behaviour(status=500, error="broken")
    provider.enqueue(Behaviour(text=plan), fails, fails, fails, fails, Behaviour(text="nothing"))
    async with traced(collector, provider, tmp_path) as served:
        await served.ask(model="fugu-ultra")
        spans = await served.spans()
    step = one(spans, "step 1")
    assert step.failed
    assert step.attributes["fugu.step.skipped"] == "failed"
    asked = children(spans, step, "chat")
    assert [(call.name, call.attributes.get("fugu.fallback"), call.failed) for call in asked] == [
        ("chat second-model", None, True),
        ("chat first-model", 1, True),
    ]
    assert not one(spans, "step 2").failed


async def test_sampling(collector: Collector, provider: LoopbackProvider, tmp_path: Path) -> None:
    async with traced(collector, provider, tmp_path, sampling=0.0) as served:
        await served.ask()
        flags = int(provider.requests[-1].headers["traceparent"][-2:], 16)
        assert flags & 1 == 0, "who comes after must not begin a trace of their own"
        await served.ask({"traceparent": f"00-{TRACE}-{CALLER}-01"})
        spans = await served.spans()
    assert {span.trace for span in spans} == {TRACE}
    assert len(spans) == 4
    collector.clear()
    async with traced(collector, provider, tmp_path) as served:
        await served.ask({"traceparent": f"00-{TRACE}-{CALLER}-00"})
        assert await served.spans() == []


async def test_off_nothing_is_sent(collector: Collector, provider: LoopbackProvider, tmp_path: Path) -> None:
    async with traced(collector, provider, tmp_path, off=True) as served:
        response = await served.ask({"traceparent": f"00-{TRACE}-{CALLER}-01"})
        assert response.status_code == 200
        assert await served.spans() == []
    assert collector.raw == []
    assert "traceparent" not in provider.requests[-1].headers
    assert served.decider.asked[0].headers is None


def test_off_nothing_is_imported() -> None:
    code = (
        "import sys, actors.config, actors.link_client, actors.link_server, actors.worker, serve.tracing;"
        "from actors.telemetry import open_telemetry; assert open_telemetry(None, 'x') is None;"
        "print([name for name in sys.modules if name == 'actors.otel' or '.otlp' in name])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert said.stdout.splitlines()[-1] == "[]", said.stderr


@pytest.mark.parametrize("status", [503, 400])
async def test_a_collector_that_refuses_is_not_felt(
    collector: Collector, provider: LoopbackProvider, tmp_path: Path, status: int
) -> None:
    collector.status = status
    async with traced(collector, provider, tmp_path) as served:
        for _ in range(3):
            assert (await served.ask()).status_code == 200
    assert collector.spans == []


async def test_one_that_is_not_there_neither(provider: LoopbackProvider, tmp_path: Path) -> None:
    with Collector() as gone:
        pass
    async with traced(gone, provider, tmp_path) as served:
        began = time.monotonic()
        for _ in range(3):
            assert (await served.ask()).status_code == 200
        assert time.monotonic() - began < 5
        closing = time.monotonic()
        await served.spans()
        assert time.monotonic() - closing < 3 * CLOSE_SECONDS + 2


async def test_the_queue_is_bounded(collector: Collector) -> None:
    with Collector() as gone:
        pass
    telemetry = open_telemetry(TelemetryConfig(endpoint=gone.url), "test")
    assert telemetry is not None
    for _ in range(2500):
        telemetry.begin("x", "server", {}).end()
    queue = telemetry._provider._active_span_processor._span_processors[0]._batch_processor._queue
    assert len(queue) <= 2048
    await asyncio.to_thread(telemetry.close)


async def test_a_stream_nobody_reads_to_its_end(
    collector: Collector, provider: LoopbackProvider, tmp_path: Path
) -> None:
    async with traced(collector, provider, tmp_path) as served:
        worker = served.app._endpoints[ROUTE]._deciding.workers["first"]  # type: ignore[union-attr]
        telemetry = served.app._endpoints[ROUTE]._telemetry  # type: ignore[union-attr]
        assert telemetry is not None
        request = ChatRequest((Message("user", "hi"),))
        with running(telemetry.begin("root", "internal", {})):
            async with aclosing(cast(Any, worker.stream(request))) as chunks:
                async for chunk in chunks:
                    if chunk.final is not None:
                        break
            async with aclosing(cast(Any, worker.stream(request))) as chunks:
                await anext(chunks)
        spans = await served.spans()
    whole, half = children(spans, one(spans, "root"), "chat")
    assert not whole.failed
    assert whole.attributes["gen_ai.usage.input_tokens"] == 11
    assert half.attributes["error.type"] == "cancelled"


# The configuration


def config_file(folder: Path, telemetry: str) -> Path:
    path = folder / "fugu.yaml"
    path.write_text(f"workers: [{{name: a, provider: openai, model: m}}]\ntelemetry: {telemetry}\n")
    return path


def test_the_section(tmp_path: Path) -> None:
    path = config_file(tmp_path, "{endpoint: 'https://c.example/otlp/', headers: {api-key: '${T}'}, sampling: 0.1}")
    config = load_config(path, {"T": TOKEN}).telemetry
    assert config is not None
    assert config.url == "https://c.example/otlp/v1/traces"
    assert TelemetryConfig(endpoint="http://c:4318/v1/traces").url == "http://c:4318/v1/traces"
    assert (config.sampling, config.content, config.service) == (0.1, False, "fugu")
    assert config.headers["api-key"].get_secret_value() == TOKEN
    assert TOKEN not in repr(config)
    assert TOKEN not in config.model_dump_json()
    assert load_config(config_file(tmp_path, "null"), {}).telemetry is None


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{}", "telemetry.endpoint"),
        ("{endpoint: 'grpc://c'}", "http:// or https://"),
        ("{endpoint: 'http://user:pass@c'}", "belong into `headers`"),
        ("{endpoint: 'http://c?key=1'}", "belong into `headers`"),
        ("{endpoint: 'http://c', sampling: 1.5}", "telemetry.sampling"),
        ("{endpoint: 'http://c', exporter: zipkin}", "telemetry.exporter: unknown key"),
        ("{endpoint: 'http://c', headers: {key: '${NOT_THERE}'}}", "NOT_THERE is not set"),
        ("{endpoint: 'http://c', headers: {key: \"two\\nlines\"}}", "header 'key' cannot be sent"),
    ],
)
def test_a_wrong_section(tmp_path: Path, written: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        load_config(config_file(tmp_path, written), {})
    assert "pass@" not in error.value.message
    assert "two" not in error.value.message


def test_what_is_missing_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_module, "_NEEDED", ("opentelemetry.exporter.nothing.here",))
    with pytest.raises(ConfigError, match=re.escape("pip install 'fugu-ray[telemetry]'")):
        open_telemetry(TelemetryConfig(endpoint="http://c"), "gateway")
    assert open_telemetry(None, "gateway") is None


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
