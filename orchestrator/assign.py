"""Who does each step, as a router says: the conductor says what is to be done, and a head that was trained on measured
success (Fugu report §3.1) who is to do it.

A conductor learns who is good at what from rewards of whole workflows only, a head from outcomes of every worker. With
a head for the pool at hand it knows more, and it reads a step's subtask as it reads any question.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Literal

from actors.messages import Message
from orchestrator.workflow import SELF, Workflow

WhoAssigns = Literal["conductor", "router"]
Conversation = tuple[Message, ...]
Assign = Callable[[Sequence[Conversation], frozenset[str]], Awaitable[Sequence[str | None]]]
"""The best of these workers for each conversation; None where nothing is known, and the plan's word holds."""


def conversations(workflow: Workflow, whole: Conversation) -> list[Conversation]:
    """What the router is asked about: each subtask that the conductor did not give to itself; of a workflow of one
    step the whole conversation, since that is what its worker is told (`is_whole`)."""
    if is_whole(workflow):
        return [whole]
    return [(Message("user", step.subtask),) for step in workflow.steps if step.worker != SELF]


def is_whole(workflow: Workflow) -> bool:
    """One step, not the conductor's own: all there is to say is who answers, and the conversation says it better than
    its copy in a plan."""
    return len(workflow.steps) == 1 and workflow.steps[0].worker != SELF


def assigned(workflow: Workflow, workers: Sequence[str | None]) -> Workflow:
    """The workflow in the hands of `workers`, one for each of `conversations`, in their order."""
    turn = iter(workers)
    return Workflow(
        tuple(
            step if step.worker == SELF else replace(step, worker=next(turn) or step.worker) for step in workflow.steps
        )
    )
