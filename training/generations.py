"""The course of an evolution: ask, play, tell, validate, keep; resumable at every generation. No Ray, no model.

What a generation is played on follows from its number and the seed, so that its place in the data is that number; with
the search's own state (random state included) on disk, a run that is killed and resumed ends bit-identically.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.errors import ConfigError, DataError, FuguError
from training.evolution import Evolution, Settings
from training.fitness import Worth, entropy, race
from training.policy import rounded
from training.rollout import Draw, Rollouts, draw

Vector = NDArray[np.float64]
# So many excluded episodes say nothing about a run, however large their share is.
FEW_EXCLUDED = 3


class BudgetReachedError(FuguError):
    """The player may make no more calls; what it was playing is not finished."""

    code = "budget_reached"


@dataclass(frozen=True)
class Spent:
    """What playing has cost so far: upstream calls made, and their USD."""

    calls: int = 0
    usd: float = 0.0


class Player(Protocol):
    """Who plays candidates on tasks."""

    @property
    def tasks(self) -> int:
        """How many training tasks there are."""

    @property
    def workers(self) -> tuple[str, ...]: ...

    def play(self, thetas: Vector, drawn: Draw) -> Rollouts:
        """θs `[K, n]` on the drawn training tasks."""

    def validate(self, theta: Vector) -> Rollouts:
        """One θ `[n]` on the fixed validation tasks: rollouts `[1, V]`."""

    def spent(self) -> Spent: ...


@dataclass(frozen=True)
class Course:
    """How a search goes. `size` is the number of tasks per candidate and generation (m = 16 in TRINITY §A), `samples`
    how many different samples of a task there are to draw, `turns` the most turns of a session. `stages` are the
    numbers of tasks after which hopeless candidates stop (none: all are played out). Every `validate_every`
    generations, and after the last, the mean is validated. A generation with more than `max_excluded` of its
    episodes excluded ends the run."""

    search: Settings = field(default_factory=Settings)
    generations: int = 60
    size: int = 16
    samples: int = 1
    turns: int = 1
    worth: Worth = field(default_factory=Worth)
    stages: tuple[int, ...] = ()
    validate_every: int = 5
    max_excluded: float = 0.2

    def __post_init__(self) -> None:
        for name in ("generations", "size", "samples", "turns", "validate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.max_excluded < 1:
            raise ConfigError(f"max_excluded is {self.max_excluded}; it must be a share from 0 up to below 1")


@dataclass(frozen=True, eq=False)
class Found:
    """The end of a search: the best validated θ, rounded as a checkpoint holds it, and how it was found.
    `best_generation` 0 is the start: nothing better was found. `history` has a row per generation; what of it is not
    repeatable (times) stands under keys that end in `_s`."""

    theta: Vector
    best_generation: int
    best_value: float
    start_value: float
    history: tuple[Mapping[str, Any], ...]
    stopped: str = ""

    @property
    def improved(self) -> bool:
        return self.best_generation > 0


@dataclass
class _State:
    """What is kept beside the search itself."""

    identity: dict[str, Any]
    theta: Vector
    start_value: float
    best_value: float
    best_generation: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def evolve(
    player: Player,
    start: Vector,
    course: Course,
    path: Path,
    *,
    identity: Mapping[str, Any],
    resume: bool = False,
    watch: Callable[[Mapping[str, Any]], None] = lambda _row: None,
) -> Found:
    """Search from `start [n]`; the state is in the file `path` after every generation.

    `identity` says what the run is about (data, pool, settings): a state of another run is not resumed. The number of
    generations is not part of it, so that a run can be made longer.

    Raises:
        ConfigError: nothing to resume, a run of something else, or one that is not finished and shall not be resumed.
        DataError: too many episodes were excluded; says why.
    """
    if player.tasks < course.size:
        raise ConfigError(f"{course.size} tasks per generation were asked for; there are {player.tasks} to train on")
    if resume:
        search, state = _resumed(path, identity)
    else:
        _check_free(path, course.generations)
        # A start in float32 is one that a checkpoint can hold.
        start = rounded(start)
        try:
            value, _ = _validated(player, start, course)
        except BudgetReachedError as error:
            raise ConfigError(f"the budget is too small to validate even the start: {error.message}") from error
        search, state = Evolution(start, course.search), _State(dict(identity), start, value, value)
        search.save(path, {"state": state})
    stopped = ""
    for row in state.history:
        watch(row)
    while search.generation < course.generations:
        try:
            row = _generation(player, search, state, course)
        except BudgetReachedError as error:
            stopped = error.message
            break
        state.history.append(row)
        search.save(path, {"state": state})
        watch(row)
    return Found(
        state.theta,
        state.best_generation,
        state.best_value,
        state.start_value,
        tuple(state.history),
        stopped,
    )


def _generation(player: Player, search: Evolution, state: _State, course: Course) -> dict[str, Any]:
    began = time.perf_counter()
    number = search.generation
    thetas = search.ask()
    optimiser = time.perf_counter() - began
    drawn = draw(
        course.search.seed, number, tasks=player.tasks, size=course.size, samples=course.samples, turns=course.turns
    )
    raced = race(
        lambda which, part: player.play(thetas[which], part),
        len(thetas),
        drawn,
        course.worth,
        most_turns=course.turns,
        parents=len(thetas) // 2,
        stages=course.stages,
    )
    _check_excluded(raced.rollouts, course, f"generation {number + 1}")
    told = time.perf_counter()
    search.tell(raced.fitness)
    optimiser += time.perf_counter() - told
    validation = reward = None
    if search.generation % course.validate_every == 0 or search.generation == course.generations:
        theta = rounded(search.mean)
        validation, reward = _validated(player, theta, course)
        if validation > state.best_value:
            state.theta, state.best_value, state.best_generation = theta, validation, search.generation
    counts = raced.rollouts.chosen.sum((0, 1))
    rewards = raced.rollouts.reward[np.isfinite(raced.rollouts.reward)]
    turns = raced.rollouts.turns[np.isfinite(raced.rollouts.turns)]
    spent = player.spent()
    return {
        "generation": search.generation,
        "fitness_best": float(raced.fitness.max()),
        "fitness_mean": float(raced.fitness.mean()),
        "fitness_worst": float(raced.fitness.min()),
        "reward": float(rewards.mean()),
        "turns": float(turns.mean()),
        "entropy": float(entropy(counts[None])[0]),
        "shares": dict(zip(player.workers, (counts / max(1, counts.sum())).tolist(), strict=True)),
        "sigma": search.sigma,
        "deviation": float(search.deviations.mean()),
        "validation": validation,
        "validation_reward": reward,
        "rollouts": raced.rollouts.played,
        "saved": raced.saved,
        "excluded": sum(raced.rollouts.excluded.values()),
        "naive_calls": int(counts.sum()),
        "calls": spent.calls,
        "usd": spent.usd,
        "seconds_s": time.perf_counter() - began,
        "optimiser_s": optimiser,
    }


def _validated(player: Player, theta: Vector, course: Course) -> tuple[float, float]:
    """Value (reward less turn and cost terms; diversity is a means, not an end) and reward on the validation tasks."""
    rollouts = player.validate(theta)
    _check_excluded(rollouts, course, "the validation")
    values = course.worth.episodes(rollouts, course.turns)
    return float(np.nanmean(values)), float(np.nanmean(rollouts.reward))


def _check_excluded(rollouts: Rollouts, course: Course, where: str) -> None:
    lost, played = sum(rollouts.excluded.values()), rollouts.played
    if played and (lost <= FEW_EXCLUDED or lost <= course.max_excluded * (lost + played)):
        return
    if not lost:
        raise DataError(f"{where}: there are no episodes")
    reasons = sorted(rollouts.excluded.items(), key=lambda item: -item[1])
    told = "; ".join(f"{count} times: {reason}" for reason, count in reasons[:3])
    raise DataError(f"{where}: {lost} of {lost + played} episodes have no reward: {told}")


def _loaded(path: Path) -> tuple[Evolution, _State]:
    search, extra = Evolution.load(path)
    state = extra.get("state")
    if not isinstance(state, _State):
        raise ConfigError(f"cannot resume from {path}: it is not the state of an evolution run")
    return search, state


def _check_free(path: Path, generations: int) -> None:
    """A run that is not finished is not overwritten: it may have cost money."""
    if path.exists() and (done := _loaded(path)[0].generation) < generations:
        raise ConfigError(
            f"{path} holds a run that is not finished ({done} generations); go on with it with --resume, or remove it"
        )


def _resumed(path: Path, identity: Mapping[str, Any]) -> tuple[Evolution, _State]:
    search, state = _loaded(path)
    differ = [key for key in {**state.identity, **identity} if state.identity.get(key) != identity.get(key)]
    if differ:
        told = "; ".join(f"{key} was {state.identity.get(key)!r}, is {identity.get(key)!r}" for key in differ)
        raise ConfigError(f"cannot resume from {path}: it is another run ({told})")
    return search, state
