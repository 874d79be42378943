"""A small world to evolve in: tasks whose words say which worker solves them, read by the tiny backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.outcomes import Outcome, Outcomes, Task, write_outcomes

WORKERS = ("sums", "words", "maps")
SUBJECTS = {
    "sums": ("add", "double", "halve", "count"),
    "words": ("spell", "rhyme", "plural", "letter"),
    "maps": ("capital", "river", "border", "coast"),
}


def world(folder: Path, *, tasks: int = 90, seed: int = 0, usd: bool = False) -> Path:
    """An outcomes folder: each worker scores about .8 on its own subject and .3 on the others'."""
    rng = np.random.default_rng(seed)
    made, outcomes = [], []
    for number in range(tasks):
        owner = WORKERS[number % 3]
        verb = SUBJECTS[owner][int(rng.integers(4))]
        prompt = f"{verb} {rng.integers(1000)} {verb}"
        split = ("train", "train", "val")[int(rng.integers(3))]
        made.append(Task(f"t{number}", prompt, "x", owner, verb, split, "exact"))
        for worker in WORKERS:
            samples = tuple(float(rng.random() < (0.8 if worker == owner else 0.3)) for _ in range(4))
            cost = 0.01 * (1 + WORKERS.index(worker)) if usd else None
            score = sum(samples) / 4
            outcomes.append(Outcome(f"t{number}", worker, score, samples, cost_usd=cost))
    write_outcomes(folder, Outcomes(tuple(made), tuple(outcomes)))
    return folder
