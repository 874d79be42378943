"""Recorded outcomes as the numbers that an evaluation compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actors.errors import ConfigError, DataError
from training.baselines import Matrix
from training.outcomes import Outcome, Outcomes, read_outcomes


@dataclass(frozen=True, eq=False)
class Measured:
    """The measured tasks (and the training tasks where there are some) with the workers' scores and costs `[N, L]`."""

    workers: tuple[str, ...]
    test: Outcomes
    scores: Matrix
    costs: Matrix
    by_pair: Mapping[tuple[str, str], Outcome]
    train: Outcomes | None
    train_scores: Matrix | None


def measured(folder: Path, workers: Sequence[str], split: str, train_split: str) -> Measured:
    """Read a folder for measuring on `split`. No workers: all that it names. Tasks without any outcome of them are left
    out; `train` is None where the folder has no outcomes of them all on `train_split`, or the splits are the same.

    Raises:
        DataError: outcomes that cannot be used, an unknown split, or a worker without outcomes.
        ConfigError: a worker named twice.
    """
    found = read_outcomes(folder)
    have = found.workers
    workers = tuple(workers) or have
    where = Path(folder) / "outcomes.parquet"
    if len(set(workers)) != len(workers):
        raise ConfigError("a worker is named twice")
    if missing := [name for name in workers if name not in have]:
        raise DataError(f"{where} has no outcome of {', '.join(missing)}; there are {', '.join(have)}")
    test = found.split(split)
    if silent := [name for name in workers if name not in test.workers]:
        raise DataError(f"{where} has no outcome of {', '.join(silent)} on the split {split}")
    scores = test.scores(workers)
    told = np.isfinite(scores).any(axis=1)
    tasks = tuple(test.tasks[row] for row in np.flatnonzero(told))
    ids = {task.task_id for task in tasks}
    test = Outcomes(tasks, tuple(outcome for outcome in test.outcomes if outcome.task_id in ids))
    by_pair = {(outcome.task_id, outcome.worker): outcome for outcome in test.outcomes}
    costs = np.full((len(tasks), len(workers)), np.nan)
    for place, task in enumerate(tasks):
        for column, name in enumerate(workers):
            outcome = by_pair.get((task.task_id, name))
            if outcome is not None and outcome.cost_usd is not None:
                costs[place, column] = outcome.cost_usd
    train = None
    if train_split != split and any(task.split == train_split for task in found.tasks):
        train = found.split(train_split)
    train_scores = None
    if train is not None and set(workers) <= set(train.workers):
        train_scores = train.scores(workers)
        rows = np.flatnonzero(np.isfinite(train_scores).any(axis=1))
        train, train_scores = Outcomes(tuple(train.tasks[row] for row in rows), ()), train_scores[rows]
    return Measured(workers, test, scores[told], costs, by_pair, train, train_scores)
