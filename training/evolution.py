"""Separable CMA-ES by ask and tell (Ros & Hansen 2008), as TRINITY uses it: the search over a router's numbers.

Pure numpy over the `cma` package; no Ray, no torch. Fitness is maximised. The whole state, random numbers included,
is a value: a run that is killed and loaded again continues bit-identically.
"""

from __future__ import annotations

import math
import os
import pickle
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cma
import numpy as np
from numpy.typing import NDArray

from actors.errors import ConfigError

Vector = NDArray[np.float64]
_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """`sigma` is the initial step size σ0 (0.03 in the released run, `[T-code]`). `population` λ defaults to
    `default_population(n)`. `mirrored` samples candidates in pairs θ ± σDz, which halves the noise of the mean's
    shift in directions that the pair agrees on (Brockhoff et al. 2010)."""

    sigma: float = 0.03
    population: int | None = None
    mirrored: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ConfigError(f"sigma is {self.sigma}; the initial step size must be a positive number")
        if self.population is not None and self.population < 4:
            raise ConfigError(f"population is {self.population}; at least 4 candidates are needed")
        if self.seed < 1:
            raise ConfigError(f"seed is {self.seed}; it must be at least 1")


def default_population(n: int) -> int:
    """λ = ⌈4 + 3 ln n⌉ candidates for n numbers (TRINITY §3.3)."""
    return math.ceil(4 + 3 * math.log(n))


class _Normal:
    """Standard normal draws from a generator of our own: `cma` would otherwise share numpy's global one."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(seed))

    def __call__(self, *shape: int) -> Vector:
        return self.generator.standard_normal(shape)


class Evolution:
    """The search distribution over vectors `[n]`: ask for λ candidates, tell their fitness, repeat."""

    def __init__(self, start: Vector, settings: Settings | None = None) -> None:
        """Search from `start [n]`.

        Raises:
            ConfigError: fewer than two numbers, or one that is not finite.
        """
        settings = Settings() if settings is None else settings
        start = np.asarray(start, dtype=np.float64)
        if start.ndim != 1 or start.size < 2 or not np.isfinite(start).all():
            raise ConfigError(f"evolution starts from at least two finite numbers, not shape {list(start.shape)}")
        population = settings.population or default_population(start.size)
        if settings.mirrored and population % 2:
            population += 1
        self.settings = settings
        self.population = population
        self._normal = _Normal(settings.seed)
        options = {
            "popsize": population,
            "CMA_diagonal": True,  # the separable variant, in every generation
            "CMA_mirrors": 0,  # pycma's own mirrors are selective; ours pair every candidate
            "randn": self._normal,
            "seed": settings.seed,
            "verbose": -9,
            "maxiter": math.inf,
            "tolfun": 0,
            "tolfunhist": 0,
            "tolflatfitness": math.inf,
            "tolstagnation": math.inf,
            "tolx": 0,
        }
        random_state = np.random.get_state()
        try:
            # The constructor seeds numpy's global generator; whoever uses that must not notice.
            self._es = cma.CMAEvolutionStrategy(start, settings.sigma, options)
        finally:
            np.random.set_state(random_state)
        self._asked: list[Vector] | None = None

    @property
    def generation(self) -> int:
        """Generations told so far."""
        return int(self._es.countiter)

    @property
    def mean(self) -> Vector:
        """The distribution's mean `[n]`: the vector to validate and to ship (pycma's xfavorite)."""
        return np.array(self._es.result.xfavorite)

    @property
    def sigma(self) -> float:
        """The present step size."""
        return float(self._es.sigma)

    @property
    def deviations(self) -> Vector:
        """Standard deviation of each number `[n]`, step size included."""
        return np.array(self._es.result.stds)

    def ask(self) -> Vector:
        """Candidates `[λ, n]` of the next generation. Asking again before telling gives the same ones."""
        if self._asked is None:
            if self.settings.mirrored:
                half = self._es.ask(self.population // 2)
                centre = self._es.mean
                self._asked = [x for sample in half for x in (sample, 2 * centre - sample)]
            else:
                self._asked = self._es.ask()
        return np.array(self._asked)

    def tell(self, fitness: Vector) -> None:
        """Fitness `[λ]` of the asked candidates in their order, higher is better.

        Raises:
            ValueError: nothing was asked, another number of values, or one that is not finite.
        """
        fitness = np.asarray(fitness, dtype=np.float64)
        if self._asked is None:
            raise ValueError("tell follows ask")
        if fitness.shape != (self.population,) or not np.isfinite(fitness).all():
            raise ValueError(f"{self.population} finite fitness values are needed, got {fitness}")
        self._es.tell(self._asked, (-fitness).tolist())
        self._asked = None

    def save(self, path: Path | str, extra: dict[str, Any] | None = None) -> None:
        """Write the whole state, and `extra` beside it, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "version": _VERSION,
            "settings": asdict(self.settings),
            "es": self._es,
            "asked": self._asked,
            "extra": {} if extra is None else extra,
        }
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                pickle.dump(state, file, protocol=5)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path | str) -> tuple[Evolution, dict[str, Any]]:
        """The saved search and its `extra`. The file is a pickle: load only files of your own.

        Raises:
            ConfigError: the file is missing, cut off or of another version.
        """
        try:
            with Path(path).open("rb") as file:
                state = pickle.load(file)
            version = state["version"]
        except (OSError, EOFError, pickle.UnpicklingError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"cannot resume from {path}: {error}") from error
        if version != _VERSION:
            raise ConfigError(f"cannot resume from {path}: it is version {version}, this program reads {_VERSION}")
        self = cls.__new__(cls)
        self.settings = Settings(**state["settings"])
        self._es = state["es"]
        self.population = int(self._es.popsize)
        self._normal = self._es.opts["randn"]
        self._asked = state["asked"]
        return self, state["extra"]
