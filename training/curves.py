"""What an evolution shows: curves as a PNG, TensorBoard scalars, and a live table of its progress."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
SCALARS = (
    "fitness_best",
    "fitness_mean",
    "fitness_worst",
    "reward",
    "turns",
    "entropy",
    "sigma",
    "deviation",
    "validation",
    "rollouts",
    "saved",
    "excluded",
    "calls",
    "usd",
)


def draw_curves(history: Sequence[Row], path: Path, *, start: float, title: str = "") -> None:
    """Fitness with validation, step size, and routing shares over the generations, as a PNG.

    Args:
        start: the validation value of the start, drawn as a line.

    Raises:
        ValueError: there is no generation.
    """
    if not history:
        raise ValueError("there is no generation to draw")
    # The object interface with its own canvas: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x = [row["generation"] for row in history]
    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    fitness, sigma, shares = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 2))
    worst, best = [row["fitness_worst"] for row in history], [row["fitness_best"] for row in history]
    fitness.fill_between(x, worst, best, alpha=0.2, linewidth=0, label="worst to best candidate")
    fitness.plot(x, [row["fitness_mean"] for row in history], label="mean candidate")
    validated = [(row["generation"], row["validation"]) for row in history if row["validation"] is not None]
    if validated:
        fitness.plot(*zip(*validated, strict=True), "o-", color="black", label="mean θ, validation")
    fitness.axhline(start, color="black", linestyle=":", label="start, validation")
    fitness.set_ylabel("fitness")
    fitness.legend(fontsize="small")
    fitness.set_title(title)
    sigma.plot(x, [row["sigma"] for row in history])
    sigma.set_yscale("log")
    sigma.set_ylabel("σ")
    names = list(history[0]["shares"])
    shares.stackplot(x, [[row["shares"][name] for row in history] for name in names], labels=names)
    shares.set_ylim(0, 1)
    shares.set_ylabel("routing share")
    shares.set_xlabel("generation")
    shares.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


@contextmanager
def shown(folder: Path, *, generations: int, done: int, progress: bool) -> Iterator[Callable[[Row], None]]:
    """Where rows go as they come: TensorBoard events and `history.jsonl` in `folder`, and a bar on standard error. Rows
    up to `done` are known to TensorBoard already."""
    from tensorboardX import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        stack.callback(events.close)
        lines = stack.enter_context((folder / "history.jsonl").open("w"))
        bar = stack.enter_context(_bar(generations)) if progress else None

        def watch(row: Row) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            if row["generation"] > done:
                _write(events, row)
            if bar is not None:
                bar(row)

        yield watch


def _write(events: Any, row: Row) -> None:
    step = row["generation"]
    for name in SCALARS:
        if row[name] is not None:
            events.add_scalar(name, row[name], step)
    for worker, share in row["shares"].items():
        events.add_scalar(f"share/{worker}", share, step)
    events.flush()


@contextmanager
def _bar(generations: int) -> Iterator[Callable[[Row], None]]:
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
        TextColumn("generation"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    validation = ""
    with Progress(*columns, console=Console(stderr=True)) as progress:
        line = progress.add_task("", total=generations, state="")

        def show(row: Row) -> None:
            nonlocal validation
            if row["validation"] is not None:
                validation = f" val {row['validation']:.4f}"
            paid = f" {row['calls']} calls ${row['usd']:.4f}" if row["calls"] else ""
            state = f"fitness {row['fitness_mean']:.4f} best {row['fitness_best']:.4f}{validation}"
            progress.update(line, completed=row["generation"], state=f"{state} σ {row['sigma']:.4f}{paid}")

        yield show
