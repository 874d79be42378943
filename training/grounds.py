"""Grounds: four fields of small tasks that a specialist can be better on than others, made from a seed.

Each family draws what its question is about and the one right answer; phrasings put it into words. What a question is
about also decides its split, by hash: another phrasing, seed or number of tasks never moves a problem from train to
test. Answers are short and exact, so that one specialist's answer can stand in another's question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.errors import DataError
from training.ground_families import GROUNDS, Family
from training.outcomes import Task
from training.splits import split_of

TRIES = 3_000


@dataclass(frozen=True, slots=True)
class Problem:
    """`key` says what it is about, whatever the phrasing; `extra` is what the grader needs beside the reference."""

    family: str
    key: str
    prompt: str
    answer: str
    grader: str
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def split(self) -> str:
        return split_of(self.key)

    def task(self, task_id: str, ground: str) -> Task:
        return Task(task_id, self.prompt, self.answer, ground, self.family, self.split, self.grader, self.extra)


def make_problem(ground: str, family: str, rng: random.Random) -> Problem:
    """One problem of a family, of whatever split."""
    source = GROUNDS[ground][family]
    drawn = source.draw(rng)
    prompt = rng.choice(source.phrasings).format(**drawn.about)
    key = f"{family} " + " ".join(f"{name}={value}" for name, value in drawn.about.items())
    extra = {"options": "|".join(drawn.options)} if drawn.options else {}
    return Problem(family, key, prompt, drawn.answer, source.grader, extra)


def problem_at(ground: str, index: int, *, seed: int, split: str) -> Problem:
    """Problem `index` of the endless stream that ground, seed and split name; always the same one.

    Raises:
        DataError: an unknown ground, or nothing of this split was drawn.
    """
    rng = random.Random(f"{ground} {seed} {split} {index}")
    family = rng.choice(list(_families(ground)))
    for _ in range(TRIES):
        problem = make_problem(ground, family, rng)
        if problem.split == split:
            return problem
    raise DataError(f"no problem of {ground} {family} is in the split {split}")


def ground_tasks(grounds: Sequence[str], *, count: int, seed: int, split: str | None = "test") -> list[Task]:
    """`count` tasks of each ground, its families in turn while they have more, no prompt twice. `split` None takes all
    splits as they come. Equal arguments give equal tasks.

    Raises:
        DataError: an unknown ground, or one without so many different problems.
    """
    tasks: list[Task] = []
    for ground in grounds:
        families = list(_families(ground))
        rng = random.Random(f"{ground} {seed} {split}")
        made: dict[str, Problem] = {}
        turn = 0
        while len(made) < count:
            if not families:
                raise DataError(f"{ground} has not {count} different problems in the split {split}")
            turn %= len(families)
            if found := _another(ground, families[turn], rng, split, made):
                made[found.prompt] = found
                turn += 1
            else:
                del families[turn]  # it is small, and all of it is there already
        tasks += [problem.task(f"{ground}-{seed}-{n:04d}", ground) for n, problem in enumerate(made.values())]
    return tasks


def _another(
    ground: str, family: str, rng: random.Random, split: str | None, made: Mapping[str, Problem]
) -> Problem | None:
    """A problem of this split that is not there yet; None if many draws found none."""
    for _ in range(TRIES):
        problem = make_problem(ground, family, rng)
        if split in (None, problem.split) and problem.prompt not in made:
            return problem
    return None


def _families(ground: str) -> Mapping[str, Family]:
    if ground not in GROUNDS:
        raise DataError(f"no ground {ground}; there are {', '.join(GROUNDS)}")
    return GROUNDS[ground]
