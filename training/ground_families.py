"""The families of tasks of each ground: what their questions are about, the one right answer, and how they are put."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from training.words import NAMES, WORDS, a_word, made_up

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SIDES = ("north", "east", "south", "west")
PLACES = ("first", "second", "third", "fourth", "fifth")


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one question is about (the fields of its phrasings), its answer, and the answers to choose from, if its
    grader needs them."""

    about: Mapping[str, object]
    answer: str
    options: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Family:
    draw: Callable[[random.Random], Drawn]
    grader: str
    phrasings: tuple[str, ...]


# Arithmetic -----------------------------------------------------------------------------------------------------


def _add(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return Drawn({"a": a, "b": b}, str(a + b))


def _subtract(rng: random.Random) -> Drawn:
    b, rest = rng.randint(2, 60), rng.randint(1, 60)
    return Drawn({"a": b + rest, "b": b}, str(rest))


def _multiply(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 19), rng.randint(2, 12)
    return Drawn({"a": a, "b": b}, str(a * b))


def _add_three(rng: random.Random) -> Drawn:
    a, b, c = (rng.randint(1, 30) for _ in range(3))
    return Drawn({"a": a, "b": b, "c": c}, str(a + b + c))


def _mixed(rng: random.Random) -> Drawn:
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 20)
    return Drawn({"a": a, "b": b, "c": c}, str(a * b + c))


def _double(rng: random.Random) -> Drawn:
    a = rng.randint(2, 250)
    return Drawn({"a": a}, str(2 * a))


def _missing(rng: random.Random) -> Drawn:
    a, b = rng.randint(2, 40), rng.randint(1, 40)
    return Drawn({"a": a, "sum": a + b}, str(b))


def _story(rng: random.Random) -> Drawn:
    b = rng.randint(2, 20)
    have, gains = b + rng.randint(1, 30), rng.random() < 0.5
    verb = rng.choice(("gets", "finds", "buys") if gains else ("loses", "sells", "gives away"))
    thing = rng.choice(("apples", "books", "coins", "pens", "cards", "balls", "cups", "stamps"))
    about = {"name": rng.choice(NAMES), "a": have, "verb": verb, "b": b, "thing": thing}
    return Drawn(about, str(have + b if gains else have - b))


# Words ----------------------------------------------------------------------------------------------------------


def _reverse(rng: random.Random) -> Drawn:
    word = a_word(rng, longest=5)
    while word == word[::-1]:
        word = a_word(rng, longest=5)
    return Drawn({"word": word}, word[::-1])


def _first_letter(rng: random.Random) -> Drawn:
    word = a_word(rng)
    return Drawn({"word": word}, word[0])


def _last_letter(rng: random.Random) -> Drawn:
    word = a_word(rng)
    return Drawn({"word": word}, word[-1])


def _beginning(rng: random.Random) -> Drawn:
    word = a_word(rng)
    return Drawn({"word": word}, word[:2])


def _upper(rng: random.Random) -> Drawn:
    word = a_word(rng)
    return Drawn({"word": word}, word.upper())


def _drop_letter(rng: random.Random) -> Drawn:
    word = made_up(rng, rng.randint(2, 3))
    letter = rng.choice(word)
    return Drawn({"word": word, "letter": letter}, word.replace(letter, ""))


def _replace_letter(rng: random.Random) -> Drawn:
    word = made_up(rng, 2) if rng.random() < 0.5 else a_word(rng, longest=5)
    old, new = rng.choice(word), rng.choice("aeioubdgklmnprst")
    while new in word:
        new = rng.choice("aeioubdgklmnprst")
    return Drawn({"word": word, "old": old, "new": new}, word.replace(old, new))


def _initials(rng: random.Random) -> Drawn:
    words = rng.sample(WORDS, 3)
    return Drawn({"words": " ".join(words)}, "".join(word[0] for word in words))


def _join(rng: random.Random) -> Drawn:
    one, two = a_word(rng, longest=5), a_word(rng, longest=5)
    return Drawn({"one": one, "two": two}, one + two)


def _twice(rng: random.Random) -> Drawn:
    word = a_word(rng, longest=6)
    return Drawn({"word": word}, word + word)


