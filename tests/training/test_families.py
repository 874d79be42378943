from __future__ import annotations

import pytest

from actors.errors import DataError
from training.families import FACTS, FAMILIES, family_tasks
from training.grading import grade
from training.tasks import jsonl_tasks

ALL = tuple(FAMILIES)


def test_tasks_are_repeatable_distinct_and_split_by_prompt() -> None:
    tasks = family_tasks(ALL, count=20, seed=3)
    assert tasks == family_tasks(ALL, count=20, seed=3)
    assert tasks != family_tasks(ALL, count=20, seed=4)
    assert len({task.task_id for task in tasks}) == len({task.prompt for task in tasks}) == len(tasks)
    assert len(tasks) == 20 * len(ALL)
    for family in ALL:
        splits = [task.split for task in tasks if task.dataset == family]
        assert (splits.count("test"), splits.count("train")) == (6, 14)


def test_the_reference_is_right_and_a_wrong_answer_is_wrong() -> None:
    for task in family_tasks(ALL, count=20, seed=9):
        right = task.reference.split("|")[0]
        if task.grader == "prose":
            right += " is a word, and this is a sentence about it."
        assert grade(task, f"Answer: {right}") == 1, task
        assert grade(task, "I do not know.") == 0, task


@pytest.mark.parametrize(
    ("family", "check"),
    [
        ("add", lambda prompt, numbers: numbers[0] + numbers[1]),
        ("subtract", lambda prompt, numbers: numbers[0] - numbers[1]),
        ("multiply", lambda prompt, numbers: numbers[0] * numbers[1]),
        ("chain", lambda prompt, numbers: sum(numbers)),
        (
            "story",
            lambda prompt, numbers: numbers[0] + (-1 if "away" in prompt or "loses" in prompt else 1) * numbers[1],
        ),
    ],
)
def test_arithmetic_is_right(family: str, check) -> None:  # type: ignore[no-untyped-def]
    import re

    for task in family_tasks([family], count=30, seed=1):
        assert int(task.reference) == check(task.prompt, [int(n) for n in re.findall(r"\d+", task.prompt)]), task


def test_facts_are_a_task_file() -> None:
    facts = jsonl_tasks(FACTS)
    assert len(facts) == len({task.prompt for task in facts}) >= 50


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(DataError, match="no family poems; there are add, "):
        family_tasks(["poems"], count=1, seed=0)
