"""`fugu train sft`: from a folder of recorded outcomes to a router checkpoint, by gradient on soft targets (Fugu report
§3.1). Needs no Ray, no configuration and no server.

Hidden states are computed once and kept on disk; settings are chosen by cross-validation within the training split, so
that every other split stays unseen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actors.errors import ConfigError, DataError
from actors.model_files import resolve_model
from orchestrator.backbone import Device
from orchestrator.head import Checkpoint, CheckpointInfo, PromptFormat, Read, save_checkpoint
from training.features import middle_read, task_states
from training.fit import Candidate, Head, Kind, fit, folds_of, space_of, unfitted
from training.landmarks import landmark_domains
from training.outcomes import Outcomes, read_outcomes
from training.sft import Objective, reached, solve

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SftRun:
    """What to learn from and what to write.

    `workers` none: all that the outcomes name. `head` says what the weights multiply: nearness to at most `landmarks`
    landmarks (fewer where tasks are few, or more than 20,000 numbers would be trained), or standardised hidden states.
    `taus` × `decays` × `gammas` are tried by cross-validation within `split`: on `folds` parts of its tasks and on as
    many of its data sets held out whole, which count alike; one candidate alone is taken untried. `objective` is
    `training.sft.solve`'s. `reads` none: one read in the middle of the backbone. `reads`, `prompt_format` and
    `max_tokens` (what is read of each task) go into the checkpoint. `cache` none: one file of hidden states for all
    runs of this user.
    """

    outcomes: Path
    out: Path
    workers: tuple[str, ...] = ()
    split: str = "train"
    seed: int = 0
    backbone: str = "SmolLM2-135M-Instruct"
    reads: tuple[Read, ...] = ()
    prompt_format: PromptFormat = "chat"
    max_tokens: int = 256
    head: Head = "landmarks"
    objective: Objective = "kl"
    taus: tuple[float, ...] = (0.5,)
    decays: tuple[float, ...] = (0.3, 1.0)
    gammas: tuple[float, ...] = (1.0, 4.0)
    landmarks: int = 512
    folds: int = 5
    device: Device = "auto"
    cache: Path | None = None
    progress: bool = True

    @property
    def kind(self) -> Kind:
        return Kind(self.head, self.objective, self.landmarks, self.seed)


@dataclass(frozen=True)
class Tried:
    """A candidate and the mean score that its choices reached on held-out tasks: of known data sets, and of data sets
    that were held out whole (None: there are too few)."""

    candidate: Candidate
    seen: float
    unseen: float | None

    @property
    def value(self) -> float:
        """What is to be large: both count alike, for a router meets both."""
        return self.seen if self.unseen is None else (self.seen + self.unseen) / 2


@dataclass(frozen=True)
class SftReport:
    """`numbers` were trained on `tasks` tasks. `held_out` is what the chosen settings reached in cross-validation
    (None: nothing was compared, then `tried` is empty); `best_single` is the best worker on the tasks, with its mean
    score; `fitted` what the head reaches on its own training tasks."""

    out: Path
    workers: tuple[str, ...]
    tasks: int
    numbers: int
    settings: Candidate
    tried: tuple[Tried, ...]
    best_single: str
    best_single_score: float
    held_out: Tried | None
    fitted: float
    losses: tuple[float, ...]
    seconds: float

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.numbers:,} numbers trained on {self.tasks} tasks", caption=f"wrote {self.out}")
        table.add_column("")
        table.add_column("", justify="right")
        table.add_row("tau", f"{self.settings.tau:g}")
        table.add_row("decay", f"{self.settings.decay:g}")
        table.add_row("gamma", f"{self.settings.gamma:g}")
        table.add_row("loss (KL), first to last step", f"{self.losses[0]:.4f} to {self.losses[-1]:.4f}")
        table.add_row(f"best single worker ({self.best_single})", f"{self.best_single_score:.4f}")
        if self.held_out is not None:
            table.add_row("head, held-out tasks", f"{self.held_out.seen:.4f}")
            if self.held_out.unseen is not None:
                table.add_row("head, held-out data sets", f"{self.held_out.unseen:.4f}")
        table.add_row("head, these tasks", f"{self.fitted:.4f}")
        table.add_row("seconds", f"{self.seconds:.1f}")
        return table


def run(settings: SftRun) -> SftReport:
    """Train a head and write its checkpoint (whole or not at all).

    Raises:
        DataError: outcomes that cannot be used, an unknown split or worker; names file and row or worker.
        ConfigError: fewer than two workers, one named twice, settings out of range, or a backbone that is not there.
    """
    began = time.perf_counter()
    check(settings)
    tasks, workers, scores = training_table(settings)
    files = resolve_model(settings.backbone)
    info = info_of(settings, workers)
    hidden = task_states(
        tasks.tasks,
        info,
        files.folder,
        singular={},
        max_tokens=settings.max_tokens,
        device=settings.device,
        cache=settings.cache,
        progress=settings.progress,
    )
    chosen, tried = choose(hidden, scores, [task.dataset for task in tasks.tasks], settings)
    head, losses = fit(hidden, scores, info, chosen, settings.kind)
    if head.landmarks is not None:
        fields = [task.domain for task in tasks.tasks]
        info = replace(info, domains=landmark_domains(head.landmarks, head.standardised(hidden), fields))
    means = np.nanmean(scores.numpy(), axis=0)
    best = int(means.argmax())
    report = SftReport(
        out=settings.out,
        workers=workers,
        tasks=len(tasks.tasks),
        numbers=head.weight.numel() + len(workers),
        settings=chosen,
        tried=tried,
        best_single=workers[best],
        best_single_score=float(means[best]),
        held_out=max(tried, key=lambda one: one.value, default=None),
        fitted=float(reached(head.logits(hidden), scores).mean()),
        losses=losses,
        seconds=time.perf_counter() - began,
    )
    save_checkpoint(settings.out, replace(head, info=replace(info, trained=trained(settings, report, head))))
    return report


def check(settings: SftRun) -> None:
    """Refuse settings that make no sense before anything is computed.

    Raises:
        ConfigError: says which.
    """
    if not settings.taus or min(settings.taus) <= 0:
        raise ConfigError("tau must be a positive number")
    if not settings.decays or min(settings.decays) <= 0:
        raise ConfigError("the decay must be a positive number")
    if not settings.gammas or min(settings.gammas) <= 0 or settings.landmarks < 1:
        raise ConfigError("gamma must be a positive number, and there must be at least one landmark")
    if settings.folds < 2:
        raise ConfigError("cross-validation needs at least two folds")
    if len(set(settings.workers)) != len(settings.workers):
        raise ConfigError("a worker is named twice")


def training_table(settings: SftRun) -> tuple[Outcomes, tuple[str, ...], Tensor]:
    """The training tasks that say something, the workers, and their scores `[N, L]` (NaN: not recorded)."""
    found = read_outcomes(settings.outcomes)
    where = Path(settings.outcomes) / "outcomes.parquet"
    workers = settings.workers or found.workers
    if missing := [name for name in workers if name not in found.workers]:
        raise DataError(f"{where} has no outcome of {', '.join(missing)}; there are {', '.join(found.workers)}")
    if len(workers) < 2:
        raise ConfigError(f"a router chooses among at least two workers; {where} and the settings leave {len(workers)}")
    part = found.split(settings.split)
    if silent := [name for name in workers if name not in part.workers]:
        raise DataError(f"{where} has no outcome of {', '.join(silent)} on the split {settings.split}")
    scores = part.scores(workers)
    told = np.flatnonzero(np.isfinite(scores).sum(axis=1) >= 2)
    if not len(told):
        raise DataError(f"{where}: no task of the split {settings.split} has outcomes of two of these workers")
    return Outcomes(tuple(part.tasks[row] for row in told), ()), tuple(workers), torch.from_numpy(scores[told]).float()


def info_of(settings: SftRun, workers: Sequence[str]) -> CheckpointInfo:
    """What the head will belong to: workers, backbone, and the way in which tasks are read.

    Raises:
        ConfigError: the backbone is not there.
    """
    files = resolve_model(settings.backbone)
    reads = settings.reads or (middle_read(files.folder),)
    return CheckpointInfo(
        tuple(workers), files.id, files.revision, reads, settings.prompt_format, max_tokens=settings.max_tokens
    )


def choose(
    hidden: Tensor, scores: Tensor, datasets: Sequence[str], settings: SftRun
) -> tuple[Candidate, tuple[Tried, ...]]:
    """The candidate whose choices reach most on held-out tasks, and what each reached."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    gammas = settings.gammas if settings.head == "landmarks" else settings.gammas[:1]
    candidates = [Candidate(tau, decay, gamma) for gamma, tau, decay in product(gammas, settings.taus, settings.decays)]
    if len(candidates) == 1:
        return candidates[0], ()
    if len(hidden) < 2 * settings.folds:
        raise DataError(f"{len(hidden)} tasks are too few for {settings.folds} folds")
    kinds = [folds_of(range(len(hidden)), settings.folds, settings.seed)]
    if len(set(datasets)) >= 2 * settings.folds:
        kinds.append(folds_of(datasets, settings.folds, settings.seed))
    totals = torch.zeros(len(candidates), len(kinds), dtype=torch.float64)
    columns = (TextColumn("choosing settings"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not settings.progress) as bar:
        row = bar.add_task("choose", total=settings.folds * len(kinds))
        for kind, folds in enumerate(kinds):
            for fold in folds:
                totals[:, kind] += _reached_on(fold, hidden, scores, candidates, settings)
                bar.advance(row)
    tried = tuple(
        Tried(candidate, means[0], means[1] if len(means) == 2 else None)
        for candidate, means in zip(candidates, (totals / len(hidden)).tolist(), strict=True)
    )
    return max(tried, key=lambda one: one.value).candidate, tried


def _reached_on(
    fold: Tensor, hidden: Tensor, scores: Tensor, candidates: Sequence[Candidate], settings: SftRun
) -> Tensor:
    """The sum of the scores that each candidate reaches on the tasks `fold [n]` after training on the others."""
    rest = torch.ones(len(hidden), dtype=torch.bool)
    rest[fold] = False
    empty = unfitted(hidden[rest], scores.shape[1], settings.kind)
    totals = torch.zeros(len(candidates), dtype=torch.float64)
    for gamma in dict.fromkeys(candidate.gamma for candidate in candidates):
        space = space_of(empty, gamma)
        inputs, held = space.inputs(hidden[rest]), space.inputs(hidden[fold])
        start: Tensor | None = None
        for index, candidate in enumerate(candidates):
            if candidate.gamma == gamma:
                found = solve(
                    inputs,
                    scores[rest],
                    tau=candidate.tau,
                    decay=candidate.decay,
                    objective=settings.objective,
                    start=start,
                )
                start = found.weight
                totals[index] = reached(found.prior + held @ found.weight.T, scores[fold]).sum()
    return totals


def trained(settings: SftRun, report: SftReport, head: Checkpoint) -> Mapping[str, Any]:
    """What the checkpoint says about how it was made."""
    return {
        "method": "sft",
        "split": settings.split,
        "tasks": report.tasks,
        "seed": settings.seed,
        "head": settings.head,
        "objective": settings.objective,
        "tau": report.settings.tau,
        "decay": report.settings.decay,
        "gamma": report.settings.gamma,
        "numbers": report.numbers,
        "landmarks": head.landmarks.count if head.landmarks is not None else None,
        "best_single": report.best_single,
        "held_out": report.held_out and asdict(report.held_out),
    }
