"""What a caller is told of a conducted request: lines of reasoning while it runs, and the trace at its end."""

from __future__ import annotations

from typing import Any

from orchestrator.conducted import (
    Conducted,
    ConductEvent,
    FellBack,
    Kept,
    Planned,
    PlanRound,
    Rejected,
    Stepped,
    Writing,
)
from orchestrator.run import StepEnded, StepEvent, StepResult, StepStarted
from orchestrator.workflow import Workflow, as_dict, to_mermaid
from serve.translate import usage_body

_SHOWN_CHARACTERS = 600


def shown(event: ConductEvent) -> str:
    """The event as a line or a few for a reader; empty where there is nothing to say (or the answer says it)."""
    match event:
        case Planned():
            text = _plan(event.workflow, event.seconds, event.round)
        case Rejected():
            then = f"{event.left} more tries" if event.left != 1 else "one more try"
            text = f"[plan] Not a workflow: {event.reason}; {then if event.left else 'no more tries'}.\n"
        case Kept():
            text = "[plan] The answer stands.\n"
        case FellBack():
            text = f"[plan] Without a workflow: {event.reason}. The best single worker answers.\n"
        case Stepped():
            text = _step(event.event)
    return "".join(f"{'  ' * event.depth}{line}\n" for line in text.splitlines())


def _plan(workflow: Workflow, seconds: float, round: int) -> str:
    again = f" for round {round + 1}" if round else ""
    count = len(workflow.steps)
    lines = [f"[plan] {workflow.topology}, {count} step{'s' * (count > 1)}{again} ({seconds:.1f} s)"]
    for index, step in enumerate(workflow.steps, 1):
        reads = f" (reads {', '.join(str(i + 1) for i in step.access)})" if step.access else ""
        lines.append(f"{index}. {step.worker}: {_cropped(step.subtask)}{reads}")
    return "\n".join(lines)


def _step(event: StepEvent) -> str:
    match event:
        case StepStarted():
            again = f", try {event.attempt}" if event.attempt > 1 else ""
            return f"[step {event.index + 1}] {event.worker} begins{again}"
        case StepEnded():
            return _ended(event.result)
    return ""


def _ended(result: StepResult) -> str:
    where = f"[step {result.index + 1}]"
    if result.reply is None:
        return f"{where} not done ({result.skipped})" if result.skipped in ("failed", "budget", "cut") else ""
    if result.reply.tool_calls:
        names = ", ".join(call.name for call in result.reply.tool_calls)
        return f"{where} {result.worker} calls {names} ({result.seconds:.1f} s)"
    return f"{where} {result.worker} is done ({result.seconds:.1f} s)"


def _cropped(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"


def told(conducted: Conducted) -> dict[str, Any]:
    """The trace's part about rounds, as JSON values. Subtasks are told: the caller's own question is in them, and
    nobody else's."""
    return {
        "rounds": [_round(each) for each in conducted.rounds],
        "planning_s": round(conducted.planning_s, 6),
        "critical_path_s": round(conducted.critical_path_s, 6),
        "out_of": conducted.out_of,
        "paused": conducted.paused is not None,
        "cost_usd": conducted.cost_usd,
        "upstream_calls": conducted.calls,
    }


def _round(this: PlanRound) -> dict[str, Any]:
    body: dict[str, Any] = {
        "plan": None if this.workflow is None else as_dict(this.workflow) | {"mermaid": to_mermaid(this.workflow)},
        "writings": [_writing(writing) for writing in this.writings],
        "kept": this.kept,
        "fallback": this.reason,
        "resumed": this.resumed,
        "steps": [] if this.run is None else [_result(step) for step in this.run.steps],
    }
    if this.run is not None:
        body |= {
            "seconds": round(this.run.seconds, 6),
            "critical_path_s": round(this.run.critical_path_s, 6),
            "waiting": list(this.run.waiting),
        }
    if this.nested:
        body["nested"] = [told(nested) for nested in this.nested]
    return body


def _writing(writing: Writing) -> dict[str, Any]:
    return {
        "worker": writing.reply.worker,
        "seconds": round(writing.seconds, 6),
        "usage": usage_body(writing.reply.usage),
        "cost_usd": writing.reply.cost_usd,
        "error": None if writing.error is None else writing.error.message,
    }


def _result(result: StepResult) -> dict[str, Any]:
    reply = result.reply
    return {
        "index": result.index,
        "worker": result.worker,
        "started_s": None if result.started_s is None else round(result.started_s, 6),
        "seconds": round(result.seconds, 6),
        "usage": None if reply is None else usage_body(reply.usage),
        "cost_usd": None if reply is None else reply.cost_usd,
        "cached": reply is not None and reply.cached,
        "tools": [] if reply is None else [call.name for call in reply.tool_calls],
        "failed": [{"worker": name, "code": error.code} for name, error in result.failures],
        "skipped": result.skipped,
    }
