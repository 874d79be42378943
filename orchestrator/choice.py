"""From probabilities to a choice. Without torch, so that processes that only play sessions start fast."""

from __future__ import annotations

import math
from collections.abc import Sequence

ROLES = ("worker", "thinker", "verifier")  # order of the three extra logits, as in the authors' code


def pick(probabilities: Sequence[float], draw: float | None) -> int:
    """Index of the most probable entry (the first of equals) if `draw` is None, else the entry in whose share
    of [0, 1) `draw` falls. An entry of probability 0 is never picked."""
    if draw is None:
        return max(range(len(probabilities)), key=probabilities.__getitem__)
    possible = [index for index, probability in enumerate(probabilities) if probability > 0]
    remaining = draw * math.fsum(probabilities)
    for index in possible:
        remaining -= probabilities[index]
        if remaining < 0:
            return index
    return possible[-1]  # rounding left a sliver at the end
