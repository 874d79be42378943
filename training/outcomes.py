"""The outcomes folder: what labelling writes and training reads. Two parquet files:

`tasks.parquet`: task_id, prompt, reference, domain, dataset, split, grader; other columns are kept as they are.
`outcomes.parquet`: one row per (task, worker): task_id, worker, score (mean of samples, 0..1), samples, and
optionally answers, response, input_tokens, output_tokens, cost_usd, latency_s.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actors.errors import DataError

TASK_COLUMNS = ("task_id", "prompt", "reference", "domain", "dataset", "split", "grader")
OUTCOME_COLUMNS = ("task_id", "worker", "score", "samples")
# Recorded means are often float32; anything further from the samples' mean is another number.
MEAN_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Task:
    """Something to solve and how to tell that it was solved. `grader` is a name `training.grading` knows; `extra`
    holds the file's other columns (some graders read them)."""

    task_id: str
    prompt: str
    reference: str
    domain: str
    dataset: str
    split: str
    grader: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one worker made of one task. `score` is the mean of `samples`; tokens, cost and latency are means over
    the samples, None where not recorded; `answers` are the samples' texts as graded, `response` the first in full."""

    task_id: str
    worker: str
    score: float
    samples: tuple[float, ...]
    answers: tuple[str, ...] = ()
    response: str | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    cost_usd: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True)
