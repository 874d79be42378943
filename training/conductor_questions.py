"""What a conductor is asked in training: question `i` of a run, with the part of the pool that it may use.

Question `i` depends on the run's seed and on `i` and on nothing else, so that the place in the data is a number. The
part of the pool is random per question (Conductor §3.2): whoever is taken away later, it has been missing before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.errors import ConfigError, DataError
from actors.messages import Message
from orchestrator.conductor_prompt import PromptSettings, Round, conductor_messages
from training.composite import task_at
from training.ground_families import GROUNDS
from training.outcomes import Task
from training.tasks import load_tasks

Number = Callable[[int], Task]


@dataclass(frozen=True)
class Subsets:
    """A share `whole` of questions may use the whole pool, the others `fewest` or more of it, all sizes alike."""

    whole: float = 0.5
    fewest: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.whole <= 1 or self.fewest < 1:
            raise ConfigError("the share of whole pools lies between 0 and 1, the fewest workers are at least 1")


@dataclass(frozen=True)
class Question:
    task: Task
    allowed: tuple[str, ...]

    def messages(self, pool: Sequence[str], prompt: PromptSettings, said: Sequence[Round] = ()) -> tuple[Message, ...]:
        query = (Message("user", self.task.prompt),)
        return conductor_messages(query, pool, prompt, allowed=self.allowed, said=said)


def endless(seed: int, split: str, single: float) -> Number:
    """Tasks of the embedded world without end: composite ones, and a share `single` for one specialist."""

    def task(index: int) -> Task:
        return task_at(index, seed=seed, split=split, single=single, grounds=list(GROUNDS))

    return task


def listed(sources: Sequence[str], seed: int, split: str) -> Number:
    """Tasks of `training.tasks.load_tasks`, in passes over all of the split, each in an order of its own.

    Raises:
        DataError: as `load_tasks`, or no task has this split.
    """
    tasks = [task for task in load_tasks(sources) if task.split == split]
    if not tasks:
        raise DataError(f"no task of {', '.join(sources)} has the split {split}")

    def task(index: int) -> Task:
        number, place = divmod(index, len(tasks))
        order = list(range(len(tasks)))
        random.Random(f"pass {seed} {number}").shuffle(order)
        return tasks[order[place]]

    return task


def question_at(index: int, tasks: Number, pool: Sequence[str], subsets: Subsets, seed: int) -> Question:
    """Question `index`; always the same one."""
    rng = random.Random(f"question {seed} {index}")
    allowed = tuple(pool)
    if rng.random() >= subsets.whole:
        count = rng.randint(min(subsets.fewest, len(pool)), len(pool))
        chosen = rng.sample(list(pool), count)
        allowed = tuple(name for name in pool if name in chosen)
    return Question(tasks(index), allowed)
