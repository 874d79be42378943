"""What an adapter of the conductor was trained for, kept beside it as `conductor.json`.

Numbers in its plans mean the workers of its training, in their order, and it knows one style of prompt. Loading it for
anything else would not fail but only plan badly, so what differs is an error that says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from actors.errors import CheckpointError
from orchestrator.access import StepStyle
from orchestrator.conductor_prompt import PromptStyle

FILE = "conductor.json"


@dataclass(frozen=True, slots=True)
class ConductorCard:
    """`workers` in the order of their numbers; `style`, `show_names` as in `PromptSettings`; `steps` as in
    `ExecutorSettings`."""

    workers: tuple[str, ...]
    style: PromptStyle
    show_names: bool = False
    steps: StepStyle = "full"


def write_card(folder: Path, card: ConductorCard) -> None:
    (folder / FILE).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")


def read_card(folder: Path) -> ConductorCard | None:
    """The card of an adapter; None where it has none.

    Raises:
        CheckpointError: there is one that cannot be read.
    """
    path = folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        workers = tuple(str(name) for name in data["workers"])
        card = ConductorCard(workers, data["style"], bool(data["show_names"]), data["steps"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__})") from None
    known = card.style in get_args(PromptStyle) and card.steps in get_args(StepStyle)
    if not known or not workers or len(set(workers)) < len(workers):
        raise CheckpointError(f"{path}: it needs workers, each once, and a known style and steps")
    return card


def numbering(card: ConductorCard | None, pool: Sequence[str]) -> tuple[str, ...]:
    """The pool's workers as the conductor numbers them: those of its training in their order, whether they are in the
    pool or not. Without a card, the pool in its own order.

    Raises:
        CheckpointError: it knows none of the pool.
    """
    if card is None:
        return tuple(pool)
    if not set(card.workers) & set(pool):
        raise CheckpointError(
            f"the conductor was trained with {', '.join(card.workers)}, and the pool has none of them but "
            f"{', '.join(pool)}"
        )
    return card.workers
