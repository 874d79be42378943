"""Take the steps of a `training.lora.Learner`: checkpoints, validation, a bar on standard error and `curve.jsonl`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.lora import Learner, Talk


@dataclass(frozen=True)
class Course:
    """How a run goes: `name` stands before its bar, `folder` holds its state and `curve.jsonl`."""

    name: str
    folder: Path
    checkpoint_every: int
    validate_every: int
    progress: bool


@dataclass(frozen=True)
class Learnt:
    """`loss` and `right` are of the last validation; `seconds` of this process's `steps` alone."""

    loss: float
    right: float
    steps: int
    seconds: float


def learn(learner: Learner, course: Course, validation: Sequence[Talk]) -> Learnt:
    """All steps that are left. Ctrl-C loses the step in progress, a kill the steps since the last checkpoint."""
    started, first, total = time.monotonic(), learner.done, learner.settings.steps
    loss, right = float("nan"), float("nan")
    with _shown(course, learner.done, total) as show:
        try:
            while learner.done < total:
                rate = learner.settings.rate(learner.done)
                row = {"step": learner.done + 1, "loss": learner.step(), "rate": rate}
                if learner.done % course.validate_every == 0 or learner.done == total:
                    loss, right = learner.held_out(validation)
                    row |= {"val_loss": loss, "val_right": right}
                show(row | {"seconds": round(time.monotonic() - started, 2)})
                if learner.done % course.checkpoint_every == 0 or learner.done == total:
                    learner.save(course.folder)
        except KeyboardInterrupt:
            learner.save(course.folder)
            raise
    if learner.done == first:  # resumed at its end
        loss, right = learner.held_out(validation)
    return Learnt(loss, right, learner.done - first, round(time.monotonic() - started, 1))


@contextmanager
def _shown(course: Course, done: int, total: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show and keep each step. A resumed run drops the lines of the steps that it takes again."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    course.folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn(course.name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not course.progress)
    validated = ""
    with open_rows(course.folder / "curve.jsonl", done) as keep, bar:
        line = bar.add_task("", total=total, completed=done, state="")

        def show(row: Mapping[str, Any]) -> None:
            nonlocal validated
            keep(row)
            if "val_right" in row:
                validated = f", {row['val_right']:.0%} of held-out right"
            bar.update(line, completed=row["step"], state=f"loss {row['loss']:.3f}{validated}")

        yield show


@contextmanager
def open_rows(path: Path, done: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A file of one JSON object a line, each with its `step`; lines after step `done` are dropped first."""
    kept = rows_of(path, done)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    with path.open("a", encoding="utf-8") as lines:

        def keep(row: Mapping[str, Any]) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        yield keep


def rows_of(path: Path, done: int) -> list[dict[str, Any]]:
    """The rows up to step `done`. A kill can leave half a line at the end; its step is taken again."""
    if not done or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [row for line in lines if line.endswith("}") and (row := json.loads(line))["step"] <= done]