# Counting and ordering ------------------------------------------------------------------------------------------


def _count_letter(rng: random.Random) -> Drawn:
    count, letter = rng.randint(1, 4), rng.choice("aeiou")
    others = "aeiou".replace(letter, "")
    vowels = [letter] * count + [rng.choice(others) for _ in range(rng.randint(0, 2))]
    rng.shuffle(vowels)
    return Drawn({"word": "".join(rng.choice("bdkmnprst") + v for v in vowels), "letter": letter}, str(count))


def _length(rng: random.Random) -> Drawn:
    word = a_word(rng)
    return Drawn({"word": word}, str(len(word)))


def _count_items(rng: random.Random) -> Drawn:
    count = rng.randint(2, 7)
    return Drawn({"items": ", ".join(rng.sample(WORDS, count))}, str(count))


def _count_same(rng: random.Random) -> Drawn:
    word, other = rng.sample(WORDS, 2)
    count = rng.randint(1, 4)
    items = [word] * count + [other] * rng.randint(1, 3)
    rng.shuffle(items)
    return Drawn({"word": word, "items": ", ".join(items)}, str(count))


def _sort_numbers(rng: random.Random) -> Drawn:
    numbers = rng.sample(range(1, 100), 3)
    while numbers == sorted(numbers):
        rng.shuffle(numbers)
    return Drawn({"items": _listed(numbers)}, _listed(sorted(numbers)))


def _sort_words(rng: random.Random) -> Drawn:
    words = rng.sample([word for word in WORDS if len(word) <= 5], 3)
    while words == sorted(words):
        rng.shuffle(words)
    return Drawn({"items": _listed(words)}, _listed(sorted(words)))


def _largest(rng: random.Random) -> Drawn:
    numbers = rng.sample(range(1, 200), rng.randint(3, 5))
    return Drawn({"items": _listed(numbers)}, str(max(numbers)))


def _smallest(rng: random.Random) -> Drawn:
    numbers = rng.sample(range(1, 200), rng.randint(3, 5))
    return Drawn({"items": _listed(numbers)}, str(min(numbers)))


def _item_at(rng: random.Random) -> Drawn:
    words = rng.sample(WORDS, rng.randint(3, 5))
    place = rng.randrange(len(words))
    return Drawn({"items": _listed(words), "place": PLACES[place]}, words[place], words)


def _alphabet_first(rng: random.Random) -> Drawn:
    words = rng.sample(WORDS, 3)
    return Drawn({"items": _listed(words)}, min(words), words)


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


# Logic ----------------------------------------------------------------------------------------------------------


def _boolean(rng: random.Random) -> Drawn:
    def leaf() -> str:
        return rng.choice(("", "not ")) + rng.choice(("True", "False"))

    wanted = rng.random() < 0.5  # so that no answer is right more often
    while True:
        left = f"({leaf()} {rng.choice(('and', 'or'))} {leaf()})" if rng.random() < 0.6 else leaf()
        operator, right = rng.choice(("and", "or")), leaf()
        if _true(f"{left} {operator} {right}") == wanted:
            return Drawn({"text": f"{left} {operator} {right}"}, str(wanted), ("True", "False"))


def _true(text: str) -> bool:
    """The value of `[not] X`, of `L op R`, or of `(L op R) op R`, by hand: nothing is evaluated as a program."""
    if text.startswith("("):
        inner, _, rest = text[1:].partition(") ")
        text = f"{_true(inner)} {rest}"
    for operator in (" and ", " or "):
        left, found, right = text.partition(operator)
        if found:
            values = (_true(left), _true(right))
            return all(values) if operator == " and " else any(values)
    return text == "True" if not text.startswith("not ") else text == "not False"


def _compare(rng: random.Random) -> Drawn:
    a, b = rng.sample(range(1, 100), 2)
    relation = rng.choice(("greater", "less"))
    holds = a > b if relation == "greater" else a < b
    return Drawn({"a": a, "relation": relation, "b": b}, "yes" if holds else "no", ("yes", "no"))


