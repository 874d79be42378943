"""The families of composite tasks: each needs two or three grounds in turn or side by side.

An answer through several steps is only as good as the worst of them, so the parts are what specialists of this size
do learn (the largest of numbers, the third of words, products, who is the tallest), not what none of them does (days of
the week, spelling backwards). What a question is about is drawn so that every part stays inside what its ground asks of
a specialist. A part's question is exactly a phrasing of the ground's own family; where it needs an earlier part's
answer, `{0}` stands for the answer of part 0, and so on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from training.ground_families import GROUNDS, PLACES
from training.words import NAMES, WORDS, made_up


@dataclass(frozen=True, slots=True)
class Part:
    """A question for one ground's specialist. `fields` fill the family's phrasings; `answer` is the right one."""

    ground: str
    family: str
    fields: Mapping[str, object]
    answer: str

    @property
    def question(self) -> str:
        return GROUNDS[self.ground][self.family].phrasings[0].format(**self.fields)


@dataclass(frozen=True, slots=True)
class Composition:
    """What one question is about, and the parts that solve it; the last part's answer is the question's."""

    about: Mapping[str, object]
    parts: tuple[Part, ...]
    options: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class CompositeFamily:
    draw: Callable[[random.Random], Composition]
    grader: str
    phrasings: tuple[str, ...]


SHORT = tuple(word for word in WORDS if len(word) <= 5)


# A number from a list, then arithmetic ---------------------------------------------------------------------------


def _largest_double(rng: random.Random) -> Composition:
    numbers = rng.sample(range(2, 120), 3)
    return Composition({"items": _listed(numbers)}, (_largest(numbers), _double(max(numbers))))


def _largest_plus(rng: random.Random) -> Composition:
    numbers, n = rng.sample(range(2, 80), 3), rng.randint(5, 60)
    return Composition({"items": _listed(numbers), "n": n}, (_largest(numbers), _add("{0}", n, max(numbers) + n)))


def _spread(rng: random.Random) -> Composition:
    numbers = rng.sample(range(3, 90), 3)
    while max(numbers) - min(numbers) > 60 or min(numbers) > 60:
        numbers = rng.sample(range(3, 90), 3)
    rest = Part("arithmetic", "subtract", {"a": "{0}", "b": "{1}"}, str(max(numbers) - min(numbers)))
    return Composition({"items": _listed(numbers)}, (_largest(numbers), _smallest(numbers), rest))


def _both_ends(rng: random.Random) -> Composition:
    numbers = rng.sample(range(3, 90), 3)
    total = _add("{0}", "{1}", max(numbers) + min(numbers))
    return Composition({"items": _listed(numbers)}, (_largest(numbers), _smallest(numbers), total))


def _list_times(rng: random.Random) -> Composition:
    count, n = rng.randint(3, 7), rng.randint(3, 12)
    items = _listed(rng.sample(SHORT, count))
    counted = Part("counting", "count_items", {"items": items}, str(count))
    return Composition({"items": items, "n": n}, (counted, _times("{0}", n, count * n)))


def _length_times(rng: random.Random) -> Composition:
    word, n = rng.choice(WORDS), rng.randint(3, 9)
    return Composition({"word": word, "n": n}, (_length(word, len(word)), _times("{0}", n, len(word) * n)))


# Arithmetic, then the largest or smallest of what was found ------------------------------------------------------


def _largest_of(rng: random.Random) -> Composition:
    while True:
        a, b, c, d = rng.randint(5, 60), rng.randint(5, 60), rng.randint(3, 12), rng.randint(3, 9)
        e = rng.randint(20, 110)
        if len({a + b, c * d, e}) == 3:
            break
    most = Part("counting", "largest", {"items": f"{{0}}, {{1}}, {e}"}, str(max(a + b, c * d, e)))
    about = {"a": a, "b": b, "c": c, "d": d, "e": e}
    return Composition(about, (_add(a, b, a + b), _times(c, d, c * d), most))


def _smallest_product(rng: random.Random) -> Composition:
    while True:
        a, b, c, d = rng.randint(3, 12), rng.randint(3, 9), rng.randint(3, 12), rng.randint(3, 9)
        e = rng.randint(9, 100)
        if len({a * b, c * d, e}) == 3:
            break
    least = Part("counting", "smallest", {"items": f"{{0}}, {{1}}, {e}"}, str(min(a * b, c * d, e)))
    about = {"a": a, "b": b, "c": c, "d": d, "e": e}
    return Composition(about, (_times(a, b, a * b), _times(c, d, c * d), least))


# A word from a list, then its letters ----------------------------------------------------------------------------


def _item_letter(rng: random.Random) -> Composition:
    items, place, word = _placed(rng, WORDS)
    return Composition({"items": items, "place": place}, (_item(items, place, word), _first_letter("{0}", word)))


def _item_twice(rng: random.Random) -> Composition:
    items, place, word = _placed(rng, SHORT)
    return Composition({"items": items, "place": place}, (_item(items, place, word), _twice("{0}", word)))


def _item_upper(rng: random.Random) -> Composition:
    items, place, word = _placed(rng, SHORT)
    upper = Part("words", "upper", {"word": "{0}"}, word.upper())
    return Composition({"items": items, "place": place}, (_item(items, place, word), upper))


def _first_twice(rng: random.Random) -> Composition:
    words = rng.sample(SHORT, 3)
    first = Part("counting", "alphabet_first", {"items": _listed(words)}, min(words))
    return Composition({"items": _listed(words)}, (first, _twice("{0}", min(words))))


def _items_join(rng: random.Random) -> Composition:
    (items, place, one), (others, other, two) = _placed(rng, SHORT), _placed(rng, SHORT)
    join = Part("words", "join", {"one": "{0}", "two": "{1}"}, one + two)
    about = {"items": items, "place": place, "others": others, "other": other}
    return Composition(about, (_item(items, place, one), _item(others, other, two), join))


# A conclusion, then letters, or a number from it -----------------------------------------------------------------


def _tallest_letter(rng: random.Random) -> Composition:
    about, name = _heights(rng)
    return Composition(about, (Part("logic", "tallest", about, name), _first_letter("{0}", name)))


def _race_letter(rng: random.Random) -> Composition:
    order = rng.sample(NAMES, 3)
    facts = [f"{a} finished before {b}." for a, b in pairwise(order)]
    rng.shuffle(facts)
    place = rng.choice(("first", "last"))
    name = order[0] if place == "first" else order[-1]
    about = {"facts": " ".join(facts), "place": place}
    return Composition(about, (Part("logic", "race", about, name), _first_letter("{0}", name)))


def _syllogism_letter(rng: random.Random) -> Composition:
    kind, name, colour = made_up(rng, 2) + "s", rng.choice(NAMES), rng.choice(("red", "blue", "green", "tall", "old"))
    answer = rng.choice(("yes", "no", "unknown"))
    quantity = {"yes": "All", "no": "No", "unknown": "Some"}[answer]
    facts = f"{quantity} {kind} are {colour}. {name} is one of the {kind}."
    about = {"facts": facts, "name": name, "colour": colour}
    return Composition(about, (Part("logic", "syllogism", about, answer), _first_letter("{0}", answer)))


# Three specialists in a row --------------------------------------------------------------------------------------


def _tallest_length_times(rng: random.Random) -> Composition:
    about, name = _heights(rng)
    n = rng.randint(3, 9)
    steps = (Part("logic", "tallest", about, name), _length("{0}", len(name)), _times("{1}", n, len(name) * n))
    return Composition({**about, "n": n}, steps)


def _twice_length_plus(rng: random.Random) -> Composition:
    word = made_up(rng, 1) if rng.random() < 0.5 else rng.choice([word for word in WORDS if len(word) == 3])
    n, length = rng.randint(5, 60), 2 * len(word)
    steps = (_twice(word, word), _length("{0}", length), _add("{1}", n, length + n))
    return Composition({"word": word, "n": n}, steps)


# Parts -----------------------------------------------------------------------------------------------------------


def _largest(numbers: Sequence[int]) -> Part:
    return Part("counting", "largest", {"items": _listed(numbers)}, str(max(numbers)))


def _smallest(numbers: Sequence[int]) -> Part:
    return Part("counting", "smallest", {"items": _listed(numbers)}, str(min(numbers)))


def _item(items: str, place: str, word: str) -> Part:
    return Part("counting", "item_at", {"items": items, "place": place}, word)


def _length(word: str, length: int) -> Part:
    return Part("counting", "length", {"word": word}, str(length))


def _add(a: int | str, b: int | str, total: int) -> Part:
    return Part("arithmetic", "add", {"a": a, "b": b}, str(total))


def _times(a: int | str, b: int | str, product: int) -> Part:
    return Part("arithmetic", "multiply", {"a": a, "b": b}, str(product))


def _double(a: int) -> Part:
    return Part("arithmetic", "double", {"a": "{0}"}, str(2 * a))


def _twice(asked: str, word: str) -> Part:
    return Part("words", "twice", {"word": asked}, word + word)


def _first_letter(asked: str, word: str) -> Part:
    return Part("words", "first_letter", {"word": asked}, word[0])


def _placed(rng: random.Random, words: Sequence[str]) -> tuple[str, str, str]:
    """Three words as a list, a place, and the word there."""
    drawn, place = rng.sample(list(words), 3), rng.randrange(3)
    return _listed(drawn), PLACES[place], drawn[place]


def _heights(rng: random.Random) -> tuple[dict[str, object], str]:
    """Who is taller than whom, what is asked of them, and its answer."""
    order = rng.sample(NAMES, 3)
    facts = [f"{a} is taller than {b}." for a, b in pairwise(order)]
    rng.shuffle(facts)
    end = rng.choice(("tallest", "shortest"))
    return {"facts": " ".join(facts), "end": end}, order[0] if end == "tallest" else order[-1]


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


FAMILIES: Mapping[str, CompositeFamily] = {
    "largest_double": CompositeFamily(
        _largest_double,
        "number",
        (
            "Take the largest of {items} and double it.",
            "What is twice the largest of {items}?",
        ),
    ),
    "largest_plus": CompositeFamily(
        _largest_plus,
        "number",
        (
            "Add {n} to the largest of {items}.",
            "What is the largest of {items}, plus {n}?",
        ),
    ),
    "spread": CompositeFamily(
        _spread,
        "number",
        (
            "Subtract the smallest of {items} from the largest.",
            "How far is the largest of {items} from the smallest?",
        ),
    ),
    "both_ends": CompositeFamily(
        _both_ends,
        "number",
        (
            "Add the largest and the smallest of {items}.",
            "What do the smallest and the largest of {items} sum to?",
        ),
    ),
    "list_times": CompositeFamily(
        _list_times,
        "number",
        (
            "Count these words and multiply the count by {n}: {items}",
            "What is {n} times the number of words in: {items}",
        ),
    ),
    "length_times": CompositeFamily(
        _length_times,
        "number",
        (
            'Count the letters of "{word}" and multiply by {n}.',
            'What is {n} times the number of letters in "{word}"?',
        ),
    ),
    "largest_of": CompositeFamily(
        _largest_of,
        "number",
        (
            "Which is largest: {a} + {b}, {c} * {d} or {e}? Give its value.",
            "Maximum of {a} + {b}, {c} * {d} and {e}?",
        ),
    ),
    "smallest_product": CompositeFamily(
        _smallest_product,
        "number",
        (
            "Which is smallest: {a} * {b}, {c} * {d} or {e}? Give its value.",
            "Minimum of {a} * {b}, {c} * {d} and {e}?",
        ),
    ),
    "item_letter": CompositeFamily(
        _item_letter,
        "letter",
        (
            "Give the first letter of the {place} of these words: {items}",
            "With which letter does the {place} word begin: {items}",
        ),
    ),
    "item_twice": CompositeFamily(
        _item_twice,
        "phrase",
        (
            "Write the {place} of these words twice without a space: {items}",
            "Repeat the {place} word two times as one word: {items}",
        ),
    ),
    "item_upper": CompositeFamily(
        _item_upper,
        "exact",
        (
            "Take the {place} of these words in capital letters: {items}",
            "In upper case, the {place} word of: {items}",
        ),
    ),
    "first_twice": CompositeFamily(
        _first_twice,
        "phrase",
        (
            "Write the alphabetically first of these words twice without a space: {items}",
            "Find the word that comes first in the alphabet and repeat it as one word: {items}",
        ),
    ),
    "items_join": CompositeFamily(
        _items_join,
        "phrase",
        (
            "Join the {place} of {items} and the {other} of {others}.",
            "Put together as one word the {place} word of {items} and the {other} word of {others}.",
        ),
    ),
    "tallest_letter": CompositeFamily(
        _tallest_letter,
        "letter",
        (
            "{facts} Give the first letter of the {end}.",
            "{facts} With which letter does the name of the {end} begin?",
        ),
    ),
    "race_letter": CompositeFamily(
        _race_letter,
        "letter",
        (
            "{facts} Give the first letter of who was {place}.",
            "{facts} With which letter does the name of who came {place} begin?",
        ),
    ),
    "syllogism_letter": CompositeFamily(
        _syllogism_letter,
        "letter",
        (
            "{facts} Is {name} {colour}: yes, no or unknown? Give the first letter of the answer.",
            "{facts} Yes, no or unknown: {name} is {colour}. Only the first letter.",
        ),
    ),
    "tallest_length_times": CompositeFamily(
        _tallest_length_times,
        "number",
        (
            "{facts} Count the letters of the {end} and multiply by {n}.",
            "{facts} What is {n} times the number of letters in the name of the {end}?",
        ),
    ),
    "twice_length_plus": CompositeFamily(
        _twice_length_plus,
        "number",
        (
            'Write "{word}" twice as one word, count its letters and add {n}.',
            'Repeat "{word}" two times without a space. What is the number of its letters plus {n}?',
        ),
    ),
}
