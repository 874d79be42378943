"""What Prometheus is told, at the gateway and at Ray's own endpoint."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors import gauges
from actors.config import FuguConfig
from actors.errors import WorkerUnavailableError
from actors.gauges import WorkerGauges
from actors.messages import Usage
from actors.status import WorkerStatus
from orchestrator.dispatch import Attempt, Record
from orchestrator.workflow import SELF
from serve import metrics
from serve.metrics import RayMeter
from serve.trace import Call, Choice, Spent, Trace
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.linked import serving
from tests.serve.test_gateway import Scripted, gateway, post
from tests.serve.test_keys import body
from tests.serve.test_session import ADVICE, QUEUED, THREE, Plan, Player, trinity
from tests.serve.test_ultra import plan


class Noted:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str, Trace]] = []

    def request(self, path: str, model: str, outcome: str, trace: Trace, now: float) -> None:
        assert now >= trace.started
        self.seen.append((path, model, outcome, trace))


def metered(*workers: Scripted) -> tuple[Any, Noted]:
    app, noted = gateway(*workers), Noted()
    for endpoint in app._endpoints.values():
        endpoint._meter = noted  # type: ignore[union-attr]
    return app, noted


async def test_every_request_is_noted_once_with_its_outcome() -> None:
    app, noted = metered(Scripted("a", WorkerUnavailableError("down", worker="a")), Scripted("b", "yes"))
    await post(app)
    await post(app, stream=True)
    await post(app, temperature=9)
    await post(app, model="nothing")
    await post(app, fugu={"allow": ["a"]})
    assert [(path, model, outcome) for path, model, outcome, _ in noted.seen] == [
        ("/v1/chat/completions", "fugu", "ok"),
        ("/v1/chat/completions", "fugu", "ok"),
        ("/v1/chat/completions", "", "invalid_request"),
        ("/v1/chat/completions", "", "model_not_found"),
        ("/v1/chat/completions", "fugu", "all_workers_failed"),
    ]
    for _, _, _, trace in noted.seen[:2]:
        assert trace.record.worker == "b"
        assert trace.ended == trace.taken == Spent(Usage(5, 3, 1, 2), 0.25)
        assert [attempt.error is None for attempt in trace.record.attempts] == [False, True]


async def test_what_is_refused_at_the_door_is_noted() -> None:
    app, noted = metered(Scripted("a", "yes"))
    app._limit = 0
    assert (await post(app)).status_code == 503
    assert [(path, model, outcome) for path, model, outcome, _ in noted.seen] == [
        ("/v1/chat/completions", "", "overloaded")
    ]


async def test_a_streams_first_piece_is_when_the_caller_sees_it() -> None:
    app, noted = metered(Scripted("a", "yes ", "indeed"))
    await post(app, stream=True)
    await post(app)
    streamed, whole = (trace for _, _, _, trace in noted.seen)
    assert streamed.seen_first(1e9) == streamed.first_piece_s is not None
    assert whole.first_piece_s is None
    assert whole.seen_first(1e9) == whole.first_byte()
    whole.turns = []
    assert whole.seen_first(whole.started + 3.5) == pytest.approx(3.5), "a session's answer comes whole"


async def test_every_call_says_how_long_it_waited_for_limits() -> None:
    app, noted = trinity(Player("a"), Player("b"), plan=Plan(*THREE)), Noted()
    for endpoint in app._endpoints.values():
        endpoint._meter = noted  # type: ignore[union-attr]
    await post(app, model="fugu-trinity")
    ((_, _, _, trace),) = noted.seen
    assert [worker for worker, _ in trace.waits] == ["a", "b", "a"]
    assert all(seconds == QUEUED for _, seconds in trace.waits)


@asynccontextmanager
async def watched(
    folder: Path, provider: LoopbackProvider, decider: Any = None, **fields: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Noted]]:
    """Workers a, b and c, of which c writes plans and may plan its steps, too."""
    worker = {"provider": "openai", "base_url": provider.url_for("openai"), "retry": {"attempts": 1}, **fields}
    config = FuguConfig.model_validate(
        {
            "workers": [{"name": name, "model": name, **worker} for name in "abc"],
            "conductor": {"worker": "c", "max_recursion": 1},
        }
    )
    noted = Noted()
    async with serving(folder, config, over_link=True, decider=decider) as served:
        for endpoint in served.app._endpoints.values():
            endpoint._meter = noted  # type: ignore[union-attr]
        async with served.client() as http:
            yield http, noted


async def test_calls_inside_a_nested_workflow_are_told(tmp_path: Path) -> None:
    planned = (plan((SELF, "split it", ())), plan(("a", "reverse", ())))
    with LoopbackProvider() as provider:
        provider.enqueue(*(Behaviour(text=text) for text in planned), Behaviour(status=500), Behaviour(text="done"))
        async with watched(tmp_path, provider) as (http, noted):
            answer = await http.post("/v1/chat/completions", json=body(model="fugu-ultra"))
    assert answer.json()["choices"][0]["message"]["content"] == "done"
    ((_, _, outcome, trace),) = noted.seen
    assert outcome == "ok"
    assert [(call.worker, call.role) for call in trace.calls] == [("c", "plan"), ("c", "plan"), ("b", "step")]
    assert trace.failures == [("a", "worker_unavailable")]
    assert [worker for worker, _ in trace.waits] == ["c", "c", "a", "b"]


async def test_every_turn_of_a_session_is_a_decision_and_a_call(tmp_path: Path) -> None:
    with LoopbackProvider() as provider:
        provider.enqueue(*(Behaviour(text=text) for text in (ADVICE, "42", "ACCEPT")))
        async with watched(tmp_path, provider, Plan(*THREE)) as (http, noted):
            await http.post("/v1/chat/completions", json=body(model="fugu-trinity"))
            await http.post("/v1/chat/completions", json=body())
    session, single = (trace for _, _, _, trace in noted.seen)
    assert [choice.seconds for choice in session.decisions] == [0.01] * 3
    assert [(call.worker, call.role) for call in session.calls] == [
        ("a", "thinker"),
        ("b", "worker"),
        ("a", "verifier"),
    ]
    assert len(single.decisions) == 1
    assert [(call.worker, call.role) for call in single.calls] == [("a", "answer")]


async def test_who_waits_for_limits_in_vain_says_how_long(tmp_path: Path) -> None:
    limits = {"concurrency": 1, "max_wait": 0.2}
    with LoopbackProvider(Behaviour(delay=0.6)) as provider:
        async with watched(tmp_path, provider, limits=limits) as (http, noted):
            asked = body(fugu={"allow": ["a"]})
            await asyncio.gather(*(http.post("/v1/chat/completions", json=asked) for _ in range(2)))
    refused, answered = (trace for _, _, _, trace in noted.seen)
    assert refused.failures == [("a", "rate_limit_exceeded")]
    ((_, waited),) = refused.waits
    assert waited >= 0.2
    ((_, waited),) = answered.waits
    assert waited < 0.2


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_rays_endpoint_tells_it() -> None:
    import ray

    record = Record([Attempt("b", 0.1, 0.5, 0.25)], "b")
    trace = Trace("id", 0.0, Choice("a", {"a": 1.0}, "head", seconds=0.02, domain="sums"), record)
    trace.ended = Spent(Usage(7, 5, 3, 0), 0.5)
    trace.spent = [trace.ended]
    trace.waits = [("a", 0.5), ("b", 0.25)]
    trace.failures = [("a", "worker_unavailable")]
    trace.calls = [Call("c", "plan", "sums"), Call("b", "step", None)]
    trace.decisions = [Choice("a", {"a": 1.0}, "head", seconds=0.02)] * 2
    meter = RayMeter()
    for _ in range(3):
        meter.request("/v1/messages", "fugu", "ok", trace, 1.0)
    WorkerGauges(0).tell([WorkerStatus("w", "openai", "m", state="open", running=4, waiting=7)])
    port = ray.nodes()[0]["MetricsExportPort"]
    expected = {
        "ray_fugu_requests_total": 3,
        "ray_fugu_answers_total": 3,
        "ray_fugu_failures_total": 3,
        "ray_fugu_fallbacks_total": 3,
        "ray_fugu_calls_total": 6,
        "ray_fugu_worker_state": 2,
        "ray_fugu_worker_running": 4,
        "ray_fugu_worker_waiting": 7,
        "ray_fugu_cost_usd_total": 1.5,
        "ray_fugu_request_seconds_count": 3,  # Ray tells sums by the middle of buckets
        "ray_fugu_first_byte_seconds_count": 3,
        "ray_fugu_decision_seconds_count": 6,
    }
    deadline, found = time.monotonic() + 60, dict[str, float]()
    while found != expected and time.monotonic() < deadline:
        time.sleep(1)
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith(tuple(f"{name}{{" for name in expected))]
        found = dict[str, float]()
        for line in lines:
            name = line.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    assert found == expected
    (answers,) = [line for line in lines if line.startswith("ray_fugu_answers_total{")]
    assert 'domain="sums"' in answers
    assert 'worker="b"' in answers
    missing = [name for name in queried() if f"\n{name}{{" not in text]
    assert not missing, "what the dashboard asks for is told under that very name"


def queried() -> set[str]:
    """The metrics that the dashboard asks Prometheus for."""
    dashboard = json.loads((Path(__file__).resolve().parents[2] / "cluster" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return {name for expression in expressions for name in re.findall(r"ray_fugu_[a-z_]+", expression)}


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    told = set(re.findall(r"fugu_[a-z_]+", f"{metrics.__doc__} {gauges.__doc__}"))
    shown = {name.removeprefix("ray_").removesuffix("_bucket") for name in queried()}
    assert told == shown, "each has a panel"
