"""What Prometheus is told, at the gateway and at Ray's own endpoint."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors import gauges
from actors.errors import WorkerUnavailableError
from actors.gauges import WorkerGauges
from actors.messages import Usage
from actors.status import WorkerStatus
from orchestrator.dispatch import Attempt, Record
from serve import metrics
from serve.metrics import RayMeter
from serve.trace import Choice, Spent, Trace
from tests.serve.test_gateway import Scripted, gateway, post
from tests.serve.test_session import QUEUED, THREE, Plan, Player, trinity


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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_rays_endpoint_tells_it() -> None:
    import ray

    failed = Attempt("a", 0.0, 0.1, None, WorkerUnavailableError("down", worker="a"))
    record = Record([failed, Attempt("b", 0.1, 0.5, 0.25)], "b")
    trace = Trace("id", 0.0, Choice("a", {"a": 1.0}, "head", seconds=0.02, domain="sums"), record)
    trace.ended = Spent(Usage(7, 5, 3, 0), 0.5)
    trace.spent = [trace.ended]
    trace.waits = [("a", 0.5), ("b", 0.25)]
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
        "ray_fugu_worker_state": 2,
        "ray_fugu_worker_running": 4,
        "ray_fugu_worker_waiting": 7,
        "ray_fugu_cost_usd_total": 1.5,
        "ray_fugu_request_seconds_count": 3,  # Ray tells sums by the middle of buckets
        "ray_fugu_first_byte_seconds_count": 3,
        "ray_fugu_decision_seconds_count": 3,
    }
    deadline, found = time.monotonic() + 60, dict[str, float]()
    while found != expected and time.monotonic() < deadline:
        time.sleep(1)
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith(tuple(f"{name}{{" for name in expected))]
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
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
