from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.errors import DataError
from training.grading import grade
from training.tasks import Columns, jsonl_tasks, reasoning_gym_tasks


def test_reasoning_gym_families_are_repeatable_and_gradable() -> None:
    pytest.importorskip("reasoning_gym")
    tasks = reasoning_gym_tasks(["basic_arithmetic", "spell_backward"], count=3, seed=5, split="train")
    assert tasks == reasoning_gym_tasks(["basic_arithmetic", "spell_backward"], count=3, seed=5, split="train")
    assert [task.dataset for task in tasks] == ["basic_arithmetic"] * 3 + ["spell_backward"] * 3
    assert [task.domain for task in tasks] == ["arithmetic"] * 3 + ["algorithmic"] * 3
    assert len({task.task_id for task in tasks}) == 6
    for task in tasks:
        assert grade(task, f"Answer: {task.reference}") == 1
        assert grade(task, "Answer: no idea") < 0.5  # spelling gets credit letter by letter
    others = reasoning_gym_tasks(["basic_arithmetic"], count=3, seed=6, split="train")
    assert {task.prompt for task in others}.isdisjoint(task.prompt for task in tasks)


def test_families_that_cannot_be_used_say_why() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataError, match="composite is not used: it has no tasks of its own"):
        reasoning_gym_tasks(["composite"], count=1, seed=0, split="train")
    with pytest.raises(DataError, match="no family nonsense"):
        reasoning_gym_tasks(["nonsense"], count=1, seed=0, split="train")
    with pytest.raises(DataError, match="cannot make basic_arithmetic"):
        reasoning_gym_tasks(["basic_arithmetic"], count=1, seed=0, split="train", config={"min_terms": -1})


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [{"prompt": "2+2?", "reference": "4", "grader": "number"}, {"prompt": "Hi", "reference": "x", "level": 3}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    first, second = jsonl_tasks(path, columns=Columns(split="val"))
    assert (first.task_id, first.grader, first.split, first.dataset) == ("mine-00001", "number", "val", "mine")
    assert (second.task_id, second.grader, dict(second.extra)) == ("mine-00002", "phrase", {"level": 3})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{not json}", "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"prompt": "x"}', "line 1: reference must be a text"),
        ('{"prompt": "x", "reference": [4]}', "line 1: reference must be a text"),
        ('{"prompt": "x", "reference": true}', "line 1: reference must be a text"),
        ('{"prompt": " ", "reference": "y"}', "line 1: prompt must be a text"),
        ('{"prompt": "x", "reference": "y", "grader": ""}', "line 1: grader must be a text"),
        ('{"prompt":"x","reference":"y","task_id":"a"}\n' * 2, "line 2 repeats the task_id a"),
        ("\n", "holds no tasks"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        jsonl_tasks(path)
