"""Supervised training of the head on soft targets (Fugu report §3.1): no Ray, only tensors in and out.

Target per task: softmax(mean score / τ) over the workers that have a score; loss: KL(target ‖ policy), the mean over
tasks. Where a worker has no score its logit is masked too: nothing is said about it, nothing is imputed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.errors import DataError


@dataclass(frozen=True)
class SftSettings:
    """`tau` is the targets' temperature in units of score. `batch` None is full-batch. `standardise` centres and
    scales the features by their training statistics, which become part of the head."""

    tau: float = 0.25
    learning_rate: float = 0.01
    weight_decay: float = 1.0
    epochs: int = 300
    batch: int | None = None
    seed: int = 0
    standardise: bool = True


@dataclass(frozen=True, eq=False)
class SftResult:
    """A head in the checkpoint's terms: logits = weight · ((h − shift) · scale). `losses` has one number per epoch:
    the mean of KL over its tasks, before each step."""

    weight: Tensor
    shift: Tensor | None
    scale: Tensor | None
    losses: tuple[float, ...]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[N, d]` → logits `[N, L]`."""
        if self.shift is not None and self.scale is not None:
            hidden = (hidden - self.shift) * self.scale
        return hidden @ self.weight.T


def soft_targets(scores: Tensor, tau: float) -> Tensor:
    """Scores `[N, L]`, NaN where unknown → targets `[N, L]` whose rows sum to 1 over the known workers."""
    return torch.softmax((scores / tau).masked_fill(scores.isnan(), -math.inf), dim=-1)


def kl_loss(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Mean over tasks of KL(target ‖ policy), both over the known workers `[N, L]` only; in nats, never negative."""
    policy = torch.log_softmax(logits.masked_fill(~known, -math.inf), dim=-1).masked_fill(~known, 0.0)
    entropy = torch.xlogy(targets, targets)
    return (entropy - targets * policy).sum(-1).mean()


def train(
    features: Tensor,
    scores: Tensor,
    settings: SftSettings,
    *,
    on_epoch: Callable[[int, float], None] = lambda _epoch, _loss: None,
) -> SftResult:
    """Fit a head on hidden states `[N, d]` and scores `[N, L]` (NaN: unknown), from zero weights, with AdamW. Equal
    inputs give an equal result.

    Raises:
        DataError: no task, shapes that do not match, numbers that are not finite, or scores outside 0..1.
    """
    if features.ndim != 2 or scores.ndim != 2 or len(features) != len(scores):
        raise DataError(f"features {list(features.shape)} and scores {list(scores.shape)} do not match")
    if not bool(torch.isfinite(features).all()):
        raise DataError("the features hold numbers that are not finite")
    known = ~scores.isnan()
    if not bool(((scores >= 0) & (scores <= 1) | ~known).all()):
        raise DataError("a score is outside 0..1")
    # One known worker says nothing about which to choose.
    told = known.sum(-1) >= 2
    if not bool(told.any()):
        raise DataError("no task has scores of two workers: there is nothing to learn")
    features, scores, known = features[told].float(), scores[told].float(), known[told]

    shift = scale = None
    if settings.standardise:
        shift = features.mean(0)
        # A dimension that never changes carries nothing; scaling it up would only amplify noise.
        deviation = features.std(0, unbiased=False)
        scale = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), torch.zeros_like(deviation))
        features = (features - shift) * scale

    targets = soft_targets(scores, settings.tau)
    weight = torch.zeros(scores.shape[1], features.shape[1], requires_grad=True)
    optimiser = torch.optim.AdamW([weight], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    generator = torch.Generator().manual_seed(settings.seed)
    count = len(features)
    size = count if settings.batch is None else min(settings.batch, count)
    losses = []
    for epoch in range(settings.epochs):
        order = torch.arange(count) if size == count else torch.randperm(count, generator=generator)
        total = 0.0
        for part in order.split(size):
            loss = kl_loss(features[part] @ weight.T, targets[part], known[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(part)
        losses.append(total / count)
        on_epoch(epoch, losses[-1])
    return SftResult(weight.detach(), shift, scale, tuple(losses))


def reached(logits: Tensor, scores: Tensor) -> Tensor:
    """The score that the most probable known worker got, per task `[N]`."""
    best = logits.masked_fill(scores.isnan(), -math.inf).argmax(-1)
    return scores.gather(1, best[:, None])[:, 0]
