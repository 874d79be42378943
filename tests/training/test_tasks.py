from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import DataError
from training.grading import grade
from training.outcomes import Outcomes, Task, write_outcomes
from training.splits import SHARES, check_tasks, split_of
from training.tasks import (
    EASY_ONLY,
    EXCLUDED,
    Columns,
    TaskSource,
    hub_tasks,
    jsonl_tasks,
    load_tasks,
    parquet_tasks,
    reasoning_gym_tasks,
    usable_families,
)


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


def test_every_usable_family_grades_its_own_answer_and_not_another() -> None:
    pytest.importorskip("reasoning_gym")
    families = usable_families()
    assert len(families) > 85
    assert not set(families) & set(EXCLUDED)
    for task in reasoning_gym_tasks(families, count=1, seed=11):
        assert grade(task, f"<answer>{task.reference}</answer>") == 1, task.dataset
        assert grade(task, "<answer>no idea</answer>") < 0.6, task.dataset


def test_harder_families() -> None:
    pytest.importorskip("reasoning_gym")
    assert not set(usable_families("hard")) & set(EASY_ONLY)
    easy, hard = (
        reasoning_gym_tasks(["spiral_matrix"], count=5, seed=1, difficulty=level) for level in ("easy", "hard")
    )
    assert sum(len(task.prompt) for task in easy) < sum(len(task.prompt) for task in hard)
    assert easy[0].task_id != hard[0].task_id
    assert grade(hard[0], f"Answer: {hard[0].reference}") == 1
    with pytest.raises(DataError, match="countdown is easy only"):
        reasoning_gym_tasks(["countdown"], count=1, seed=1, difficulty="hard")


def test_tasks_are_the_same_in_every_process() -> None:
    """Python's hashes differ from process to process; what is made may not depend on them."""
    pytest.importorskip("reasoning_gym")
    code = (
        "import hashlib; from training.tasks import *; "
        "tasks = reasoning_gym_tasks(['family_relationships', 'letter_jumble', 'sokoban'], "
        "count=2, seed=3); print(hashlib.sha256(repr(tasks).encode()).hexdigest())"
    )
    said = {
        subprocess.run(
            (sys.executable, "-c", code), env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


@given(st.text(min_size=1), st.sampled_from(["", " ", "\n"]))
def test_the_same_prompt_is_on_the_same_side(prompt: str, space: str) -> None:
    assert split_of(prompt) == split_of(space + prompt.replace(" ", "  ") + space)
    assert split_of(prompt) in SHARES


def test_shares() -> None:
    found = Counter(split_of(f"What is {n}?") for n in range(4000))
    assert {name: round(count / 4000, 1) for name, count in found.items()} == dict(SHARES)
    # More tasks or another order move nobody; larger shares only add.
    before = {n for n in range(1000) if split_of(f"{n}", {"train": 0.5, "test": 0.5}) == "train"}
    assert before < {n for n in range(1000) if split_of(f"{n}", {"train": 0.7, "test": 0.3}) == "train"}
    with pytest.raises(DataError, match="add up to 1"):
        split_of("x", {"train": 0.5})


def test_sources_together(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "2+2?", "label": 4, "grader": "number"}')
    settings = TaskSource(count=3, seed=2, columns=Columns(names={"prompt": "question", "reference": "label"}))
    tasks = load_tasks((str(path), "reasoning-gym:basic_arithmetic,spell_backward", "embedded:add"), settings)
    assert Counter(task.dataset for task in tasks) == {"mine": 1, "basic_arithmetic": 3, "spell_backward": 3, "add": 3}
    assert tasks[0].reference == "4"
    assert all(task.split == split_of(task.prompt) for task in tasks)
    write_outcomes(tmp_path / "folder", Outcomes(tuple(tasks), ()))
    assert load_tasks((str(tmp_path / "folder"),)) == tasks
    with pytest.raises(DataError, match="nonsense is no source of tasks"):
        load_tasks(("nonsense",))
    with pytest.raises(DataError, match="there are two tasks mine-00001"):
        load_tasks((str(path), str(path)), settings)
    with pytest.raises(DataError, match="there are no tasks"):
        check_tasks([])


def test_a_prompt_in_two_splits_is_found() -> None:
    one = Task("a", "What is 1?", "1", "d", "s", "train", "number")
    with pytest.raises(DataError, match="a and b have the same prompt, but one is in train and one in test"):
        check_tasks([one, Task("b", "what is  1?", "1", "d", "s", "test", "number")])
    check_tasks([one, Task("b", "what is  1?", "1", "d", "s", "train", "number")])


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"prompt": ["a?", "b?"], "reference": ["1", "2"], "level": [3, None]}), path)
    first, second = parquet_tasks(path, columns=Columns(grader="number", split="test"))
    assert (first.task_id, first.grader, first.split, dict(first.extra)) == (
        "mine-00000",
        "number",
        "test",
        {"level": 3},
    )
    assert dict(second.extra) == {}
    pq.write_table(pa.table({"prompt": ["a?", None], "reference": ["1", "2"]}), path)
    with pytest.raises(DataError, match=r"mine\.parquet: row 1: prompt must be a text"):
        parquet_tasks(path)
    path.write_text("not parquet")
    with pytest.raises(DataError, match="is not a parquet file"):
        parquet_tasks(path)
    with pytest.raises(DataError, match="does not exist"):
        parquet_tasks(tmp_path / "none.parquet")


def test_a_data_set_of_the_hub_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "quiz"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "a?", "answer": "1"}\n{"question": "b?", "answer": "2"}\n')
    (folder / "test.jsonl").write_text('{"question": "c?", "answer": "3"}\n')
    columns = Columns(grader="number", split="val", names={"prompt": "question", "reference": "answer"})
    tasks = hub_tasks(str(folder), columns=columns)
    assert [(task.task_id, task.prompt, task.reference, task.split) for task in tasks] == [
        ("quiz-00000", "a?", "1", "val"),
        ("quiz-00001", "b?", "2", "val"),
    ]
    (other,) = load_tasks((f"hub:{folder}@test",), TaskSource(columns=columns))
    assert other.prompt == "c?"
    with pytest.raises(DataError, match="row 0: there is no column prompt; there are question, answer"):
        hub_tasks(str(folder), columns=Columns(names={"prompt": "prompt"}))
    with pytest.raises(DataError, match=r"cannot load the data set somebody/nothing .*needs the network"):
        hub_tasks("somebody/nothing")
