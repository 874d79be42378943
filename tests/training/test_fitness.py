"""What candidates are worth, and that a race changes nothing but the bill."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actors.errors import ConfigError
from orchestrator.head import pick
from training.fitness import Worth, entropy, race
from training.rollout import Draw, Episode, Rollouts, decided, draw, gathered, looked_up, merged


def rollouts(reward: list[list[float]], chosen: list[list[int]], turns: float = 1.0, usd: float = 0.5) -> Rollouts:
    scores = np.array(reward)
    known = np.isfinite(scores)
    counts = (np.array(chosen)[..., None] == np.arange(3)) & known[..., None]
    return Rollouts(scores, np.where(known, turns, np.nan), np.where(known, usd, np.nan), counts.astype(np.int64), {})


def test_every_term_of_the_fitness() -> None:
    played = rollouts([[1.0, 0.0, math.nan, 1.0]], [[0, 1, 1, 0]], turns=3, usd=0.5)
    assert Worth(turns=0).fitness(played, 5)[0] == pytest.approx(2 / 3)
    assert Worth().fitness(played, 5)[0] == pytest.approx(2 / 3 - 0.1 * (2 / 5) / 4)
    assert Worth(turns=0, usd=0.2).fitness(played, 5)[0] == pytest.approx(2 / 3 - 0.1)
    nats = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert Worth(turns=0, diversity=0.15).fitness(played, 5)[0] == pytest.approx(2 / 3 + 0.15 * nats)
    assert entropy(np.array([[5, 5], [7, 0], [0, 0]])) == pytest.approx([math.log(2), 0, 0])
    assert math.isnan(Worth().fitness(rollouts([[math.nan]], [[0]]), 1)[0])
    for wrong in ({"diversity": -1.0}, {"usd": math.nan}, {"turns": math.inf}):
        with pytest.raises(ConfigError, match="in the fitness is"):
            Worth(**wrong)


@given(st.integers(0, 10_000), st.booleans())
def test_decisions_are_those_of_the_served_head(seed: int, sampled: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(4, 6, 3)) * 3
    allowed = rng.random((6, 3)) < 0.7
    allowed[:, 0] |= ~allowed.any(1)
    draws = rng.random(6) if sampled else None
    chosen = decided(logits, draws, allowed)
    for row in range(4):
        for task in range(6):
            weights = np.where(allowed[task], np.exp(logits[row, task]), 0.0)
            share = (weights / weights.sum()).tolist()
            assert chosen[row, task] == pick(share, None if draws is None else float(draws[task]))


def test_equal_candidates_get_equal_results() -> None:
    """Common random numbers: what is drawn belongs to the task, not to the candidate."""
    drawn = draw(1, 5, tasks=40, size=16, samples=3, turns=2)
    logits = np.tile(np.random.default_rng(0).normal(size=(1, 16, 3)), (5, 1, 1))
    chosen = decided(logits, drawn.uniforms[:, 0, 0])
    assert (chosen == chosen[0]).all()
    assert len(set(chosen[0].tolist())) > 1


@given(st.integers(1, 50), st.integers(1, 30), st.integers(0, 8))
def test_tasks_come_in_whole_passes(tasks: int, size: int, generation: int) -> None:
    size = min(size, tasks)
    draws = [draw(3, one, tasks=tasks, size=size, samples=4, turns=1) for one in range(generation + 1)]
    seen = np.concatenate([one.tasks for one in draws])
    assert (np.bincount(seen[: len(seen) // tasks * tasks], minlength=tasks) == len(seen) // tasks).all()
    again = draw(3, generation, tasks=tasks, size=size, samples=4, turns=1)
    assert np.array_equal(again.tasks, draws[-1].tasks)
    assert np.array_equal(again.uniforms, draws[-1].uniforms)
    assert ((again.samples >= 0) & (again.samples < 4)).all()


def raced(value: NDArray[np.float64], stages: tuple[int, ...], parents: int, worth: Worth | None = None):  # type: ignore[no-untyped-def]
    """A race over known values `[K, M]`; every candidate has one worker."""

    def play(which: NDArray[np.int64], part: Draw) -> Rollouts:
        scores = value[np.ix_(which, part.tasks)]
        known = np.isfinite(scores)
        counts = np.zeros((*scores.shape, len(value)), dtype=np.int64)
        counts[np.arange(len(which)), :, which] = known
        return Rollouts(scores, np.where(known, 1.0, np.nan), np.full(scores.shape, np.nan), counts, {})

    drawn = Draw(np.arange(value.shape[1]), np.zeros(value.shape[1], dtype=np.int64), np.zeros((value.shape[1], 1, 2)))
    return race(play, len(value), drawn, worth or Worth(), most_turns=1, parents=parents, stages=stages)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 20), st.integers(4, 60))
def test_a_race_without_noise_has_the_same_parents(seed: int, candidates: int, tasks: int) -> None:
    """Tasks differ in difficulty, candidates in a constant: without noise between them nobody good is stopped."""
    rng = np.random.default_rng(seed)
    value = rng.random((candidates, 1)) * 0.5 + rng.random((1, tasks)) * 0.5
    full = raced(value, (), candidates // 2)
    early = raced(value, (tasks // 4, tasks // 2), candidates // 2)
    assert full.saved == 0
    best = np.argsort(-full.fitness)[: candidates // 2]
    assert np.array_equal(np.argsort(-early.fitness)[: candidates // 2], best)
    np.testing.assert_allclose(early.fitness[best], full.fitness[best])
    assert np.isfinite(early.fitness).all()
    # What was not played is what was saved.
    assert early.saved == candidates * tasks - early.rollouts.played


def test_a_race_stops_the_hopeless() -> None:
    rng = np.random.default_rng(0)
    strength = np.where(np.arange(20) < 12, 0.75, 0.15)
    value = (rng.random((20, 64)) < strength[:, None]).astype(float)
    early = raced(value, (16, 32), 10)
    assert early.saved >= 8 * 32 * 0.75
    stopped = np.isnan(early.rollouts.reward).any(1)
    assert not stopped[:12].any()
    # Their estimates stand where they belong: below every survivor among the parents, in a sensible order of size.
    full = raced(value, (), 10)
    assert early.fitness[stopped].max() < np.sort(early.fitness)[::-1][9]
    assert np.abs(early.fitness - full.fitness)[stopped].max() < 0.3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_a_race_under_noise_keeps_the_leaders(seed: int) -> None:
    """At three standard errors a true parent is hardly ever stopped, and the leader of what was played never."""
    rng = np.random.default_rng(seed)
    value = (rng.random((24, 48)) < np.linspace(0.2, 0.8, 24)[:, None]).astype(float)
    early, full = raced(value, (12, 24), 12), raced(value, (), 12)
    # Ties make "the" best a set.
    assert np.isclose(full.fitness[early.fitness.argmax()], full.fitness.max())
    wrong = np.isnan(early.rollouts.reward).any(1) & (full.fitness > np.sort(full.fitness)[::-1][11])
    assert wrong.sum() <= 1


def test_candidates_without_any_episode_are_last() -> None:
    value = np.random.default_rng(0).random((6, 8))
    value[2] = np.nan
    found = raced(value, (2, 4), 3)
    assert np.isfinite(found.fitness).all()
    assert found.fitness[2] == found.fitness.min()


def test_episodes_become_arrays() -> None:
    good = Episode("t", 0.5, 2, 0.25, ("b", "b"), ("worker", "verifier"))
    bad = Episode("t", None, 0, None, (), (), "worker a: down")
    free = Episode("t", 1.0, 1, None, ("a",), ("worker",))
    found = merged([gathered([[good], [bad]], ("a", "b")), gathered([[free], [bad]], ("a", "b"))])
    np.testing.assert_equal(found.reward, [[0.5, 1.0], [np.nan, np.nan]])
    np.testing.assert_equal(found.cost_usd, [[0.25, np.nan], [np.nan, np.nan]])
    assert found.chosen.sum(1).tolist() == [[1, 2], [0, 0]]
    assert found.excluded == {"worker a: down": 2}
    assert found.played == 2


def test_a_look_up_leaves_out_what_is_unknown() -> None:
    scores = np.array([[0.5, np.nan], [1.0, 0.25]])
    found = looked_up(np.array([[0, 0], [1, 1]]), scores, np.ones((2, 2)))
    np.testing.assert_equal(found.reward, [[0.5, 1.0], [np.nan, 0.25]])
    assert found.chosen.sum((1, 2)).tolist() == [2, 1]
