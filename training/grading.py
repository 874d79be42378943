"""Graders: a task and a worker's text in, a score from 0 to 1 out. By the task's `grader`:

    number[:TOLERANCE]         the answer's last number equals the reference; relative tolerance, 1e-6 if not given
                               (`number:1e-3` is what TRINITY uses for RLPR, `fugu` report §A)
    phrase                     the answer's last line contains the reference as whole words; `a|b` accepts either
    letter                     the last letter that stands alone in the answer's last line is the reference
    choice                     the last of the task's options (extra column `options`, `a|b|c`) named is the reference
    prose[:WORDS]              the whole text mentions the reference and has at least so many words (8 if not given),
                               half of them different; `a|b` accepts either
    exact                      the answer is the reference, character by character, but for space around it
    normalised                 the same but for case, spaces, articles and punctuation around it; `a|b` accepts either
    maths                      the answer is mathematically equal to the reference (math-verify, in its own process)
    code[:SECONDS]             the program in the answer passes the task's tests (`training.code`), in a sandbox
    reasoning_gym:FAMILY       the package's own verifier; needs the extra column `entry` (JSON)
    judge:WORKER               a worker compares answer and reference (`training.judge`)

The answer of a longer text is what follows its last "answer:" (or stands in its last <answer> tag), else its last line.
A grader that cannot run raises GradingError; that is never a score.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from actors.errors import DataError, GradingError
from training import code
from training.judge import Judge, judge
from training.outcomes import Task
from training.verifier import LateError, verifier

# Words that a text needs to count as prose.
PROSE_WORDS = 8

# Seconds for one symbolic comparison or verifier.
VERIFY_SECONDS = 20.0

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_LABEL = re.compile(r"\banswer(?:\s+is)?\s*:\s*|\banswer\s+is\s+", re.IGNORECASE)
# A minus sign belongs to the number where nothing stands before it that it could be subtracted from.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\w))?|(?<![\w.])-?\.\d+")
_POWER = re.compile(r"(\d)\s*(?:×|x|\*|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?\s*([-+]?\d{1,3})\}?")
_LETTER = re.compile(r"(?<![A-Za-z'’])([A-Za-z])(?![A-Za-z'’])")
_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_ARTICLE = re.compile(r"^(?:the|an?)\s+")


@dataclass(frozen=True, slots=True)
class Graded:
    """A score, and what a judge cost: upstream requests and USD (None where its price is unknown)."""

    score: float
    requests: int = 0
    cost_usd: float | None = 0.0


async def graded(task: Task, response: str, judges: Mapping[str, Judge] | None = None) -> Graded:
    """Score of a worker's text on a task; slow graders run beside the event loop.

    Raises:
        GradingError: the grader cannot run on this text; names task and grader.
    """
    name, _, detail = task.grader.partition(":")
    if name != "judge":
        return Graded(await asyncio.to_thread(grade, task, response))
    if judges is None or detail not in judges:
        raise GradingError(f"task {task.task_id}: there is no worker {detail} to judge")
    found = await judge(judges[detail], task, response)
    return Graded(found.score, found.requests, found.cost_usd)


def grade(task: Task, response: str) -> float:
    """Score of a worker's text on a task, by any grader but a judge. Safe from several threads.

    Raises:
        GradingError: the grader is unknown, lacks what it needs, or fails; names task and grader.
    """
    name, _, detail = task.grader.partition(":")
    if name not in GRADERS:
        raise GradingError(f"task {task.task_id}: unknown grader {task.grader}")
    try:
        score = float(GRADERS[name](task, detail, response))
        if not 0 <= score <= 1:  # NaN fails the comparison too
            raise ValueError(f"it returned {score}")
    except Exception as error:
        # Whatever a verifier stumbles over is a fault of this task, never a score.
        reason = error.message if isinstance(error, GradingError) else repr(error)
        raise GradingError(f"task {task.task_id}: the grader {task.grader} failed: {reason}") from error
    return score


def check_task(task: Task, workers: frozenset[str] | None = None) -> None:
    """Find out before anything is paid whether a task can be graded at all.

    `workers` are those that may judge; None takes any.

    Raises:
        DataError: names the task and what it lacks.
    """
    name, _, detail = task.grader.partition(":")
    where = f"task {task.task_id}: the grader {task.grader}"
    try:
        if name == "number":
            if not math.isfinite(_float(task.reference)) or (detail and not 0 < float(detail) < 1):
                raise ValueError
        elif name == "choice":
            if task.reference not in _options(task):
                raise DataError(f"{where} needs the reference among its options")
        elif name == "letter":
            if not re.fullmatch("[A-Za-z]", task.reference):
                raise DataError(f"{where} needs one letter as the reference, not {task.reference!r}")
        elif name in ("phrase", "prose", "exact", "normalised", "maths"):
            if not task.reference.strip():
                raise DataError(f"{where} needs a reference")
            if name == "prose" and detail and not 1 <= int(detail) <= 10_000:
                raise ValueError
        elif name == "code":
            code.check(task)
            if detail and not 0 < float(detail) <= 600:
                raise ValueError
        elif name == "reasoning_gym":
            json.loads(task.extra["entry"])["metadata"]
        elif name == "judge":
            if workers is not None and detail not in workers:
                raise DataError(f"{where}: the configuration has no worker {detail}")
        else:
            raise DataError(f"task {task.task_id}: unknown grader {task.grader}")
    except KeyError as error:
        raise DataError(f"{where} needs the column {error.args[0]}") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} cannot use the reference {task.reference!r} or its own settings") from error


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


def _number(task: Task, tolerance: str, response: str) -> bool:
    wanted = _float(task.reference)
    found = _numbers(final_answer(response)) or _numbers(response)
    return bool(found) and math.isclose(_float(found[-1]), wanted, rel_tol=float(tolerance or 1e-6), abs_tol=1e-9)


def _numbers(text: str) -> list[str]:
    text = _POWER.sub(r"\1e\2", text.replace("−", "-"))
    return _NUMBER.findall(text)


def _float(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def _phrase(task: Task, _detail: str, response: str) -> bool:
    return _mentions(_last_line(final_answer(response)), task.reference)


def _prose(task: Task, least: str, response: str) -> bool:
    words = re.findall(r"\w+", response.lower())
    # A small model that loops says the same few words over and over.
    long_enough = len(words) >= int(least or PROSE_WORDS) and 2 * len(set(words)) >= len(words)
    return long_enough and _mentions(response, task.reference)


def _mentions(text: str, phrases: str) -> bool:
    return any(
        re.search(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", text, re.IGNORECASE) for phrase in phrases.split("|")
    )


def _letter(task: Task, _detail: str, response: str) -> bool:
    # "a" and "I" are words far more often than answers; they count only where nothing else stands alone.
    alone = _LETTER.findall(_last_line(final_answer(response)))
    letters = [letter for letter in alone if letter not in ("a", "A", "I")] or alone
    return bool(letters) and letters[-1].lower() == task.reference.lower()


def _choice(task: Task, _detail: str, response: str) -> bool:
    answer = final_answer(response)
    places = {
        option: [match.start() for match in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", answer, re.IGNORECASE)]
        for option in _options(task)
    }
    named = {option: found[-1] for option, found in places.items() if found}
    return bool(named) and max(named, key=named.__getitem__) == task.reference


def _options(task: Task) -> list[str]:
    return str(task.extra["options"]).split("|")


def _exact(task: Task, _detail: str, response: str) -> bool:
    return final_answer(response).strip() == task.reference.strip()


def _normalised(task: Task, _detail: str, response: str) -> bool:
    return normalise(final_answer(response)) in map(normalise, task.reference.split("|"))


def normalise(text: str) -> str:
    """Lower case, single spaces, no article at the beginning, no quotes, marks of emphasis or punctuation around."""
    return _ARTICLE.sub("", " ".join(text.lower().split()).strip(" .!?,;:\"'`*“”‘’"))


def _maths(task: Task, _detail: str, response: str) -> float:
    # The whole text: math-verify finds the boxed or last expression itself. It reads LaTeX in `\boxed` or dollars.
    answer = response if "\\boxed" in response else final_answer(response)
    return verifier().ask("maths", VERIFY_SECONDS, reference=task.reference, answer=answer)


def _code(task: Task, seconds: str, response: str) -> float:
    return code.passes(task, response, float(seconds) if seconds else code.SECONDS)


def _reasoning_gym(task: Task, family: str, response: str) -> float:
    """The family's verifier. Several evaluate the answer as an expression, which is why they run shut in."""
    entry = json.loads(task.extra["entry"])

    def ask(answer: str | None) -> float:
        return verifier().ask("reasoning_gym", VERIFY_SECONDS, family=family, answer=answer, entry=entry)

    answer = final_answer(response)
    if "\n" in task.reference.strip() and answer == _last_line(response):
        # A grid has no label before its last line only: the last fenced block, or all of the text.
        answer = (_FENCED.findall(response) or [response])[-1].strip("\n")
    try:
        return ask(answer)
    except LateError:
        raise
    except GradingError:
        # Some verifiers raise on an answer they cannot read. Where the reference passes, the verifier is in order and
        # the answer is wrong; where it does not, nothing is known.
        if entry.get("answer") is None or ask(str(entry["answer"])) != 1:
            raise
        return 0.0


GRADERS: Mapping[str, Callable[[Task, str, str], float]] = {
    "number": _number,
    "phrase": _phrase,
    "prose": _prose,
    "letter": _letter,
    "choice": _choice,
    "exact": _exact,
    "normalised": _normalised,
    "maths": _maths,
    "code": _code,
    "reasoning_gym": _reasoning_gym,
}
