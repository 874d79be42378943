"""Traces of the running server: gateway, router and provider actors are processes of their own, and each sends its part
to one collector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.collector import Collector, Seen, children
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.conftest import KEY, UPSTREAM_KEY, WORKERS, tiny_checkpoint, worker
from tests.serve.running import RunningServer
from tests.serve.test_live_ultra import CHAIN

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ROUTE = "/v1/chat/completions"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SECRET = "words-that-nobody-may-see-42"
TOKEN = "collector-token-77aa"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, upstream: LoopbackProvider, collector: Collector
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("traced")
    model, checkpoint = tiny_checkpoint(folder, WORKERS)
    config = {
        "workers": [worker(name, upstream) for name in WORKERS],
        "router": {"backbone": str(model), "checkpoint": str(checkpoint), "timeout": 20, "max_tokens": 256},
        "conductor": {"worker": "second", "max_rounds": 1},
        "serve": {"api_keys": ["${SERVE_KEY}"], "drain": 5},
        "telemetry": {"endpoint": collector.url, "headers": {"x-token": "${COLLECTOR_TOKEN}"}, "service": "test"},
    }
    environ = {"SERVE_KEY": KEY, "UPSTREAM_KEY": UPSTREAM_KEY, "COLLECTOR_TOKEN": TOKEN}
    with RunningServer(folder, config, environ=environ) as server:
        yield server


def ask(server: RunningServer, number: int, **fields: Any) -> httpx.Response:
    body = {"model": "fugu", "messages": [{"role": "user", "content": SECRET}], **fields}
    headers = {"authorization": f"Bearer {KEY}", "traceparent": f"00-{TRACE}-{number:016x}-01"}
    with httpx.Client(trust_env=False, timeout=60) as http:
        return http.post(f"{server.url}{ROUTE}", json=body, headers=headers)


def whole(collector: Collector, number: int, calls: int) -> tuple[Seen, list[Seen]]:
    """The request's span under the caller's span `number`, and all spans, once `calls` attempts of it are there and the
    router's part of every decision: each process sends its own when it comes to it."""

    def there(spans: list[Seen]) -> bool:
        mine = [root for root in spans if root.parent == f"{number:016x}" and len(attempts(spans, root)) == calls]
        return any(all(children(spans, each) for each in children(spans, root, "decision")) for root in mine)

    spans = collector.wait_for(there, 30)
    return next(root for root in spans if root.parent == f"{number:016x}"), spans


def attempts(spans: list[Seen], above: Seen) -> list[Seen]:
    found = [above] if above.name == "attempt" else []
    return found + [each for part in children(spans, above) for each in attempts(spans, part)]


@pytest.mark.parametrize("stream", [False, True])
def test_one_trace_over_all_processes(
    traced: RunningServer, provider: LoopbackProvider, collector: Collector, stream: bool
) -> None:
    number = 0xA0 + stream
    assert ask(traced, number, stream=stream).status_code == 200
    request, spans = whole(collector, number, 1)
    assert request.trace == TRACE
    (decision,) = children(spans, request, "decision")
    (routed,) = children(spans, decision)
    (chat,) = children(spans, request, "chat")
    (attempt,) = children(spans, chat)
    chosen = decision.attributes["fugu.decision.worker"]
    assert chosen in WORKERS
    scores = {name: decision.attributes[f"fugu.decision.score.{name}"] for name in WORKERS}
    assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
    assert max(scores, key=scores.__getitem__) == chosen
    assert (routed.name, routed.attributes["fugu.decision.worker"]) == ("router pass", chosen)
    assert routed.attributes["fugu.router.batch"] == 1
    assert decision.began <= routed.began <= routed.ended <= decision.ended
    assert chat.attributes["gen_ai.request.model"] == chat.attributes["gen_ai.response.model"] == chosen
    assert chat.attributes["gen_ai.request.stream"] is stream
    processes = [span.resource["fugu.process"] for span in (request, decision, routed, chat, attempt)]
    assert processes == ["gateway", "gateway", "router", "gateway", f"provider {chosen}"]
    assert len({span.resource["service.instance.id"] for span in (request, routed, attempt)}) == 3
    assert provider.requests[-1].headers["traceparent"].split("-")[1:3] == [TRACE, attempt.id]
    assert {each["x-token"] for each in collector.headers} == {TOKEN}


def test_a_fallback(traced: RunningServer, provider: LoopbackProvider, collector: Collector) -> None:
    provider.enqueue(Behaviour(status=500, error="broken"))
    assert ask(traced, 0xB0).status_code == 200
    request, spans = whole(collector, 0xB0, 2)
    failed, answered = children(spans, request, "chat")
    assert (failed.failed, failed.attributes["error.type"]) == (True, "worker_unavailable")
    assert (answered.failed, answered.attributes["fugu.fallback"]) == (False, 1)
    assert request.attributes["fugu.worker"] == answered.attributes["fugu.worker"]


def test_a_workflow(traced: RunningServer, provider: LoopbackProvider, collector: Collector) -> None:
    provider.enqueue(CHAIN, Behaviour(text="clouds"), Behaviour(text="yes, a coat"))
    assert ask(traced, 0xC0, model="fugu-ultra").status_code == 200
    request, spans = whole(collector, 0xC0, 3)
    parts = [part.name for part in children(spans, request)]
    assert parts == ["decision", "plan", "step 1", "step 2"]
    workers = [children(spans, part, "chat")[0].attributes["fugu.worker"] for part in children(spans, request)[1:]]
    assert workers == ["second", "first", "second"]


def test_no_words_and_no_keys(traced: RunningServer, provider: LoopbackProvider, collector: Collector) -> None:
    ask(traced, 0xD0)
    whole(collector, 0xD0, 1)
    everything = b"".join(collector.raw)
    for word in (SECRET, KEY, UPSTREAM_KEY, TOKEN, "clouds", "a coat"):
        assert word.encode() not in everything
    assert TOKEN not in traced.text


def test_what_is_left_is_sent_when_it_stops(
    traced: RunningServer, provider: LoopbackProvider, collector: Collector
) -> None:
    """The last of this file: it stops the server, at once after an answer."""
    assert ask(traced, 0xE0).status_code == 200
    traced.__exit__()
    _, spans = whole(collector, 0xE0, 1)
    assert {each.resource["fugu.process"].split()[0] for each in spans} == {"gateway", "router", "provider"}
    mine = next(each for each in spans if each.parent == f"{0xE0:016x}")
    (decision,) = children(spans, mine, "decision")
    assert [each.name for each in children(spans, decision)] == ["router pass"]
