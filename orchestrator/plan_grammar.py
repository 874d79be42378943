"""The plans of `orchestrator.workflow` as a regular expression, for engines that decode under one (structured outputs).

What matches always parses: numbers of allowed workers only, lists of equal length, reads of earlier steps only. Every
repetition is bounded, so that a plan also ends; by words and not by characters, because an engine compiles every
repetition into states of their own (xgrammar: 4 s of CPU for hundreds of single characters, half a second for words),
and vLLM gives up after 5 s.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations

from actors.errors import NoWorkerAllowedError
from orchestrator.workflow import MAX_STEPS, SELF

CHARACTERS = 4_096
CHARACTERS_PER_TOKEN = 3
"""English has about four: a plan of so many characters fits into its tokens."""
CHARACTERS_PER_WORD = 6
"""English, the blank included."""
_WORD = 40  # the longest; what is longer needs a blank inside


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
    text precede the lists (the paper's style). `characters` is about how long a whole plan may be, in words of usual
    length, so that it ends before its tokens do. The other arguments are those of `parse_workflow`.

    Raises:
        NoWorkerAllowedError: nobody is left to name.
    """
    numbers = [str(number) for number, name in enumerate(workers) if allowed is None or name in allowed]
    if not numbers:
        raise NoWorkerAllowedError("the constraints leave the conductor no worker", param="fugu")
    worker = "(" + "|".join([*numbers, *([f'"{SELF}"'] if allow_self else [])]) + ")"
    # No quotes, backslashes or line ends, so that a text ends where its quote does; and no blank first character, so
    # that it is never empty.
    words = _words(r'[^"\\\r\n ]', max(40, characters * 5 // 8 // max_steps))
    subtask = rf'"[^"\\\s]{words}"'
    plans = [_lists(worker, subtask, steps) for steps in range(1, max_steps + 1)]
    if allow_empty:
        plans.append(r"model_id: \[\]\nsubtasks: \[\]\naccess_list: \[\]")
    # Nothing that could begin a list, a label, a code fence or a thinking block.
    first = r"[^:=<`\[\]\r\n ]"
    before = rf"({first}{_words(first, max(40, characters // 4))}\n)?" if thought else ""
    return f"{before}({'|'.join(plans)})"


def _words(sign: str, characters: int) -> str:
    """So many characters in words of this sign, after a first sign."""
    return rf"{sign}{{0,{_WORD - 1}}}( {sign}{{0,{_WORD}}}){{0,{characters // CHARACTERS_PER_WORD}}}"


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
