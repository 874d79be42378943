"""Landmarks (`orchestrator.landmarks`) from training tasks, and what makes a decay of weights on them mean what it
should."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from orchestrator.landmarks import Landmarks

DIRECTIONS = 32
# Whitening makes all directions count alike; of few tasks only the first ones are more than noise.
_TASKS_PER_DIRECTION = 20
_ROUNDS = 5
# Landmarks may lie on one another; this is far below what a decay changes.
_JITTER = 1e-4


def place_landmarks(standardised: Tensor, *, count: int, gamma: float, seed: int) -> Landmarks:
    """At most `count` landmarks among the training tasks' standardised hidden states `[N, d]`: centres of their places
    by k-means, or all of them where there are no more than `count`. Few tasks get fewer directions."""
    tasks = len(standardised)
    directions = max(1, min(DIRECTIONS, tasks // _TASKS_PER_DIRECTION, standardised.shape[1]))
    basis = principal(standardised, directions)
    places = normalize(standardised @ basis.T)
    centres = places if tasks <= count else normalize(k_means(places, count, seed=seed, rounds=_ROUNDS))
    return Landmarks(basis, centres, torch.tensor([gamma]))


def landmark_domains(landmarks: Landmarks, standardised: Tensor, domains: Sequence[str]) -> tuple[str, ...]:
    """For each landmark the domain of the training task that is nearest to it; `domains` are those of the tasks, whose
    standardised hidden states are `[N, d]`."""
    places = normalize(standardised @ landmarks.basis.T)
    return tuple(domains[at] for at in (landmarks.centres @ places.T).argmax(1).tolist())


def principal(standardised: Tensor, directions: int) -> Tensor:
    """The principal directions `[k, d]` of hidden states `[N, d]`, scaled so that what they give has variance 1; those
    in which nothing varies are left out."""
    values = standardised.double()
    if values.shape[0] < values.shape[1]:
        sizes, left = torch.linalg.eigh(values @ values.T / len(values))
        axes = (values.T @ left) / (sizes.clamp(min=1e-300) * len(values)).sqrt()
    else:
        sizes, axes = torch.linalg.eigh(values.T @ values / len(values))
    kept = torch.arange(len(sizes))[-directions:]
    kept = kept[sizes[kept] > 1e-9 * sizes[-1].clamp(min=1e-9)]
    if not len(kept):
        # Nothing varies at all: any direction will do, every task lies at the same place.
        return torch.eye(1, values.shape[1])
    return (axes[:, kept] / sizes[kept].sqrt()).T.float().contiguous()


def whitening(landmarks: Landmarks) -> Tensor:
    """The matrix `[m, m]`, float64, to multiply φ with, so that the squared length of weights on the product is the
    squared norm of the function in the kernel's own space (Williams & Seeger 2001): their decay is then that of kernel
    ridge regression. `whitening @ v` are weights on φ for weights v on the product."""
    kernel = landmarks.nearness(landmarks.centres).double()
    kernel = (kernel + kernel.T) / 2 + _JITTER * torch.eye(landmarks.count, dtype=torch.float64)
    factor = torch.linalg.cholesky(kernel)
    identity = torch.eye(landmarks.count, dtype=torch.float64)
    return torch.linalg.solve_triangular(factor, identity, upper=False).T


def k_means(points: Tensor, count: int, *, seed: int, rounds: int) -> Tensor:
    """Centres `[count, k]` of points `[N, k]`, by Lloyd's rounds (1982) from a k-means++ start (Arthur & Vassilvitskii
    2007)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    far = (points - points[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        chosen.append(int(torch.multinomial(far + 1e-12, 1, generator=generator)))
        far = torch.minimum(far, (points - points[chosen[-1]]).square().sum(1))
    centres = points[chosen]
    for _ in range(rounds):
        mine = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, mine, points)
        sizes = torch.bincount(mine, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres
