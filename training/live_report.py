"""What a live evaluation found: the workers, the systems, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from actors.errors import DataError
from training.baselines import by_domain
from training.evaluate import Estimate, bootstrap
from training.journal import Key, Sample
from training.outcomes import Task
from training.systems import System

if TYPE_CHECKING:
    from rich.table import Table

Vector = NDArray[np.float64]
Kind = Literal["worker", "system", "baseline", "bound"]


@dataclass(frozen=True)
class Attempt:
    """One answer of a system. `score` None: it failed, or could not be graded, and `error` says why. `workers` acted,
    in order; `cost_usd` is what their calls cost without any cache (None: a price is unknown)."""

    system: str
    task_id: str
    sample: int
    score: float | None = None
    workers: tuple[str, ...] = ()
    cost_usd: float | None = None
    latency_s: float = 0.0
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class LiveData:
    """Everything that was measured: `answers` of `workers` and `attempts` of `systems` on `tasks`."""

    tasks: Sequence[Task]
    workers: tuple[str, ...]
    answers: Mapping[Key, Sample]
    systems: tuple[System, ...]
    attempts: Sequence[Attempt]
    samples: int


@dataclass(frozen=True)
class LiveRow:
    """One way of answering. `score` is its mean over `tasks` tasks, `gain` the difference to the reference, paired by
    task; `calls` of workers, `cost_usd` and seconds are per answer, the latter at the median and at the 95th
    percentile. `failed` answers have no score. `shares` is the share of each worker in what was done, by domain."""

    name: str
    kind: Kind
    score: Estimate
    gain: Estimate
    tasks: int
    calls: float | None = None
    cost_usd: float | None = None
    tokens: float | None = None
    p50_s: float | None = None
    p95_s: float | None = None
    failed: int = 0
    note: str = ""
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class LiveReport:
    """`reference` is what gains are over, and `reference_from` says what it was chosen on. `wanted` tasks were to be
    measured; `stopped` says why fewer were (empty: none were left out for want of a budget). `usd` and `requests` are
    those of all runs of the folder. `left_out` says why a system has no row, `errors` why answers have no score."""

    workers: tuple[str, ...]
    tasks: int
    wanted: int
    reference: str
    reference_from: str
    rows: tuple[LiveRow, ...]
    usd: float
    requests: int
    stopped: str
    min_gain: float | None
    left_out: Mapping[str, str]
    errors: tuple[tuple[str, str, str], ...]

    @property
    def systems(self) -> tuple[LiveRow, ...]:
        return tuple(row for row in self.rows if row.kind == "system")

    @property
    def passed(self) -> bool:
        """Whether the gate is passed: every system has been measured and gains enough. True where none was set."""
        if self.min_gain is None:
            return True
        whole = not self.stopped and not self.left_out and bool(self.systems)
        return whole and all(row.gain.mean >= self.min_gain for row in self.systems if row.name != self.reference)

    def row(self, name: str) -> LiveRow:
        return next(row for row in self.rows if row.name == name)

    def json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        errors = [{"system": system, "task": task, "error": what} for system, task, what in self.errors]
        return fields | {
            "rows": [asdict(row) for row in self.rows],
            "left_out": dict(self.left_out),
            "errors": errors,
            "passed": self.passed,
        }

    def table(self) -> Table:
        from rich.table import Table

        told = f"gain: over {self.reference} (best on {self.reference_from}), paired by task"
        table = Table(
            title=f"{self.tasks} of {self.wanted} tasks, live; ${self.usd:.4f} and {self.requests} requests so far",
            caption=f"{told}. {self.stopped}" if self.stopped else told,
        )
        table.add_column("", min_width=16)
        paid = any(row.cost_usd is not None for row in self.rows)
        names = ("score (95%)", "gain (95%)", "calls", *(("USD",) if paid else ()), "p50 s", "p95 s", "failed")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        styles: dict[Kind, str | None] = {"worker": None, "system": "bold green", "baseline": None, "bound": "dim"}
        for row, after in zip(self.rows, (*self.rows[1:], None), strict=True):
            numbers = [
                f"{row.score.mean:.3f} ({row.score.low:.3f}–{row.score.high:.3f})",
                f"{row.gain.mean:+.3f} ({row.gain.low:+.3f}–{row.gain.high:+.3f})",
                _number(row.calls, ".2g"),
                *((_number(row.cost_usd, ".4g"),) if paid else ()),
                _number(row.p50_s, ".3g"),
                _number(row.p95_s, ".3g"),
                str(row.failed) if row.failed else "",
            ]
            ends = after is None or after.kind != row.kind
            name = f"{row.name} ({row.note})" if row.note else row.name
            table.add_row(name, *numbers, style=styles[row.kind], end_section=ends)
        return table


def report_of(
    data: LiveData,
    *,
    wanted: int,
    reference: tuple[str, str] | None,
    spent: tuple[float, int],
    stopped: str,
    seed: int,
    min_gain: float | None,
) -> LiveReport:
    """The report. `reference` is a worker and what it was chosen on; None takes the worker that is best on these very
    tasks, or without workers the first system that was measured.

    Raises:
        DataError: nothing has a score.
    """
    scores = _Scores(data, seed)
    for name in data.workers:
        scores.worker(name)
    left_out: dict[str, str] = {}
    for system in data.systems:
        if not scores.system(system):
            left_out[system.name] = "no answer of it has a score"
    if not scores.values:
        raise DataError("nothing was measured: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
    if reference is None or reference[0] not in scores.values:
        means = {name: float(np.nanmean(scores.values[name])) for name in data.workers}
        best = max(means, key=means.__getitem__) if means else next(iter(scores.values))
        reference = (best, "these very tasks" if means else "the order of the models")
    if data.workers:
        table = np.stack([scores.values[name] for name in data.workers])
        scores.plain("random worker", "baseline", table.mean(0))
        scores.plain("oracle", "bound", table.max(0))
    errors = [(one.system, one.task_id, one.error) for one in data.attempts if one.error]
    return LiveReport(
        data.workers,
        len(data.tasks),
        wanted,
        *reference,
        scores.rows(reference[0]),
        *spent,
        stopped,
        min_gain,
        left_out,
        tuple(errors),
    )


class _Scores:
    """Collects a number per task for each way of answering, and what else its row says."""

    def __init__(self, data: LiveData, seed: int) -> None:
        self._data = data
        self._seed = seed
        self._place = {task.task_id: index for index, task in enumerate(data.tasks)}
        self.values: dict[str, Vector] = {}
        self._more: dict[str, tuple[Kind, dict[str, Any]]] = {}

    def worker(self, name: str) -> None:
        taken = [
            self._data.answers[task.task_id, name, index]
            for task in self._data.tasks
            for index in range(self._data.samples)
        ]
        self._add(
            name,
            "worker",
            [(one.task_id, one.score or 0.0) for one in taken],
            costs=[one.cost_usd for one in taken],
            seconds=[one.latency_s for one in taken],
            tokens=[one.input_tokens + one.output_tokens for one in taken],
            calls=1.0,
        )

    def system(self, system: System) -> bool:
        """False where it has no score at all."""
        mine = [one for one in self._data.attempts if one.system == system.name]
        good = [one for one in mine if one.score is not None]
        if not good:
            return False
        domain = {task.task_id: task.domain for task in self._data.tasks}
        acted = [(domain[one.task_id], name) for one in good for name in one.workers]
        names = (*self._data.workers, *dict.fromkeys(name for _, name in acted if name not in self._data.workers))
        shares = by_domain([where for where, _ in acted], [names.index(name) for _, name in acted], names)
        self._add(
            system.name,
            "system",
            [(one.task_id, one.score or 0.0) for one in good],
            costs=[one.cost_usd for one in good],
            seconds=[one.latency_s for one in good],
            tokens=[one.tokens for one in good],
            calls=float(np.mean([len(one.workers) for one in good])),
            failed=len(mine) - len(good),
            note=system.note,
            shares=shares,
        )
        return True

    def plain(self, name: str, kind: Kind, values: Vector) -> None:
        self.values[name], self._more[name] = values, (kind, {})

    def rows(self, reference: str) -> tuple[LiveRow, ...]:
        base, rows = self.values[reference], []
        for name, values in self.values.items():
            kind, more = self._more[name]
            known = values[np.isfinite(values)]
            paired = (values - base)[np.isfinite(values - base)]
            rng = np.random.default_rng(self._seed)
            score = bootstrap(known, rng)
            # Without a task in common nothing can be said of the difference.
            gain = bootstrap(paired, rng) if len(paired) else Estimate(0.0, -1.0, 1.0)
            rows.append(LiveRow(name, kind, score, gain, len(known), **more))
        return tuple(rows)

    def _add(
        self,
        name: str,
        kind: Kind,
        scored: Sequence[tuple[str, float]],
        *,
        costs: Sequence[float | None],
        seconds: Sequence[float],
        tokens: Sequence[int],
        **more: Any,
    ) -> None:
        sums, counts = np.zeros(len(self._place)), np.zeros(len(self._place))
        for task_id, score in scored:
            sums[self._place[task_id]] += score
            counts[self._place[task_id]] += 1
        self.values[name] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        known = [cost for cost in costs if cost is not None]
        p50, p95 = np.percentile(seconds, [50, 95])
        self._more[name] = (
            kind,
            {
                "cost_usd": float(np.mean(known)) if len(known) == len(costs) else None,
                "tokens": float(np.mean(tokens)),
                "p50_s": float(p50),
                "p95_s": float(p95),
                **more,
            },
        )


def write_report(report: LiveReport, folder: Path) -> None:
    """`eval.json`, quality against cost, and the routing shares of each system."""
    from training.plots import Point, draw_quality, draw_shares

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.json").write_text(json.dumps(report.json(), indent=2, allow_nan=False) + "\n")
    paid = all(row.cost_usd is not None for row in report.rows if row.kind in ("worker", "system"))
    points = [
        Point(row.name, row.kind == "system", price, row.score.mean, row.score.low, row.score.high)
        for row in report.rows
        if (price := row.cost_usd if paid else row.calls) is not None
    ]
    title = f"{report.tasks} tasks"
    draw_quality(points, folder / "quality.png", price="USD per task" if paid else "calls per task", title=title)
    for row in report.systems:
        if row.shares:
            name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in row.name)
            names = list(dict.fromkeys(worker for shares in row.shares.values() for worker in shares))
            draw_shares(row.shares, names, folder / f"shares-{name}.png", title=f"{row.name}: {title}")


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
