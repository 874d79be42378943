"""A router as one flat vector θ, which evolution searches: [singular-value offsets | head weights] (TRINITY §3), or
[offsets | change of the head along a few axes].

The head's numbers multiply standardised features (h − shift) · scale, or nearness to landmarks, so that one step size σ
means the same for every number, whatever the backbone: with σ0 = 0.03 and d = 576 the logits of a fresh candidate
differ by about 0.7. A prior stays as it is: what is decided far from every training task is not for a search on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.errors import CheckpointError, DataError
from orchestrator.head import ROLES, Checkpoint, CheckpointInfo
from training.landmarks import whitening

Vector = NDArray[np.float64]
AXES = 64


@dataclass(frozen=True, eq=False)
class Policy:
    """What the numbers of θ mean: `base` gives shape, features and names; `singular` the matrices whose offsets stand
    before the head, with their number of singular values. With `axes [r, m]` the head's part of θ is how far each row
    of the base's weights is moved along each of them; without, it is the weights."""

    base: Checkpoint
    singular: tuple[tuple[str, int], ...] = ()
    axes: Tensor | None = None

    @property
    def workers(self) -> tuple[str, ...]:
        return self.base.info.workers

    @property
    def roles(self) -> bool:
        return self.base.info.roles

    @property
    def offsets(self) -> int:
        """How many numbers of θ are singular-value offsets."""
        return sum(size for _, size in self.singular)

    @property
    def size(self) -> int:
        """Length n of θ."""
        rows, features = self.base.weight.shape
        return self.offsets + rows * (features if self.axes is None else len(self.axes))

    def vector(self) -> Vector:
        """θ of the base itself; offsets that it does not have are zero."""
        parts = [self.base.singular.get(name, torch.zeros(size)) for name, size in self.singular]
        head = self.base.weight if self.axes is None else torch.zeros(len(self.base.weight), len(self.axes))
        return torch.cat([*parts, head.reshape(-1)]).double().numpy()

    def heads(self, thetas: Vector) -> Vector:
        """θs `[K, n]` → head weights `[K, rows, d or m]`."""
        found = self._moves(thetas)
        if self.axes is None:
            return found
        heads: Vector = self.base.weight.double().numpy() + found @ self.axes.double().numpy()
        return heads

    def _moves(self, thetas: Vector) -> Vector:
        return thetas[:, self.offsets :].reshape(len(thetas), len(self.base.weight), -1)

    def scales(self, theta: Vector) -> dict[str, Tensor]:
        """One θ `[n]` → its offsets by matrix."""
        found, begin = {}, 0
        for name, size in self.singular:
            found[name] = torch.from_numpy(theta[begin : begin + size].astype(np.float32))
            begin += size
        return found

    def features(self, hidden: Tensor | NDArray[np.float32]) -> Vector:
        """Hidden states `[N, d]` → `[N, rows + …]`, float64: the part of the logits that no θ changes, then what the
        head's part of θ multiplies."""
        found = self.base.features(torch.as_tensor(hidden)).double()
        fixed = torch.zeros(len(found), len(self.base.weight), dtype=torch.float64)
        if self.base.prior is not None:
            fixed = fixed + self.base.prior.double()
        if self.axes is not None:
            fixed = fixed + found @ self.base.weight.double().T
            found = found @ self.axes.double().T
        return np.asarray(torch.cat([fixed, found], dim=1).numpy())

    def logits(self, thetas: Vector, features: Vector) -> Vector:
        """A whole population at once: θs `[K, n]` on `features` → `[K, N, rows]`."""
        moves, rows = self._moves(thetas), len(self.base.weight)
        # One matrix product; np.einsum("krd,nd->knr") is the same and slower.
        flat = features[:, rows:] @ moves.reshape(-1, moves.shape[-1]).T
        changed = flat.reshape(len(features), len(thetas), rows).transpose(1, 0, 2)
        return np.ascontiguousarray(changed + features[:, :rows])

    def checkpoint(self, theta: Vector, trained: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint of one θ `[n]`."""
        weight = torch.from_numpy(self.heads(theta[None])[0].astype(np.float32))
        kept = {name: offsets for name, offsets in self.base.singular.items() if name not in dict(self.singular)}
        info = replace(self.base.info, trained=trained)
        return replace(self.base, info=info, weight=weight, singular={**kept, **self.scales(theta)})


def rounded(theta: Vector) -> Vector:
    """θ as a checkpoint holds it (float32), so that what is validated is what is shipped."""
    return theta.astype(np.float32).astype(np.float64)


def from_zeros(info: CheckpointInfo, hidden: Tensor) -> Checkpoint:
    """A head of zeros (TRINITY's start), standardised by the training tasks' hidden states `[N, d]`.

    Raises:
        DataError: fewer than two tasks.
    """
    if len(hidden) < 2:
        raise DataError("at least two training tasks are needed to standardise their hidden states")
    hidden = hidden.float()
    return Checkpoint(
        info,
        torch.zeros(info.rows, hidden.shape[1]),
        hidden.mean(0),
        _inverse(hidden.std(0, unbiased=False)),
    )


def from_checkpoint(
    start: Checkpoint, hidden: Tensor, *, workers: Sequence[str], roles: bool, where: str = "the start"
) -> Checkpoint:
    """A checkpoint as a start, its rows in the order of `workers`. The same decisions come out of it.

    Weights on raw hidden states are put on ones of unit mean square: without a bias a shift could not be taken back.
    Where roles are wanted and it has none, their rows are zero, which makes every turn a Worker's.

    Raises:
        CheckpointError: other workers, another size, or roles that would not be trained.
    """
    info = start.info
    if set(workers) != set(info.workers):
        raise CheckpointError(
            f"{where} was trained for the workers {', '.join(info.workers)}; these are {', '.join(workers)}"
        )
    if start.dimension != hidden.shape[1]:
        raise CheckpointError(f"{where} reads hidden states of size {start.dimension}, these have {hidden.shape[1]}")
    if info.roles and not roles:
        raise CheckpointError(f"{where} has roles; evolve it on sessions with roles (fugu-trinity)")
    rows = [info.workers.index(name) for name in workers]
    weight = start.weight[[*rows, *range(len(rows), info.rows)]]
    if roles and not info.roles:
        weight = torch.cat([weight, torch.zeros(len(ROLES), weight.shape[1])])
    prior = start.prior
    if prior is not None:
        prior = prior[[*rows, *range(len(rows), info.rows)]]
        prior = torch.cat([prior, torch.zeros(len(weight) - len(prior))])
    scale = start.scale
    if start.scale is None and start.landmarks is None:
        centred = hidden.float() if start.shift is None else hidden.float() - start.shift
        scale = _inverse(centred.square().mean(0).sqrt())
        # A dimension that is always zero stays out of the search, and out of the head.
        weight = torch.where(scale > 0, weight / torch.where(scale > 0, scale, 1.0), 0.0)
    info = replace(info, workers=tuple(workers), roles=roles)
    return replace(start, info=info, weight=weight, scale=scale, prior=prior)


def principal_axes(base: Checkpoint, hidden: Tensor, count: int) -> Tensor:
    """The `count` axes `[r, m]` of a head's weights along which it matters most for the tasks with hidden states `[N,
    d]`: principal components of what the weights multiply (on landmarks: in the kernel's own space). Moved by 1 along
    all of them at random, logits move by about 1."""
    features = base.features(hidden).double()
    mixing = torch.eye(features.shape[1], dtype=torch.float64) if base.landmarks is None else whitening(base.landmarks)
    inputs = features @ mixing
    _, directions = torch.linalg.eigh(inputs.T @ inputs)
    axes = (mixing @ directions[:, -count:]).T
    return (axes / (features @ axes.T).square().sum(1).mean().sqrt()).float()


def _inverse(spread: Tensor) -> Tensor:
    # A dimension that never changes carries nothing; scaling it up would only amplify noise.
    return torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), torch.zeros_like(spread))
