"""`fugu eval`: what routing is worth on recorded outcomes, against every worker and every simpler way of choosing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from actors.errors import ConfigError, DataError
from actors.model_files import resolve_model
from orchestrator.backbone import Device
from orchestrator.head import Checkpoint, check_fits, load_checkpoint
from training import baselines
from training.baselines import Matrix
from training.features import read_limit, task_states
from training.measured import Measured, measured
from training.outcomes import Outcomes

if TYPE_CHECKING:
    from rich.table import Table

Kind = Literal["worker", "head", "baseline", "bound"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: NDArray[np.float64], rng: np.random.Generator, *, resamples: int = 2000) -> Estimate:
    """Mean of one number per task `[N]`, with a 95% percentile interval from resampling whole tasks (Efron 1979)."""
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("bootstrap needs at least one number, all of them finite")
    means = [values[rng.integers(0, len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class EvalRun:
    """What to compare and where.

    `outcomes` is a folder of recorded outcomes, `split` the tasks to measure on, `train_split` those that the baselines
    learn from (where the folder has them). `workers` none: those of the checkpoint, else all. `out` is a folder for
    `eval.json` and the plots. `min_gain` makes the run a gate: `passed` says
    whether every head gains at least so much over the best single worker. `backbone` none: what
    the checkpoints name; `max_tokens` none: as each head was trained.
    """

    outcomes: Path
    checkpoints: tuple[Path, ...] = ()
    workers: tuple[str, ...] = ()
    split: str = "test"
    train_split: str = "train"
    out: Path | None = None
    seed: int = 0
    min_gain: float | None = None
    backbone: str | None = None
    max_tokens: int | None = None
    device: Device = "auto"
    cache: Path | None = None
    hidden_baselines: bool = True
    progress: bool = True


@dataclass(frozen=True)
class Row:
    """One way of answering: `score` is its mean over `tasks` tasks, `gain` the difference to the best single worker
    paired by task, `calls` per task, `cost_usd` per task where it was recorded, `turns` per task. `shares` is the share
    of each worker by domain."""

    name: str
    kind: Kind
    score: Estimate
    gain: Estimate
    tasks: int
    calls: float | None = None
    cost_usd: float | None = None
    turns: float | None = None
    note: str = ""
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalReport:
    """`best_single` is the worker that the gains are over and `best_single_from` says what it was chosen on.
    `left_out` gives the reason for each way of choosing that could not be measured."""

    settings: EvalRun
    workers: tuple[str, ...]
    tasks: int
    best_single: str
    best_single_from: str
    rows: tuple[Row, ...]
    left_out: Mapping[str, str]

    @property
    def heads(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.kind == "head")

    @property
    def passed(self) -> bool:
        """Whether the gate is passed; true where none was set."""
        least = self.settings.min_gain
        return least is None or (bool(self.heads) and all(row.gain.mean >= least for row in self.heads))

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def closed(self, row: Row) -> float | None:
        """The share of the way from the best single worker to the oracle that this closes."""
        gap = self.row("oracle").gain.mean
        return row.gain.mean / gap if gap > 0 else None

    def json(self) -> dict[str, Any]:
        rows = [asdict(row) | {"gap_closed": self.closed(row)} for row in self.rows]
        settings = {
            key: [str(path) for path in value] if isinstance(value, tuple) else value
            for key, value in asdict(self.settings).items()
        }
        return {
            "settings": {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
            "workers": list(self.workers),
            "tasks": self.tasks,
            "best_single": {"worker": self.best_single, "chosen_on": self.best_single_from},
            "rows": rows,
            "left_out": dict(self.left_out),
            "passed": self.passed,
        }

    def table(self) -> Table:
        from rich.table import Table

        table = Table(
            title=f"{self.tasks} tasks of {self.settings.split}, mean score with 95% interval",
            caption=f"gain: over {self.best_single} (best single on {self.best_single_from}), paired by task; gap: how "
            "much of the way from there to the oracle",
        )
        columns: list[tuple[str, Callable[[Row], str]]] = [
            ("score (95%)", lambda row: f"{row.score.mean:.3f} ({row.score.low:.3f}–{row.score.high:.3f})"),
            ("gain (95%)", lambda row: f"{row.gain.mean:+.3f} ({row.gain.low:+.3f}–{row.gain.high:+.3f})"),
            ("gap", lambda row: "" if row.kind == "worker" else _number(self.closed(row), ".0%")),
            ("calls", lambda row: _number(row.calls, ".2g")),
            ("USD", lambda row: _number(row.cost_usd, ".4g")),
            ("turns", lambda row: _number(row.turns, ".1f")),
        ]
        if all(row.cost_usd is None for row in self.rows):
            columns = [column for column in columns if column[0] != "USD"]
        if all(row.turns in (None, 1) for row in self.rows):
            columns = [column for column in columns if column[0] != "turns"]
        table.add_column("", min_width=16)
        for name, _ in columns:
            table.add_column(name, justify="right", no_wrap=True)
        styles: dict[Kind, str | None] = {"worker": None, "head": "bold green", "baseline": None, "bound": "dim"}
        for row, after in zip(self.rows, (*self.rows[1:], None), strict=True):
            name = f"{row.name} ({row.note})" if row.note else row.name
            ends = after is None or after.kind != row.kind
            table.add_row(name, *(text(row) for _, text in columns), style=styles[row.kind], end_section=ends)
        return table


def run(settings: EvalRun) -> EvalReport:
    """Measure, write the files of `settings.out`, and report.

    Raises:
        DataError: outcomes that cannot be used, an unknown split or worker; names file and row or worker.
        CheckpointError: a checkpoint that cannot be read or is of other workers or another backbone.
        ConfigError: a worker or a checkpoint named twice.
    """
    heads = {path.stem: load_checkpoint(path) for path in settings.checkpoints}
    if len(heads) != len(settings.checkpoints):
        raise ConfigError("two checkpoints have the same file name; the table could not tell them apart")
    workers = settings.workers or next((head.info.workers for head in heads.values()), ())
    data = measured(settings.outcomes, workers, settings.split, settings.train_split)
    for path, head in zip(settings.checkpoints, heads.values(), strict=True):
        check_fits(head, workers=data.workers, dimension=head.dimension, where=str(path))
    best, best_from = _best_single(data, heads)
    left_out: dict[str, str] = {}
    rows = _Rows(data, best, settings.seed)
    for index, name in enumerate(data.workers):
        rows.add(name, "worker", data.scores[:, index], costs=data.costs[:, index], calls=1.0, turns=1.0)
    rows.add("random worker", "baseline", np.nanmean(data.scores, axis=1), calls=1.0, turns=1.0)
    _simple(settings, data, rows, left_out)
    states = {name: _states(settings, head, data.test) for name, head in heads.items()}
    _by_states(settings, data, rows, heads, states, left_out)
    _consistency(data, best, rows, left_out)
    for name, head in heads.items():
        order = [head.info.workers.index(worker) for worker in data.workers]
        logits = head.logits(states[name])[:, order].double().numpy()
        note = "" if head.info.trained.get("method") is None else str(head.info.trained["method"])
        rows.add_choice(name, "head", logits, note=note)
    luck_free = baselines.luck_free_oracle(
        [
            [
                data.by_pair[key].samples if (key := (task.task_id, name)) in data.by_pair else ()
                for name in data.workers
            ]
            for task in data.test.tasks
        ],
        np.random.default_rng(settings.seed),
    )
    if np.isfinite(luck_free).any():
        able = int(np.isfinite(luck_free).sum())
        note = "" if able == len(luck_free) else f"{able} tasks with several samples of two workers or more"
        rows.add("oracle, luck-free", "bound", luck_free, note=note)
    else:
        left_out["oracle, luck-free"] = "no task has several samples of two workers or more"
    rows.add("oracle", "bound", np.nanmax(data.scores, axis=1))
    report = EvalReport(
        settings, data.workers, len(data.test.tasks), data.workers[best], best_from, tuple(rows.rows), left_out
    )
    _write(settings, report)
    return report


class _Rows:
    """Collects rows, each with its intervals."""

    def __init__(self, data: Measured, best: int, seed: int) -> None:
        self.data, self.seed = data, seed
        self.single = data.scores[:, best]
        self.rows: list[Row] = []

    def add(self, name: str, kind: Kind, values: Matrix, *, costs: Matrix | None = None, **more: Any) -> None:
        """`values [N]`: NaN where this way of answering has nothing recorded."""
        known, paired = values[np.isfinite(values)], (values - self.single)[np.isfinite(values - self.single)]
        if not len(known) or not len(paired):
            raise DataError(f"{name} has no outcome on the tasks where the best single worker has one")
        rng = np.random.default_rng(self.seed)
        cost = float(costs.mean()) if costs is not None and np.isfinite(costs).all() else None
        score, gain = bootstrap(known, rng), bootstrap(paired, rng)
        self.rows.append(Row(name, kind, score, gain, len(known), cost_usd=cost, **more))

    def add_choice(self, name: str, kind: Kind, preferences: Matrix, note: str = "") -> None:
        """By preferences `[N, L]` over the workers, of those with an outcome."""
        data = self.data
        chosen = np.where(np.isnan(data.scores), -np.inf, preferences).argmax(1)
        every = np.arange(len(chosen))
        shares = baselines.by_domain([task.domain for task in data.test.tasks], chosen.tolist(), data.workers)
        self.add(
            name,
            kind,
            data.scores[every, chosen],
            costs=data.costs[every, chosen],
            calls=1.0,
            turns=1.0,
            note=note,
            shares=shares,
        )


def _best_single(data: Measured, heads: Mapping[str, Checkpoint]) -> tuple[int, str]:
    """The worker that is best where nothing of the measured tasks is seen, if that can be known."""
    if data.train_scores is not None:
        return int(np.nanmean(data.train_scores, axis=0).argmax()), "the training tasks"
    for head in heads.values():
        named = head.info.trained.get("best_single")
        if named in data.workers:
            return data.workers.index(named), "the head's training tasks"
    return int(np.nanmean(data.scores, axis=0).argmax()), "these very tasks"


def _simple(settings: EvalRun, data: Measured, rows: _Rows, left_out: dict[str, str]) -> None:
    if data.train is None or data.train_scores is None:
        left_out["lookup per dataset"] = _no_train(settings)
        return
    groups = [task.dataset for task in data.train.tasks]
    table = baselines.lookup(groups, data.train_scores, [task.dataset for task in data.test.tasks])
    new = sum(task.dataset not in set(groups) for task in data.test.tasks)
    rows.add_choice("lookup per dataset", "baseline", table, note=f"{new} of unknown datasets" if new else "")


def _by_states(
    settings: EvalRun,
    data: Measured,
    rows: _Rows,
    heads: Mapping[str, Checkpoint],
    states: Mapping[str, torch.Tensor],
    left_out: dict[str, str],
) -> None:
    """kNN, k-means and an MLP on the hidden states that the first head reads."""
    names = ("kNN", "k-means", "MLP")
    if not heads:
        left_out |= dict.fromkeys(names, "no checkpoint says which hidden states to read")
    elif data.train is None or data.train_scores is None:
        left_out |= dict.fromkeys(names, _no_train(settings))
    elif not settings.hidden_baselines:
        left_out |= dict.fromkeys(names, "not asked for")
    else:
        name, head = next(iter(heads.items()))
        train, scores, hidden = _states(settings, head, data.train), data.train_scores, states[name]
        rows.add_choice("kNN", "baseline", baselines.nearest(train, scores, hidden), note="20 neighbours")
        rows.add_choice("k-means", "baseline", baselines.clusters(train, scores, hidden, seed=settings.seed))
        tau = float(head.info.trained.get("tau", 0.25))
        logits, numbers = baselines.mlp(train, scores, hidden, tau=tau, seed=settings.seed)
        rows.add_choice("MLP", "baseline", logits, note=f"{numbers:,} numbers")


def _consistency(data: Measured, best: int, rows: _Rows, left_out: dict[str, str]) -> None:
    name = f"self-consistency of {data.workers[best]}"
    recorded = [data.by_pair.get((task.task_id, data.workers[best])) for task in data.test.tasks]
    scores, calls = baselines.self_consistency(recorded)
    if np.isfinite(scores).any() and float(np.nanmax(calls)) > 1:
        rows.add(name, "baseline", scores, calls=float(np.nanmean(calls)), turns=1.0)
    else:
        left_out[name] = "no task has several recorded answers of it"


def _states(settings: EvalRun, head: Checkpoint, part: Outcomes) -> torch.Tensor:
    folder = resolve_model(settings.backbone or head.info.backbone, revision=head.info.revision).folder
    return task_states(
        part.tasks,
        head.info,
        folder,
        singular=head.singular,
        max_tokens=read_limit(head.info, settings.max_tokens),
        device=settings.device,
        cache=settings.cache,
        progress=settings.progress,
    )


def _no_train(settings: EvalRun) -> str:
    return f"{settings.outcomes} has no training tasks of these workers (split {settings.train_split})"


def _write(settings: EvalRun, report: EvalReport) -> None:
    if settings.out is None:
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "eval.json").write_text(json.dumps(report.json(), indent=2, allow_nan=False) + "\n")
    _draw(settings.out, report)


def _draw(folder: Path, report: EvalReport) -> None:
    from training.plots import Point, draw_quality, draw_shares

    title = f"{report.tasks} tasks of {report.settings.split}"
    paid = all(row.cost_usd is not None for row in report.rows if row.kind == "worker")
    points = [
        Point(row.name, row.kind == "head", price, row.score.mean, row.score.low, row.score.high)
        for row in report.rows
        if (price := row.cost_usd if paid else row.calls) is not None
    ]
    draw_quality(points, folder / "quality.png", price="USD per task" if paid else "calls per task", title=title)
    for row in report.heads:
        draw_shares(row.shares, report.workers, folder / f"shares-{row.name}.png", title=f"{row.name}: {title}")


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
