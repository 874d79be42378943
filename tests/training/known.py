"""Outcomes where it is known who should answer: three kinds of tasks, each mastered by one of three workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.outcomes import Outcome, Outcomes, Task, write_outcomes

WORDS = {"sums": "add the numbers", "letters": "spell the word", "logic": "is it true that"}
MASTER = {"sums": "a", "letters": "b", "logic": "c"}
COST = {"a": 0.010, "b": 0.002, "c": 0.001}
MASTERY = 0.9
# Elsewhere; a is the best single worker.
OTHERWISE = {"a": 0.4, "b": 0.3, "c": 0.3}


def known_outcomes(count: int = 180, *, samples: int = 4, test_only: bool = False) -> Outcomes:
    """Two thirds `train`, the rest `test`; answers and costs are recorded."""
    rng = np.random.default_rng(0)
    tasks, outcomes = [], []
    for index in range(count):
        kind = list(WORDS)[index % 3]
        split = "train" if index < 2 * count / 3 else "test"
        prompt = f"{WORDS[kind]} {rng.integers(10**6)}"
        task = Task(f"t{index}", prompt, "right", f"domain of {kind}", kind, split, "exact")
        for worker, cost in COST.items():
            chance = MASTERY if MASTER[kind] == worker else OTHERWISE[worker]
            drawn = tuple(float(right) for right in rng.random(samples) < chance)
            answers = tuple("right" if right else str(rng.integers(1000)) for right in drawn)
            outcomes.append(Outcome(task.task_id, worker, float(np.mean(drawn)), drawn, answers=answers, cost_usd=cost))
        tasks.append(task)
    if test_only:
        tasks = [task for task in tasks if task.split == "test"]
        ids = {task.task_id for task in tasks}
        outcomes = [outcome for outcome in outcomes if outcome.task_id in ids]
    return Outcomes(tuple(tasks), tuple(outcomes))


def known_folder(folder: Path, *, test_only: bool = False) -> Path:
    write_outcomes(folder, known_outcomes(test_only=test_only))
    return folder
