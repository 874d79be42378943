from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.assign import assigned
from orchestrator.workflow import Step, Workflow, parse_workflow
from tests.training.conductors import GROUNDS, specialists
from training.composite import CompositeProblem, make_composite
from training.composite_families import FAMILIES
from training.conductor_questions import Subsets, endless, listed, question_at
from training.conductor_rollouts import InProcessRollouts, Played, RolloutSettings, Written, play
from training.plans import COMPACT, PlanSettings, plan_example, short_plan

BARE = RolloutSettings(steps="bare")


def problem(family: str, seed: int = 0) -> CompositeProblem:
    return make_composite(family, random.Random(seed))


def gold(one: CompositeProblem) -> Workflow:
    return Workflow(tuple(Step(step.ground, step.subtask, step.access) for step in one.plan))


def played(one: CompositeProblem, text: str, how: RolloutSettings = BARE, **more: object) -> Played:
    written = Written(one.task("it"), text, GROUNDS, **more)  # type: ignore[arg-type]
    return asyncio.run(play(written, GROUNDS, specialists(one.composition), how))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_right_workflow_over_the_right_specialists_is_right(family: str) -> None:
    one = problem(family)
    found = played(one, short_plan(gold(one), GROUNDS))
    assert (found.reward, found.score, found.answer) == (1.0, 1.0, one.composition.parts[-1].answer)
    assert found.workers == tuple(step.ground for step in one.plan)
    assert found.calls == len(one.plan)
    assert found.cost_usd == pytest.approx(0.001 * len(one.plan))
    assert (found.input_tokens, found.output_tokens) == (10 * len(one.plan), 2 * len(one.plan))
    assert found.topology == gold(one).topology


def test_rewards_are_nothing_for_no_plan_half_for_a_wrong_one_and_one_for_a_right_one() -> None:
    one = problem("largest_plus")
    right = short_plan(gold(one), GROUNDS)
    wrong = short_plan(Workflow((Step("logic", one.prompt),)), GROUNDS)
    assert [played(one, text).reward for text in ("no plan at all", wrong, right)] == [0.0, 0.5, 1.0]
    code = replace(BARE, right=1.5)
    assert [played(one, text, code).reward for text in ("no plan at all", wrong, right)] == [0.0, 0.5, 1.5]
    assert played(one, "no plan at all").failure
    assert played(one, wrong).failure == ""


def test_a_router_gives_the_steps_to_workers_and_a_plan_of_one_step_the_question() -> None:
    one = problem("largest_plus")
    right = tuple(step.ground for step in one.plan)
    wrong = Workflow(tuple(Step("logic", step.subtask, step.access) for step in one.plan))
    assert played(one, short_plan(wrong, GROUNDS)).score == 0
    found = played(one, "what was written is not read again", plan=assigned(wrong, right))
    assert (found.score, found.workers) == (1.0, right)
    workers = specialists(one.composition)
    alone = Written(one.task("it"), "", GROUNDS, plan=Workflow((Step("words", "a copy"),)))
    asyncio.run(play(alone, GROUNDS, workers, BARE))
    assert [request.messages[-1].text for request in workers["words"].asked] == [one.prompt]


def test_a_worker_that_may_not_be_used_makes_it_no_plan() -> None:
    one = problem("largest_plus")
    written = Written(one.task("it"), short_plan(gold(one), GROUNDS), ("words", "logic"))
    found = asyncio.run(play(written, GROUNDS, specialists(one.composition), BARE))
    assert (found.reward, found.calls) == (0.0, 0)
    assert "allowed" in found.failure or "worker" in found.failure


def test_where_a_worker_fails_nothing_is_known() -> None:
    one = problem("largest_plus")
    workers = specialists(one.composition)
    workers["arithmetic"].fails = 1
    written = Written(one.task("it"), short_plan(gold(one), GROUNDS), GROUNDS)
    found = asyncio.run(play(written, GROUNDS, workers, BARE))
    assert (found.reward, found.score) == (None, None)
    assert found.excluded


def test_empty_lists_keep_the_answer_of_the_round_before_and_are_no_plan_in_the_first() -> None:
    one = problem("largest_plus")
    empty = short_plan(Workflow(()), GROUNDS)
    answer = one.composition.parts[-1].answer
    assert played(one, empty, before=answer).reward == 1.0
    assert played(one, empty, before="Pumpernickel.").reward == 0.5
    assert played(one, empty).reward == 0.0


