"""What a candidate is worth, and the race that stops hopeless ones early. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.errors import ConfigError
from training.rollout import Draw, Rollouts, merged

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Worth:
    """fitness = mean terminal reward + `diversity` · entropy of worker selection (nats, over the candidate's turns)
    − `turns` · ((turns − 1) / most turns) / 4 − `usd` · USD per task.

    The defaults are the paper's fitness (mean terminal reward, TRINITY §3.3) with the turn term of the authors' code,
    0.1, which is zero for single turns. Their code also adds 0.15 · entropy: with few tasks per candidate that is
    more than routing itself can gain, so that it is off unless asked for.
    """

    diversity: float = 0.0
    turns: float = 0.1
    usd: float = 0.0

    def __post_init__(self) -> None:
        for name in ("diversity", "turns", "usd"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"the weight of {name} in the fitness is {value}; it must be a number from 0 on")

    def episodes(self, rollouts: Rollouts, most_turns: int) -> Vector:
        """The part of the fitness that is a mean over episodes, `[K, M]`; NaN where there is none."""
        value = rollouts.reward - self.turns * (rollouts.turns - 1) / most_turns / 4
        return value - self.usd * rollouts.cost_usd if self.usd else value

    def fitness(self, rollouts: Rollouts, most_turns: int) -> Vector:
        """Fitness `[K]`; NaN for a candidate without any episode."""
        return _mean(self.episodes(rollouts, most_turns)) + self.diversity * entropy(rollouts.chosen.sum(1))


def entropy(counts: NDArray[np.int64]) -> Vector:
    """Entropy in nats of each row of counts `[K, L]`; 0 for a row without any."""
    total = counts.sum(-1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    return np.asarray(-(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1))


@dataclass(frozen=True, eq=False)
class Raced:
    """Fitness `[K]`, all finite; what was played (NaN where it was stopped); how many rollouts were not needed."""

    fitness: Vector
    rollouts: Rollouts
    saved: int


Play = Callable[[NDArray[np.int64], Draw], Rollouts]


def race(
    play: Play,
    candidates: int,
    drawn: Draw,
    worth: Worth,
    *,
    most_turns: int,
    parents: int,
    stages: Sequence[int] = (),
    confidence: float = 3.0,
) -> Raced:
    """Play a generation; `play(which candidates, draw)` → rollouts `[len(which), m]`.

    After each of `stages` (numbers of tasks) a candidate is stopped that will not be among the best `parents`: the
    upper bound of its paired difference to the one in that place is below zero. Both were played on the same tasks
    with the same draws, so what they share cancels. The bound is mean + `confidence` standard errors, with one
    more deviation of a whole reward in the variance (a few equal differences are no certainty), corrected for the part
    of the generation's tasks that is already known (Cochran 1977, §2.6): where nothing is left, nothing is in doubt.
    Only the best `parents` make the next mean, and whoever leads there is never stopped.

    A stopped candidate gets its estimate (the fitness of that place plus the paired difference), and never more than
    that place, so that the parents are those of the whole generation.
    """
    size = len(drawn.tasks)
    parents = max(1, min(parents, candidates))
    alive = np.arange(candidates)
    gone: dict[int, int] = {}
    parts: list[Rollouts] = []
    begin = 0
    for end in [*(stage for stage in sorted(set(stages)) if 0 < stage < size), size]:
        parts.append(_spread(play(alive, drawn.part(begin, end)), alive, candidates))
        begin = end
        if end == size or len(alive) <= parents:
            continue
        value, bonus = _so_far(parts, worth, most_turns)
        place = _place(value, bonus, alive, parents)
        if place is None:
            continue
        stopped = [
            int(one)
            for one in alive
            if one != place and _bound(value[one] - value[place], size, confidence) + bonus[one] - bonus[place] < 0
        ]
        gone.update(dict.fromkeys(stopped, end))
        alive = np.array([one for one in alive if one not in gone], dtype=np.int64)
    value, bonus = _so_far(parts, worth, most_turns)
    fitness = _mean(value) + bonus
    place = _place(value, bonus, alive, parents)
    if gone and place is not None:
        ceiling = float(np.nextafter(fitness[place], -np.inf))
        for one in gone:
            difference = (value[one] - value[place])[np.isfinite(value[one] - value[place])]
            estimate = fitness[place] + difference.mean() + bonus[one] - bonus[place] if difference.size else ceiling
            fitness[one] = min(float(estimate), ceiling)
    lost = ~np.isfinite(fitness)
    if lost.any():
        # Every episode of such a candidate was excluded: nothing speaks for it.
        fitness[lost] = fitness[~lost].min() if (~lost).any() else 0.0
    return Raced(fitness, _joined(parts), sum(size - end for end in gone.values()))


def _so_far(parts: Sequence[Rollouts], worth: Worth, most_turns: int) -> tuple[Vector, Vector]:
    rollouts = _joined(parts)
    return worth.episodes(rollouts, most_turns), worth.diversity * entropy(rollouts.chosen.sum(1))


def _place(value: Vector, bonus: Vector, alive: NDArray[np.int64], parents: int) -> int | None:
    """The candidate that is the last of the best `parents` now; None where too few have any episode."""
    fitness = (_mean(value) + bonus)[alive]
    known = alive[np.isfinite(fitness)]
    if len(known) < parents:
        return None
    order = known[np.argsort(-(_mean(value) + bonus)[known], kind="stable")]
    return int(order[parents - 1])


def _bound(differences: Vector, size: int, confidence: float) -> float:
    """Upper bound of the mean of all `size` paired differences, from those that are known (NaN: not known)."""
    known = differences[np.isfinite(differences)]
    count = len(known)
    if count == 0:
        return math.inf
    variance = (float(((known - known.mean()) ** 2).sum()) + 1.0) / count
    return float(known.mean()) + confidence * math.sqrt(variance / count * max(0.0, 1 - count / size))


def _mean(values: Vector) -> Vector:
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(-1)
    return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)


def _spread(part: Rollouts, alive: NDArray[np.int64], candidates: int) -> Rollouts:
    """The rows of those that are left, in their places among all."""
    if len(alive) == candidates:
        return part
    tasks = part.reward.shape[1]
    arrays = []
    for values in (part.reward, part.turns, part.cost_usd):
        whole = np.full((candidates, tasks), np.nan)
        whole[alive] = values
        arrays.append(whole)
    chosen = np.zeros((candidates, *part.chosen.shape[1:]), dtype=np.int64)
    chosen[alive] = part.chosen
    return Rollouts(arrays[0], arrays[1], arrays[2], chosen, part.excluded)


def _joined(parts: Sequence[Rollouts]) -> Rollouts:
    return parts[0] if len(parts) == 1 else merged(parts)
