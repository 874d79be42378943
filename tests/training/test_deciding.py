"""A router that is asked by many at once, about the same texts, with other workers to choose from."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.errors import NoWorkerAllowedError, RequestError
from actors.messages import Message
from orchestrator.backbone import Backbone
from orchestrator.head import Checkpoint, CheckpointInfo
from orchestrator.router import Decision, Router
from orchestrator.workflow import Step, Workflow
from tests.orchestrator.tiny import DIMENSION, said, tiny_folder
from tests.training.conductors import GROUNDS, specialists
from training import conductor_rollouts, deciding
from training.composite import make_composite
from training.conductor_rollouts import AssignedRollouts, InProcessRollouts, Played, RolloutSettings, Written
from training.deciding import Decider, Rankings
from training.plans import short_plan
from training.ultra_systems import assigner

TEXTS = [said(f"{'What is' * (n % 7)} {n} {n * n}?") for n in range(40)]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Router:
    weight = 0.1 * torch.randn(len(GROUNDS), DIMENSION, generator=torch.Generator().manual_seed(1))
    backbone = Backbone.load(tiny_folder(tmp_path_factory.mktemp("tiny")), device="cpu", dtype=torch.float32)
    return Router(backbone, Checkpoint(CheckpointInfo(GROUNDS, "tiny", "r1"), weight), max_tokens=256)


@pytest.fixture
def passes(router: Router, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each pass of the backbone read."""
    sizes: list[int] = []
    hidden = router.backbone.hidden

    def counted(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        sizes.append(len(prompts))
        return hidden(prompts)

    monkeypatch.setattr(router.backbone, "hidden", counted)
    return sizes


def alone(router: Router, talk: tuple[Message, ...], allowed: frozenset[str]) -> Decision:
    return router.decide([talk], [allowed], [None])[0]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(TEXTS), st.sets(st.sampled_from(GROUNDS), min_size=1)), max_size=12))
def test_what_is_said_is_what_the_router_says_when_asked_alone(
    router: Router, asked: list[tuple[tuple[Message, ...], set[str]]]
) -> None:
    talks, allowed = [talk for talk, _ in asked], [frozenset(names) for _, names in asked]
    found = Rankings(router).decide(talks, allowed)
    for decision, talk, names in zip(found, talks, allowed, strict=True):
        expected = alone(router, talk, names)
        assert (decision.worker, decision.source) == (expected.worker, expected.source)
        assert decision.probabilities == pytest.approx(expected.probabilities, abs=1e-4)
        assert decision.ranking == expected.ranking


def test_a_text_is_read_once_and_many_together(
    router: Router, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deciding, "_AT_ONCE", 16)
    rankings = Rankings(router)
    rankings.decide([*TEXTS, *TEXTS], [frozenset(GROUNDS)] * 80)
    assert passes == [16, 16, 8]
    rankings.decide(TEXTS, [frozenset({"logic", "words"})] * 40)
    assert passes == [16, 16, 8]


async def test_those_who_ask_at_the_same_time_share_a_pass(router: Router, passes: list[int]) -> None:
    decider = Decider(router)
    assign = assigner(decider)
    some = frozenset({"words", "logic"})
    hands = await asyncio.gather(*(assign([talk, TEXTS[0]], some) for talk in TEXTS[:20]))
    assert passes == [20]
    assert {name for pair in hands for name in pair} <= some
    assert [pair[0] for pair in hands] == [alone(router, talk, some).worker for talk in TEXTS[:20]]
    del passes[:]
    everybody = await asyncio.gather(*(decider(talk, frozenset(GROUNDS)) for talk in TEXTS[:20]))
    assert passes == []
    assert {decision.worker for decision in everybody} - some, "all are given to two, so that a mask shows nothing"


async def test_who_asks_wrongly_hears_of_it_and_the_next_is_answered(router: Router) -> None:
    decider = Decider(router)
    with pytest.raises(NoWorkerAllowedError):
        await decider(TEXTS[0], frozenset({"nobody"}))
    with pytest.raises(RequestError):
        await decider((), frozenset(GROUNDS))
    assert (await decider(TEXTS[0], frozenset({"logic"}))).worker == "logic"
    waiting = asyncio.create_task(decider(TEXTS[1], frozenset(GROUNDS)))
    await asyncio.sleep(0)
    waiting.cancel()
    assert (await decider(TEXTS[2], frozenset(GROUNDS))).worker in GROUNDS


def test_certainty_about_one_leaves_the_others_equal() -> None:
    certain = Decision("a", {"a": 1.0, "b": 0.0, "c": 0.0}, role="thinker")
    assert certain.among(frozenset("bc")) == Decision("b", {"b": 0.5, "c": 0.5}, role="thinker")
    assert certain.among(frozenset("abcd")) == certain


def test_plans_are_read_once_and_carried_out_by_whom_the_router_names(
    router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_composite("largest_plus", random.Random(0))
    steps = tuple(Step("words", step.subtask, step.access) for step in one.plan)
    texts = [short_plan(Workflow(steps), GROUNDS), short_plan(Workflow((steps[0],)), GROUNDS), "no plan at all"]
    some = ("words", "logic", "counting")
    written = [Written(one.task("it"), text, some) for text in texts]
    written.append(Written(one.task("it"), short_plan(Workflow(()), GROUNDS), some, before="7"))
    read: list[str] = []
    parse = conductor_rollouts.parse_workflow

    def noted(text: str, *given: object, **more: object) -> Workflow:
        read.append(text)
        return parse(text, *given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(conductor_rollouts, "parse_workflow", noted)
    workers = specialists(one.composition)
    how = RolloutSettings(steps="bare")
    with InProcessRollouts(GROUNDS, workers, how, tmp_path / "calls.sqlite") as rollouts:
        found: list[Played] = AssignedRollouts(rollouts, GROUNDS, router).play(written)
    best = [alone(router, said(step.subtask), frozenset(some)).worker for step in steps]
    whole = alone(router, said(one.prompt), frozenset(some)).worker
    assert [played.workers for played in found] == [tuple(best), (whole,), (), ()]
    assert [played.failure for played in found] == ["", "", "missing", ""]
    assert [played.topology for played in found] == ["chain", "single", "", "empty"]
    assert one.prompt in [request.messages[-1].text for request in workers[whole].asked]
    assert {text: read.count(text) for text in texts[:2]} == dict.fromkeys(texts[:2], 1)
