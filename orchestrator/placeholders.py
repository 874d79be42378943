"""`{0}` in a subtask stands for the answer of step 0: a plan can put one worker's answer into another's question.

A step's answer stands only where that step may read it. Whatever the answer holds, it is put in once: placeholders in
an answer stay the text that they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PLACEHOLDER = re.compile(r"\{(\d{1,2})\}")


def placeholders(text: str) -> tuple[int, ...]:
    """The steps (from 0) whose answers a subtask asks for, sorted, each once."""
    return tuple(sorted({int(number) for number in _PLACEHOLDER.findall(text)}))


def fill(text: str, answers: Mapping[int, str]) -> str:
    """`text` with each placeholder replaced by that step's answer, stripped; one without an answer stays as it is."""

    def answer(found: re.Match[str]) -> str:
        number = int(found[1])
        return answers[number].strip() if number in answers else found[0]

    return _PLACEHOLDER.sub(answer, text)
