"""Labelling a newcomer for `fugu train add-worker`: only this one worker is asked, on chosen tasks that the others were
labelled on already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actors.config_file import load_config
from actors.errors import CheckpointError, ConfigError, DataError
from actors.model_files import resolve_model
from orchestrator.backbone import Device
from orchestrator.head import load_checkpoint
from training import label
from training.features import read_limit, task_states
from training.label import LabelReport, LabelRun, chosen
from training.outcomes import Outcomes, Task, read_outcomes

Pick = Literal["spread", "random"]


@dataclass(frozen=True)
class NewcomerRun:
    """Whom to label with what, at most at which cost.

    `outcomes` holds the outcomes of the workers of `checkpoint`; the newcomer's go there, too. It tries `tasks` of
    those of `split`, picked as `pick` says, and `held` of those of `val_split`, always drawn at random, since they
    measure; what it has an outcome for already counts. `budget_usd` and `max_requests` bound what all runs of the
    folder's journal spend together. `seed` also draws the tasks.
    """

    worker: str
    config: Path
    outcomes: Path
    checkpoint: Path
    split: str = "train"
    val_split: str = "val"
    tasks: int = 300
    held: int = 200
    pick: Pick = "spread"
    samples: int = 1
    seed: int = 0
    max_tokens: int | None = None
    temperature: float | None = None
    budget_usd: float | None = None
    max_requests: int | None = None
    backbone: str | None = None
    read_tokens: int | None = None
    device: Device = "auto"
    cache: Path | None = None
    address: str | None = None
    progress: bool = True


def run(settings: NewcomerRun) -> LabelReport | None:
    """Label what is missing; None where nothing is.

    Raises:
        ConfigError: the configuration lacks the worker, or a budget cannot be kept.
        CheckpointError: the head cannot be read or has the worker already.
        DataError: outcomes that cannot be used, or a worker that does not work.
    """
    if settings.tasks < 1 or settings.held < 1:
        raise ConfigError("a newcomer needs at least one task to learn from and one to be measured on")
    chosen(load_config(settings.config), (settings.worker,))
    head = load_checkpoint(settings.checkpoint)
    if settings.worker in head.info.workers:
        raise CheckpointError(f"{settings.checkpoint} has a row for {settings.worker} already")
    found = read_outcomes(settings.outcomes)
    if missing := [name for name in head.info.workers if name not in found.workers]:
        where = settings.outcomes / "outcomes.parquet"
        raise DataError(f"{where} has no outcome of {', '.join(missing)}; there are {', '.join(found.workers)}")
    learned = _shared(found, settings.split, head.info.workers, every=False)
    held = _shared(found, settings.val_split, head.info.workers, every=True)
    rng = np.random.default_rng([settings.seed, 6])
    if settings.pick == "spread" and settings.tasks < len(learned):
        files = resolve_model(settings.backbone or head.info.backbone, revision=head.info.revision)
        states = task_states(
            learned,
            head.info,
            files.folder,
            singular=head.singular,
            max_tokens=read_limit(head.info, settings.read_tokens),
            device=settings.device,
            cache=settings.cache,
            progress=settings.progress,
        )
        rows = spread(head.features(states), settings.tasks, first=int(rng.integers(len(learned))))
    else:
        rows = rng.permutation(len(learned))[: settings.tasks].tolist()
    tasks = [learned[row] for row in sorted(rows)]
    tasks += [held[row] for row in sorted(rng.permutation(len(held))[: settings.held].tolist())]
    known = {
        one.task_id for one in found.outcomes if one.worker == settings.worker and len(one.samples) >= settings.samples
    }
    # Mixed, so that a run that is stopped has covered both parts alike.
    mixed = [tasks[row] for row in rng.permutation(len(tasks))]
    missing_tasks = [task for task in mixed if task.task_id not in known]
    if not missing_tasks:
        return None
    return label.run(
        LabelRun(
            settings.config,
            settings.outcomes,
            workers=(settings.worker,),
            samples=settings.samples,
            seed=settings.seed,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            budget_usd=settings.budget_usd,
            max_requests=settings.max_requests,
            address=settings.address,
            progress=settings.progress,
        ),
        missing_tasks,
    )


def spread(features: Tensor, count: int, *, first: int) -> list[int]:
    """Rows of `features [N, m]` that cover all others as closely as so few can: each next one is the furthest from
    those that were taken (k-centre by the greedy rule, Gonzalez 1985; for active learning Sener & Savarese 2018). What
    is looked at are the tasks alone, never anybody's scores, which would bend what the row learns."""
    taken = [first]
    distances = torch.cdist(features, features[first : first + 1])[:, 0]
    while len(taken) < count:
        taken.append(int(distances.argmax()))
        distances = torch.minimum(distances, torch.cdist(features, features[taken[-1] : taken[-1] + 1])[:, 0])
    return taken


def _shared(found: Outcomes, split: str, workers: Sequence[str], *, every: bool) -> list[Task]:
    """The tasks of a split that one of the workers has an outcome for, or every one."""
    part = found.split(split)
    told = np.isfinite(part.scores(workers)).sum(1)
    tasks = [task for task, count in zip(part.tasks, told, strict=True) if count >= (len(workers) if every else 1)]
    if not tasks:
        raise DataError(f"no task of the split {split} has outcomes of {', '.join(workers)}")
    # Labelling changes the order in the file; what is chosen must not follow it, or a second run would choose anew.
    return sorted(tasks, key=lambda task: task.task_id)
