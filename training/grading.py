"""Graders: a task and a worker's text in, a score from 0 to 1 out. By the task's `grader`:

    number                     the answer's last number equals the reference (relative tolerance 1e-6)
    phrase                     the answer's last line contains the reference as whole words; `a|b` accepts either
    letter                     the last letter that stands alone in the answer's last line is the reference
    choice                     the last of the task's options (extra column `options`, `a|b|c`) named is the reference
    exact                      the answer equals the reference but for case, spaces and final punctuation
    reasoning_gym:<dataset>    the package's own verifier; needs the extra column `entry` (JSON)

The answer of a longer text is what follows its last "answer:" (or stands in its last <answer> tag), else its last line.
"""

from __future__ import annotations

import json
import math
import re

from actors.errors import DataError
from training.outcomes import Task

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_LABEL = re.compile(r"\banswer(?:\s+is)?\s*:\s*|\banswer\s+is\s+", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_LETTER = re.compile(r"(?<![A-Za-z'’])([A-Za-z])(?![A-Za-z'’])")


def grade(task: Task, response: str) -> float:
    """Score of a worker's text on a task.

    Raises:
        DataError: the grader is unknown, lacks what it needs, or fails; names task and grader.
    """
    name, _, detail = task.grader.partition(":")
    try:
        if name == "reasoning_gym":
            return _reasoning_gym(task, detail, response)
        answer = final_answer(response)
        if name == "number":
            return float(_number(response, answer, task.reference))
        if name == "phrase":
            return float(_contains(_last_line(answer), task.reference))
        if name == "letter":
            # "a" and "I" are words far more often than answers; they count only where nothing else stands alone.
            alone = _LETTER.findall(_last_line(answer))
            letters = [letter for letter in alone if letter not in ("a", "A", "I")] or alone
            return float(bool(letters) and letters[-1].lower() == task.reference.lower())
        if name == "choice":
            return float(_last_option(answer, str(task.extra["options"]).split("|")) == task.reference)
        if name == "exact":
            return float(_plain(answer) == _plain(task.reference))
    except Exception as error:
        # Whatever a verifier stumbles over is a fault of this task, never a score.
        raise DataError(f"task {task.task_id}: the grader {task.grader} failed: {error!r}") from error
    raise DataError(f"task {task.task_id}: unknown grader {task.grader}")


def final_answer(response: str) -> str:
    """The part of a text that counts as its answer; may be empty."""
    if tags := _TAG.findall(response):
        return str(tags[-1]).strip()
    labelled = _LABEL.split(response)
    # A label with nothing after it names no answer.
    if len(labelled) > 1 and labelled[-1].strip():
        return labelled[-1].strip()
    return _last_line(response)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _number(response: str, answer: str, reference: str) -> bool:
    found = _NUMBER.findall(answer) or _NUMBER.findall(response)
    return bool(found) and math.isclose(float(found[-1].replace(",", "")), float(reference), rel_tol=1e-6, abs_tol=1e-9)


def _contains(line: str, reference: str) -> bool:
    return any(
        re.search(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", line, re.IGNORECASE) for phrase in reference.split("|")
    )


def _last_option(answer: str, options: list[str]) -> str | None:
    places = {
        option: [match.start() for match in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", answer, re.IGNORECASE)]
        for option in options
    }
    named = {option: found[-1] for option, found in places.items() if found}
    return max(named, key=named.__getitem__) if named else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .!\"'`*")


def _reasoning_gym(task: Task, dataset: str, response: str) -> float:
    import reasoning_gym

    entry = json.loads(task.extra["entry"])
    score = float(reasoning_gym.get_score_answer_fn(dataset)(answer=final_answer(response), entry=entry))
    if not 0 <= score <= 1:
        raise ValueError(f"the verifier returned {score}")
    return score
