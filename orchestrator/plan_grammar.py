"""The plans of `orchestrator.workflow` as a regular expression, for engines that decode under one (structured outputs).

What matches always parses: numbers of allowed workers only, lists of equal length, reads of earlier steps only. Every
repetition is bounded, so that a plan also ends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations

from actors.errors import NoWorkerAllowedError
from orchestrator.workflow import MAX_STEPS, SELF

CHARACTERS = 4_096
CHARACTERS_PER_TOKEN = 3
"""English has about four: a plan of so many characters fits into its tokens."""


def plan_regex(
    workers: Sequence[str],
    *,
    allowed: Collection[str] | None = None,
    max_steps: int = MAX_STEPS,
    allow_self: bool = False,
    allow_empty: bool = False,
    thought: bool = True,
    characters: int = CHARACTERS,
) -> str:
    """A regular expression, without anchors, that only plans for this pool match. `thought` lets one line of free
    text precede the lists (the paper's style). `characters` is about how long a whole plan may be, so that it ends
    before its tokens do. The other arguments are those of `parse_workflow`.

    Raises:
        NoWorkerAllowedError: nobody is left to name.
    """
    numbers = [str(number) for number, name in enumerate(workers) if allowed is None or name in allowed]
    if not numbers:
        raise NoWorkerAllowedError("the constraints leave the conductor no worker", param="fugu")
    worker = "(" + "|".join([*numbers, *([f'"{SELF}"'] if allow_self else [])]) + ")"
    # No quotes, backslashes or line ends, so that a text ends where its quote does; and no blank first character, so
    # that it is never empty.
    subtask = rf'"[^"\\\s][^"\\\r\n]{{0,{max(40, characters * 5 // 8 // max_steps)}}}"'
    plans = [_lists(worker, subtask, steps) for steps in range(1, max_steps + 1)]
    if allow_empty:
        plans.append(r"model_id: \[\]\nsubtasks: \[\]\naccess_list: \[\]")
    # Nothing that could begin a list, a label, a code fence or a thinking block.
    before = rf"([^:=<`\[\]\r\n]{{1,{max(40, characters // 4)}}}\n)?" if thought else ""
    return f"{before}({'|'.join(plans)})"


def _lists(worker: str, subtask: str, steps: int) -> str:
    models = ", ".join([worker] * steps)
    subtasks = ", ".join([subtask] * steps)
    access = ", ".join(_access(step) for step in range(steps))
    return rf"model_id: \[{models}\]\nsubtasks: \[{subtasks}\]\naccess_list: \[{access}\]"


def _access(step: int) -> str:
    """What step `step` may read: any of the steps before it, or all of them by word."""
    if step == 0:
        return r"\[\]"
    reads = [", ".join(map(str, chosen)) for size in range(1, step + 1) for chosen in combinations(range(step), size)]
    return rf'\[({"|".join(reads)}|"all")?\]'
