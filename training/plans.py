"""Well-formed plans to warm a conductor up with: made from a seed, right in form, without any knowledge of workers.

A task's own plan says which subtasks lead to its answer; who does them is drawn at random here, from a random part of
a pool of random size. So a small model learns to write plans that parse, for whatever workers it may use; who is good
at what is left to reinforcement. Some plans hand the whole question to one worker. With `again` some conversations go
on after a first plan's result: there the answer is empty lists, or a plan.

The text is the shortest that `orchestrator.workflow` reads: subtasks first, so that their workers are chosen with the
subtasks in sight. With SmolLM2's tokens a prompt takes about 70 and a plan about 50.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from actors.errors import ConfigError
from actors.messages import Message
from orchestrator.conductor_prompt import PromptSettings, Round, conductor_messages
from orchestrator.plan_text import quoted
from orchestrator.workflow import Step, Workflow
from training.composite import PlannedStep, plan_of, task_at
from training.ground_families import GROUNDS
from training.lora import Talk
from training.outcomes import Task

COMPACT = PromptSettings(style="compact")


@dataclass(frozen=True)
class PlanSettings:
    """`single` is the share of tasks that one specialist solves, `whole` of composite ones whose question goes to one
    worker as it is, `again` of conversations with a second round. Pools have `pool` workers, from and to."""

    single: float = 0.3
    whole: float = 0.1
    again: float = 0.0
    pool: tuple[int, int] = (2, 6)
    prompt: PromptSettings = COMPACT
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.single, self.whole, self.again)):
            raise ConfigError("the shares of plans must be between 0 and 1")
        if not 1 <= self.pool[0] <= self.pool[1]:
            raise ConfigError("a pool has at least one worker, and at least as many at most")


def short_plan(workflow: Workflow, workers: Sequence[str]) -> str:
    """A plan in few tokens, which `parse_workflow` reads back to an equal workflow."""
    numbers = ", ".join(str(workers.index(step.worker)) for step in workflow.steps)
    access = ", ".join(f"[{', '.join(map(str, step.access))}]" for step in workflow.steps)
    subtasks = ", ".join(_text(step.subtask) for step in workflow.steps)
    return f"subtasks: [{subtasks}]\nworkers: [{numbers}]\naccess: [{access}]"


def _text(subtask: str) -> str:
    """In single quotes where that spares escapes: a backslash is a token, and hard to copy."""
    if '"' in subtask and not set("'\\\n<") & set(subtask):
        return f"'{subtask}'"
    return quoted(subtask)


@dataclass(frozen=True, slots=True)
class PlanExample:
    """What a conductor is asked, about which workers, and a plan. `again`: a second round, where empty lists are a
    plan too."""

    messages: tuple[Message, ...]
    answer: str
    workers: tuple[str, ...]
    allowed: tuple[str, ...]
    again: bool

    @property
    def talk(self) -> Talk:
        return Talk(self.messages, self.answer)


def plan_example(index: int, settings: PlanSettings, *, split: str = "train") -> PlanExample:
    """Training example `index`; always the same one."""
    rng = random.Random(f"plan {settings.seed} {split} {index}")
    task = task_at(index, seed=settings.seed, split=split, single=settings.single, grounds=list(GROUNDS))
    workers = tuple(f"worker{number}" for number in range(rng.randint(*settings.pool)))
    chosen = rng.sample(workers, rng.randint(1, len(workers)))
    allowed = tuple(name for name in workers if name in chosen)
    answer = short_plan(_drawn(task, allowed, settings, rng), workers)
    again = rng.random() < settings.again
    said: tuple[Round, ...] = ()
    if again:
        said = (Round(answer, task.reference if rng.random() < 0.5 else rng.choice(_OTHER)),)
        kept = rng.random() < 0.5
        answer = short_plan(Workflow(()) if kept else _drawn(task, allowed, settings, rng), workers)
    query = (Message("user", task.prompt),)
    messages = conductor_messages(query, workers, settings.prompt, allowed=allowed, said=said)
    return PlanExample(messages, answer, workers, allowed, again)


_OTHER = ("12", "no", "apple", "Tuesday", "I do not know.")


def _drawn(task: Task, allowed: Sequence[str], settings: PlanSettings, rng: random.Random) -> Workflow:
    planned = plan_of(task)
    if len(planned) > 1 and rng.random() < settings.whole:
        planned = (PlannedStep("", task.prompt),)
    return Workflow(tuple(Step(rng.choice(allowed), step.subtask, step.access) for step in planned))
