"""A workflow: who does what, and who may read whom. Read from what a model wrote, checked, named and drawn.

The Conductor writes free reasoning and then three lists of equal length (Conductor §3.1): `model_id`, the worker of
each step; `subtasks`, what it is told; `access_list`, which earlier steps' outputs it is shown: `[]`, `["all"]` or
their positions from 0. The last step answers. What a model wrote is data: it is scanned (`orchestrator.plan_text`),
never evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from actors.errors import (
    ConfigError,
    PlanAccessError,
    PlanEmptyError,
    PlanLengthsError,
    PlanSubtaskError,
    PlanSyntaxError,
    PlanTooLongError,
    PlanWorkerError,
    PlanWorkerNotAllowedError,
)
from orchestrator.plan_text import Item, quoted, read_plan

MAX_STEPS = 5  # Conductor §3.1
MAX_SUBTASK_CHARS = 8192
SELF = "conductor"  # the Conductor as a worker of its own plan: the step is planned and run as a workflow of its own

Topology = Literal["empty", "single", "chain", "parallel", "tree", "graph"]

_NUMBERED = re.compile(r"(?:(?:worker|model|agent|step)s?[\s_-]{0,3})?#?(\d{1,6})", re.IGNORECASE)
_SHOWN = re.compile(r"[A-Za-z0-9 ._#/-]{1,64}")  # what an error may quote


@dataclass(frozen=True, slots=True)
class Step:
    """`access` holds the positions (from 0) of the earlier steps whose outputs this one is shown, ascending."""

    worker: str
    subtask: str
    access: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Workflow:
    """Steps in the order in which they were written; the last one answers. Without steps it says "keep the answer
    that there is" (Conductor §3.2, recursion).

    Raises:
        PlanAccessError: a step reads itself, a later step, or the same step twice.
    """

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        for index, step in enumerate(self.steps):
            if step.access != tuple(sorted(set(step.access))) or any(not 0 <= i < index for i in step.access):
                raise PlanAccessError(f"step {index} may read earlier steps only, each once and in order")

    @property
    def needed(self) -> frozenset[int]:
        """The steps that the answer depends on, directly or through others, the last one among them."""
        if not self.steps:
            return frozenset()
        needed = {len(self.steps) - 1}
        for index in range(len(self.steps) - 1, -1, -1):
            if index in needed:
                needed.update(self.steps[index].access)
        return frozenset(needed)

    def waves(self) -> tuple[tuple[int, ...], ...]:
        """The steps by the earliest moment at which they can run: all of one wave at the same time, if every step
        takes equally long."""
        levels: list[int] = []
        for step in self.steps:
            levels.append(1 + max((levels[i] for i in step.access), default=-1))
        return tuple(
            tuple(index for index, at in enumerate(levels) if at == level)
            for level in range(max(levels, default=-1) + 1)
        )

    @property
    def depth(self) -> int:
        """Steps on the longest way through: 0 without steps, 1 where all run at once."""
        return len(self.waves())

    @property
    def topology(self) -> Topology:
        """The shape of the flow, ignoring reads that another way already carries: `single`; `chain`, each step builds
        on the one before; `parallel`, independent steps and a last one that joins them; `tree`, every step but the
        last is read by exactly one; else `graph`."""
        count = len(self.steps)
        if count <= 1:
            return "single" if count else "empty"
        if self.depth == count:
            return "chain"
        if not any(step.access for step in self.steps[:-1]):
            return "parallel"
        readers = [0] * count
        for _, index in direct_reads(self):
            readers[index] += 1
        return "tree" if all(number == 1 for number in readers[:-1]) else "graph"


def direct_reads(workflow: Workflow) -> list[tuple[int, int]]:
    """Pairs (reader, read) without those that a longer way through other steps implies (transitive reduction)."""
    behind: list[set[int]] = []  # all that a step's inputs carry, directly or not
    pairs = []
    for index, step in enumerate(workflow.steps):
        carried = set().union(*(behind[i] for i in step.access))
        pairs += [(index, i) for i in step.access if i not in carried]
        behind.append(carried | set(step.access))
    return pairs


def parse_workflow(
    text: str,
    workers: Sequence[str],
    *,
    allowed: Collection[str] | None = None,
    max_steps: int = MAX_STEPS,
    allow_self: bool = False,
    allow_empty: bool = False,
) -> Workflow:
    """The last complete plan in `text`, in time linear in its length.

    `workers` in the order in which they were numbered, from 0; a plan may name one by number (`1`, `"1"`,
    `"Worker 1"`) or by name, in any case where that is unambiguous. `allowed` (default: all) are those that this
    request may use. With `allow_self` the Conductor may name itself (`SELF`); with `allow_empty` three empty lists
    are `Workflow(())`.

    Raises:
        PlanError: a subclass per failure, with `kind` and one sentence that can be shown to the writer.
        ConfigError: `allow_self`, and a worker of the pool has the Conductor's name.
    """
    if allow_self and SELF in workers:
        raise ConfigError(f"a worker of the pool is called {SELF!r}, which is the Conductor's own name: rename it")
    models, subtasks, access = read_plan(text)
    lengths = (len(models), len(subtasks), len(access))
    if len(set(lengths)) > 1:
        raise PlanLengthsError(
            f"the lists must be equally long, but model_id has {lengths[0]}, subtasks {lengths[1]} "
            f"and access_list {lengths[2]}"
        )
    if not models and not allow_empty:
        raise PlanEmptyError("the plan has no steps")
    if len(models) > max_steps:
        raise PlanTooLongError(f"the plan has {len(models)} steps, and at most {max_steps} are allowed")
    steps = []
    for index, (model, subtask, reads) in enumerate(zip(models, subtasks, access, strict=True)):
        worker = _worker(index, model, workers, allow_self)
        if worker != SELF and allowed is not None and worker not in allowed:
            raise PlanWorkerNotAllowedError(f"step {index} names {worker}, which may not be used for this request")
        steps.append(Step(worker, _subtask(index, subtask), _access(index, reads)))
    return Workflow(tuple(steps))


def _worker(index: int, item: Item, workers: Sequence[str], allow_self: bool) -> str:
    if isinstance(item, list):
        raise PlanSyntaxError(f"step {index} must name one worker, not a list")
    word = str(item).strip()
    if isinstance(item, str):
        if word in workers:
            return word
        if allow_self and word.lower() == SELF:
            return SELF
        alike = [name for name in workers if name.lower() == word.lower()]
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise PlanWorkerError(f"step {index} names a worker that could be {' or '.join(alike)}")
    number = _NUMBERED.fullmatch(word)
    if number is not None and int(number[1]) < len(workers):
        return workers[int(number[1])]
    raise PlanWorkerError(
        f"step {index} names {f'{word!r}' if _SHOWN.fullmatch(word) else 'something'}, which is no worker: "
        f"there are {len(workers)}, numbered from 0"
    )


def _subtask(index: int, item: Item) -> str:
    if isinstance(item, list):
        raise PlanSyntaxError(f"the subtask of step {index} must be a text, not a list")
    text = str(item)
    if not text.strip():
        raise PlanSubtaskError(f"the subtask of step {index} is empty")
    if len(text) > MAX_SUBTASK_CHARS:
        raise PlanTooLongError(
            f"the subtask of step {index} has {len(text)} characters, and at most {MAX_SUBTASK_CHARS} are allowed"
        )
    return text


def _access(index: int, item: Item) -> tuple[int, ...]:
    reads: set[int] = set()
    for entry in item if isinstance(item, list) else [item]:
        if isinstance(entry, list):
            raise PlanSyntaxError(f"the access of step {index} must be a list of positions")
        word = str(entry).strip().lower()
        if word == "all":
            reads.update(range(index))
            continue
        if word in ("", "none", "null"):
            continue
        number = _NUMBERED.fullmatch(word)
        if number is None or int(number[1]) >= index:
            raise PlanAccessError(
                f"step {index} may read the steps before it only"
                + (f", not {word!r}" if _SHOWN.fullmatch(word) else "")
                + (f": 0 to {index - 1}" if index else ", and there are none")
            )
        reads.add(int(number[1]))
    return tuple(sorted(reads))


def render_workflow(workflow: Workflow, workers: Sequence[str]) -> str:
    """The text that `parse_workflow` reads back to an equal workflow: three labelled lists, workers by their number,
    `["all"]` where a step reads every earlier one.

    Raises:
        PlanWorkerError: a step's worker is not among `workers`.
    """
    models: list[int | str] = []
    for index, step in enumerate(workflow.steps):
        if step.worker == SELF:
            models.append(SELF)
        elif step.worker in workers:
            models.append(list(workers).index(step.worker))
        else:
            raise PlanWorkerError(f"step {index} names {step.worker}, which is not in the pool")
    subtasks = ", ".join(quoted(step.subtask) for step in workflow.steps)
    access = [
        ["all"] if step.access and len(step.access) == index else list(step.access)
        for index, step in enumerate(workflow.steps)
    ]
    return f"model_id: {json.dumps(models)}\nsubtasks: [{subtasks}]\naccess_list: {json.dumps(access)}"


def as_dict(workflow: Workflow) -> dict[str, Any]:
    """JSON values: topology, depth, and the steps with worker, subtask and access."""
    return {
        "topology": workflow.topology,
        "depth": workflow.depth,
        "steps": [
            {"worker": step.worker, "subtask": step.subtask, "access": list(step.access)} for step in workflow.steps
        ],
    }


def to_json(workflow: Workflow) -> str:
    return json.dumps(as_dict(workflow), ensure_ascii=False)


def to_mermaid(workflow: Workflow) -> str:
    """A Mermaid flowchart, one box per step with its number, worker and the beginning of its subtask; the last one has
    a thick border. Every character that means something to Mermaid is written as its code."""
    lines = ["flowchart TD"]
    for index, step in enumerate(workflow.steps):
        label = f"{_coded(_short(f'{index} {step.worker}'))}<br/>{_coded(_short(step.subtask))}"
        lines.append(f'    s{index}["{label}"]')
    for index, step in enumerate(workflow.steps):
        lines += [f"    s{i} --> s{index}" for i in step.access]
    if workflow.steps:
        lines.append(f"    style s{len(workflow.steps) - 1} stroke-width:3px")
    return "\n".join(lines) + "\n"


def to_dot(workflow: Workflow) -> str:
    """A Graphviz digraph with the same boxes and arrows."""
    lines = ["digraph workflow {", "    node [shape=box];"]
    for index, step in enumerate(workflow.steps):
        label = f"{_backslashed(_short(f'{index} {step.worker}'))}\\n{_backslashed(_short(step.subtask))}"
        last = ", penwidth=3" if index == len(workflow.steps) - 1 else ""
        lines.append(f'    s{index} [label="{label}"{last}];')
    for index, step in enumerate(workflow.steps):
        lines += [f"    s{i} -> s{index};" for i in step.access]
    return "\n".join([*lines, "}"]) + "\n"


def _short(text: str, limit: int = 80) -> str:
    text = "".join(c if c.isprintable() else " " for c in text[: 4 * limit])
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _coded(text: str) -> str:
    return "".join(c if c.isalnum() or c in " .,!?-…" else f"#{ord(c)};" for c in text)


def _backslashed(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def from_json(text: str) -> Workflow:
    """Read what `to_json` wrote.

    Raises:
        PlanSyntaxError: it is something else.
        PlanAccessError: a step reads what is not before it.
    """
    try:
        steps = tuple(
            Step(str(step["worker"]), str(step["subtask"]), tuple(int(i) for i in step["access"]))
            for step in json.loads(text)["steps"]
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanSyntaxError(f"this is not a stored workflow ({type(error).__name__})") from None
    return Workflow(steps)
