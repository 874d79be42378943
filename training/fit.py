"""One head of given settings on hidden states and scores: what `training.sft.solve` finds in a space that suits it."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from orchestrator.head import Checkpoint, CheckpointInfo
from training.landmarks import place_landmarks, whitening
from training.sft import Objective, Solution, solve, standardisation

Head = Literal["landmarks", "linear"]
MOST_NUMBERS = 20_000


@dataclass(frozen=True)
class Candidate:
    """Settings that are compared: the targets' temperature, the decay of the weights, and how near a task has to be to
    a landmark to matter (`orchestrator.landmarks`; a linear head has no use for it)."""

    tau: float
    decay: float
    gamma: float


@dataclass(frozen=True)
class Kind:
    """Settings that are not compared: what the weights multiply, what is minimised (`training.sft.solve`), and the most
    landmarks, which are placed by `seed`."""

    head: Head = "landmarks"
    objective: Objective = "kl"
    landmarks: int = 512
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Space:
    """Where a head is fitted. `empty` is the head without weights; `mixing [m, m]` turns its features into those that a
    decay of weights acts on as it should (None: they are so already)."""

    empty: Checkpoint
    mixing: Tensor | None

    def inputs(self, hidden: Tensor) -> Tensor:
        """Hidden states `[N, d]` → what is fitted on `[N, m]`."""
        features = self.empty.features(hidden)
        return features if self.mixing is None else (features.double() @ self.mixing).float()

    def weight(self, found: Tensor) -> Tensor:
        """Weights `[L, m]` on the inputs → weights on the head's features."""
        return found if self.mixing is None else (found.double() @ self.mixing.T).float()

    def head(self, solution: Solution, info: CheckpointInfo) -> Checkpoint:
        return replace(self.empty, info=info, weight=self.weight(solution.weight), prior=solution.prior)


def unfitted(hidden: Tensor, workers: int, kind: Kind) -> Checkpoint:
    """A head without weights, gamma 1, for so many workers on training tasks' hidden states `[N, d]`. Few tasks get
    fewer landmarks, many workers too: no more than `MOST_NUMBERS` are trained."""
    shift, scale = standardisation(hidden.float())
    info = CheckpointInfo(tuple(map(str, range(workers))), "", "")
    empty = Checkpoint(info, torch.zeros(workers, hidden.shape[1]), shift, scale)
    if kind.head == "linear":
        return empty
    count = min(kind.landmarks, MOST_NUMBERS // workers - 1)
    landmarks = place_landmarks(empty.standardised(hidden), count=count, gamma=1.0, seed=kind.seed)
    return replace(empty, weight=torch.zeros(workers, landmarks.count), landmarks=landmarks)


def space_of(head: Checkpoint, gamma: float | None = None) -> Space:
    """The space to fit a head in, its landmarks as near as `gamma` says (None: as they are)."""
    if head.landmarks is None:
        return Space(head, None)
    if gamma is not None:
        head = replace(head, landmarks=replace(head.landmarks, gamma=torch.tensor([gamma])))
    assert head.landmarks is not None
    return Space(head, whitening(head.landmarks))


def fit(
    hidden: Tensor, scores: Tensor, info: CheckpointInfo, candidate: Candidate, kind: Kind
) -> tuple[Checkpoint, tuple[float, ...]]:
    """The head of a candidate on hidden states `[N, d]` and scores `[N, L]` (NaN: unknown), and its losses.

    Raises:
        DataError: as `training.sft.solve`.
    """
    space = space_of(unfitted(hidden, scores.shape[1], kind), candidate.gamma)
    solution = solve(space.inputs(hidden), scores, tau=candidate.tau, decay=candidate.decay, objective=kind.objective)
    return space.head(solution, info), solution.losses


def unseen_logits(head: Checkpoint, hidden: Tensor, scores: Tensor, *, folds: int, seed: int) -> Tensor | None:
    """What heads like this one say about training tasks that they were not fitted on: logits `[N, L]` by refitting it,
    on its own landmarks and with its own settings, without one of `folds` parts of the tasks after the other. None if
    it does not say how it was fitted, or is not what was fitted then."""
    notes = head.info.trained
    if notes.get("method") != "sft" or "added" in notes or not {"tau", "decay", "objective"} <= set(notes):
        return None
    space = space_of(head)
    inputs, logits = space.inputs(hidden), torch.zeros(scores.shape)
    for fold in folds_of(range(len(hidden)), folds, seed):
        rest = torch.ones(len(hidden), dtype=torch.bool)
        rest[fold] = False
        found = solve(inputs[rest], scores[rest], tau=notes["tau"], decay=notes["decay"], objective=notes["objective"])
        logits[fold] = found.prior + inputs[fold] @ found.weight.T
    return logits


def sft_notes(head: Checkpoint) -> Mapping[str, Any]:
    """What a head says about its making by SFT; an evolved one says it of its start."""
    notes = head.info.trained
    while isinstance(notes.get("start"), Mapping):
        notes = notes["start"]
    return notes


def folds_of(groups: Sequence[Hashable], folds: int, seed: int) -> list[Tensor]:
    """Positions in `groups`, partitioned at random; equal entries stay together, parts are of nearly equal size."""
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    order = list(members.values())
    random.Random(seed).shuffle(order)
    parts: list[list[int]] = [[] for _ in range(folds)]
    for together in order:
        min(parts, key=len).extend(together)
    return [torch.tensor(sorted(part)) for part in parts]
