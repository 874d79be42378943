"""Grading a program by running its tests in `training.sandbox`. The score is 1 where all tests pass, else 0.

A task has one of these extra columns (JSON, or a text for `tests`):

    tests     Python statements with assertions that run after the program, in its namespace. Where they define
              `check`, it is called with the function named in the column `entry_point` (as in HumanEval).
    cases     a list of {"input": text, "output": text}: the program reads standard input and writes standard output;
              compared line by line but for space at the ends of lines (as in LiveCodeBench)

The program is the answer's last fenced block (of those that define `entry_point`, where it is given), else its text.
Expected outputs of cases never enter the sandbox. Tests do; a program counts as passing only if the harness says a
secret word afterwards, so leaving early or printing does not help it. Reading the harness's memory would.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from typing import Any

from actors.errors import DataError
from training.outcomes import Task
from training.sandbox import Bounds, run

SECONDS = 10.0

_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)

# Runs the program, then its tests. What it was given is read before the program starts, which finds an empty input.
_HARNESS = """
import os, sys
word, tests, entry = sys.stdin.buffer.read().decode().split("\\0")
said = os.dup(1)
os.dup2(os.open(os.devnull, os.O_RDWR), 0)
os.dup2(2, 1)
space = {"__name__": "solution", "__file__": "solution.py"}
exec(compile(open("solution.py", encoding="utf-8").read(), "solution.py", "exec"), space)
exec(compile(tests, "tests.py", "exec"), space)
if entry and "check" in space:
    space["check"](space[entry])
os.write(said, word.encode())
"""


def check(task: Task) -> None:
    """Whether the task has usable tests.

    Raises:
        DataError: names the task.
    """
    if "cases" in task.extra:
        cases = _cases(task)
        if not cases or not all(
            isinstance(case, dict) and isinstance(case.get("input"), str) and isinstance(case.get("output"), str)
            for case in cases
        ):
            raise DataError(f"task {task.task_id}: cases must be a list of objects with the texts input and output")
        return
    tests = task.extra["tests"]
    if not isinstance(tests, str) or not tests.strip():
        raise DataError(f"task {task.task_id}: tests must be a text with Python statements")
    try:
        compile(tests, "tests.py", "exec")
    except (SyntaxError, ValueError) as error:
        raise DataError(f"task {task.task_id}: its tests are not Python: {error}") from error


def passes(task: Task, response: str, seconds: float) -> float:
    """1 where the program in the response passes all tests, each run within `seconds`; else 0.

    Raises:
        GradingError: the sandbox cannot run here.
    """
    entry = str(task.extra.get("entry_point") or "")
    files = {"solution.py": program(response, entry)}
    bounds = Bounds(wall_s=seconds, cpu_s=max(1, round(seconds)))
    if "cases" in task.extra:
        for case in _cases(task):
            argv = (sys.executable, "-I", "solution.py")
            ran = run(argv, files=files, stdin=case["input"].encode(), bounds=bounds)
            if ran.end != "exited" or ran.status != 0 or _lines(ran.stdout) != _lines(case["output"].encode()):
                return 0.0
        return 1.0
    word = secrets.token_hex(16)
    given = "\0".join((word, str(task.extra["tests"]), entry)).encode()
    argv = (sys.executable, "-I", "harness.py")
    ran = run(argv, files={**files, "harness.py": _HARNESS}, stdin=given, bounds=bounds)
    return float(ran.end == "exited" and ran.status == 0 and ran.stdout == word.encode())


def program(response: str, entry: str = "") -> str:
    """The program in an answer."""
    text = _THOUGHT.sub("", response)
    blocks = _BLOCK.findall(text)
    definition = re.compile(rf"^\s*(?:async\s+)?(?:def|class)\s+{re.escape(entry)}\b", re.MULTILINE)
    defining = [block for block in blocks if entry and definition.search(block)]
    found = (defining or blocks or [text])[-1]
    # A NUL or half a surrogate pair is in no program.
    return str(found).replace("\0", "").encode("utf-8", "replace").decode()


def _cases(task: Task) -> list[Any]:
    cases = task.extra["cases"]
    found = json.loads(cases) if isinstance(cases, str) else cases
    return list(found)


def _lines(output: bytes) -> list[bytes]:
    return [line.rstrip() for line in output.rstrip().splitlines()]
