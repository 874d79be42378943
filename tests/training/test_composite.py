from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import DataError
from orchestrator.placeholders import fill, placeholders
from training.composite import PLAN, composite_at, composite_tasks, make_composite, plan_of, task_at
from training.composite_families import FAMILIES
from training.grading import check_task, grade
from training.ground_families import GROUNDS
from training.outcomes import Task
from training.tasks import Columns, TaskSource, load_tasks


@given(st.sampled_from(sorted(FAMILIES)), st.integers(0, 2**32))
def test_the_plan_of_each_problem_leads_to_its_answer_through_two_specialists(family: str, seed: int) -> None:
    problem = make_composite(family, random.Random(seed))
    task = problem.task("it")
    check_task(task)
    parts = problem.composition.parts
    assert 2 <= len(parts) <= 4
    assert len({part.ground for part in parts}) >= 2
    answers: dict[int, str] = {}
    for number, (step, part) in enumerate(zip(plan_of(task), parts, strict=True)):
        assert all(earlier < number for earlier in step.access)
        filled = fill(step.subtask, answers)
        # The question that the specialist gets is one that its ground could ask.
        assert not placeholders(filled)
        assert part.question == step.subtask
        assert re.fullmatch(pattern(part.ground, part.family), filled), filled
        answers[number] = part.answer
    assert grade(task, answers[len(parts) - 1]) == 1
    assert grade(task, "Pumpernickel.") == 0
    # Each part's answer is used, but for the last one's, which is the answer.
    assert {number for step in plan_of(task) for number in step.access} == set(range(len(parts) - 1))


def pattern(ground: str, family: str) -> str:
    return re.sub(r"\\\{\w+\\\}", ".+", re.escape(GROUNDS[ground][family].phrasings[0]))


# Each family's answer once more, by other means, from nothing but the question.
def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def quoted(text: str) -> list[str]:
    return re.findall(r'"([a-z]+)"', text)


PLACES = {"first": 0, "second": 1, "third": 2}


def placed(text: str) -> list[str]:
    """The words at the named places of the lists."""
    found = []
    for place, items in re.findall(
        r"(first|second|third)(?: of these words| word)?[^:,]*?:? (?:of )?(\w+, \w+, \w+)", text
    ):
        found.append(items.split(", ")[PLACES[place]])
    return found


SOLVERS = {
    "largest_double": lambda p: 2 * max(numbers(p)),
    "spread": lambda p: max(numbers(p)) - min(numbers(p)),
    "both_ends": lambda p: max(numbers(p)) + min(numbers(p)),
    "list_times": lambda p: numbers(p)[0] * (p.count(",") + 1),
    "length_times": lambda p: len(quoted(p)[0]) * numbers(p)[0],
    "largest_of": lambda p: max(numbers(p)[0] + numbers(p)[1], numbers(p)[2] * numbers(p)[3], numbers(p)[4]),
    "smallest_product": lambda p: min(numbers(p)[0] * numbers(p)[1], numbers(p)[2] * numbers(p)[3], numbers(p)[4]),
    "item_upper": lambda p: placed(p)[0].upper(),
    "items_join": lambda p: "".join(placed(p)),
    "first_twice": lambda p: min(p.partition(": ")[2].split(", ")) * 2,
    "syllogism_letter": lambda p: {"A": "y", "N": "n", "S": "u"}[p[0]],
    "twice_length_plus": lambda p: 2 * len(quoted(p)[0]) + numbers(p)[0],
}


@pytest.mark.parametrize("family", SOLVERS)
def test_answers_are_those_of_a_second_solution(family: str) -> None:
    for seed in range(40):
        task = make_composite(family, random.Random(seed)).task("it")
        assert str(SOLVERS[family](task.prompt)) == task.reference, task.prompt


def test_equal_arguments_make_equal_tasks_and_all_families_have_their_turn() -> None:
    one, two = (composite_tasks(count=3 * len(FAMILIES), seed=4) for _ in range(2))
    assert one == two
    assert Counter(task.dataset for task in one) == dict.fromkeys(FAMILIES, 3)
    assert len({task.prompt for task in one}) == len(one)
    assert {task.split for task in one} == {"test"}
    assert composite_tasks(count=20, seed=5) != composite_tasks(count=20, seed=6)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(["train", "val", "test"]))
def test_no_problem_is_in_two_splits(index: int, split: str) -> None:
    problem = composite_at(index, seed=1, split=split)
    assert problem.split == split
    assert composite_at(index, seed=1, split=split) == problem


def test_the_mixture_holds_single_tasks_whose_plan_is_their_own_question() -> None:
    made = [task_at(index, seed=3, split="train", single=0.4, grounds=list(GROUNDS)) for index in range(120)]
    singles = [task for task in made if task.domain != "composite"]
    assert 30 < len(singles) < 70
    for task in singles:
        ((ground, subtask),) = [(step.ground, step.subtask) for step in plan_of(task)]
        assert (ground, subtask) == (task.domain, task.prompt)
        assert task.split == "train"
        check_task(task)


def test_composite_tasks_are_a_source_of_tasks() -> None:
    made = load_tasks(["composite:spread,largest_plus"], TaskSource(count=6, columns=Columns(split="val")))
    assert {task.dataset for task in made} == {"spread", "largest_plus"}
    assert {task.split for task in made} == {"val"}
    assert all(task.extra[PLAN] for task in made)
    with pytest.raises(DataError, match="no composite family pumpkin"):
        load_tasks(["composite:pumpkin"])


def test_a_task_without_a_plan_says_so() -> None:
    with pytest.raises(DataError, match="task it carries no plan"):
        plan_of(Task("it", "What?", "4", "maths", "add", "train", "number"))


@given(st.lists(st.one_of(st.integers(0, 12), st.text(alphabet="ab {}0.")), max_size=8), st.text(), st.text())
def test_answers_are_put_in_once_and_nothing_else_changes(parts: list[int | str], first: str, fifth: str) -> None:
    text = "|".join(f"{{{part}}}" if isinstance(part, int) else part.replace("{", "") for part in parts)
    answers = {0: first, 5: fifth}
    wanted = [
        answers[part].strip() if part in answers else f"{{{part}}}" if isinstance(part, int) else part.replace("{", "")
        for part in parts
    ]
    assert fill(text, answers) == "|".join(wanted)
    assert placeholders(text) == tuple(sorted({part for part in parts if isinstance(part, int)}))