def _tallest(rng: random.Random) -> Drawn:
    order = rng.sample(NAMES, 3)  # the tallest first
    facts = [f"{a} is taller than {b}." for a, b in pairwise(order)]
    rng.shuffle(facts)
    end = rng.choice(("tallest", "shortest"))
    answer = order[0] if end == "tallest" else order[-1]
    return Drawn({"facts": " ".join(facts), "end": end}, answer, order)


def _race(rng: random.Random) -> Drawn:
    order = rng.sample(NAMES, 3)
    facts = [f"{a} finished before {b}." for a, b in pairwise(order)]
    rng.shuffle(facts)
    place = rng.choice(("first", "second", "last"))
    return Drawn({"facts": " ".join(facts), "place": place}, order[("first", "second", "last").index(place)], order)


def _syllogism(rng: random.Random) -> Drawn:
    kind, name, colour = made_up(rng, 2) + "s", rng.choice(NAMES), rng.choice(("red", "blue", "green", "tall", "old"))
    answer = rng.choice(("yes", "no", "unknown"))
    quantity = {"yes": "All", "no": "No", "unknown": "Some"}[answer]
    facts = f"{quantity} {kind} are {colour}. {name} is one of the {kind}."
    return Drawn({"facts": facts, "name": name, "colour": colour}, answer, ("yes", "no", "unknown"))


def _implies(rng: random.Random) -> Drawn:
    cause, effect = rng.sample([f"the {word} is {what}" for word in WORDS[:90] for what in ("wet", "on", "new")], 2)
    kind = rng.randrange(3)
    rule = f"If {cause}, then {effect}."
    said, asked, answer = (
        (_sentence(cause), effect, "yes"),
        (_sentence(_negated(effect)), cause, "no"),
        (_sentence(effect), cause, "unknown"),
    )[kind]
    subject, _, what = asked.rpartition(" is ")
    about = {"facts": f"{rule} {said}", "question": f"Is {subject} {what}?"}
    return Drawn(about, answer, ("yes", "no", "unknown"))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _negated(text: str) -> str:
    return text.replace(" is ", " is not ")


def _weekday(rng: random.Random) -> Drawn:
    today, days = rng.randrange(7), rng.randint(1, 6)
    ahead = rng.random() < 0.6
    when = f"in {days} days" if ahead else f"{days} days ago"
    answer = DAYS[(today + (days if ahead else -days)) % 7]
    tense = "will it be" if ahead else "was it"
    return Drawn({"today": DAYS[today], "when": when, "tense": tense}, answer, DAYS)


def _turn(rng: random.Random) -> Drawn:
    start, turns = rng.randrange(4), [rng.choice(("left", "right")) for _ in range(rng.randint(1, 3))]
    end = (start + sum(1 if turn == "right" else -1 for turn in turns)) % 4
    path = ", then ".join(f"turn {turn}" for turn in turns)
    return Drawn({"start": SIDES[start], "path": path}, SIDES[end], SIDES)


