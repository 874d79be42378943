from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.messages import ChatReply, ChatRequest, Chunk, Message
from orchestrator.conductor import ConductorSettings
from orchestrator.conductor_card import ConductorCard, write_card
from orchestrator.conductor_prompt import PromptSettings
from orchestrator.executor import ExecutorSettings
from orchestrator.workflow import Step, Workflow
from tests.actors.tiny_chat import random_adapter, tiny_chat_folder
from tests.training.conductors import GROUNDS, pool_file, specialists
from training.cli import app
from training.composite import make_composite
from training.plans import short_plan
from training.ultra_evaluate import ULTRA, UltraRun, fresh_tasks, run
from training.ultra_systems import alone, conducted, mixture_of_agents, panel, self_consistency

HOW = ConductorSettings(PromptSettings(style="compact"), executor=ExecutorSettings(steps="bare"))


@dataclass
class Says:
    """Says its texts in turn, again and again."""

    name: str
    texts: list[str]
    asked: list[ChatRequest] = field(default_factory=list)

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.asked.append(request)
        return ChatReply(self.name, self.texts[(len(self.asked) - 1) % len(self.texts)])

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        yield Chunk(final=await self.complete(request))


QUESTION = ChatRequest((Message("user", "What?"),), seed=3, temperature=0.0)


def test_the_answer_that_comes_most_often_wins() -> None:
    worker = Says("one", ["Answer: 4", "5", "The 4.", "6", "4"])
    told = asyncio.run(self_consistency("one", 5).ask(QUESTION, {"one": worker}))
    assert told.reply.text == "Answer: 4"
    assert len({request.seed for request in worker.asked}) == 5
    assert {request.temperature for request in worker.asked} == {0.7}
    tie = Says("one", ["7", "8", "8", "7"])
    assert asyncio.run(self_consistency("one", 4).ask(QUESTION, {"one": tie})).reply.text == "7"


def test_a_judge_reads_every_answer_of_the_panel() -> None:
    workers = {name: Says(name, [f"from {name}"]) for name in ("a", "b", "judge")}
    told = asyncio.run(panel(["a", "b", "a"], "judge").ask(QUESTION, workers))
    assert told.reply.text == "from judge"
    (asked,) = workers["judge"].asked
    assert asked.messages[-1].text.startswith("What?")
    assert [asked.messages[-1].text.count(f"from {name}") for name in ("a", "b")] == [2, 1]
    assert [len(workers[name].asked) for name in ("a", "b")] == [2, 1]


def test_layers_of_a_mixture_read_the_layer_before() -> None:
    workers = {"a": Says("a", ["a1", "a2"]), "b": Says("b", ["b1", "b2"])}
    told = asyncio.run(mixture_of_agents(["a", "b"], 2, "a").ask(QUESTION, workers))
    assert told.reply.text == "a1"
    first, second, last = (request.messages[-1].text for request in workers["a"].asked)
    assert first == "What?"
    assert [text in second for text in ("a1", "b1", "a2", "b2")] == [True, True, False, False]
    assert [text in last for text in ("a1", "b1", "a2", "b2")] == [False, False, True, True]


def test_a_conductor_is_asked_and_its_workflow_run_without_those_left_out() -> None:
    problem = make_composite("largest_plus", random.Random(0))
    plan = short_plan(Workflow(tuple(Step(s.ground, s.subtask, s.access) for s in problem.plan)), GROUNDS)
    workers = {**specialists(problem.composition), "writer": Says("writer", [plan])}
    request = ChatRequest((Message("user", problem.prompt),))
    whole = conducted("it", "writer", GROUNDS, HOW, ranking=["logic"])
    told = asyncio.run(whole.ask(request, workers))
    assert told.reply.text == problem.composition.parts[-1].answer
    assert told.conducted is not None
    assert told.conducted.calls == 3
    # The plan names whom it may not: three tries, then the best of those that remain.
    without = conducted("it", "writer", GROUNDS, HOW, ranking=["counting", "logic"], without=("counting",))
    told = asyncio.run(without.ask(request, workers))
    assert told.reply.worker == "logic"
    assert told.conducted is not None
    assert told.conducted.rounds[-1].bare
    assert len(workers["writer"].asked) == 4
    assert "Workers: 0, 1, 3" in workers["writer"].asked[-1].messages[1].text


def test_a_worker_alone_is_asked_once() -> None:
    worker = Says("one", ["yes"])
    told = asyncio.run(alone("one").ask(QUESTION, {"one": worker}))
    assert (told.reply.text, worker.asked) == ("yes", [QUESTION])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.timeout(300)
def test_everything_is_measured_in_this_process_and_nothing_is_asked_twice(folder: Path, tmp_path: Path) -> None:
    adapter = random_adapter(folder, tmp_path / "adapter", seed=1)
    write_card(adapter, ConductorCard(GROUNDS, "compact", steps="bare"))
    settings = UltraRun(
        pool_file(tmp_path, folder), adapter, tmp_path / "out", warm=adapter, tasks=8, calls=3, max_tokens=4,
        plan_tokens=6, retries=0, progress=False,
    )  # fmt: skip
    report = run(settings)
    names = [row.name for row in report.rows]
    best = report.ranking[0]
    assert names == [
        *GROUNDS,
        ULTRA,
        "warm start only",
        "untrained conductor",
        f"{best}, 3 votes",
        "panel of 2 + judge",
        "mixture of agents 1x2 + 1",
        *(f"{ULTRA} without {name}" for name in GROUNDS),
    ]
    assert dict(report.tasks) == {"composite": 8, "single": 8}
    assert [report.row(name).calls for name in names[:4]] == [1.0] * 4
    assert [report.row(name).calls for name in names[7:10]] == [3.0] * 3
    # Random weights write no plan: one try, then the best worker.
    assert report.row(ULTRA).planned == 0
    assert report.row(ULTRA).calls == 2
    assert report.row(ULTRA).score["composite"] == report.row(best).score["composite"]
    assert report.row(ULTRA).critical_s == pytest.approx(report.row(ULTRA).seconds)
    assert set(report.against) == {
        f"{ULTRA} over warm start only",
        f"{ULTRA} over untrained conductor",
        *(key for key in report.against if " without " in key),
    }
    assert json.loads((tmp_path / "out" / "ultra.json").read_text())["ranking"] == list(report.ranking)
    assert (tmp_path / "out" / "topologies.png").read_bytes()[:4] == b"\x89PNG"
    assert report.table() is not None
    size = (tmp_path / "out" / "calls.sqlite").stat().st_size
    again = run(settings)
    assert [row.score for row in again.rows] == [row.score for row in report.rows]
    assert (tmp_path / "out" / "calls.sqlite").stat().st_size == size


def test_fresh_tasks_are_test_tasks_of_both_kinds(tmp_path: Path) -> None:
    tasks = fresh_tasks(UltraRun(tmp_path, tmp_path, tmp_path, tasks=20))
    assert {task.split for task in tasks} == {"test"}
    assert sum(task.domain == "composite" for task in tasks) == 20
    assert {task.domain for task in tasks} == {"composite", *GROUNDS}
    assert len({task.prompt for task in tasks}) == len(tasks) == 40


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["eval-ultra", "--adapter", "x", "--out", "y", "--config", str(tmp_path / "no.yaml")]
    )
    assert done.exit_code == 2
