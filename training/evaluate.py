"""Comparing ways of choosing a worker on recorded outcomes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: NDArray[np.float64], rng: np.random.Generator, *, resamples: int = 2000) -> Estimate:
    """Mean of one number per task `[N]`, with a 95% percentile interval from resampling whole tasks (Efron 1979)."""
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("bootstrap needs at least one number, all of them finite")
    draws = rng.integers(0, len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))
