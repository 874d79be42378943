"""Where tasks come from: reasoning-gym families and the user's own JSONL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.errors import DataError
from training.outcomes import TASK_COLUMNS, Task

# Families that cannot be used as they come, each with its reason.
EXCLUDED: Mapping[str, str] = {
    "composite": "has no tasks of its own: it mixes other families by a configuration",
}

# The package makes item i of a data set from seed + i: without a stride, neighbouring seeds would share their items.
SEED_STRIDE = 1_000_000


def reasoning_gym_tasks(
    families: Sequence[str],
    *,
    count: int,
    seed: int,
    split: str,
    difficulty: str = "easy",
    config: Mapping[str, Any] | None = None,
) -> list[Task]:
    """`count` (below a million) tasks of each family. Equal arguments give equal tasks, other seeds other
    ones. `config` goes to each family's generator.

    Raises:
        DataError: an unknown or excluded family, or one that cannot be made with this configuration.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    tasks = []
    for family in families:
        if family in EXCLUDED:
            raise DataError(f"the reasoning-gym family {family} is not used: it {EXCLUDED[family]}")
        if family not in DATASETS:
            raise DataError(f"reasoning-gym has no family {family}")
        try:
            dataset = reasoning_gym.create_dataset(family, size=count, seed=seed * SEED_STRIDE, **(config or {}))
        except (TypeError, ValueError, AssertionError) as error:
            raise DataError(f"reasoning-gym cannot make {family}: {error}") from error
        for index in range(count):
            entry = dataset[index]
            tasks.append(
                Task(
                    task_id=f"rg-{difficulty}-{family}-{seed}-{index:04d}",
                    prompt=entry["question"],
                    reference="" if entry["answer"] is None else str(entry["answer"]),
                    domain=type(dataset).__module__.split(".")[1],
                    dataset=family,
                    split=split,
                    grader=f"reasoning_gym:{family}",
                    extra={"entry": json.dumps(entry, default=str), "difficulty": difficulty},
                )
            )
    return tasks


def jsonl_tasks(path: Path | str, *, split: str = "train", grader: str = "phrase") -> list[Task]:
    """Tasks from a JSONL file: `prompt` and `reference` are needed, the other columns of `tasks.parquet` optional;
    further keys are kept in `extra`.

    Raises:
        DataError: names the line that is not a JSON object or lacks a key, or that repeats a task_id.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    tasks: list[Task] = []
    ids: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}: line {number} is not a JSON object")
        defaults = {
            "task_id": f"{path.stem}-{number:05d}",
            "domain": path.stem,
            "dataset": path.stem,
            "split": split,
            "grader": grader,
        }
        named = {key: record.pop(key, defaults.get(key)) for key in TASK_COLUMNS}
        if wrong := [key for key, value in named.items() if not isinstance(value, str)]:
            raise DataError(f"{path}: line {number}: {', '.join(wrong)} must be a text")
        if named["task_id"] in ids:
            raise DataError(f"{path}: line {number} repeats the task_id {named['task_id']}")
        ids.add(named["task_id"])
        tasks.append(Task(**named, extra=record))
    if not tasks:
        raise DataError(f"{path} holds no tasks")
    return tasks
