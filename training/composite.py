"""Composite tasks: problems that no single specialist solves and a right workflow over several of them does.

They are made from a seed like the grounds' tasks (`training.grounds`): what a question is about decides its split by
hash, whatever the phrasing. Each carries the plan that solves it: whose question, word for word as that ground asks
it, with `{0}` for the answer of step 0. The plan is for training a planner; nobody who answers sees it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from actors.errors import DataError
from orchestrator.placeholders import placeholders
from training.composite_families import FAMILIES, Composition
from training.grounds import TRIES, problem_at
from training.outcomes import Task
from training.splits import split_of

DOMAIN = "composite"
PLAN = "plan"
"""The extra column that holds a task's plan as JSON: a list of [ground, subtask]."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A subtask and the ground whose specialist can do it. `access`: the steps whose answers stand in the subtask."""

    ground: str
    subtask: str

    @property
    def access(self) -> tuple[int, ...]:
        return placeholders(self.subtask)


@dataclass(frozen=True, slots=True)
class CompositeProblem:
    family: str
    key: str
    prompt: str
    composition: Composition

    @property
    def split(self) -> str:
        return split_of(self.key)

    @property
    def plan(self) -> tuple[PlannedStep, ...]:
        return tuple(PlannedStep(part.ground, part.question) for part in self.composition.parts)

    def task(self, task_id: str) -> Task:
        extra = {PLAN: json.dumps([[step.ground, step.subtask] for step in self.plan])}
        if self.composition.options:
            extra["options"] = "|".join(self.composition.options)
        answer, grader = self.composition.parts[-1].answer, FAMILIES[self.family].grader
        return Task(task_id, self.prompt, answer, DOMAIN, self.family, self.split, grader, extra)


def make_composite(family: str, rng: random.Random) -> CompositeProblem:
    """One problem of a family, of whatever split."""
    source = FAMILIES[family]
    drawn = source.draw(rng)
    prompt = rng.choice(source.phrasings).format(**drawn.about)
    key = f"{family} " + " ".join(f"{name}={value}" for name, value in drawn.about.items())
    return CompositeProblem(family, key, prompt, drawn)


def composite_at(index: int, *, seed: int, split: str) -> CompositeProblem:
    """Problem `index` of the endless stream that seed and split name; always the same one.

    Raises:
        DataError: nothing of this split was drawn.
    """
    rng = random.Random(f"{DOMAIN} {seed} {split} {index}")
    family = rng.choice(list(FAMILIES))
    for _ in range(TRIES):
        problem = make_composite(family, rng)
        if problem.split == split:
            return problem
    raise DataError(f"no problem of {DOMAIN} {family} is in the split {split}")


def composite_tasks(families: Sequence[str] = (), *, count: int, seed: int, split: str | None = "test") -> list[Task]:
    """`count` tasks, the families in turn, no prompt twice. `split` None takes all splits as they come. Equal arguments
    give equal tasks.

    Raises:
        DataError: an unknown family, or not so many different problems.
    """
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise DataError(f"no composite family {unknown[0]}; there are {', '.join(FAMILIES)}")
    left = list(families or FAMILIES)
    rng = random.Random(f"{DOMAIN} {seed} {split} {' '.join(left)}")
    made: dict[str, CompositeProblem] = {}
    turn = 0
    while len(made) < count:
        if not left:
            raise DataError(f"there are not {count} different composite problems in the split {split}")
        turn %= len(left)
        for _ in range(TRIES):
            problem = make_composite(left[turn], rng)
            if split in (None, problem.split) and problem.prompt not in made:
                made[problem.prompt] = problem
                turn += 1
                break
        else:
            del left[turn]  # it is small, and all of it is there already
    return [problem.task(f"{DOMAIN}-{seed}-{number:04d}") for number, problem in enumerate(made.values())]


def task_at(index: int, *, seed: int, split: str, single: float, grounds: Sequence[str]) -> Task:
    """Task `index` of an endless mixture: a share `single` of tasks that one specialist solves, its question being
    the whole plan, the rest composite. Always the same one.

    Raises:
        DataError: an unknown ground, or nothing of this split was drawn.
    """
    rng = random.Random(f"mixture {seed} {split} {index}")
    if rng.random() >= single:
        return composite_at(index, seed=seed, split=split).task(f"{DOMAIN}-{seed}-{split}-{index}")
    ground = rng.choice(list(grounds))
    task = problem_at(ground, index, seed=seed, split=split).task(f"{ground}-{seed}-{split}-{index}", ground)
    return Task(
        task.task_id,
        task.prompt,
        task.reference,
        task.domain,
        task.dataset,
        task.split,
        task.grader,
        {**task.extra, PLAN: json.dumps([[ground, task.prompt]])},
    )


def plan_of(task: Task) -> tuple[PlannedStep, ...]:
    """The plan that a task carries.

    Raises:
        DataError: it carries none.
    """
    try:
        return tuple(PlannedStep(ground, subtask) for ground, subtask in json.loads(task.extra[PLAN]))
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"task {task.task_id} carries no plan (column {PLAN})") from error
