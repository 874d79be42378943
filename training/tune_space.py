"""What a tuning may vary: the knobs of each method, where they are usually looked for, and how a user writes others.

A knob is written `NAME=LOW..HIGH` (drawn evenly on a logarithmic scale where LOW is above zero; whole numbers where
both ends are), `NAME=A,B,C` (one of these) or `NAME=A` (fixed). Names are those of the settings that they become:
fields of `training.train_sft.SftRun` (one candidate of `taus` is `tau`), of `training.start.EvolveRun`, and of its
`search` and `worth`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from actors.errors import ConfigError
from training.commands import reads
from training.evolution import Settings
from training.fitness import Worth
from training.start import EvolveRun
from training.train_sft import SftRun

Method = Literal["sft", "evolve", "sft+evolve"]
Value = int | float | bool | str
Config = Mapping[str, Value]


@dataclass(frozen=True)
class Between:
    """Any number from `low` to `high`; both whole: whole numbers only."""

    low: float
    high: float

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.low, self.high

    def domain(self) -> Any:
        from ray import tune

        if isinstance(self.low, int) and isinstance(self.high, int):  # Tune leaves the upper end out
            return (tune.lograndint if self.low > 0 else tune.randint)(self.low, self.high + 1)
        return (tune.loguniform if self.low > 0 else tune.uniform)(self.low, self.high)


@dataclass(frozen=True)
class Among:
    """One of these."""

    values: tuple[Value, ...]

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.values

    def domain(self) -> Any:
        from ray import tune

        return tune.choice(list(self.values))


Knob = Between | Among


@dataclass(frozen=True)
class Usual:
    """Where a knob is looked for where nothing else is said, and the value that the first trial has."""

    knob: Knob
    first: Value


SFT: Mapping[str, Usual] = {
    "tau": Usual(Between(0.05, 1.0), 0.5),
    "decay": Usual(Between(0.01, 3.0), 0.3),
    "gamma": Usual(Between(1.0, 16.0), 4.0),
}
# `candidates` is what a trial may play in all, so that a larger population has fewer generations; `size` is cut at the
# number of tasks.
EVOLVE: Mapping[str, Usual] = {
    "sigma": Usual(Between(0.01, 1.0), 0.03),
    "population": Usual(Among((8, 16, 32, 64)), 32),
    "size": Usual(Among((64, 256, 1024, 4096)), 4096),
    "candidates": Usual(Among((1920,)), 1920),
}
# Not for tuning: where things are, and how a tuning itself goes.
_SFT_FIXED = frozenset(
    {"outcomes", "out", "workers", "split", "seed", "backbone", "folds", "device", "cache", "json", "progress"}
)
_EVOLVE_KNOBS = frozenset({"axes", "size", "samples", "choose", "validate_every", "generations"})
_SEARCH_KNOBS = frozenset({"sigma", "population", "mirrored"})
_WORTH_KNOBS = frozenset({"diversity"})


def space_of(method: Method, over: Sequence[str] = ()) -> dict[str, Knob]:
    """The usual knobs of a method, with what `over` says put in their place.

    Raises:
        ConfigError: a text that is no knob, or a knob that the method does not have.
    """
    space = {name: usual.knob for name, usual in _usual(method).items()}
    named = [read_knob(text) for text in over]
    if twice := sorted({name for name, _ in named if [other for other, _ in named].count(name) > 1}):
        raise ConfigError(f"--over: {', '.join(twice)} is given twice")
    able = knobs_of(method)
    for name, knob in named:
        if name not in able:
            raise ConfigError(f"--over: {method} has no setting {name} to tune; there are {', '.join(able)}")
        if name == "generations":
            space.pop("candidates", None)
        space[name] = knob
    return space


def first_of(method: Method, space: Mapping[str, Knob]) -> dict[str, Value]:
    """The first trial: the usual values where the space holds them, else its first ones."""
    usual = _usual(method)
    return {
        name: usual[name].first if name in usual and _holds(knob, usual[name].first) else knob.ends[0]
        for name, knob in space.items()
    }


def knobs_of(method: Method) -> tuple[str, ...]:
    """Names of all that may be tuned."""
    found: list[str] = []
    if method != "evolve":
        found += [_singular(field.name) for field in fields(SftRun) if field.name not in _SFT_FIXED]
    if method != "sft":
        found += [*sorted(_EVOLVE_KNOBS | _SEARCH_KNOBS | _WORTH_KNOBS), "candidates"]
    return tuple(found)


def read_knob(text: str) -> tuple[str, Knob]:
    """`NAME=LOW..HIGH`, `NAME=A,B,C` or `NAME=A`.

    Raises:
        ConfigError: it is none of these.
    """
    name, equals, given = (part.strip() for part in text.partition("="))
    if not name or not equals or not given:
        raise ConfigError(f"--over: {text!r} is not of the form NAME=LOW..HIGH or NAME=A,B,C")
    low, dots, high = given.partition("..")
    if not dots:
        values = tuple(_value(part.strip()) for part in given.split(","))
        if any(value == "" for value in values) or len(set(map(repr, values))) != len(values):
            raise ConfigError(f"--over: {text!r} names a value twice, or none")
        return name, Among(values)
    ends = _value(low.strip()), _value(high.strip())
    if any(isinstance(end, (bool, str)) for end in ends) or not ends[0] < ends[1]:  # type: ignore[operator]
        raise ConfigError(f"--over: {text!r} needs two numbers, the smaller one first")
    return name, Between(*ends)  # type: ignore[arg-type]  # numbers, as was checked


def corners(space: Mapping[str, Knob], first: Config) -> Iterable[Config]:
    """Configurations that show whether any of the space makes no sense: each knob at each of its ends."""
    yield first
    for name, knob in space.items():
        for end in knob.ends:
            yield {**first, name: end}


def sft_run(base: SftRun, config: Config) -> SftRun:
    """`base` with what of `config` is of SFT.

    Raises:
        ConfigError: a value of the wrong kind.
    """
    have = {field.name for field in fields(SftRun)} - _SFT_FIXED
    changes: dict[str, Any] = {}
    for name, value in config.items():
        if name == "read":
            changes["reads"] = reads(str(value).split("+"))
        elif name in have:
            changes[name] = _like(name, value, getattr(base, name))
        elif f"{name}s" in have:
            changes[f"{name}s"] = (_like(name, value, getattr(base, f"{name}s")[0]),)
    for name, kind in get_type_hints(SftRun).items():
        if get_origin(kind) is Literal and name in changes and changes[name] not in get_args(kind):
            raise ConfigError(f"{name} is {changes[name]!r}; it is one of {', '.join(get_args(kind))}")
    return replace(base, **changes)


def evolve_run(base: EvolveRun, config: Config, *, seed: int, tasks: int) -> EvolveRun:
    """`base` with what of `config` is of an evolution on `tasks` tasks.

    Raises:
        ConfigError: a value of the wrong kind or out of its range.
    """

    def chosen(names: Iterable[str], plain: Any) -> dict[str, Any]:
        return {name: _like(name, config[name], getattr(plain, name)) for name in names if name in config}

    changes = chosen(_EVOLVE_KNOBS, replace(base, size=1, axes=0))
    search = Settings(**{"population": 4} | chosen(_SEARCH_KNOBS, Settings(population=4)), seed=seed)
    if "population" not in config:
        search = replace(search, population=None)
    if "candidates" in config:
        population = search.population or 32
        changes["generations"] = max(1, int(_like("candidates", config["candidates"], 1)) // population)
    if "size" in changes:
        changes["size"] = min(changes["size"], tasks)
    if changes.get("choose", "argmax") not in ("argmax", "sample"):
        raise ConfigError(f"choose is {changes['choose']!r}; it is argmax or sample")
    for name in ("generations", "size", "samples", "validate_every"):
        if changes.get(name, 1) < 1:
            raise ConfigError(f"{name} is {changes[name]}; it must be at least 1")
    return replace(base, search=search, worth=Worth(**chosen(_WORTH_KNOBS, Worth())), **changes)


def _usual(method: Method) -> dict[str, Usual]:
    parts = {"sft": (SFT,), "evolve": (EVOLVE,), "sft+evolve": (SFT, EVOLVE)}[method]
    return {name: usual for part in parts for name, usual in part.items()}


def _singular(name: str) -> str:
    # Candidates stand in tuples under a plural; everything else keeps its name.
    return name.removesuffix("s") if isinstance(SftRun.__dataclass_fields__[name].default, tuple) else name


def _holds(knob: Knob, value: Value) -> bool:
    if isinstance(knob, Among):
        return value in knob.values
    return not isinstance(value, (str, bool)) and knob.low <= value <= knob.high


def _value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if math.isnan(number):
            raise ConfigError(f"--over: {text!r} is not a number")
        return number
    return text


def _like(name: str, value: Value, model: Any) -> Any:
    """The value as what the setting holds: 1 for a float is 1.0, 0.5 for a whole number an error."""
    wanted: Any = type(model)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not wanted:
        raise ConfigError(f"--over: {name} is {value!r}; it has to be of the kind {wanted.__name__}, as {model!r} is")
    return value
