"""What the workers of a configuration cost, for what the gateway has to price itself."""

from __future__ import annotations

from functools import cached_property

from actors.config import FuguConfig
from actors.messages import Usage
from actors.prices import Pricing, pricing


class Prices:
    """Of the workers in use, and of the conductor's own model. The public list of prices takes most of a second to
    read, where a worker needs it: `load` reads it."""

    def __init__(self, config: FuguConfig) -> None:
        own = config.conductor.specs() if config.conductor is not None else ()
        self._specs = (*config.active, *own)

    def load(self) -> None:
        """Ready for `usd`; may be called in a thread of its own."""
        _ = self._priced

    def usd(self, worker: str, usage: Usage) -> float | None:
        """None where it is unknown."""
        priced = self._priced.get(worker)
        return None if priced is None else priced(usage)

    def known(self, worker: str) -> bool:
        """Whether what its calls cost can be told."""
        return self.usd(worker, Usage(1, 1)) is not None

    @cached_property
    def _priced(self) -> dict[str, Pricing]:
        return {spec.name: pricing(spec) for spec in self._specs}
