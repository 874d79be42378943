"""What a GRPO run shows: TensorBoard scalars, `curve.jsonl`, a bar on standard error, and curves as a PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from training.lora_run import open_rows

Row = Mapping[str, Any]


@contextmanager
def shown(folder: Path, *, steps: int, done: int, progress: bool) -> Iterator[Callable[[Row], None]]:
    """Where rows go as they come. A resumed run writes the rows of steps that it takes again anew."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from tensorboardX import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("GRPO"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    validated = ""
    with ExitStack() as stack:
        events = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)
        stack.callback(events.close)
        keep = stack.enter_context(open_rows(folder / "curve.jsonl", done))
        bar = stack.enter_context(Progress(*columns, *times, console=Console(stderr=True), disable=not progress))
        line = bar.add_task("", total=steps, completed=done, state="")

        def show(row: Row) -> None:
            nonlocal validated
            keep(row)
            for name, value in scalars(row):
                events.add_scalar(name, value, row["step"])
            events.flush()
            if row.get("validation") is not None:
                validated = f" val {row['validation']['right']:.3f}"
            state = f"reward {_short(row['reward'])} right {_short(row['right'])} parsed {_short(row['parsed'])}"
            bar.update(line, completed=row["step"], state=f"{state}{validated} {row['calls']} calls")

        yield show


def scalars(row: Row) -> Iterator[tuple[str, float]]:
    """A row's numbers by name: `reward`, `worker/NAME`, `validation/right` …"""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in value.items() if number is not None)
        elif name != "step" and isinstance(value, int | float):
            yield name, value


def draw(history: Sequence[Row], path: Path, *, title: str = "") -> None:
    """Reward, validation, worker and topology shares over the steps, as a PNG.

    Raises:
        ValueError: there is no step.
    """
    if not history:
        raise ValueError("there is no step to draw")
    # The object interface with its own canvas: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    x = [row["step"] for row in history]
    figure = Figure(figsize=(8, 10), layout="constrained")
    FigureCanvasAgg(figure)
    reward, length, workers, shapes = figure.subplots(4, 1, sharex=True, height_ratios=(3, 1, 2, 2))
    for name in ("reward", "right", "parsed"):
        values = [row[name] if row[name] is not None else float("nan") for row in history]
        (line,) = reward.plot(x, values, alpha=0.3, linewidth=1)
        reward.plot(x, _smooth(values), color=line.get_color(), label=name)
    held = [(row["step"], row["validation"]["right"]) for row in history if row.get("validation")]
    if held:
        reward.plot(*zip(*held, strict=True), "o-", color="black", label="right, validation")
    reward.set_ylim(0, None)
    reward.legend(fontsize="small")
    reward.set_title(title)
    length.plot(x, [row["steps"] or float("nan") for row in history], label="steps of a plan")
    length.legend(fontsize="small")
    for axes, key in ((workers, "worker"), (shapes, "topology")):
        names = sorted({name for row in history for name in row[key]})
        if names:
            axes.stackplot(x, [_smooth([row[key].get(name, 0.0) for row in history]) for name in names], labels=names)
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set_ylim(0, 1)
        axes.set_ylabel(f"{key} share")
    shapes.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _smooth(values: Sequence[float], share: float = 0.1) -> list[float]:
    """A running mean over up to a tenth of the steps before."""
    width = max(1, round(share * len(values)))
    smooth = []
    for end in range(1, len(values) + 1):
        part = [value for value in values[max(0, end - width) : end] if value == value]
        smooth.append(sum(part) / len(part) if part else float("nan"))
    return smooth


def _short(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"
