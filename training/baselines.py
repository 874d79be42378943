"""What a trained router has to beat: other ways of choosing a worker, on the same tasks and the same hidden states.

A way of choosing gives preferences `[N, L]`: the worker with the largest number on a task answers it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.landmarks import k_means
from training.outcomes import Outcome
from training.sft import kl_loss, soft_targets

Matrix = NDArray[np.float64]

NEIGHBOURS = 20
MAX_CLUSTERS = 64
MLP_WIDTH = 64
MLP_EPOCHS = 40
HALVINGS = 32


def lookup(train_groups: Sequence[str], train_scores: Matrix, groups: Sequence[str]) -> Matrix:
    """The mean training score of each worker on the task's group (its data set), on all tasks where the group or the
    worker in it is unknown: `[N, L]`."""
    overall: Matrix = np.nanmean(train_scores, axis=0)
    labels = np.asarray(train_groups)
    table: dict[str, Matrix] = {}
    for name in set(train_groups):
        part = train_scores[labels == name]
        known = ~np.isnan(part)
        sums = np.where(known, part, 0.0).sum(0)
        table[name] = np.where(known.any(0), sums / np.maximum(known.sum(0), 1), overall)
    return np.stack([table.get(name, overall) for name in groups])


def standardised(train: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both `[N, d]` by the training tasks' mean and deviation."""
    mean, deviation = train.mean(0), train.std(0, unbiased=False).clamp(min=1e-6)
    return (train - mean) / deviation, (other - mean) / deviation


def nearest(train: Tensor, train_scores: Matrix, hidden: Tensor, *, neighbours: int = NEIGHBOURS) -> Matrix:
    """Mean score of each worker on the training tasks with the most similar hidden states (cosine)."""
    train, hidden = standardised(train.float(), hidden.float())
    train, hidden = nn.functional.normalize(train), nn.functional.normalize(hidden)
    closest = torch.cat([(part @ train.T).topk(min(neighbours, len(train))).indices for part in hidden.split(1024)])
    return _mean_known(train_scores[closest.numpy()], np.nanmean(train_scores, axis=0))


def clusters(train: Tensor, train_scores: Matrix, hidden: Tensor, *, seed: int) -> Matrix:
    """Mean score of each worker in the task's cluster of training tasks (k-means)."""
    train, hidden = standardised(train.float(), hidden.float())
    count = max(1, min(MAX_CLUSTERS, round(math.sqrt(len(train) / 2))))
    centres = k_means(train, count, seed=seed, rounds=25)
    labels = torch.cdist(train, centres).argmin(1).numpy()
    overall = np.nanmean(train_scores, axis=0)
    table = np.stack([_mean_known(train_scores[labels == index][None], overall)[0] for index in range(count)])
    chosen: Matrix = table[torch.cdist(hidden, centres).argmin(1).numpy()]
    return chosen


def mlp(train: Tensor, train_scores: Matrix, hidden: Tensor, *, tau: float, seed: int) -> tuple[Matrix, int]:
    """Logits of a small network (one hidden layer, dropout) trained on the same targets and loss as the head, and how
    many numbers it has."""
    train, hidden = standardised(train.float(), hidden.float())
    scores = torch.from_numpy(train_scores).float()
    known = ~scores.isnan()
    told = known.sum(-1) >= 2
    train, known, targets = train[told], known[told], soft_targets(scores[told], tau)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(train.shape[1], MLP_WIDTH), nn.GELU(), nn.Dropout(0.3), nn.Linear(MLP_WIDTH, scores.shape[1])
        )
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(MLP_EPOCHS):
            for part in torch.randperm(len(train), generator=generator).split(128):
                loss = kl_loss(network(train[part]), targets[part], known[part])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    with torch.inference_mode():
        logits: Matrix = network.eval()(hidden).double().numpy()
    return logits, sum(weight.numel() for weight in network.parameters())


def luck_free_oracle(samples: Sequence[Sequence[Sequence[float]]], rng: np.random.Generator) -> Matrix:
    """The best worker per task, chosen on half of its samples and scored on the other half: what an oracle of true
    success rates would get, without the luck of single samples. `samples[task][worker]` are scores; only workers with
    two or more count, equals share. `[N]`, the mean over random halvings; NaN where fewer than two workers count."""
    values = np.full(len(samples), np.nan)
    for row, workers in enumerate(samples):
        able = [np.asarray(taken) for taken in workers if len(taken) >= 2]
        if len(able) < 2:
            continue
        total = 0.0
        for _ in range(HALVINGS):
            shuffled = [rng.permutation(taken) for taken in able]
            chosen_on = np.array([taken[: len(taken) // 2].mean() for taken in shuffled])
            scored_on = np.array([taken[len(taken) // 2 :].mean() for taken in shuffled])
            total += float(scored_on[chosen_on >= chosen_on.max() - 1e-9].mean())
        values[row] = total / HALVINGS
    return values


def self_consistency(outcomes: Sequence[Outcome | None]) -> tuple[Matrix, Matrix]:
    """One worker's most frequent answer per task (Wang et al. 2023; the earliest of equals): its score `[N]` and how
    many calls it took `[N]`; NaN where the answers were not recorded."""
    scores, calls = np.full(len(outcomes), np.nan), np.full(len(outcomes), np.nan)
    for row, outcome in enumerate(outcomes):
        if outcome is None or len(outcome.answers) != len(outcome.samples):
            continue
        plain = [" ".join(answer.split()).casefold() for answer in outcome.answers]
        most, _ = Counter(plain).most_common(1)[0]
        voted = [score for answer, score in zip(plain, outcome.samples, strict=True) if answer == most]
        scores[row], calls[row] = sum(voted) / len(voted), len(plain)
    return scores, calls


def by_domain(domains: Sequence[str], chosen: Sequence[int], workers: Sequence[str]) -> Mapping[str, dict[str, float]]:
    """Share of each worker among the tasks of each domain, domains by name."""
    counts: dict[str, Counter[int]] = {}
    for domain, worker in zip(domains, chosen, strict=True):
        counts.setdefault(domain, Counter())[worker] += 1
    return {
        domain: {name: counts[domain][index] / counts[domain].total() for index, name in enumerate(workers)}
        for domain in sorted(counts)
    }


def _mean_known(scores: Matrix, otherwise: Matrix) -> Matrix:
    """Mean over the middle axis of `[N, K, L]`, of what is known; `otherwise [L]` where nothing is."""
    known = ~np.isnan(scores)
    sums = np.where(known, scores, 0.0).sum(1)
    return np.where(known.any(1), sums / np.maximum(known.sum(1), 1), otherwise)
