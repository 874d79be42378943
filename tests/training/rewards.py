"""Reward functions for `--reward`, called in Ray tasks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from training.outcomes import Task


def says_x(task: Task, response: str) -> float:
    return float(response == "x")


def raises(task: Task, response: str) -> float:
    raise RuntimeError("the scorer is broken")


def too_much(task: Task, response: str) -> float:
    return 7.0


def dies_once(task: Task, response: str) -> float:
    """The first process that grades the task named in the marker file is gone."""
    marker = Path(task.extra["marker"])
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return says_x(task, response)
