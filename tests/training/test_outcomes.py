from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.errors import DataError
from training.outcomes import Outcome, Outcomes, Task, read_outcomes, write_outcomes


def task(task_id: str, split: str = "train", **extra: Any) -> Task:
    return Task(task_id, f"ask {task_id}", "42", "maths", "sums", split, "number", extra)


FOUND = Outcomes(
    (task("t0", difficulty="easy"), task("t1", "val", difficulty="hard"), task("t2", difficulty="easy")),
    (
        Outcome("t0", "a", 0.5, (0.0, 1.0), ("7", "42"), "It is 7.", 10.0, 3.0, 0.001, 0.5),
        Outcome("t0", "b", 1.0, (1.0, 1.0), ("42", "42"), "42", 10.0, 1.0, 0.002, 0.2),
        Outcome("t1", "a", 0.25, (0.25,), ("4",), "4", 9.0, 1.0, 0.001, 0.1),
        Outcome("t2", "b", 0.0, (0.0,), ("x",), "x", 9.0, 1.0, 0.001, 0.1),
    ),
)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    write_outcomes(tmp_path / "new" / "folder", FOUND)
    assert read_outcomes(tmp_path / "new" / "folder") == FOUND
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "outcomes.parquet",
        "tasks.parquet",
    ]


def test_optional_columns_may_be_absent(tmp_path: Path) -> None:
    bare = Outcomes((task("t0"),), (Outcome("t0", "a", 1.0, (1.0,)),))
    write_outcomes(tmp_path, bare)
    assert pq.read_table(tmp_path / "outcomes.parquet").column_names == ["task_id", "worker", "score", "samples"]
    assert read_outcomes(tmp_path) == bare


def test_scores_are_a_table_with_holes() -> None:
    assert FOUND.workers == ("a", "b")
    np.testing.assert_array_equal(FOUND.scores(("b", "a")), [[1.0, 0.5], [np.nan, 0.25], [0.0, np.nan]])
    np.testing.assert_array_equal(FOUND.split("train").scores(("a", "b")), [[0.5, 1.0], [np.nan, 0.0]])
    with pytest.raises(DataError, match="no outcome of c; there are a, b"):
        FOUND.scores(("a", "c"))
    with pytest.raises(DataError, match="no task has the split test; there are train, val"):
        FOUND.split("test")


def broken(tmp_path: Path, file: str, change: Any) -> Path:
    """The good folder with one file's rows changed, written past the checks."""
    write_outcomes(tmp_path, FOUND)
    path = tmp_path / file
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows)), path)
    return tmp_path


def setting(row: int, **values: Any) -> Any:
    return lambda rows: [*rows[:row], {**rows[row], **values}, *rows[row + 1 :]]


def without(column: str) -> Any:
    return lambda rows: [{key: value for key, value in row.items() if key != column} for row in rows]


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (
            "outcomes.parquet",
            setting(1, score=math.nan),
            r"outcomes.parquet: row 1 \(task t0, worker b\): score holds nan",
        ),
        ("outcomes.parquet", setting(1, score=None), r"row 1 \(task t0, worker b\): score holds nan"),
        (
            "outcomes.parquet",
            setting(2, score=1.5),
            r"row 2 \(task t1, worker a\): score holds 1.5, not a number from 0",
        ),
        ("outcomes.parquet", setting(0, samples=[0.0, math.inf]), r"row 0 .*samples holds inf"),
        ("outcomes.parquet", setting(0, samples=[]), "row 0 .*samples must be a list"),
        ("outcomes.parquet", setting(0, score=0.75), "row 0 .*score is 0.7500, its samples' mean 0.5000"),
        ("outcomes.parquet", setting(0, worker=""), "row 0 .*task_id and worker must be texts"),
        ("outcomes.parquet", setting(3, task_id="t9"), r"row 3 \(worker b\): task t9 is not in .*tasks.parquet"),
        ("outcomes.parquet", lambda rows: [*rows, rows[1]], "rows 1 and 4 are both worker b on task t0"),
        ("outcomes.parquet", without("samples"), "outcomes.parquet lacks the columns samples"),
        ("tasks.parquet", without("grader"), "tasks.parquet lacks the columns grader"),
        ("tasks.parquet", lambda rows: [*rows, rows[0]], "tasks.parquet: rows 0 and 3 are both task t0"),
        ("tasks.parquet", setting(2, prompt=None), "tasks.parquet: row 2: prompt must be a text"),
        ("tasks.parquet", setting(2, split=""), "tasks.parquet: row 2: split must be a text"),
    ],
)
def test_a_fault_is_named_with_file_row_and_worker(tmp_path: Path, file: str, change: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_outcomes(broken(tmp_path, file, change))


def test_missing_or_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tasks\.parquet does not exist"):
        read_outcomes(tmp_path)
    write_outcomes(tmp_path, FOUND)
    (tmp_path / "outcomes.parquet").write_bytes(b"task_id,worker\n")
    with pytest.raises(DataError, match=r"outcomes\.parquet is not a parquet file"):
        read_outcomes(tmp_path)


def test_nothing_wrong_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tasks"):
        write_outcomes(tmp_path, Outcomes((), ()))
    twice = replace(FOUND, outcomes=(*FOUND.outcomes, FOUND.outcomes[0]))
    with pytest.raises(DataError, match="rows 0 and 4 are both worker a on task t0"):
        write_outcomes(tmp_path, twice)
    assert list(tmp_path.iterdir()) == []


def test_the_recorded_outcomes_are_read(reasoning_gym_dir: Path) -> None:
    found = read_outcomes(reasoning_gym_dir)
    assert len(found.tasks) == 7598
    assert len(found.outcomes) == 75_980
    validation = found.split("val")
    assert len(validation.tasks) == 853
    # The best single worker of the README's table.
    assert float(validation.scores(("o3-mini",)).mean()) == pytest.approx(0.763, abs=0.0006)
    assert float(validation.scores(("qwq-32b",)).mean()) == pytest.approx(0.531, abs=0.0006)
