from __future__ import annotations

import json
from typing import Any

import pytest

from actors.errors import DataError
from training.grading import final_answer, grade
from training.outcomes import Task


def graded(grader: str, reference: str, response: str, **extra: Any) -> float:
    return grade(Task("t7", "?", reference, "d", "s", "train", grader, extra), response)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Paris", "Paris"),
        ("I think.\nIt is Paris.\n\n", "It is Paris."),
        ("3 + 4 = 7\nAnswer: 7\nI hope this helps!", "7\nI hope this helps!"),
        ("Answer: 3. No.\nThe answer is 4.", "4."),
        ("<answer> 12 </answer> is what I say", "12"),
        ("The answer is:", "The answer is:"),
        ("", ""),
    ],
)
def test_the_answer_in_a_text(response: str, answer: str) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("grader", "reference", "response", "score"),
    [
        ("number", "42", "17 + 25 = 42", 1),
        ("number", "42", "17 + 25 = 42. Easy for a child of 9", 0),
        ("number", "42", "Answer: 42.0", 1),
        ("number", "-4", "5 - 9 = -4", 1),
        ("number", "12000", "It is 12,000.", 1),
        ("number", "42", "4.2e1 or so", 1),
        ("number", "3e8", "about 3.0 × 10^8 m/s", 1),
        ("number", "-3", "10-3", 0),
        ("number", "3", "it is 10-3", 1),
        ("number", "-0.5", "x = −.5", 1),
        ("number:1e-3", "3.1416", "Answer: 3.14", 1),
        ("number:1e-3", "3.1416", "Answer: 3.13", 0),
        ("number", "3.1416", "Answer: 3.14", 0),
        ("number", "42", "forty-two", 0),
        ("number", "42", "It is 42.\nThat was easy.", 1),
        ("phrase", "Paris", "The capital of France is Paris.", 1),
        ("phrase", "Paris", "Parisian", 0),
        ("phrase", "7|seven", "There are Seven days", 1),
        ("phrase", "Paris", "Paris is old.\nIt is Lyon.", 0),
        ("letter", "c", 'The last letter of "music" is C.', 1),
        ("letter", "c", "It's a c", 1),
        ("letter", "a", "It is a", 1),
        ("letter", "c", "music", 0),
        ("exact", "the cat", "The cat is:\n the cat ", 1),
        ("exact", "the cat", "The cat", 0),
        ("normalised", "the cat", "  **The  Cat.** ", 1),
        ("normalised", "cat", "the cat", 1),
        ("normalised", "a dog|cat", '"Dog"', 1),
        ("normalised", "cat", "cats", 0),
    ],
)
def test_graders(grader: str, reference: str, response: str, score: float) -> None:
    assert graded(grader, reference, response) == score


def test_choice_takes_the_last_option_named() -> None:
    assert graded("choice", "odd", "Not even: 97 is odd.", options="even|odd") == 1
    assert graded("choice", "even", "Not even: 97 is odd.", options="even|odd") == 0
    assert graded("choice", "yes", "Yesterday", options="yes|no") == 0


def test_reasoning_gyms_own_verifier() -> None:
    pytest.importorskip("reasoning_gym")
    entry = json.dumps({"question": "5 - 3?", "answer": "2", "metadata": {}})
    assert graded("reasoning_gym:basic_arithmetic", "2", "5 - 3 = 2\nAnswer: 2", entry=entry) == 1
    assert graded("reasoning_gym:basic_arithmetic", "2", "Answer: 3", entry=entry) == 0


@pytest.mark.parametrize(
    ("grader", "extra", "says"),
    [
        ("magic", {}, "task t7: unknown grader magic"),
        ("choice", {}, "task t7: the grader choice failed: KeyError"),
        ("number", {}, "task t7: the grader number failed: ValueError"),
        ("reasoning_gym:basic_arithmetic", {}, "task t7: the grader reasoning_gym:basic_arithmetic failed: KeyError"),
        ("reasoning_gym:none", {"entry": "{}"}, "task t7: the grader reasoning_gym:none failed"),
    ],
)
def test_a_grader_that_cannot_run_is_an_error_not_a_zero(grader: str, extra: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        graded(grader, "not a number", "1", **extra)
