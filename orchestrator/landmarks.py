"""What a head multiplies where a hidden state itself will not do: how near the state is to each of some landmarks.

    φ_j(z) = exp(−2γ · (1 − cos(B z, C_j)))

the Gaussian kernel of directions. B projects standardised hidden states onto whitened principal directions, C_j are
places of training tasks there. A linear map of φ is a kernel machine on fixed landmarks (Poggio & Girosi 1990): it can
say more than a linear map of z, and far from every training task all φ are nearly 0, so that the prior over workers
decides there. A linear map of z says just as much there as elsewhere, and it means nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Directions at least as near as this are taken to be of one kind: in the tens of dimensions that landmarks have, chance
# hardly ever brings two so near.
_NEAR_COSINE = 0.5


@dataclass(frozen=True, eq=False)
class Landmarks:
    """`basis [k, d]`, `centres [m, k]` of length 1, `gamma [1]` (positive): statistics of the training tasks; nothing
    here is trained."""

    basis: Tensor
    centres: Tensor
    gamma: Tensor

    @property
    def near(self) -> float:
        """The nearness that a landmark has at `_NEAR_COSINE`, whatever gamma is."""
        return math.exp(2 * float(self.gamma) * (_NEAR_COSINE - 1))

    @property
    def count(self) -> int:
        """How many landmarks there are, m."""
        return len(self.centres)

    def features(self, standardised: Tensor) -> Tensor:
        """Standardised hidden states `[B, d]` → how near each landmark is `[B, m]`, from 0 to 1, on their device."""
        device = standardised.device
        places = normalize(standardised @ self.basis.to(device).T)
        return self.nearness(places)

    def nearness(self, places: Tensor) -> Tensor:
        """Places `[B, k]` of length 1 → how near each landmark is `[B, m]`."""
        cosines = places @ self.centres.to(places.device).T
        return torch.exp(2 * self.gamma.to(places.device) * (cosines - 1).clamp(max=0))

    def fault(self, width: int) -> str | None:
        """Why this cannot feed weights of `width` columns; None if it can."""
        if self.basis.ndim != 2 or not self.basis.numel():
            return f"landmarks.basis has shape {list(self.basis.shape)}, not [k, d]"
        if self.centres.shape != (width, len(self.basis)):
            return f"landmarks.centres has shape {list(self.centres.shape)}, not [{width}, {len(self.basis)}]"
        if self.gamma.shape != (1,) or not float(self.gamma) > 0:
            return "landmarks.gamma is not one positive number"
        return None
