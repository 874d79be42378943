"""The families of composite tasks: each needs two or three grounds in turn or side by side.

What a question is about is drawn so that every part stays inside what its ground asks of a specialist. A part's
question is exactly a phrasing of the ground's own family; where it needs an earlier part's answer, `{0}` stands for
the answer of part 0, and so on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from training.ground_families import DAYS, GROUNDS, PLACES, SIDES
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


# A number from words, then arithmetic ----------------------------------------------------------------------------


def _length_plus(rng: random.Random) -> Composition:
    word, n = rng.choice(WORDS), rng.randint(5, 60)
    return Composition(
        {"word": word, "n": n},
        (
            Part("counting", "length", {"word": word}, str(len(word))),
            Part("arithmetic", "add", {"a": "{0}", "b": n}, str(len(word) + n)),
        ),
    )


def _length_times(rng: random.Random) -> Composition:
    word, n = rng.choice(WORDS), rng.randint(3, 9)
    return Composition(
        {"word": word, "n": n},
        (
            Part("counting", "length", {"word": word}, str(len(word))),
            Part("arithmetic", "multiply", {"a": "{0}", "b": n}, str(len(word) * n)),
        ),
    )


def _two_lengths(rng: random.Random) -> Composition:
    one, two = rng.sample(WORDS, 2)
    return Composition(
        {"one": one, "two": two},
        (
            Part("counting", "length", {"word": one}, str(len(one))),
            Part("counting", "length", {"word": two}, str(len(two))),
            Part("arithmetic", "add", {"a": "{0}", "b": "{1}"}, str(len(one) + len(two))),
        ),
    )


def _list_minus(rng: random.Random) -> Composition:
    count, n = rng.randint(3, 6), rng.randint(20, 60)
    items = _listed(rng.sample(SHORT, count))
    return Composition(
        {"items": items, "n": n},
        (
            Part("counting", "count_items", {"items": items}, str(count)),
            Part("arithmetic", "subtract", {"a": n, "b": "{0}"}, str(n - count)),
        ),
    )


# Numbers from numbers --------------------------------------------------------------------------------------------


def _largest_double(rng: random.Random) -> Composition:
    numbers = rng.sample(range(2, 120), 3)
    return Composition(
        {"items": _listed(numbers)},
        (
            Part("counting", "largest", {"items": _listed(numbers)}, str(max(numbers))),
            Part("arithmetic", "double", {"a": "{0}"}, str(2 * max(numbers))),
        ),
    )


def _spread(rng: random.Random) -> Composition:
    numbers = rng.sample(range(3, 90), 3)
    while max(numbers) - min(numbers) > 60 or min(numbers) > 60:
        numbers = rng.sample(range(3, 90), 3)
    items, high, low = _listed(numbers), max(numbers), min(numbers)
    return Composition(
        {"items": items},
        (
            Part("counting", "largest", {"items": items}, str(high)),
            Part("counting", "smallest", {"items": items}, str(low)),
            Part("arithmetic", "subtract", {"a": "{0}", "b": "{1}"}, str(high - low)),
        ),
    )


def _largest_of(rng: random.Random) -> Composition:
    while True:
        a, b, c, d = rng.randint(5, 60), rng.randint(5, 60), rng.randint(3, 12), rng.randint(3, 9)
        e = rng.randint(20, 110)
        if len({a + b, c * d, e}) == 3:
            break
    return Composition(
        {"a": a, "b": b, "c": c, "d": d, "e": e},
        (
            Part("arithmetic", "add", {"a": a, "b": b}, str(a + b)),
            Part("arithmetic", "multiply", {"a": c, "b": d}, str(c * d)),
            Part("counting", "largest", {"items": f"{{0}}, {{1}}, {e}"}, str(max(a + b, c * d, e))),
        ),
    )


# Letters of what was found ---------------------------------------------------------------------------------------


def _item_upper(rng: random.Random) -> Composition:
    words, place = rng.sample(SHORT, 3), rng.randrange(3)
    items, word = _listed(words), words[place]
    return Composition(
        {"items": items, "place": PLACES[place]},
        (
            Part("counting", "item_at", {"items": items, "place": PLACES[place]}, word),
            Part("words", "upper", {"word": "{0}"}, word.upper()),
        ),
    )


def _first_twice(rng: random.Random) -> Composition:
    words = rng.sample(SHORT, 3)
    items, word = _listed(words), min(words)
    return Composition(
        {"items": items},
        (
            Part("counting", "alphabet_first", {"items": items}, word),
            Part("words", "twice", {"word": "{0}"}, word + word),
        ),
    )


def _replaced_count(rng: random.Random) -> Composition:
    word = made_up(rng, 3)
    old, new = rng.choice(word[1::2]), rng.choice("aeiou")
    while new == old or new not in word:
        word = made_up(rng, 3)
        old, new = rng.choice(word[1::2]), rng.choice("aeiou")
    changed = word.replace(old, new)
    return Composition(
        {"word": word, "old": old, "new": new},
        (
            Part("words", "replace_letter", {"word": word, "old": old, "new": new}, changed),
            Part("counting", "count_letter", {"word": "{0}", "letter": new}, str(changed.count(new))),
        ),
    )


def _direction_upper(rng: random.Random) -> Composition:
    start, turns = rng.randrange(4), [rng.choice(("left", "right")) for _ in range(rng.randint(2, 3))]
    end = SIDES[(start + sum(1 if turn == "right" else -1 for turn in turns)) % 4]
    about = {"start": SIDES[start], "path": ", then ".join(f"turn {turn}" for turn in turns)}
    return Composition(about, (Part("logic", "turn", about, end), Part("words", "upper", {"word": "{0}"}, end.upper())))


def _tallest_letter(rng: random.Random) -> Composition:
    order = rng.sample(NAMES, 3)
    facts = [f"{a} is taller than {b}." for a, b in pairwise(order)]
    rng.shuffle(facts)
    end = rng.choice(("tallest", "shortest"))
    name = order[0] if end == "tallest" else order[-1]
    about = {"facts": " ".join(facts), "end": end}
    return Composition(
        about, (Part("logic", "tallest", about, name), Part("words", "last_letter", {"word": "{0}"}, name[-1]))
    )


# A conclusion from what was found --------------------------------------------------------------------------------


def _difference_day(rng: random.Random) -> Composition:
    today, days = rng.randrange(7), rng.randint(2, 6)
    b = rng.randint(2, 60)
    day = DAYS[(today + days) % 7]
    asked = {"today": DAYS[today], "when": "in {0} days", "tense": "will it be"}
    return Composition(
        {"today": DAYS[today], "a": b + days, "b": b},
        (
            Part("arithmetic", "subtract", {"a": b + days, "b": b}, str(days)),
            Part("logic", "weekday", asked, day),
        ),
        DAYS,
    )


def _length_day(rng: random.Random) -> Composition:
    today, word = rng.randrange(7), rng.choice([word for word in WORDS if len(word) <= 6])
    day = DAYS[(today + len(word)) % 7]
    asked = {"today": DAYS[today], "when": "in {0} days", "tense": "will it be"}
    return Composition(
        {"today": DAYS[today], "word": word},
        (
            Part("counting", "length", {"word": word}, str(len(word))),
            Part("logic", "weekday", asked, day),
        ),
        DAYS,
    )


def _difference_day_letters(rng: random.Random) -> Composition:
    first = _difference_day(rng)
    day = first.parts[-1].answer
    return Composition(first.about, (*first.parts, Part("words", "beginning", {"word": "{1}"}, day[:2])))


def _product_greater(rng: random.Random) -> Composition:
    a, b = rng.randint(3, 12), rng.randint(3, 8)
    near = a * b + rng.choice((-1, 1)) * rng.randint(1, 20)
    n = max(2, min(99, near))
    while n == a * b:
        n -= 1
    return Composition(
        {"a": a, "b": b, "n": n},
        (
            Part("arithmetic", "multiply", {"a": a, "b": b}, str(a * b)),
            Part("logic", "compare", {"a": "{0}", "relation": "greater", "b": n}, "yes" if a * b > n else "no"),
        ),
        ("yes", "no"),
    )


def _twice_length_plus(rng: random.Random) -> Composition:
    word = made_up(rng, 1) if rng.random() < 0.5 else rng.choice([word for word in WORDS if len(word) == 3])
    n = rng.randint(5, 60)
    return Composition(
        {"word": word, "n": n},
        (
            Part("words", "twice", {"word": word}, word * 2),
            Part("counting", "length", {"word": "{0}"}, str(2 * len(word))),
            Part("arithmetic", "add", {"a": "{1}", "b": n}, str(2 * len(word) + n)),
        ),
    )


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


FAMILIES: Mapping[str, CompositeFamily] = {
    "length_plus": CompositeFamily(
        _length_plus,
        "number",
        ('Count the letters of "{word}" and add {n}.', 'Add {n} to the number of letters in "{word}".'),
    ),
    "length_times": CompositeFamily(
        _length_times,
        "number",
        ('Count the letters of "{word}" and multiply by {n}.', 'What is {n} times the number of letters in "{word}"?'),
    ),
    "two_lengths": CompositeFamily(
        _two_lengths,
        "number",
        ('How many letters have "{one}" and "{two}" together?', 'Add the letters of "{one}" and those of "{two}".'),
    ),
    "list_minus": CompositeFamily(
        _list_minus,
        "number",
        ("Count these words and take the count from {n}: {items}", "What is {n} minus the number of words in: {items}"),
    ),
    "largest_double": CompositeFamily(
        _largest_double,
        "number",
        ("Take the largest of {items} and double it.", "What is twice the largest of {items}?"),
    ),
    "spread": CompositeFamily(
        _spread,
        "number",
        ("Subtract the smallest of {items} from the largest.", "How far is the largest of {items} from the smallest?"),
    ),
    "largest_of": CompositeFamily(
        _largest_of,
        "number",
        ("Which is largest: {a} + {b}, {c} * {d} or {e}? Give its value.", "Maximum of {a} + {b}, {c} * {d} and {e}?"),
    ),
    "item_upper": CompositeFamily(
        _item_upper,
        "exact",
        ("Take the {place} of these words in capital letters: {items}", "In upper case, the {place} word of: {items}"),
    ),
    "first_twice": CompositeFamily(
        _first_twice,
        "phrase",
        (
            "Write the alphabetically first of these words twice without a space: {items}",
            "Find the word that comes first in the alphabet and repeat it as one word: {items}",
        ),
    ),
    "replaced_count": CompositeFamily(
        _replaced_count,
        "number",
        (
            'Replace every "{old}" in "{word}" with "{new}". How many "{new}" are in the result?',
            'How many "{new}" has "{word}" after each "{old}" became "{new}"?',
        ),
    ),
    "direction_upper": CompositeFamily(
        _direction_upper,
        "exact",
        (
            "You face {start}, {path}. Write in capital letters where you face now.",
            "Start facing {start}, {path}. Which direction is it, in upper case?",
        ),
    ),
    "tallest_letter": CompositeFamily(
        _tallest_letter,
        "letter",
        ("{facts} Give the last letter of the {end}.", "{facts} With which letter does the name of the {end} end?"),
    ),
    "difference_day": CompositeFamily(
        _difference_day,
        "choice",
        ("Today is {today}. What day will it be in {a} - {b} days?", "Which day is {a} minus {b} days after {today}?"),
    ),
    "length_day": CompositeFamily(
        _length_day,
        "choice",
        (
            'Today is {today}. What day will it be in as many days as "{word}" has letters?',
            'Which day comes as many days after {today} as "{word}" has letters?',
        ),
    ),
    "difference_day_letters": CompositeFamily(
        _difference_day_letters,
        "phrase",
        (
            "Today is {today}. Give the first two letters of the day in {a} - {b} days.",
            "With which two letters begins the day that is {a} minus {b} days after {today}?",
        ),
    ),
    "product_greater": CompositeFamily(
        _product_greater,
        "choice",
        ("Is {a} * {b} greater than {n}? Answer yes or no.", "Yes or no: {a} times {b} is more than {n}"),
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
