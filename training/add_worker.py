"""`fugu train add-worker`: a newcomer joins a trained router. Only its row is fitted, on the tasks that it was labelled
on; then all workers' rows are polished together for a moment. Needs no Ray, no configuration and no server.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actors.errors import CheckpointError, ConfigError, DataError
from actors.model_files import resolve_model
from orchestrator.backbone import Device
from orchestrator.head import Checkpoint, load_checkpoint, save_checkpoint
from training.features import read_limit, task_states
from training.fit import Candidate, Kind, fit, sft_notes, space_of
from training.outcomes import Outcomes, read_outcomes
from training.sft import change, reached

if TYPE_CHECKING:
    from rich.table import Table

# Of heads that do not say how they were trained.
_TAU, _DECAY, _GAMMA = 0.5, 0.3, 4.0


@dataclass(frozen=True)
class AddWorkerRun:
    """Whom to add to what.

    `outcomes` is a folder where `worker` has outcomes on a sample of the tasks, next to the other workers';
    `checkpoint` a head without it. Tasks of `split` are learned from (at most `tasks` of those that the newcomer has,
    none: all), those of `val_split` measure. `tau` and `decay` none: as the head was trained. `polish` is how many
    steps all rows take together at the end. `retrain` measures a full training on the same data, too.
    """

    worker: str
    outcomes: Path
    checkpoint: Path
    out: Path
    split: str = "train"
    val_split: str = "val"
    tasks: int | None = None
    tau: float | None = None
    decay: float | None = None
    polish: int = 5
    retrain: bool = True
    seed: int = 0
    backbone: str | None = None
    max_tokens: int | None = None
    device: Device = "auto"
    cache: Path | None = None
    progress: bool = True


@dataclass(frozen=True)
class AddWorkerReport:
    """Mean scores on `held_out` tasks that every worker has an outcome for: `before` of the head without the newcomer,
    `row` with its row alone, `after` with the polish (what was written), `retrained` of a head trained anew on the same
    data (None: not asked for). `tasks` are those that the newcomer was learned from, `share` how many of the held-out
    tasks it gets."""

    out: Path
    worker: str
    workers: tuple[str, ...]
    tasks: int
    held_out: int
    best_single: str
    best_single_score: float
    before: float
    row: float
    after: float
    retrained: float | None
    share: float
    seconds: float
    retrain_seconds: float | None

    def json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"out": str(self.out)}

    def table(self) -> Table:
        from rich.table import Table

        title = f"{self.worker} joined, learned from {self.tasks} tasks, measured on {self.held_out}"
        table = Table(title=title, caption=f"wrote {self.out}")
        table.add_column("")
        table.add_column("score", justify="right")
        table.add_column("seconds", justify="right")
        table.add_row(f"best single worker ({self.best_single})", f"{self.best_single_score:.4f}", "")
        table.add_row(f"head without {self.worker}", f"{self.before:.4f}", "")
        table.add_row("its row alone", f"{self.row:.4f}", "")
        table.add_row("its row, then all polished", f"{self.after:.4f}", f"{self.seconds:.2f}")
        if self.retrained is not None:
            table.add_row("all trained anew", f"{self.retrained:.4f}", f"{self.retrain_seconds:.2f}")
        table.add_row(f"share of {self.worker}", f"{self.share:.1%}", "")
        return table


def run(settings: AddWorkerRun) -> AddWorkerReport:
    """Fit, measure, and write the new checkpoint (whole or not at all).

    Raises:
        CheckpointError: the head cannot be read or has the worker already.
        DataError: outcomes that cannot be used, or that lack the worker or one of the head's; says which.
        ConfigError: settings out of range, or a backbone that is not there.
    """
    head = load_checkpoint(settings.checkpoint)
    candidate = _candidate(settings, head)
    workers = (*head.info.workers, settings.worker)
    learned, scores, held, held_scores = _tables(settings, head, workers)
    files = resolve_model(settings.backbone or head.info.backbone, revision=head.info.revision)
    states = task_states(
        (*learned.tasks, *held.tasks),
        head.info,
        files.folder,
        singular=head.singular,
        max_tokens=read_limit(head.info, settings.max_tokens),
        device=settings.device,
        cache=settings.cache,
        progress=settings.progress,
    )
    hidden, held_hidden = states.split([len(learned.tasks), len(held.tasks)])
    count = len(head.info.workers)

    began = time.perf_counter()
    new = ~scores[:, count].isnan()
    with_row = widened(head, settings.worker, usual(head, scores, candidate.tau))
    with_row = improved(with_row, hidden[new], scores[new], candidate, rows=slice(count, count + 1))
    after = improved(with_row, hidden, scores, candidate, rows=slice(0, count + 1), steps=settings.polish)
    seconds = time.perf_counter() - began

    retrained = retrain_seconds = None
    if settings.retrain:
        began = time.perf_counter()
        anew, _ = fit(hidden, scores, with_row.info, candidate, _kind(head, settings.seed))
        retrain_seconds = time.perf_counter() - began
        retrained = float(reached(anew.logits(held_hidden), held_scores).mean())
    singles = held_scores.mean(0)
    final = after.logits(held_hidden)[:, : count + 1]
    report = AddWorkerReport(
        out=settings.out,
        worker=settings.worker,
        workers=workers,
        tasks=int(new.sum()),
        held_out=len(held.tasks),
        best_single=workers[int(singles.argmax())],
        best_single_score=float(singles.max()),
        before=float(reached(head.logits(held_hidden)[:, :count], held_scores[:, :count]).mean()),
        row=float(reached(with_row.logits(held_hidden)[:, : count + 1], held_scores).mean()),
        after=float(reached(final, held_scores).mean()),
        retrained=retrained,
        share=float((final.argmax(-1) == count).float().mean()),
        seconds=seconds,
        retrain_seconds=retrain_seconds,
    )
    save_checkpoint(settings.out, replace(after, info=replace(after.info, trained=_trained(settings, head, report))))
    return report


def usual(head: Checkpoint, scores: Tensor, tau: float) -> float | None:
    """The newcomer's prior: the others' mean and, in units of logits, how much better it is than they are on the tasks
    `[N, L + 1]` where it was tried (None: the head has no prior)."""
    if head.prior is None:
        return None
    count = len(head.info.workers)
    better = (scores[:, count] - scores[:, :count].nanmean(1)).nanmean()
    return float(head.prior[:count].mean() + better / tau)


def widened(head: Checkpoint, worker: str, prior: float | None) -> Checkpoint:
    """The head with one more worker, whose row of zeros follows the others' (and comes before the roles)."""
    count = len(head.info.workers)
    info = replace(head.info, workers=(*head.info.workers, worker))
    weight = torch.cat([head.weight[:count], torch.zeros(1, head.weight.shape[1]), head.weight[count:]])
    if head.prior is None or prior is None:
        return replace(head, info=info, weight=weight)
    priors = torch.cat([head.prior[:count], torch.tensor([prior]), head.prior[count:]])
    return replace(head, info=info, weight=weight, prior=priors)


