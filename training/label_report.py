"""What a labelling shows: bars while it runs, and a report at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.journal import Journal, Sample
from training.labelling import Lane

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class WorkerReport:
    """One worker's part of a report. `mean` is over the samples that have a score, None without any; `usd` and
    `requests` are this run's, judges included."""

    name: str
    samples: int
    new: int
    failed: int
    ungraded: int
    mean: float | None
    usd: float
    requests: int


@dataclass(frozen=True)
class LabelReport:
    """What a labelling did. `wanted` counts samples of all workers; `usd` and `requests` are of all runs of the
    journal. `stopped` says why it ended before all was done, empty if it did not. `errors` are (task, worker, what)."""

    out: Path
    tasks: int
    wanted: int
    workers: tuple[WorkerReport, ...]
    usd: float
    requests: int
    stopped: str = ""
    errors: tuple[tuple[str, str, str], ...] = ()

    @property
    def complete(self) -> bool:
        return sum(worker.samples - worker.ungraded for worker in self.workers) == self.wanted

    def json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "tasks": self.tasks,
            "wanted": self.wanted,
            "complete": self.complete,
            "stopped": self.stopped,
            "usd": self.usd,
            "requests": self.requests,
            "workers": {
                worker.name: {
                    "samples": worker.samples,
                    "new": worker.new,
                    "failed": worker.failed,
                    "ungraded": worker.ungraded,
                    "mean": worker.mean,
                    "usd": worker.usd,
                    "requests": worker.requests,
                }
                for worker in self.workers
            },
            "errors": [{"task": task, "worker": worker, "error": what} for task, worker, what in self.errors],
        }

    def table(self) -> Table:
        from rich.table import Table

        title = f"{self.tasks} tasks, {self.wanted} samples wanted, ${self.usd:.4f} and {self.requests} requests so far"
        table = Table(title=title, caption=self.stopped or None)
        table.add_column("worker")
        for name in ("samples", "new", "failed", "not graded", "mean score", "USD", "requests"):
            table.add_column(name, justify="right")
        for worker in self.workers:
            mean = "" if worker.mean is None else f"{worker.mean:.3f}"
            counts = (worker.samples, worker.new, worker.failed, worker.ungraded)
            table.add_row(worker.name, *map(str, counts), mean, f"{worker.usd:.4f}", str(worker.requests))
        return table


Watching = tuple[Callable[[Sample], None], Callable[[], None]]


@contextmanager
def shown(progress: bool, lanes: Mapping[str, Lane], journal: Journal, total: int) -> Iterator[Watching]:
    """A bar for each worker on standard error: samples of `total`, cost so far, failures, time left."""
    if not progress:
        yield (lambda _sample: None), (lambda: None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        rows = {
            name: bars.add_task(name, total=total, completed=total - len(lane.queue), state="")
            for name, lane in lanes.items()
        }
        everything = bars.add_task(
            "all", total=total * len(lanes), completed=sum(total - len(lane.queue) for lane in lanes.values()), state=""
        )

        def on_sample(sample: Sample) -> None:
            bars.advance(rows[sample.worker])
            bars.advance(everything)

        def on_change() -> None:
            for name, lane in lanes.items():
                failed = f" {lane.failed} failed" if lane.failed else ""
                bars.update(rows[name], state=f"${lane.usd:.4f}{failed}")
            bars.update(everything, state=f"${journal.usd:.4f} {journal.requests} requests")

        yield on_sample, on_change
