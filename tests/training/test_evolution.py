"""The search itself: it finds optima, matches other implementations, and resumes bit-identically."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cmaes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import ConfigError
from training.evolution import Evolution, Settings, Vector, default_population

N = 12


def sphere(x: Vector) -> Vector:
    return np.asarray((x**2).sum(-1))


def ellipsoid(x: Vector) -> Vector:
    return np.asarray((10 ** np.linspace(0, 4, x.shape[-1]) * x**2).sum(-1))


def rastrigin_like(x: Vector) -> Vector:
    """Separable, with ripples too small to trap a population."""
    return np.asarray((x**2 + 0.05 * (1 - np.cos(4 * np.pi * x))).sum(-1))


def minimise(function: Callable[[Vector], Vector], generations: int, *, mirrored: bool = False) -> Evolution:
    search = Evolution(np.full(N, 2.0), Settings(sigma=0.5, seed=7, mirrored=mirrored))
    for _ in range(generations):
        search.tell(-function(search.ask()))
    return search


@pytest.mark.parametrize("function", [sphere, ellipsoid, rastrigin_like])
def test_same_optimum_as_other_implementations(function: Callable[[Vector], Vector]) -> None:
    ours = function(minimise(function, 400).mean)
    other = cmaes.SepCMA(mean=np.full(N, 2.0), sigma=0.5, seed=7)
    for _ in range(400):
        points = [other.ask() for _ in range(other.population_size)]
        other.tell([(point, float(function(point))) for point in points])
    theirs = function(other.mean)
    assert ours < 1e-8
    assert theirs < 1e-8


def test_scales_adapt_per_coordinate() -> None:
    """On the ellipsoid the stiffest coordinate must end with a far smaller step than the flattest (√10⁴ = 100)."""
    deviations = minimise(ellipsoid, 150).deviations
    assert deviations[0] / deviations[-1] > 30


def test_mirrored_candidates_come_in_pairs() -> None:
    search = Evolution(np.arange(5.0), Settings(mirrored=True, population=7))
    candidates = search.ask()
    assert candidates.shape == (8, 5)
    np.testing.assert_allclose(candidates[0::2] + candidates[1::2], 2 * np.tile(np.arange(5.0), (4, 1)), atol=1e-12)
    assert sphere(minimise(sphere, 300, mirrored=True).mean) < 1e-8


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 12), st.booleans(), st.booleans())
def test_resume_is_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, at: int, mirrored: bool, asked: bool
) -> None:
    path = tmp_path_factory.mktemp("evolution") / "state.pkl"
    straight = minimise(sphere, 13, mirrored=mirrored)
    search = Evolution(np.full(N, 2.0), Settings(sigma=0.5, seed=7, mirrored=mirrored))
    for generation in range(13):
        if asked:
            search.ask()
        if generation == at:
            search.save(path, {"generation": generation})
            search, extra = Evolution.load(path)
            assert extra == {"generation": at}
            assert search.generation == generation
        search.tell(-sphere(search.ask()))
    assert np.array_equal(search.mean, straight.mean)
    assert search.sigma == straight.sigma
    assert np.array_equal(search.ask(), straight.ask())


def test_numpys_global_random_state_is_left_alone() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    minimise(sphere, 3)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_population_of_the_paper() -> None:
    assert default_population(10_240) == 32
    assert default_population(19_456) == 34
    assert Evolution(np.zeros(10_240)).population == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Settings(sigma=0), "step size"),
        (lambda: Settings(sigma=float("nan")), "step size"),
        (lambda: Settings(population=3), "at least 4"),
        (lambda: Settings(seed=0), "seed is 0"),
        (lambda: Evolution(np.array([1.0, np.nan])), "finite numbers"),
        (lambda: Evolution(np.zeros(1)), "at least two"),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_bad_fitness_is_refused() -> None:
    search = Evolution(np.zeros(4))
    with pytest.raises(ValueError, match="tell follows ask"):
        search.tell(np.zeros(search.population))
    search.ask()
    with pytest.raises(ValueError, match="finite fitness"):
        search.tell(np.full(search.population, np.nan))


def test_broken_state_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.pkl"
    with pytest.raises(ConfigError, match="cannot resume"):
        Evolution.load(path)
    Evolution(np.zeros(4)).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="cannot resume"):
        Evolution.load(path)
    assert list(tmp_path.iterdir()) == [path]
