"""Small families of tasks that are made from a seed, for pools of very small models: short questions with one right
answer. A family is a function from a random generator to (prompt, reference, grader, extra columns)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.errors import DataError
from training.outcomes import Task

Made = tuple[str, str, str, dict[str, Any]]

FACTS = Path(__file__).with_name("facts.jsonl")
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Emma", "Leo", "Zoe")
THINGS = ("apples", "books", "coins", "pens", "cards", "balls", "cups", "stamps")
OPPOSITES = (
    "hot:cold|cool big:small|little|tiny up:down day:night happy:sad|unhappy fast:slow old:young|new "
    "open:closed|close|shut high:low long:short light:dark|heavy|darkness hard:soft|easy full:empty "
    "early:late loud:quiet|silent|soft rich:poor strong:weak wet:dry left:right near:far black:white "
    "love:hate good:bad|evil start:end|finish|stop clean:dirty in:out true:false buy:sell win:lose "
    "push:pull"
)
YES_NO = {
    "Is fire hot": "yes",
    "Can fish fly": "no",
    "Is ice cold": "yes",
    "Do cats bark": "no",
    "Is the sun a star": "yes",
    "Is Paris in France": "yes",
    "Do birds have wings": "yes",
    "Is snow black": "no",
    "Is water wet": "yes",
    "Can a stone swim": "no",
    "Do trees have leaves": "yes",
    "Is the moon made of cheese": "no",
    "Is Africa a country": "no",
    "Do dogs have tails": "yes",
    "Is a whale a fish": "no",
    "Is London in England": "yes",
    "Do humans have three legs": "no",
    "Is gold a metal": "yes",
    "Can pigs fly": "no",
    "Is the sky green": "no",
    "Do cows give milk": "yes",
    "Is a banana a fruit": "yes",
    "Is honey salty": "no",
    "Is winter colder than summer": "yes",
}

TOPICS = (
    "sea", "rain", "cat", "dog", "moon", "river", "summer", "winter", "music", "friend", "castle", "train",
    "bread", "house", "forest", "coffee", "football", "birthday", "wind", "garden", "school", "snow", "ship",
    "night", "horse", "city", "mountain", "king", "letter", "teacher",
)  # fmt: skip


def add(rng: random.Random) -> Made:
    first, second = rng.randint(2, 20), rng.randint(2, 12)
    ask = rng.choice(["What is {} + {}?", "Calculate {} + {}.", "How much is {} plus {}?"])
    return ask.format(first, second), str(first + second), "number", {}


def subtract(rng: random.Random) -> Made:
    second = rng.randint(2, 9)
    first = second + rng.randint(2, 12)
    ask = rng.choice(["What is {} - {}?", "Calculate {} - {}.", "How much is {} minus {}?"])
    return ask.format(first, second), str(first - second), "number", {}


def multiply(rng: random.Random) -> Made:
    first, second = rng.randint(2, 10), rng.randint(2, 9)
    ask = rng.choice(["What is {} times {}?", "Calculate {} * {}.", "What is {} multiplied by {}?"])
    return ask.format(first, second), str(first * second), "number", {}


def chain(rng: random.Random) -> Made:
    numbers = [rng.randint(1, 9) for _ in range(rng.randint(3, 4))]
    ask = rng.choice(["What is {}?", "Calculate {}.", "Add up: {}"])
    return ask.format(" + ".join(map(str, numbers))), str(sum(numbers)), "number", {}


def story(rng: random.Random) -> Made:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    have, more = rng.randint(5, 20), rng.randint(2, 9)
    verb, total = rng.choice([("gets {} more", have + more), ("finds {} more", have + more)])
    if have > more and rng.random() < 0.5:
        verb, total = rng.choice(["gives away {}", "loses {}"]), have - more
    prompt = f"{name} has {have} {thing} and {verb.format(more)}. How many {thing} does {name} have now?"
    return prompt, str(total), "number", {}


def fact(rng: random.Random) -> Made:
    line = rng.choice([json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()])
    return line["prompt"], line["reference"], "phrase", {}


def opposite(rng: random.Random) -> Made:
    word, answers = rng.choice([pair.split(":") for pair in OPPOSITES.split()])
    ask = rng.choice(['What is the opposite of "{}"?', 'Give a word that means the opposite of "{}".'])
    return ask.format(word), answers, "phrase", {}


def yes_no(rng: random.Random) -> Made:
    question, answer = rng.choice(list(YES_NO.items()))
    return f"{question}? Answer yes or no.", answer, "choice", {"options": "yes|no"}


def even_odd(rng: random.Random) -> Made:
    number = rng.randint(2, 99)
    ask = rng.choice(["Is {} even or odd?", "Is the number {} even or odd?"])
    return ask.format(number), ("odd" if number % 2 else "even"), "choice", {"options": "even|odd"}


def plural(rng: random.Random) -> Made:
    word = rng.choice("cat dog tree apple chair horse table cloud river house book bird star ship lamp king".split())  # noqa: SIM905
    return (
        rng.choice(['What is the plural of "{}"?', 'Write the plural of "{}".']).format(word),
        word + "s",
        "phrase",
        {},
    )


def prose(rng: random.Random) -> Made:
    topic = rng.choice(TOPICS)
    ask = rng.choice(
        [
            "Write a sentence about a {}.",
            "Write a short story about a {}.",
            "Write a poem about the {}.",
            "Tell me something about the word {}.",
            "Explain to a child: {}.",
            "Describe a {} in a few words.",
        ]
    )
    return ask.format(topic), f"{topic}|{topic}s", "prose", {}


FAMILIES: dict[str, Callable[[random.Random], Made]] = {
    family.__name__: family
    for family in (add, subtract, multiply, chain, story, fact, opposite, yes_no, even_odd, plural, prose)
}


def family_tasks(families: Sequence[str], *, count: int, seed: int, test_share: float = 0.3) -> list[Task]:
    """At most `count` tasks of each family, no prompt twice, split into train and test by prompt. Equal arguments give
    equal tasks.

    Raises:
        DataError: an unknown family.
    """
    tasks: list[Task] = []
    for family in families:
        if family not in FAMILIES:
            raise DataError(f"no family {family}; there are {', '.join(FAMILIES)}")
        rng = random.Random(f"{family} {seed}")
        made: dict[str, Made] = {}
        for _ in range(count * 50):
            one = FAMILIES[family](rng)
            made.setdefault(one[0], one)
            if len(made) == count:
                break
        tests = int(len(made) * test_share)
        for index, (prompt, reference, grader, extra) in enumerate(made.values()):
            split = "test" if index < tests else "train"
            task_id = f"{family}-{seed}-{index:03d}"
            tasks.append(Task(task_id, prompt, reference, family, family, split, grader, extra))
    return tasks
