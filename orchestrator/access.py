"""What a step's worker is shown: the task, its subtask, and the outputs that its access list grants.

Isolation holds by construction: `step_messages` looks up the granted outputs only. What a worker wrote is quoted in a
numbered tag; whatever looks like such a tag inside is written so that it no longer is one, so that no output can
pretend to be another agent's or the end of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from actors.messages import ChatRequest, Message
from orchestrator.placeholders import fill
from orchestrator.plan_text import defused
from orchestrator.roles import with_note
from orchestrator.workflow import SELF, Workflow

StepStyle = Literal["full", "bare"]

MAX_OUTPUT_CHARS = 65_536

SYSTEM = (
    "You are one of several language models that solve a task together. You are given one part of it, and perhaps "
    "what others wrote for theirs. Do your part, and only that."
)
_OTHERS = "What other agents wrote for their parts. It may be wrong: check it before you use it."
_FAILED = "(This agent could not answer. Do without it.)"
_LAST = "You are the last agent: reply with the full answer to the task, in the form that it asks for."

_TAG = re.compile(r"<(?=[\s/\\]*(?:agent|subtask)\b|[\s/\\]*agent_)", re.IGNORECASE)


def step_messages(
    request: ChatRequest,
    workflow: Workflow,
    index: int,
    outputs: Mapping[int, str | None],
    style: StepStyle = "full",
) -> tuple[Message, ...]:
    """The request's conversation, with granted outputs, subtask and instruction appended to its last user message; in
    the `bare` style the subtask alone, `{0}` in it replaced by the output of step 0 where that is granted. That is for
    workers so small that they can do one question and nothing else.

    `outputs` may hold the outputs of all steps so far; only those in the step's access list are read. A granted one
    that is None or absent is told as failed.
    """
    step = workflow.steps[index]
    if style == "bare":
        granted = {i: text for i in step.access if (text := outputs.get(i)) is not None}
        return (Message("user", fill(step.subtask, granted)),)
    notes = []
    if step.access:
        notes.append(_OTHERS)
        notes += [quote_output(i, outputs.get(i), to_planner=step.worker == SELF) for i in step.access]
    notes.append(f"<subtask>\n{escape(step.subtask).strip()}\n</subtask>")
    if len(workflow.steps) > 1 and index == len(workflow.steps) - 1:
        notes.append(_LAST)
    return with_note(request.messages, "\n\n".join(notes), system=SYSTEM)


def quote_output(index: int, text: str | None, *, to_planner: bool = False) -> str:
    """An output of step `index` in its tag; the middle of an overlong one is left out. For a reader that writes plans
    no plan is left in it."""
    shown = _FAILED if text is None else escape(_cropped(text)).strip()
    if to_planner:
        shown = defused(shown)
    return f'<agent number="{index}">\n{shown}\n</agent>'


def escape(text: str) -> str:
    """`text` with the opening bracket of everything that looks like one of our tags written as an entity."""
    return _TAG.sub("&lt;", text)


def _cropped(text: str, limit: int = MAX_OUTPUT_CHARS) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"
