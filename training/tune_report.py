"""What a tuning is asked for, and what it reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.backbone import Device
from training.evaluate import Estimate
from training.tune_space import Config, Method
from training.tune_trial import HoldOut

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class TuneRun:
    """What to tune, on what, and how long.

    `out` is the checkpoint to write, trained with the best settings on all tasks of `split`. `over` are knobs as
    `training.tune_space` reads them, in place of the method's usual ones. `checkpoint` is where evolutions start.
    `objective` "folds" scores on parts of `split` that a trial did not learn from (single tasks, or with `hold_out`
    whole data sets), so that `val_split` stays unseen; "val" scores on `val_split` itself. Each of `trials` is trained
    and scored up to `replicates` times; ASHA ends most of them earlier. At most `concurrency` run at once. Nodes of a
    cluster (`address`) need to share the folders.
    """

    outcomes: Path
    out: Path
    method: Method = "sft"
    over: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    checkpoint: Path | None = None
    split: str = "train"
    val_split: str = "val"
    objective: Literal["folds", "val"] = "folds"
    hold_out: HoldOut = "tasks"
    trials: int = 24
    replicates: int = 4
    concurrency: int = 2
    seed: int = 0
    backbone: str | None = None
    max_tokens: int | None = None
    device: Device = "auto"
    cache: Path | None = None
    address: str | None = None
    resume: bool = False
    progress: bool = True

    @property
    def folder(self) -> Path:
        return self.out.resolve().with_name(f"{self.out.stem}.tune")

    @property
    def folds(self) -> int:
        return max(3, self.replicates)


@dataclass(frozen=True)
class Trial:
    """One trial: its settings, its mean score on what it did not learn from, the replicates that it was given, and why
    it failed (empty: it did not)."""

    config: Config
    score: float | None
    replicates: int
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class TuneReport:
    """What a tuning found. `trials` come best first; only those with all replicates can be compared, and `best` is one
    of them. `validation` is the score of the checkpoint at `out` on the tasks of `val_split`, `gain` over
    `best_single`, the best worker on the training tasks (all None where that split has no tasks); where these
    tasks chose the settings (objective "val") or the generation (an evolution), the numbers flatter."""

    out: Path
    folder: Path
    method: Method
    objective: str
    replicates: int
    best: Trial
    trials: tuple[Trial, ...]
    best_single: str | None
    validation: Estimate | None
    gain: Estimate | None
    seconds: float

    @property
    def stopped_early(self) -> int:
        """Trials that ASHA ended before their last replicate."""
        return sum(not trial.error and trial.replicates < self.replicates for trial in self.trials)

    def json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        told = {
            "out": str(self.out),
            "folder": str(self.folder),
            "best": asdict(self.best),
            "trials": [asdict(trial) for trial in self.trials],
            "validation": self.validation and asdict(self.validation),
            "gain": self.gain and asdict(self.gain),
            "stopped_early": self.stopped_early,
        }
        return fields | told

    def table(self) -> Table:
        from rich.table import Table

        what = {"folds": "folds of the training tasks", "val": "the validation tasks"}[self.objective]
        told = f"wrote {self.out}"
        if self.validation is not None and self.gain is not None:
            told += f": {self.validation} on the validation tasks, a gain of {self.gain} over {self.best_single}"
        title = f"{len(self.trials)} trials of {self.method} on {what}, {self.stopped_early} of them ended early"
        table = Table(title=title, caption=told)
        table.add_column("score", justify="right")
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.config))
        for name in (*names, "replicates", "seconds"):
            table.add_column(name, justify="right")
        table.add_column("")
        for trial in self.trials:
            score = "" if trial.score is None else f"{trial.score:.4f}"
            values = [_shown(trial.config.get(name)) for name in names]
            numbers = (f"{trial.replicates} of {self.replicates}", f"{trial.seconds:.0f}")
            style = "bold green" if trial is self.best else "red" if trial.error else None
            table.add_row(score, *values, *numbers, trial.error, style=style)
        return table


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
