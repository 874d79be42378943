"""What an evaluation of `fugu-ultra` found: its table, its JSON, and topologies by family as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.evaluate import Estimate

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Row:
    """One way of answering. `score` and `gain` (over the worker that is best alone) by kind of task; the rest is per
    answer: calls, tokens, cost, seconds of all calls one after the other and of the longest chain of them, the share
    of requests that got a plan, and its steps."""

    name: str
    score: Mapping[str, Estimate]
    gain: Mapping[str, Estimate]
    calls: float
    tokens: float
    cost_usd: float | None
    seconds: float
    critical_s: float | None
    planned: float | None
    steps: float | None
    failed: int


@dataclass(frozen=True)
class UltraReport:
    """`best_single` by kind of task is whom gains are over; `against` are further differences, paired by task, of
    composite tasks where nothing else is said. `families` gives mean scores, `topologies` and `workers` shares of
    fugu-ultra's plans, by family of tasks."""

    tasks: Mapping[str, int]
    best_single: Mapping[str, str]
    ranking: tuple[str, ...]
    rows: tuple[Row, ...]
    against: Mapping[str, Estimate]
    families: Mapping[str, Mapping[str, float]]
    topologies: Mapping[str, Mapping[str, float]]
    workers: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, Any]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        kinds = list(self.tasks)
        counts = " and ".join(f"{count} {kind}" for kind, count in self.tasks.items())
        singles = ", ".join(f"{name} ({kind})" for kind, name in self.best_single.items())
        table = Table(
            title=f"{counts} tasks, mean score with 95% interval",
            caption=f"gain: over the worker that is best alone, {singles}, paired by task; s: calls one after the "
            "other, path: the longest chain of them",
        )
        table.add_column("", min_width=16)
        for kind in kinds:
            table.add_column(kind, justify="right", no_wrap=True)
            table.add_column("gain", justify="right", no_wrap=True)
        for column in ("calls", "tokens", "s", "path", "planned", "steps"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            cells = [cell for kind in kinds for cell in (str(row.score[kind]), f"{row.gain[kind].mean:+.3f}")]
            numbers = (row.calls, row.tokens, row.seconds, row.critical_s, row.planned, row.steps)
            shown = ["" if number is None else f"{number:.3g}" for number in numbers]
            table.add_row(row.name, *cells, *shown, style="bold green" if row.name == "fugu-ultra" else None)
        more = Table(title="differences, paired by task", show_header=False)
        for name, gain in self.against.items():
            more.add_row(name, f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
        return Group(table, more)


def write_report(report: UltraReport, path: Path) -> None:
    path.write_text(json.dumps(report.json(), indent=2) + "\n", encoding="utf-8")


def draw_topologies(shares: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Share of topologies by family of tasks, as a PNG."""
    # The object interface with its own canvas: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.28 * len(shares)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    families = list(shares)
    left = [0.0] * len(families)
    for shape in sorted({name for row in shares.values() for name in row}):
        widths = [shares[family].get(shape, 0.0) for family in families]
        axes.barh(families, widths, left=left, label=shape)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of plans")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, metadata={"Software": None})
