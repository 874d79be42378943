"""Tasks of the user's own: JSONL, parquet and Hugging Face data sets, all read by the same rules.

A row needs `prompt` and `reference` (with the grader `code`: `tests` or `cases` instead). task_id, domain, dataset,
split and grader may be given too; further columns are kept in `extra`, where graders find theirs. A row without a split
gets one by the hash of its prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.errors import DataError
from training.outcomes import TASK_COLUMNS, Task
from training.splits import split_of


@dataclass(frozen=True)
class Columns:
    """How rows become tasks: the grader and split of rows that do not say (split None: by hash), and which of the
    file's columns stand for ours, for example {"prompt": "question", "reference": "answer"}."""

    grader: str = "phrase"
    split: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def jsonl_tasks(path: Path | str, *, columns: Columns | None = None) -> list[Task]:
    """Tasks from a JSONL file, one object per line.

    Raises:
        DataError: names the line that is not a JSON object, lacks a key or repeats a task_id.
    """
    path = Path(path)
    return _tasks(path.stem, str(path), "line", _json_lines(path), columns)


def parquet_tasks(path: Path | str, *, columns: Columns | None = None) -> list[Task]:
    """Tasks from a parquet file.

    Raises:
        DataError: names the row (from 0) that lacks a value or repeats a task_id.
    """
    path = Path(path)
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
    return _tasks(path.stem, str(path), "row", enumerate(table.to_pylist()), columns)


def hub_tasks(
    name: str, *, part: str = "train", subset: str | None = None, columns: Columns | None = None
) -> list[Task]:
    """Tasks from a Hugging Face data set: a hub id, or a folder with its files. `part` is the data set's own split.

    Raises:
        DataError: the package `datasets` is missing, the data set cannot be reached or has no such part, or a row
            (from 0) lacks a value.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "reading a Hugging Face data set needs the package datasets: pip install 'fugu-ray[hub]'"
        ) from error
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, subset, split=part)
    except Exception as error:
        # The package raises what its many back ends raise; the kind tells what happened.
        raise DataError(
            f"cannot load the data set {name} ({type(error).__name__}: {str(error).splitlines()[0][:200]}). A data set "
            "from the hub needs the network, or must be in the cache already; a folder with its files works without"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()
    return _tasks(name.rstrip("/").rsplit("/", 1)[-1], f"{name} ({part})", "row", enumerate(rows), columns)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    # Not splitlines: JSON strings may hold other line ends than \n.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}: line {number} is not JSON: {error}") from error


def _tasks(stem: str, where: str, unit: str, rows: Iterable[tuple[int, Any]], columns: Columns | None) -> list[Task]:
    columns = columns or Columns()
    tasks: list[Task] = []
    first: dict[str, int] = {}
    for number, row in rows:
        place = f"{where}: {unit} {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{place} is not a JSON object")
        task = _task(stem, place, number, dict(row), columns)
        if task.task_id in first:
            raise DataError(f"{place} repeats the task_id {task.task_id} of {unit} {first[task.task_id]}")
        first[task.task_id] = number
        tasks.append(task)
    if not tasks:
        raise DataError(f"{where} holds no tasks")
    return tasks


def _task(stem: str, place: str, number: int, row: dict[str, Any], columns: Columns) -> Task:
    for ours, theirs in columns.names.items():
        if theirs not in row:
            raise DataError(f"{place}: there is no column {theirs}; there are {', '.join(map(str, row))}")
        row[ours] = row.pop(theirs)
    given = {key: value for key, value in row.items() if value is not None}
    values: dict[str, Any] = {
        "task_id": f"{stem}-{number:05d}",
        "domain": stem,
        "dataset": stem,
        "grader": columns.grader,
        "reference": "" if "tests" in given or "cases" in given else None,
    }
    values |= {key: given.pop(key) for key in TASK_COLUMNS if key in given}
    if isinstance(values["reference"], (int, float)) and not isinstance(values["reference"], bool):
        values["reference"] = repr(values["reference"])  # a number is written as one in many files
    values.setdefault("split", columns.split or split_of(str(values.get("prompt"))))
    empty_allowed = ("reference", "domain", "dataset")
    wrong = [
        key
        for key in TASK_COLUMNS
        if not isinstance(values.get(key), str) or (not values[key].strip() and key not in empty_allowed)
    ]
    if wrong:
        raise DataError(f"{place}: {', '.join(wrong)} must be a text")
    return Task(**{key: values[key] for key in TASK_COLUMNS}, extra=given)