def improved(
    head: Checkpoint, hidden: Tensor, scores: Tensor, candidate: Candidate, *, rows: slice, steps: int = 100
) -> Checkpoint:
    """The head with the rows of some workers fitted to soft targets on hidden states `[N, d]` and scores `[N, L]`, the
    others as they were."""
    count, space = len(head.info.workers), space_of(head)
    logits = head.logits(hidden)[:, :count]
    found = change(
        logits, space.inputs(hidden), scores, tau=candidate.tau, decay=candidate.decay, rows=rows, steps=steps
    )
    weight = head.weight.clone()
    weight[:count] += space.weight(found)
    return replace(head, weight=weight)


def _candidate(settings: AddWorkerRun, head: Checkpoint) -> Candidate:
    if settings.worker in head.info.workers:
        raise CheckpointError(f"{settings.checkpoint} has a row for {settings.worker} already")
    trained = sft_notes(head)
    tau = float(trained.get("tau", _TAU)) if settings.tau is None else settings.tau
    decay = float(trained.get("decay", _DECAY)) if settings.decay is None else settings.decay
    if not (tau > 0 and decay > 0 and settings.polish >= 0):
        raise ConfigError("tau and decay must be positive, and polish not negative")
    return Candidate(tau, decay, _GAMMA if head.landmarks is None else float(head.landmarks.gamma))


def _kind(head: Checkpoint, seed: int) -> Kind:
    if head.landmarks is None:
        return Kind("linear", seed=seed)
    return Kind("landmarks", sft_notes(head).get("objective", "kl"), head.landmarks.count, seed)


def _tables(
    settings: AddWorkerRun, head: Checkpoint, workers: Sequence[str]
) -> tuple[Outcomes, Tensor, Outcomes, Tensor]:
    """Training tasks with scores `[N, L + 1]` (NaN: none), and the held-out tasks that every worker has a score for."""
    found = read_outcomes(settings.outcomes)
    where = settings.outcomes / "outcomes.parquet"
    if missing := [name for name in workers if name not in found.workers]:
        raise DataError(f"{where} has no outcome of {', '.join(missing)}; there are {', '.join(found.workers)}")
    learned, held = found.split(settings.split), found.split(settings.val_split)
    tables = []
    for part in (learned, held):
        rows = {task.task_id: index for index, task in enumerate(part.tasks)}
        table = np.full((len(rows), len(workers)), np.nan, dtype=np.float32)
        for outcome in part.outcomes:
            if outcome.worker in workers:
                table[rows[outcome.task_id], workers.index(outcome.worker)] = outcome.score
        tables.append(table)
    table, held_table = tables
    # Where the newcomer is alone, nothing says whom it is to be preferred to.
    able = np.flatnonzero(np.isfinite(table[:, -1]) & (np.isfinite(table).sum(1) >= 2))
    if not len(able):
        raise DataError(f"{where}: {settings.worker} shares no task of the split {settings.split} with another worker")
    if settings.tasks is not None and settings.tasks < len(able):
        kept = np.random.default_rng(settings.seed).permutation(able)[: settings.tasks]
        table[np.setdiff1d(np.arange(len(table)), kept), -1] = np.nan
    told = np.flatnonzero(np.isfinite(table).sum(1) >= 2)
    whole = np.flatnonzero(np.isfinite(held_table).all(1))
    if not len(whole):
        raise DataError(f"{where}: no task of the split {settings.val_split} has outcomes of all workers to measure on")
    return (
        Outcomes(tuple(learned.tasks[row] for row in told), ()),
        torch.from_numpy(table[told]),
        Outcomes(tuple(held.tasks[row] for row in whole), ()),
        torch.from_numpy(held_table[whole]),
    )


def _trained(settings: AddWorkerRun, head: Checkpoint, report: AddWorkerReport) -> dict[str, Any]:
    note = {"worker": settings.worker, "tasks": report.tasks, "seed": settings.seed, "polish": settings.polish}
    return {**head.info.trained, "added": [*head.info.trained.get("added", []), note]}
