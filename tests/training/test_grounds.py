from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import DataError
from actors.model_files import resolve_model
from training.grading import check_task, grade
from training.ground_families import DAYS, GROUNDS, SIDES
from training.grounds import Problem, ground_tasks, make_problem, problem_at
from training.tasks import Columns, TaskSource, load_tasks

ALL = [(ground, family) for ground in GROUNDS for family in GROUNDS[ground]]


@given(st.sampled_from(ALL), st.integers(0, 2**32))
def test_the_reference_is_right_and_another_answer_is_wrong(place: tuple[str, str], seed: int) -> None:
    ground, family = place
    rng = random.Random(seed)
    task = make_problem(ground, family, rng).task("it", ground)
    check_task(task)
    assert grade(task, task.reference) == 1
    assert grade(task, f"Answer: {task.reference}") == 1
    assert grade(task, "Pumpernickel.") == 0
    other = make_problem(ground, family, rng)
    if other.answer.lower() not in task.reference.lower() and task.reference.lower() not in other.answer.lower():
        assert grade(task, other.answer) == 0


def words_of(prompt: str) -> list[str]:
    return re.findall(r"[a-z]+", prompt.rpartition(":")[2].strip("?"))


def numbers_of(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", prompt)]


def place(names: Sequence[str], prompt: str) -> int:
    """Which of the names the prompt has."""
    (found,) = [number for number, name in enumerate(names) if name in prompt]
    return found


# Each answer once more, by other means, from nothing but the question.
SOLVERS = {
    "add": lambda p: sum(numbers_of(p)),
    "subtract": lambda p: numbers_of(p)[0] - numbers_of(p)[1],
    "multiply": lambda p: numbers_of(p)[0] * numbers_of(p)[1],
    "add_three": lambda p: sum(numbers_of(p)),
    "mixed": lambda p: numbers_of(p)[0] * numbers_of(p)[1] + numbers_of(p)[2],
    "double": lambda p: 2 * numbers_of(p)[0],
    "missing": lambda p: abs(numbers_of(p)[0] - numbers_of(p)[1]),
    "story": lambda p: numbers_of(p)[0] + (1 if re.search("gets|finds|buys", p) else -1) * numbers_of(p)[1],
    "sort_numbers": lambda p: ", ".join(map(str, sorted(numbers_of(p)))),
    "sort_words": lambda p: ", ".join(sorted(words_of(p))),
    "largest": lambda p: max(numbers_of(p)),
    "smallest": lambda p: min(numbers_of(p)),
    "count_items": lambda p: len(words_of(p)),
    "alphabet_first": lambda p: sorted(words_of(p))[0],
    "boolean": lambda p: eval(p.partition(": ")[2], {"__builtins__": {}}),
    "compare": lambda p: "yes" if ("greater" in p) == (numbers_of(p)[0] > numbers_of(p)[1]) else "no",
    "turn": lambda p: SIDES[(place(SIDES, p) + p.count("right") - p.count("left")) % 4],
    "weekday": lambda p: DAYS[(place(DAYS, p) + numbers_of(p)[0] * (-1 if "ago" in p else 1)) % 7],
    "syllogism": lambda p: {"All": "yes", "No": "no", "Some": "unknown"}[re.search("All|No |Some", p)[0].strip()],  # type: ignore[index]
}


@pytest.mark.parametrize("family", SOLVERS)
def test_answers_are_those_of_a_second_solution(family: str) -> None:
    ground = next(ground for ground in GROUNDS if family in GROUNDS[ground])
    for seed in range(60):
        problem = make_problem(ground, family, random.Random(seed))
        assert str(SOLVERS[family](problem.prompt)) == problem.answer, problem


def test_word_answers_by_hand() -> None:
    def answers(ground: str, family: str) -> dict[str, str]:
        made = [make_problem(ground, family, random.Random(seed)) for seed in range(40)]
        return {problem.key: problem.answer for problem in made}

    for key, answer in answers("words", "reverse").items():
        assert "".join(reversed(answer)) == key.rpartition("=")[2]
    for key, answer in answers("words", "replace_letter").items():
        word, old, new = re.findall("=([a-z]+)", key)
        assert new not in word
        assert answer == "".join(new if letter == old else letter for letter in word)
    for key, answer in answers("words", "drop_letter").items():
        word, letter = re.findall("=([a-z]+)", key)
        assert len(answer) == len(word) - word.count(letter) > 0
    for key, answer in answers("counting", "count_letter").items():
        word, letter = re.findall("=([a-z]+)", key)
        assert int(answer) == word.count(letter)
    for key, answer in answers("counting", "count_same").items():
        word, items = re.match("count_same word=([a-z]+) items=(.*)", key).groups()  # type: ignore[union-attr]
        assert int(answer) == items.split(", ").count(word)


@pytest.mark.parametrize(("ground", "family"), ALL)
def test_no_constant_is_right_more_often_than_every_other_time(ground: str, family: str) -> None:
    made = [make_problem(ground, family, random.Random(seed)) for seed in range(500)]
    most = Counter(problem.answer for problem in made).most_common(1)[0][1]
    assert most / len(made) < 0.5 + 3 * 0.5 / 500**0.5  # three standard errors, for those with two answers
    assert max(len(problem.answer) for problem in made) <= 24


@settings(max_examples=25)
@given(st.sampled_from(list(GROUNDS)), st.integers(0, 2**31), st.integers(0, 2**31))
def test_training_and_test_share_no_problem_whatever_their_seeds(ground: str, seed: int, other: int) -> None:
    train = [problem_at(ground, index, seed=seed, split="train") for index in range(20)]
    assert train == [problem_at(ground, index, seed=seed, split="train") for index in range(20)]
    tests = ground_tasks([ground], count=20, seed=other)
    held = [problem_at(ground, index, seed=seed, split="val") for index in range(20)]
    assert {problem.split for problem in train} == {"train"}
    assert {task.split for task in tests} == {"test"}
    prompts = {problem.prompt for problem in train}
    assert not prompts & {task.prompt for task in tests}
    assert not {problem.key for problem in train} & {problem.key for problem in held}
    if seed != other:
        assert train != [problem_at(ground, index, seed=other, split="train") for index in range(20)]


@given(st.sampled_from(ALL), st.integers(0, 2**32))
def test_a_question_in_other_words_stays_in_its_split(place: tuple[str, str], seed: int) -> None:
    ground, family = place
    made = make_problem(ground, family, random.Random(seed))
    for phrasing in GROUNDS[ground][family].phrasings:
        assert Problem(family, made.key, phrasing, made.answer, made.grader).split == made.split


def test_tasks_are_repeatable_distinct_and_of_every_family() -> None:
    tasks = ground_tasks(list(GROUNDS), count=40, seed=5)
    assert tasks == ground_tasks(list(GROUNDS), count=40, seed=5)
    assert tasks != ground_tasks(list(GROUNDS), count=40, seed=6)
    assert len({task.task_id for task in tasks}) == len({task.prompt for task in tasks}) == 160
    assert {(task.domain, task.dataset) for task in tasks} == set(ALL)
    assert {task.split for task in ground_tasks(["logic"], count=60, seed=1, split=None)} == {"train", "val", "test"}


def test_grounds_are_a_source_of_tasks_for_labelling() -> None:
    tasks = load_tasks(["grounds:words,logic"], TaskSource(count=30, seed=4))
    assert Counter(task.domain for task in tasks) == {"words": 30, "logic": 30}
    assert tasks == ground_tasks(["words", "logic"], count=30, seed=4, split=None)
    as_test = load_tasks(["grounds:words"], TaskSource(count=3, columns=Columns(split="test")))
    assert {task.split for task in as_test} == {"test"}


def test_a_small_family_leaves_its_place_to_the_others() -> None:
    tasks = ground_tasks(["logic"], count=200, seed=1)
    counts = Counter(task.dataset for task in tasks)
    assert len({task.prompt for task in tasks}) == 200
    assert 5 <= counts["turn"] < 20 < counts["race"]


def test_what_cannot_be_made_is_named() -> None:
    with pytest.raises(DataError, match="no ground poems; there are arithmetic, "):
        ground_tasks(["poems"], count=1, seed=0)
    with pytest.raises(DataError, match="no ground poems"):
        problem_at("poems", 0, seed=0, split="train")
    with pytest.raises(DataError, match=r"no problem of logic .* is in the split dev"):
        problem_at("logic", 0, seed=0, split="dev")
    with pytest.raises(DataError, match="logic has not 3 different problems in the split dev"):
        ground_tasks(["logic"], count=3, seed=0, split="dev")


@pytest.mark.model
def test_answers_are_short_in_the_embedded_models_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("SmolLM2-135M-Instruct").folder)
    for ground, family in ALL:
        for seed in range(40):
            answer = make_problem(ground, family, random.Random(seed)).answer
            assert len(tokenizer(answer)["input_ids"]) <= 12, answer
