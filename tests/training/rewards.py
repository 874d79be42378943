"""Reward functions for `--reward`, called in Ray tasks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

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


def loses_the_queue_once(task: Task, response: str) -> float:
    """The first process that grades the task named in the marker file ends the queue that lanes of its node take
    groups from."""
    marker = Path(task.extra["marker"])
    if not marker.exists():
        marker.touch()
        node = psutil.Process().parent()
        assert node is not None
        queues = [each for each in node.children() if " ".join(each.cmdline()).startswith("ray::GroupQueue")]
        assert queues
        for queue in queues:
            queue.kill()
    return says_x(task, response)
