"""One trial of a tuning: train with some settings on a part of the tasks, score on another, several times over. No Ray.

A replicate is one such pair of parts, laid out beforehand as an outcomes folder of its own with the splits `learn`,
`choose` (by which an evolution takes its best generation) and `score`, so that trainings are run just as a user would.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from actors.errors import DataError
from actors.model_files import resolve_model
from orchestrator.backbone import Device
from orchestrator.head import load_checkpoint
from training import evolve, train_sft
from training.evolve import EvolveRun
from training.features import read_limit, task_states
from training.outcomes import Outcomes, read_outcomes, write_outcomes
from training.sft import reached
from training.start import Reading
from training.train_sft import SftRun
from training.tune_space import Config, Method, evolve_run, sft_run

LEARN, CHOOSE, SCORE = "learn", "choose", "score"
HoldOut = Literal["tasks", "datasets"]


@dataclass(frozen=True)
class Laboratory:
    """What all trials share. `folder` holds the replicates; `checkpoint` is where evolutions start (None: zeros, or
    what SFT found). `backbone` and `max_tokens` none: the training's own."""

    method: Method
    folder: Path
    workers: tuple[str, ...]
    seed: int = 0
    checkpoint: Path | None = None
    backbone: str | None = None
    max_tokens: int | None = None
    device: Device = "auto"
    cache: Path | None = None

    def replicate(self, number: int) -> Path:
        return self.folder / "data" / str(number)


@dataclass(frozen=True)
class Pass:
    """One training: what it reads and writes. `tasks` are those of `split`."""

    outcomes: Path
    out: Path
    split: str
    choose: str
    seed: int
    tasks: int
    progress: bool = False


def train(laboratory: Laboratory, config: Config, one: Pass) -> None:
    """Train with these settings; the checkpoint is then at `one.out`.

    Raises:
        FuguError: as the training does.
    """
    start = laboratory.checkpoint
    if laboratory.method != "evolve":
        learned = one.out if laboratory.method == "sft" else one.out.with_name("sft.safetensors")
        train_sft.run(sft_settings(laboratory, config, replace(one, out=learned)))
        start = learned
    if laboratory.method != "sft":
        evolve.run(evolve_settings(laboratory, config, one, start))


def sft_settings(laboratory: Laboratory, config: Config, one: Pass) -> SftRun:
    base = SftRun(
        one.outcomes,
        one.out,
        laboratory.workers,
        split=one.split,
        seed=one.seed,
        device=laboratory.device,
        cache=laboratory.cache,
        progress=one.progress,
    )
    if laboratory.backbone is not None:
        base = replace(base, backbone=laboratory.backbone)
    if laboratory.max_tokens is not None:
        base = replace(base, max_tokens=laboratory.max_tokens)
    return sft_run(base, config)


def evolve_settings(laboratory: Laboratory, config: Config, one: Pass, start: Path | None) -> EvolveRun:
    reading = Reading(laboratory.backbone, device=laboratory.device)
    if laboratory.max_tokens is not None:
        reading = replace(reading, max_tokens=laboratory.max_tokens)
    base = EvolveRun(
        one.out,
        one.outcomes,
        workers=laboratory.workers,
        checkpoint=start,
        split=one.split,
        val_split=one.choose,
        reading=reading,
        progress=one.progress,
    )
    return evolve_run(base, config, seed=one.seed + 1, tasks=one.tasks)


def scores_of(laboratory: Laboratory, path: Path, part: Outcomes) -> NDArray[np.float64]:
    """The score of the worker that the checkpoint chooses, for each task that one of its workers has a score for."""
    head = load_checkpoint(path)
    scores = torch.from_numpy(part.scores(head.info.workers))
    told = torch.isfinite(scores).any(1)
    tasks = [task for task, has in zip(part.tasks, told.tolist(), strict=True) if has]
    files = resolve_model(laboratory.backbone or head.info.backbone, revision=head.info.revision)
    states = task_states(
        tasks,
        head.info,
        files.folder,
        singular=head.singular,
        max_tokens=read_limit(head.info, laboratory.max_tokens),
        device=laboratory.device,
        cache=laboratory.cache,
        progress=False,
    )
    logits = head.logits(states)[:, : len(head.info.workers)]
    found: NDArray[np.float64] = reached(logits, scores[told]).double().numpy()
    return found


def replicate(laboratory: Laboratory, config: Config, number: int, folder: Path) -> float:
    """Train and score one replicate, with `folder` to write to: the mean score on its held-out tasks.

    Raises:
        FuguError: as the training does.
    """
    data = laboratory.replicate(number)
    found = read_outcomes(data)
    tasks = sum(task.split == LEARN for task in found.tasks)
    one = Pass(data, folder / "router.safetensors", LEARN, CHOOSE, laboratory.seed + number, tasks)
    train(laboratory, config, one)
    return float(scores_of(laboratory, one.out, found.split(SCORE)).mean())


def lay_out(
    laboratory: Laboratory,
    learn: Outcomes,
    score: Outcomes | None,
    *,
    folds: int,
    replicates: int,
    hold_out: HoldOut,
) -> None:
    """Write the replicates' folders. Without `score` replicate r is scored on the r-th of `folds` parts of `learn`;
    with it, all are scored there. An evolution chooses by a part that it neither learns from nor is scored on.

    Raises:
        DataError: as `parts_of`.
    """
    parts = list(parts_of(learn, folds, laboratory.seed, hold_out))
    evolves = laboratory.method != "sft"
    for number in range(replicates):
        split = np.full(len(learn.tasks), LEARN, dtype=object)
        if evolves:
            split[parts[(number + 1) % folds]] = CHOOSE
        if score is None:
            split[parts[number % folds]] = SCORE
        tasks = [replace(task, split=str(name)) for task, name in zip(learn.tasks, split, strict=True)]
        outcomes = list(learn.outcomes)
        if score is not None:
            tasks += [replace(task, split=SCORE) for task in score.tasks]
            outcomes += score.outcomes
        # What was answered is not needed, and most of the file.
        bare = [replace(one, answers=(), response=None) for one in outcomes if one.worker in laboratory.workers]
        write_outcomes(laboratory.replicate(number), Outcomes(tuple(tasks), tuple(bare)))


def parts_of(found: Outcomes, folds: int, seed: int, hold_out: HoldOut) -> Iterator[NDArray[np.int64]]:
    """A random partition of the tasks' positions, of single tasks or of whole data sets.

    Raises:
        DataError: there are too few for so many folds.
    """
    rng = np.random.default_rng([seed, 5])
    names = [task.dataset if hold_out == "datasets" else task.task_id for task in found.tasks]
    labels = sorted(set(names))
    if len(labels) < max(folds, 2):
        raise DataError(f"{len(labels)} {hold_out} are too few for {folds} folds")
    order = rng.permutation(len(labels))
    fold = {labels[label]: place % folds for place, label in enumerate(order)}
    folded = np.array([fold[name] for name in names])
    for number in range(folds):
        yield np.flatnonzero(folded == number)


def read_scores(folder: Path) -> list[float]:
    """The scores that a trial has kept in a checkpoint of Tune."""
    return [float(score) for score in json.loads((folder / "scores.json").read_text())]


def write_scores(folder: Path, scores: Sequence[float]) -> None:
    (folder / "scores.json").write_text(json.dumps(list(scores)))
