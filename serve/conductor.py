"""From the configuration to a conductor that serves: whether there is one, its settings, its numbering of the pool."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from actors.config import ConductorConfig, FuguConfig, writer_of
from actors.errors import CheckpointError
from actors.messages import Usage, Worker
from orchestrator.budget import Budget, Price
from orchestrator.conductor import ConductorSettings, PromptSettings
from orchestrator.conductor_card import ConductorCard, numbering, read_card
from orchestrator.executor import ExecutorSettings
from serve.checkpoint import check_pinned
from serve.prices import Prices

Number = TypeVar("Number", int, float)

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Knobs:
    """What a request may choose; None is the configuration's value. Limits of the configuration hold as well: a
    request can only lower what it may spend."""

    max_rounds: int | None = None
    max_recursion: int | None = None
    max_steps: int | None = None
    deadline_s: float | None = None
    budget_usd: float | None = None
    budget_tokens: int | None = None
    max_calls: int | None = None


@dataclass(frozen=True, slots=True)
class Conducting:
    """A conductor as it is served: `writer` writes; `names` are the workers by their numbers; `about` a line on each;
    `price` what a call costs; `structured`: it decodes under a grammar."""

    config: ConductorConfig
    writer: Worker
    names: tuple[str, ...]
    about: Mapping[str, str]
    price: Price
    structured: bool = False

    def settings(self, knobs: Knobs) -> ConductorSettings:
        config = self.config
        steps = config.max_steps if knobs.max_steps is None else min(knobs.max_steps, config.max_steps)
        return ConductorSettings(
            _shortened(
                PromptSettings(config.style, config.show_names, config.examples, max_steps=steps), config.context
            ),
            max_rounds=rounds_of(config, knobs),
            max_depth=config.max_recursion if knobs.max_recursion is None else knobs.max_recursion,
            retries=config.retries,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            structured=self.structured,
            executor=ExecutorSettings(config.on_failure, config.fallbacks, config.steps),
        )

    def unpriced(self, names: Iterable[str]) -> list[str]:
        """Those of `names`, and the conductor, whose price is not known: a budget in USD does not hold for them."""
        return [name for name in dict.fromkeys((*names, self.writer.name)) if self.price(name, 1, 1) is None]

    def budget(self, knobs: Knobs) -> Budget:
        return budget_of(self.config, knobs)


def budget_of(config: ConductorConfig, knobs: Knobs) -> Budget:
    """What all calls of a request may take together."""
    return Budget(
        seconds=_least(config.deadline, knobs.deadline_s),
        usd=_least(config.budget_usd, knobs.budget_usd),
        tokens=_least(config.budget_tokens, knobs.budget_tokens),
        calls=_least(config.max_calls, knobs.max_calls),
    )


def rounds_of(config: ConductorConfig, knobs: Knobs) -> int:
    return config.max_rounds if knobs.max_rounds is None else knobs.max_rounds


def most_calls(config: ConductorConfig, knobs: Knobs) -> int:
    """How many calls a request may take where none fails: plans that are no workflow are written again, and a step
    that is handed to the conductor is a workflow of one round itself."""
    steps = config.max_steps if knobs.max_steps is None else min(knobs.max_steps, config.max_steps)
    once = 1
    for _ in range(config.max_recursion if knobs.max_recursion is None else knobs.max_recursion):
        once = 1 + config.retries + steps * once
    return rounds_of(config, knobs) * (1 + config.retries + steps * once)


def why_no_conductor(config: FuguConfig) -> str | None:
    """Why `fugu-ultra` is not served; None: it is.

    Raises:
        CheckpointError: the conductor's adapter does not fit the configuration, or a pin's is not what its digest
            says.
    """
    conductor = config.conductor
    if conductor is None:
        return "the configuration has no conductor"
    if conductor.worker in config.disabled:
        return f"its conductor, the worker {conductor.worker}, is disabled ({config.disabled[conductor.worker]})"
    for pin, folder in conductor.pins.items():
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"conductor.pins.{pin}: {folder} has no {WEIGHTS} that can be read from here")
        check_pinned("conductor", pin, folder / WEIGHTS, conductor.pin_sha256.get(pin))
    for pin in conductor.pin_sha256:
        if pin not in conductor.pins:
            raise CheckpointError(
                f"conductor.pin_sha256.{pin}: there is no such pin; add it to conductor.pins, or take this out"
            )
    for each in (None, *conductor.pins):
        _checked_card(config, _pinned(conductor, each))
    return None


def pinned_conductors(config: FuguConfig, workers: Mapping[str, Worker]) -> dict[str, Conducting]:
    """Who conducts `fugu-ultra-DATE`, for every date at which nothing that plans or decides can move: the conductor
    has an adapter of that date, or none that could be exchanged, and the router's pin of that date decides.

    Raises:
        CheckpointError: as `conducting`.
    """
    conductor = config.conductor
    if conductor is None:
        return {}
    dates = dict.fromkeys((*conductor.pins, *(config.router.pins if conductor.adapter is None else ())))
    return {pin: conducting(config, workers, pin if pin in conductor.pins else None) for pin in dates}


def conducting(config: FuguConfig, workers: Mapping[str, Worker], pin: str | None = None) -> Conducting:
    """The conductor of a configuration that has one, or one that it pins. `workers` are those of the pool and, under
    names of their own (`actors.config.writer_of`), the conductor's model and its pins, where it has one.

    Raises:
        CheckpointError: the conductor's adapter does not fit the configuration.
    """
    assert config.conductor is not None
    conductor = _pinned(config.conductor, pin)
    names = numbering(_checked_card(config, conductor), [spec.name for spec in config.workers])
    specs = {spec.name: spec for spec in config.active}
    own = conductor.spec()
    writes = own or specs[conductor.worker or ""]
    return Conducting(
        conductor,
        workers[conductor.worker or writer_of(pin)],
        names,
        {name: ", ".join(spec.tags) for name, spec in specs.items()},
        _price(Prices(config)),
        structured=writes.provider == "vllm",
    )


def _pinned(conductor: ConductorConfig, pin: str | None) -> ConductorConfig:
    """The conductor with the adapter of a pin, and told as that was trained."""
    if pin is None:
        return conductor
    adapter, pins = conductor.pins[pin], dict[str, Path]()
    card = read_card(adapter)
    trained = {} if card is None else {"style": card.style, "show_names": card.show_names, "steps": card.steps}
    return conductor.model_copy(update={"adapter": adapter, "pins": pins, **trained})


def _checked_card(config: FuguConfig, conductor: ConductorConfig) -> ConductorCard | None:
    card = read_card(conductor.adapter) if conductor.adapter is not None else None
    if card is None:
        return None
    wanted = replace(card, style=conductor.style, show_names=conductor.show_names, steps=conductor.steps)
    for field in ("style", "show_names", "steps"):
        if getattr(card, field) != getattr(wanted, field):
            raise CheckpointError(
                f"conductor.{field} is {getattr(wanted, field)}, but {conductor.adapter} was trained with "
                f"{getattr(card, field)}"
            )
    numbering(card, [spec.name for spec in config.workers])
    return card


def _shortened(prompt: PromptSettings, context: int | None) -> PromptSettings:
    """So much of question and result that a conductor's context (tokens) holds them both and a plan, at two characters
    per token and more."""
    if context is None:
        return prompt
    return replace(
        prompt,
        question_characters=min(prompt.question_characters, context),
        result_characters=min(prompt.result_characters, context // 2),
    )


def _price(prices: Prices) -> Price:
    return lambda worker, read, written: prices.usd(worker, Usage(read, written))


def _least(*limits: Number | None) -> Number | None:
    return min((limit for limit in limits if limit is not None), default=None)
