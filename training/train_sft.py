"""`fugu train sft`: from a folder of recorded outcomes to a router checkpoint, by gradient on soft targets (Fugu report
§3.1). Needs no Ray, no configuration and no server.

Hidden states are computed once and kept on disk; settings are chosen by cross-validation within the training split, so
that every other split stays unseen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from actors.errors import ConfigError, DataError
from actors.model_files import resolve_model
from orchestrator.backbone import Device
from orchestrator.head import FINAL, Checkpoint, CheckpointInfo, PromptFormat, Read, save_checkpoint
from training.features import task_states
from training.outcomes import Outcomes, read_outcomes
from training.sft import SftResult, SftSettings, reached, train

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SftRun:
    """What to learn from and what to write.

    `workers` none: all that the outcomes name. `taus` × `decays` are tried by `folds`-fold cross-validation over the
    tasks of `split`; one candidate alone is taken untried. `reads`, `prompt_format` and `max_tokens` (what is read of
    each task) go into the checkpoint. `cache` none: one file of hidden states for all runs of this user.
    """

    outcomes: Path
    out: Path
    workers: tuple[str, ...] = ()
    split: str = "train"
    seed: int = 0
    backbone: str = "SmolLM2-135M-Instruct"
    reads: tuple[Read, ...] = FINAL
    prompt_format: PromptFormat = "chat"
    max_tokens: int = 1024
    taus: tuple[float, ...] = (0.1, 0.25, 0.5)
    decays: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    epochs: int = 150
    learning_rate: float = 0.01
    folds: int = 5
    device: Device = "auto"
    cache: Path | None = None
    json: Path | None = None
    progress: bool = True


@dataclass(frozen=True)
class Tried:
    """A candidate and the mean score that its choices reached on the held-out folds."""

    tau: float
    weight_decay: float
    reached: float


@dataclass(frozen=True)
class SftReport:
    """`numbers` were trained on `tasks` tasks. `best_single` is the best worker on them, with its mean score;
    `held_out` what the chosen settings reached in cross-validation (None: nothing was compared); `fitted` what the head
    reaches on its own training tasks."""

    out: Path
    workers: tuple[str, ...]
    tasks: int
    numbers: int
    settings: SftSettings
    tried: tuple[Tried, ...]
    best_single: str
    best_single_score: float
    held_out: float | None
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
        table.add_row("weight decay", f"{self.settings.weight_decay:g}")
        table.add_row("loss (KL), first to last epoch", f"{self.losses[0]:.4f} to {self.losses[-1]:.4f}")
        table.add_row(f"best single worker ({self.best_single})", f"{self.best_single_score:.4f}")
        if self.held_out is not None:
            table.add_row("head, held-out folds", f"{self.held_out:.4f}")
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
    info = CheckpointInfo(workers, files.id, files.revision, settings.reads, settings.prompt_format)
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
    chosen, tried = choose(hidden, scores, settings)
    result = train(hidden, scores, chosen)
    means = np.nanmean(scores.numpy(), axis=0)
    best = int(means.argmax())
    held_out = max((entry.reached for entry in tried), default=None)
    report = SftReport(
        out=settings.out,
        workers=workers,
        tasks=len(tasks.tasks),
        numbers=result.weight.numel(),
        settings=chosen,
        tried=tried,
        best_single=workers[best],
        best_single_score=float(means[best]),
        held_out=held_out,
        fitted=float(reached(result.logits(hidden), scores).mean()),
        losses=result.losses,
        seconds=time.perf_counter() - began,
    )
    save_checkpoint(settings.out, checkpoint(replace(info, trained=trained(settings, report)), result))
    if settings.json is not None:
        settings.json.parent.mkdir(parents=True, exist_ok=True)
        settings.json.write_text(json.dumps(report.json(), indent=2, allow_nan=False) + "\n")
    return report


def check(settings: SftRun) -> None:
    """Refuse settings that make no sense before anything is computed.

    Raises:
        ConfigError: says which.
    """
    if not settings.taus or min(settings.taus) <= 0:
        raise ConfigError("tau must be a positive number")
    if not settings.decays or min(settings.decays) < 0:
        raise ConfigError("the weight decay must not be negative")
    if settings.epochs < 1 or settings.folds < 2:
        raise ConfigError("training needs at least one epoch, cross-validation at least two folds")
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


def choose(hidden: Tensor, scores: Tensor, settings: SftRun) -> tuple[SftSettings, tuple[Tried, ...]]:
    """The candidate whose choices reach most on held-out folds, and what each reached."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    candidates = [
        SftSettings(tau, settings.learning_rate, decay, settings.epochs, seed=settings.seed)
        for tau in settings.taus
        for decay in settings.decays
    ]
    if len(candidates) == 1:
        return candidates[0], ()
    if len(hidden) < settings.folds:
        raise DataError(f"{len(hidden)} tasks are too few for {settings.folds} folds")
    folds = folds_of(len(hidden), settings.folds, settings.seed)
    columns = (TextColumn("choosing settings"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tried = []
    with Progress(*columns, disable=not settings.progress) as bar:
        row = bar.add_task("choose", total=len(candidates) * len(folds))
        for candidate in candidates:
            total = 0.0
            for fold in folds:
                rest = torch.ones(len(hidden), dtype=torch.bool)
                rest[fold] = False
                result = train(hidden[rest], scores[rest], candidate)
                total += float(reached(result.logits(hidden[fold]), scores[fold]).sum())
                bar.advance(row)
            tried.append(Tried(candidate.tau, candidate.weight_decay, total / len(hidden)))
    best = max(range(len(tried)), key=lambda index: tried[index].reached)
    return candidates[best], tuple(tried)


def folds_of(count: int, folds: int, seed: int) -> Sequence[Tensor]:
    """A random partition of `count` tasks into parts of nearly equal size."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tensor_split(folds)


def checkpoint(info: CheckpointInfo, result: SftResult) -> Checkpoint:
    return Checkpoint(info, result.weight, result.shift, result.scale)


def trained(settings: SftRun, report: SftReport) -> Mapping[str, Any]:
    """What the checkpoint says about how it was made."""
    return {
        "method": "sft",
        "split": settings.split,
        "tasks": report.tasks,
        "seed": settings.seed,
        "tau": report.settings.tau,
        "weight_decay": report.settings.weight_decay,
        "learning_rate": report.settings.learning_rate,
        "epochs": report.settings.epochs,
        "numbers": report.numbers,
        "read_tokens": settings.max_tokens,
        "best_single": report.best_single,
        "held_out": report.held_out,
    }
