"""Which tasks train, choose and test. By a hash of the prompt: the same prompt is on the same side on every machine, in
every run and file, however many others there are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from actors.errors import DataError
from training.outcomes import Task

SHARES: Mapping[str, float] = {"train": 0.8, "val": 0.1, "test": 0.1}


def split_of(prompt: str, shares: Mapping[str, float] = SHARES) -> str:
    """The split of a prompt. Case and spaces do not count, so that near copies stay together.

    Raises:
        DataError: the shares are not positive numbers that add up to 1.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise DataError(f"split shares must be positive and add up to 1, not {dict(shares)}")
    place = int.from_bytes(hashlib.sha256(plain(prompt).encode("utf-8", "replace")).digest()[:8], "big") / 2**64
    total = 0.0
    for name, share in shares.items():
        total += share
        if place < total:
            return name
    return name


def plain(prompt: str) -> str:
    """What counts of a prompt when two are compared."""
    return " ".join(prompt.lower().split())


def check_tasks(tasks: Sequence[Task]) -> None:
    """Whether tasks from several sources can be used together.

    Raises:
        DataError: none at all, a task_id twice, or one prompt in two splits; names the tasks.
    """
    if not tasks:
        raise DataError("there are no tasks")
    ids: set[str] = set()
    sides: dict[str, Task] = {}
    for task in tasks:
        if task.task_id in ids:
            raise DataError(f"there are two tasks {task.task_id}")
        ids.add(task.task_id)
        other = sides.setdefault(plain(task.prompt), task)
        if other.split != task.split:
            raise DataError(
                f"tasks {other.task_id} and {task.task_id} have the same prompt, but one is in {other.split} and one "
                f"in {task.split}"
            )