def test_equal_questions_are_asked_once_and_known_ever_after(tmp_path: Path) -> None:
    one = problem("largest_plus")
    workers = specialists(one.composition)
    right = Written(one.task("it"), short_plan(gold(one), GROUNDS), GROUNDS)
    with InProcessRollouts(GROUNDS, workers, BARE, tmp_path / "calls.sqlite") as rollouts:
        first = rollouts.play([right] * 8)
    assert [found.reward for found in first] == [1.0] * 8
    assert sum(len(worker.asked) for worker in workers.values()) == 2
    others = specialists(one.composition)
    with InProcessRollouts(GROUNDS, others, BARE, tmp_path / "calls.sqlite") as rollouts:
        again = rollouts.play([right])
    assert not any(worker.asked for worker in others.values())
    assert again[0].calls == first[0].calls == 2
    assert again[0].cost_usd == first[0].cost_usd


# Plans for the warm start ---------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0]), st.sampled_from(["train", "val"]))
def test_plans_parse_and_name_only_workers_that_may_be_used(index: int, again: float, split: str) -> None:
    how = PlanSettings(again=again)
    example = plan_example(index, how, split=split)
    workflow = parse_workflow(example.answer, example.workers, allowed=example.allowed, allow_empty=example.again)
    assert {step.worker for step in workflow.steps} <= set(example.allowed)
    assert example == plan_example(index, how, split=split)
    assert example.again == (again == 1.0) == (len(example.messages) == 4)
    # All that is asked for can be read, and is needed.
    assert workflow.needed == frozenset(range(len(workflow.steps)))
    listed_workers = example.messages[1].text.partition("\n")[0]
    assert listed_workers == "Workers: " + ", ".join(str(example.workers.index(name)) for name in example.allowed)


TEXTS = st.text(min_size=1, max_size=40).filter(lambda text: text.strip() and "\ud800" not in text)


@given(st.lists(st.tuples(st.integers(0, 3), TEXTS), max_size=5), st.randoms(use_true_random=False))
def test_a_short_plan_is_read_back_to_an_equal_workflow(steps: list[tuple[int, str]], rng: random.Random) -> None:
    pool = ("zero", "one", "two", "three")
    made = tuple(
        Step(pool[worker], text, tuple(sorted(rng.sample(range(index), rng.randint(0, index)))))
        for index, (worker, text) in enumerate(steps)
    )
    workflow = Workflow(made)
    text = short_plan(workflow, pool)
    assert parse_workflow(text, pool, allow_empty=True) == workflow


def test_who_does_a_subtask_is_drawn_at_random() -> None:
    examples = [plan_example(index, PlanSettings(pool=(4, 4))) for index in range(300)]
    steps = [
        step.worker
        for example in examples
        if len(example.allowed) == 4
        for step in parse_workflow(example.answer, example.workers).steps
    ]
    shares = [steps.count(f"worker{number}") / len(steps) for number in range(4)]
    assert all(0.15 < share < 0.35 for share in shares), shares


# Questions ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 5_000), st.integers(0, 3))
def test_questions_are_functions_of_their_number(index: int, seed: int) -> None:
    tasks = endless(seed, "train", 0.5)
    one, two = (question_at(index, tasks, GROUNDS, Subsets(), seed) for _ in range(2))
    assert one == two
    assert 2 <= len(one.allowed) <= 4
    assert list(one.allowed) == [name for name in GROUNDS if name in one.allowed]
    assert one.task.split == "train"
    text = one.messages(GROUNDS, COMPACT)[1].text
    numbers = ", ".join(str(GROUNDS.index(name)) for name in one.allowed)
    assert text == f"Workers: {numbers}\nTask: {one.task.prompt}"


def test_half_of_the_questions_may_use_the_whole_pool_and_none_too_few() -> None:
    tasks = endless(1, "train", 0.5)
    sizes = [len(question_at(i, tasks, GROUNDS, Subsets(0.5, 2), 1).allowed) for i in range(400)]
    assert 0.55 < sizes.count(4) / 400 < 0.78  # half, and a third of the others
    assert min(sizes) == 2
    assert {len(question_at(i, tasks, GROUNDS, Subsets(1.0, 1), 1).allowed) for i in range(50)} == {4}


def test_listed_tasks_come_in_passes(tmp_path: Path) -> None:
    rows = [
        {"task_id": f"t{n}", "prompt": f"What is {n} + 1?", "reference": str(n + 1), "grader": "number",
         "split": "val" if n % 4 == 0 else "train", "domain": "d", "dataset": "d"}
        for n in range(12)
    ]  # fmt: skip
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = listed([str(path)], 5, "train")
    passes = [[tasks(index).task_id for index in range(start, start + 9)] for start in (0, 9)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(f"t{n}" for n in range(12) if n % 4)
    assert passes[0] != passes[1]
