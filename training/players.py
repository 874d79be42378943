"""Playing candidates on recorded outcomes: every rollout is a look-up, a whole population is one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actors.errors import DataError
from training.generations import Spent
from training.outcomes import Outcomes
from training.policy import Policy
from training.rollout import Choose, Draw, Rollouts, decided, looked_up

Vector = NDArray[np.float64]
# Validation draws come from a stream that no generation uses.
_VALIDATION = 3


@dataclass(frozen=True, eq=False)
class Table:
    """Results that are known: `scores` and `costs` `[N, L]`, NaN where a worker has none."""

    scores: Vector
    costs: Vector

    def part(self, rows: NDArray[np.int64]) -> Table:
        return Table(self.scores[rows], self.costs[rows])


def known_results(found: Outcomes, workers: Sequence[str], *, usd: bool, where: str) -> tuple[Outcomes, Table]:
    """The tasks that at least one of the workers has a score for, with their scores and costs in USD.

    Raises:
        DataError: a worker has no outcome, no task has any, or (with `usd`) a cost is not recorded.
    """
    scores = found.scores(workers)
    labelled = np.isfinite(scores).max(axis=1).astype(bool)
    if not labelled.any():
        raise DataError(f"{where}: no task has an outcome of {', '.join(workers)}")
    tasks = tuple(task for task, has in zip(found.tasks, list(labelled), strict=True) if has)
    kept = {task.task_id: row for row, task in enumerate(tasks)}
    column = {name: index for index, name in enumerate(workers)}
    costs = np.full((len(kept), len(workers)), np.nan)
    for outcome in found.outcomes:
        if outcome.worker in column and outcome.task_id in kept:
            if outcome.cost_usd is None and usd:
                raise DataError(
                    f"{where}: worker {outcome.worker} has no cost for task {outcome.task_id}; a fitness that counts "
                    "USD needs one"
                )
            if outcome.cost_usd is not None:
                costs[kept[outcome.task_id], column[outcome.worker]] = outcome.cost_usd
    outcomes = tuple(outcome for outcome in found.outcomes if outcome.task_id in kept)
    return Outcomes(tasks, outcomes), Table(scores[labelled], costs)


class RecordedPlayer:
    """Candidates on recorded tasks. A worker without a score for a task is masked there, as in SFT: nothing is said
    about it."""

    def __init__(
        self,
        policy: Policy,
        train: tuple[Tensor, Table],
        validation: tuple[Tensor, Table],
        *,
        choose: Choose = "argmax",
        seed: int = 42,
        unseen: Tensor | None = None,
    ) -> None:
        """`unseen [N, rows]` are logits to put in place of the start's on the training tasks (`training.fit`), for a
        policy that moves along axes: candidates would else be told how well a start that was fitted on these very tasks
        remembers them. Validation on the training tasks themselves (the same `train`) is done likewise."""
        self._policy = policy
        self._features, self._table = policy.features(train[0]), train[1]
        if unseen is not None:
            self._features[:, : unseen.shape[1]] = unseen.double().numpy()
        self._held = self._features if validation is train else policy.features(validation[0])
        self._held_table = validation[1]
        self._sampled = choose == "sample"
        self._draws = np.random.default_rng([seed, _VALIDATION]).random(len(self._held))

    @property
    def tasks(self) -> int:
        return len(self._features)

    @property
    def workers(self) -> tuple[str, ...]:
        return self._policy.workers

    def play(self, thetas: Vector, drawn: Draw) -> Rollouts:
        table, draws = self._table.part(drawn.tasks), self._sampled_draws(drawn)
        return self._played(thetas, self._features[drawn.tasks], table, draws)

    def validate(self, theta: Vector) -> Rollouts:
        return self._played(theta[None], self._held, self._held_table, self._draws if self._sampled else None)

    def spent(self) -> Spent:
        return Spent()

    def _sampled_draws(self, drawn: Draw) -> Vector | None:
        return drawn.uniforms[:, 0, 0] if self._sampled else None

    def _played(self, thetas: Vector, features: Vector, table: Table, draws: Vector | None) -> Rollouts:
        logits = self._policy.logits(thetas, features)
        return looked_up(decided(logits, draws, np.isfinite(table.scores)), table.scores, table.costs)