class Outcomes:
    """Tasks with the outcomes recorded for them. A worker may lack some tasks (partial labels)."""

    tasks: tuple[Task, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def workers(self) -> tuple[str, ...]:
        """In order of first appearance."""
        return tuple(dict.fromkeys(outcome.worker for outcome in self.outcomes))

    def split(self, *names: str) -> Outcomes:
        """Only the tasks of these splits, with their outcomes.

        Raises:
            DataError: no task has such a split.
        """
        if unknown := sorted(set(names) - {task.split for task in self.tasks}):
            have = ", ".join(sorted({task.split for task in self.tasks}))
            raise DataError(f"no task has the split {', '.join(unknown)}; there are {have}")
        tasks = tuple(task for task in self.tasks if task.split in names)
        ids = {task.task_id for task in tasks}
        return Outcomes(tasks, tuple(outcome for outcome in self.outcomes if outcome.task_id in ids))

    def scores(self, workers: Sequence[str]) -> NDArray[np.float64]:
        """Mean scores `[tasks, workers]`; NaN where a worker has no outcome for a task.

        Raises:
            DataError: a worker has no outcome at all.
        """
        if missing := sorted(set(workers) - set(self.workers)):
            raise DataError(f"no outcome of {', '.join(missing)}; there are {', '.join(self.workers)}")
        rows = {task.task_id: index for index, task in enumerate(self.tasks)}
        columns = {name: index for index, name in enumerate(workers)}
        table = np.full((len(rows), len(columns)), np.nan)
        for outcome in self.outcomes:
            if outcome.worker in columns:
                table[rows[outcome.task_id], columns[outcome.worker]] = outcome.score
        return table


def read_outcomes(folder: Path | str) -> Outcomes:
    """Read and check a folder.

    Raises:
        DataError: a file is missing or not parquet, lacks a column, or holds an empty task set, an empty name, a
            repeated task, a repeated (task, worker), an unknown task, a score or sample that is not a number in
            0..1, or a score that is not its samples' mean. Names file, row (from 0), task and worker.
    """
    tasks_path, outcomes_path = Path(folder) / "tasks.parquet", Path(folder) / "outcomes.parquet"
    tasks = read_tasks(folder)
    known = [column.name for column in fields(Outcome)]
    records = _read(outcomes_path, OUTCOME_COLUMNS)
    outcomes = []
    for row, record in enumerate(records):
        where = f"{outcomes_path}: row {row} (task {record['task_id']}, worker {record['worker']})"
        values = {key: record[key] for key in known if record.get(key) is not None}
        if not isinstance(values.get("samples"), list) or not values["samples"]:
            raise DataError(f"{where}: samples must be a list of numbers")
        values["samples"] = tuple(values["samples"])
        values["answers"] = tuple(values.get("answers", ()))
        outcomes.append(_checked(Outcome(**{"score": math.nan, "worker": "", **values}), where))
    found = Outcomes(tasks, tuple(outcomes))
    _check_rows(found, str(tasks_path), str(outcomes_path))
    return found


def read_tasks(folder: Path | str) -> tuple[Task, ...]:
    """Only the tasks of a folder; `extra` lacks what is empty in the file.

    Raises:
        DataError: as `read_outcomes`.
    """
    path = Path(folder) / "tasks.parquet"
    tasks = []
    for row, record in enumerate(_read(path, TASK_COLUMNS)):
        named = {key: record.pop(key) for key in TASK_COLUMNS}
        for key, value in named.items():
            if not isinstance(value, str) or (not value and key in ("task_id", "prompt", "split", "grader")):
                raise DataError(f"{path}: row {row}: {key} must be a text, not {value!r}")
        tasks.append(Task(**named, extra={key: value for key, value in record.items() if value is not None}))
    return tuple(tasks)


def write_outcomes(folder: Path | str, found: Outcomes) -> None:
    """Write both files, each whole or not at all; checked as `read_outcomes` checks them.

    Raises:
        DataError: as `read_outcomes`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for row, outcome in enumerate(found.outcomes):
        _checked(outcome, f"outcomes: row {row} (task {outcome.task_id}, worker {outcome.worker})")
    _check_rows(found, "tasks", "outcomes")
    named = [{key: getattr(task, key) for key in TASK_COLUMNS} | dict(task.extra) for task in found.tasks]
    extra = sorted({key for task in found.tasks for key in task.extra})
    _write(folder / "tasks.parquet", {key: [row.get(key) for row in named] for key in (*TASK_COLUMNS, *extra)})
    columns: dict[str, list[Any]] = {}
    for key in (column.name for column in fields(Outcome)):
        values = [getattr(outcome, key) for outcome in found.outcomes]
        if key in OUTCOME_COLUMNS or any(value not in (None, ()) for value in values):
            columns[key] = [list(value) if isinstance(value, tuple) else value for value in values]
    _write(folder / "outcomes.parquet", columns)


def _checked(outcome: Outcome, where: str) -> Outcome:
    if not outcome.task_id or not outcome.worker:
        raise DataError(f"{where}: task_id and worker must be texts")
    for name, numbers in (("score", (outcome.score,)), ("samples", outcome.samples)):
        for number in numbers:
            if not isinstance(number, (int, float)) or not 0 <= number <= 1:  # NaN fails the comparison too
                raise DataError(f"{where}: {name} holds {number}, not a number from 0 to 1")
    if not outcome.samples:
        raise DataError(f"{where}: samples must be a list of numbers")
    mean = math.fsum(outcome.samples) / len(outcome.samples)
    if abs(mean - outcome.score) > MEAN_TOLERANCE:
        raise DataError(f"{where}: score is {outcome.score:.4f}, its samples' mean {mean:.4f}")
    return outcome


def _check_rows(found: Outcomes, tasks_path: str, outcomes_path: str) -> None:
    if not found.tasks:
        raise DataError(f"{tasks_path}: no tasks")
    first: dict[str, int] = {}
    for row, task in enumerate(found.tasks):
        if task.task_id in first:
            raise DataError(f"{tasks_path}: rows {first[task.task_id]} and {row} are both task {task.task_id}")
        first[task.task_id] = row
    seen: dict[tuple[str, str], int] = {}
    for row, outcome in enumerate(found.outcomes):
        key = (outcome.task_id, outcome.worker)
        if outcome.task_id not in first:
            raise DataError(
                f"{outcomes_path}: row {row} (worker {outcome.worker}): task {outcome.task_id} is not in {tasks_path}"
            )
        if key in seen:
            raise DataError(
                f"{outcomes_path}: rows {seen[key]} and {row} are both "
                f"worker {outcome.worker} on task {outcome.task_id}"
            )
        seen[key] = row


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
    if missing := [name for name in columns if name not in table.column_names]:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _write(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        pq.write_table(pa.table(dict(columns)), temporary, compression="zstd")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
