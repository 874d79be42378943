"""Supervised training of the head on soft targets (Fugu report §3.1): no Ray, only tensors in and out.

Target per task: softmax(mean score / τ) over the workers that have a score; loss: KL(target ‖ policy), the mean over
tasks. Where a worker has no score its logit is masked too: nothing is said about it, nothing is imputed.

The problem is convex where a decay is given: `solve` finds its one best head, `change` what to add to one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from actors.errors import DataError

Objective = Literal["kl", "squares"]


def soft_targets(scores: Tensor, tau: float) -> Tensor:
    """Scores `[N, L]`, NaN where unknown → targets `[N, L]` whose rows sum to 1 over the known workers."""
    return torch.softmax((scores / tau).masked_fill(scores.isnan(), -math.inf), dim=-1)


def kl_loss(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Mean over tasks of KL(target ‖ policy), both over the known workers `[N, L]` only; in nats, never negative."""
    policy = torch.log_softmax(logits.masked_fill(~known, -math.inf), dim=-1).masked_fill(~known, 0.0)
    entropy = torch.xlogy(targets, targets)
    return (entropy - targets * policy).sum(-1).mean()


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights `[L, m]` on the inputs, the prior `[L]` that is added, and the loss before each step (`squares`: after
    the only one)."""

    weight: Tensor
    prior: Tensor
    losses: tuple[float, ...]


def solve(
    inputs: Tensor,
    scores: Tensor,
    *,
    tau: float,
    decay: float,
    objective: Objective = "kl",
    start: Tensor | None = None,
    steps: int = 100,
) -> Solution:
    """The weights on inputs `[N, m]` that fit scores `[N, L]` (NaN: unknown) best: logits = prior + weight · input.

    The prior is each worker's mean score / τ, less their mean: where inputs are zero the head says what is best on
    average. "kl" minimises Σ over tasks of KL(target ‖ policy) + decay/2 · ‖weight‖², by L-BFGS (Liu & Nocedal 1989)
    from `start` or zero, until a step gains nothing more; "squares" minimises Σ (τ · logit − score)² + decay ·
    ‖τ · weight‖² over known scores and has a closed form (ridge regression of scores). Both are convex: the result
    depends on nothing but the data, on no seed, learning rate or order of tasks.

    Raises:
        DataError: no task, shapes that do not match, numbers that are not finite, or scores outside 0..1.
    """
    inputs, scores, known = _checked(inputs, scores)
    means = scores.nanmean(0).nan_to_num(float(scores.nanmean()))
    prior = (means - means.mean()) / tau
    targets = soft_targets(scores, tau)
    if objective == "squares":
        weight = _ridge(inputs, (scores - means).masked_fill(~known, 0.0), known, decay) / tau
        return Solution(weight, prior, (float(kl_loss(prior + inputs @ weight.T, targets, known)),))
    start = torch.zeros(scores.shape[1], inputs.shape[1]) if start is None else start
    weight, losses = _descended(prior.expand_as(targets), inputs, targets, known, decay, start, steps)
    return Solution(weight, prior, losses)


def change(
    logits: Tensor, inputs: Tensor, scores: Tensor, *, tau: float, decay: float, rows: slice, steps: int = 100
) -> Tensor:
    """What to add to weights `[L, m]` that give `logits [N, L]` on inputs `[N, m]`: minimises Σ over tasks of KL(target
    ‖ policy) + decay/2 · ‖change‖² by at most `steps` steps of L-BFGS. Only `rows` change; what they know already is
    where decay leads them.

    Raises:
        DataError: as `solve`.
    """
    known = (~scores.isnan()).sum(-1) >= 2
    inputs, scores, told = _checked(inputs, scores)
    targets = soft_targets(scores, tau)
    start = torch.zeros(scores.shape[1], inputs.shape[1])
    return _descended(logits[known].float(), inputs, targets, told, decay, start, steps, rows)[0]


def _descended(
    base: Tensor,
    inputs: Tensor,
    targets: Tensor,
    known: Tensor,
    decay: float,
    start: Tensor,
    steps: int,
    rows: slice = slice(None),
) -> tuple[Tensor, tuple[float, ...]]:
    """Weights `[L, m]` that lower the decayed loss of logits base + weight · input, and the loss before each step."""
    free = torch.zeros(len(start), 1)
    free[rows] = 1.0
    weight = start.clone().requires_grad_()
    # What float32 can tell of the loss ends soon after these; line searches below them only go astray.
    optimiser = torch.optim.LBFGS(
        [weight], max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )
    losses: list[float] = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        used = weight * free
        loss = kl_loss(base + inputs @ used.T, targets, known)
        losses.append(float(loss.detach()))
        total = loss + decay / 2 / len(inputs) * used.square().sum()
        total.backward()
        return total

    if steps > 0:
        optimiser.step(closure)
    return weight.detach() * free, tuple(losses)


def _ridge(inputs: Tensor, targets: Tensor, known: Tensor, decay: float) -> Tensor:
    """Ridge regression `[L, m]` of targets `[N, L]`, each worker's on its known rows."""
    weight = torch.zeros(targets.shape[1], inputs.shape[1])
    values = inputs.double()
    penalty = decay * torch.eye(inputs.shape[1], dtype=torch.float64)
    patterns, which = known.unique(dim=1, return_inverse=True)
    for index, rows in enumerate(patterns.T):
        columns = which == index
        part = values[rows]
        solved = torch.linalg.solve(part.T @ part + penalty, part.T @ targets[rows][:, columns].double())
        weight[columns] = solved.T.float()
    return weight


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale `[d]` that give features `[N, d]` mean 0 and deviation 1."""
    deviation = features.std(0, unbiased=False)
    # A dimension that never changes carries nothing; scaling it up would only amplify noise.
    return features.mean(0), torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), torch.zeros_like(deviation))


def _checked(features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, scores and what is known of them, on the tasks that say something."""
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
    return features[told].float(), scores[told].float(), known[told]


def reached(logits: Tensor, scores: Tensor) -> Tensor:
    """The score that the most probable known worker got, per task `[N]`."""
    best = logits.masked_fill(scores.isnan(), -math.inf).argmax(-1)
    return scores.gather(1, best[:, None])[:, 0]