GROUNDS: Mapping[str, Mapping[str, Family]] = {
    "arithmetic": {
        "add": Family(_add, "number", ("What is {a} + {b}?", "Calculate {a} plus {b}.", "{a} + {b} =")),
        "subtract": Family(_subtract, "number", ("What is {a} - {b}?", "Calculate {a} minus {b}.", "{a} - {b} =")),
        "multiply": Family(_multiply, "number", ("What is {a} * {b}?", "Calculate {a} times {b}.", "{a} * {b} =")),
        "add_three": Family(_add_three, "number", ("What is {a} + {b} + {c}?", "Find the sum of {a}, {b} and {c}.")),
        "mixed": Family(_mixed, "number", ("What is {a} * {b} + {c}?", "Multiply {a} by {b} and add {c}.")),
        "double": Family(_double, "number", ("What is the double of {a}?", "Double the number {a}.", "Twice {a} is?")),
        "missing": Family(_missing, "number", ("{a} + ? = {sum}", "Which number added to {a} gives {sum}?")),
        "story": Family(
            _story,
            "number",
            (
                "{name} has {a} {thing} and {verb} {b}. How many {thing} does {name} have now?",
                "{name} had {a} {thing}. Then {name} {verb} {b} of them. How many are there now?",
            ),
        ),
    },
    "words": {
        "reverse": Family(
            _reverse, "phrase", ('Reverse the word "{word}".', 'Write "{word}" backwards.', "Spell {word} backwards.")
        ),
        "first_letter": Family(
            _first_letter, "letter", ('What is the first letter of "{word}"?', "Give the first letter of {word}.")
        ),
        "last_letter": Family(
            _last_letter, "letter", ('What is the last letter of "{word}"?', "Give the last letter of {word}.")
        ),
        "beginning": Family(
            _beginning, "phrase", ('What are the first two letters of "{word}"?', "Give the first 2 letters of {word}.")
        ),
        "upper": Family(_upper, "exact", ('Write "{word}" in capital letters.', "Change {word} to upper case.")),
        "drop_letter": Family(
            _drop_letter,
            "phrase",
            ('Remove every "{letter}" from "{word}".', "Write {word} without the letter {letter}."),
        ),
        "replace_letter": Family(
            _replace_letter,
            "phrase",
            ('Replace every "{old}" in "{word}" with "{new}".', "In {word}, change each {old} to {new}."),
        ),
        "initials": Family(
            _initials,
            "phrase",
            ("Join the first letters of these words: {words}", 'What are the initials of "{words}", as one word?'),
        ),
        "join": Family(_join, "phrase", ('Join "{one}" and "{two}".', "Put {one} and {two} together as one word.")),
        "twice": Family(
            _twice, "phrase", ('Write "{word}" twice without a space.', "Repeat {word} two times as one word.")
        ),
    },
    "counting": {
        "count_letter": Family(
            _count_letter,
            "number",
            ('How many times does the letter "{letter}" occur in "{word}"?', 'Count the "{letter}" in {word}.'),
        ),
        "length": Family(
            _length, "number", ('How many letters has the word "{word}"?', "Count the letters of {word}.")
        ),
        "count_items": Family(
            _count_items, "number", ("How many words are in this list: {items}", "Count the items: {items}")
        ),
        "count_same": Family(
            _count_same,
            "number",
            ('How often does "{word}" occur in this list: {items}', "Count how often {word} stands in: {items}"),
        ),
        "sort_numbers": Family(
            _sort_numbers,
            "phrase",
            ("Sort from small to large: {items}", "Put these numbers in increasing order: {items}"),
        ),
        "sort_words": Family(
            _sort_words, "phrase", ("Sort alphabetically: {items}", "Put these words in alphabetical order: {items}")
        ),
        "largest": Family(_largest, "number", ("What is the largest of {items}?", "Find the maximum: {items}")),
        "smallest": Family(_smallest, "number", ("What is the smallest of {items}?", "Find the minimum: {items}")),
        "item_at": Family(
            _item_at, "choice", ("What is the {place} word in this list: {items}", "Give the {place} item: {items}")
        ),
        "alphabet_first": Family(
            _alphabet_first,
            "choice",
            ("Which comes first in the alphabet: {items}?", "Which word is first alphabetically: {items}"),
        ),
    },
    "logic": {
        "boolean": Family(_boolean, "choice", ("Is this True or False: {text}", "Evaluate: {text}")),
        "compare": Family(
            _compare,
            "choice",
            ("Is {a} {relation} than {b}? Answer yes or no.", "Yes or no: {a} is {relation} than {b}"),
        ),
        "tallest": Family(_tallest, "choice", ("{facts} Who is the {end}?", "{facts} Name the {end} of them.")),
        "race": Family(_race, "choice", ("{facts} Who was {place}?", "{facts} Name who came {place}.")),
        "syllogism": Family(
            _syllogism,
            "choice",
            (
                "{facts} Is {name} {colour}? Answer yes, no or unknown.",
                "{facts} Yes, no or unknown: {name} is {colour}.",
            ),
        ),
        "implies": Family(
            _implies,
            "choice",
            ("{facts} {question} Answer yes, no or unknown.", "Yes, no or unknown? {facts} {question}"),
        ),
        "weekday": Family(
            _weekday,
            "choice",
            ("Today is {today}. What day {tense} {when}?", "If today is {today}, what day {tense} {when}?"),
        ),
        "turn": Family(
            _turn,
            "choice",
            (
                "You face {start}, {path}. Where do you face now?",
                "Start facing {start}, {path}. Which direction is it?",
            ),
        ),
    },
}
