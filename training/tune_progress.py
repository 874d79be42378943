"""What a tuning shows while it runs: a bar of trials on standard error, with the best score so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Watching(Callback):
    """Tells the bar of results and ends; without a bar it does nothing. Tune copies it with the experiment, so it holds
    nothing that cannot be pickled."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._row: Any = None
        self._best: float | None = None

    def show(self, bar: Progress, row: Any) -> None:
        self._bar, self._row = bar, row

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        score = result.get("score")
        if score is not None:
            self._best = score if self._best is None else max(self._best, score)
        self._update(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._update(trials, trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._update(trials, trial)

    def _update(self, trials: list[Any], ending: Any = None) -> None:
        if self._bar is None:
            return
        best = "" if self._best is None else f"best so far {self._best:.4f}"
        ended = sum(one.is_finished() or one is ending for one in trials)
        self._bar.update(self._row, completed=ended, state=best)

    def __getstate__(self) -> dict[str, Any]:
        return {"_bar": None, "_row": None, "_best": self._best}


@contextmanager
def shown(trials: int, progress: bool) -> Iterator[Watching]:
    watching = Watching()
    columns = (
        TextColumn("trials"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        row = bar.add_task("tune", total=trials, state="")
        watching.show(bar, row)
        yield watching
