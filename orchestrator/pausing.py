"""A run that waits for its caller's tools: what is kept of it, what the caller is told, and where it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from actors.messages import ChatReply, Usage
from orchestrator import memory
from orchestrator.conductor_prompt import Round
from orchestrator.memory import Output, Paused, Resumed, Waiting
from orchestrator.run import Run, StepResult
from orchestrator.workflow import Workflow


def pause(
    run: Run,
    id: str,
    path: tuple[int, ...],
    *,
    bare: bool,
    rounds: Sequence[Round],
    nested: Mapping[int, Paused],
    resumed: Resumed | None,
) -> Paused:
    """What is kept of a run. `path` leads to its workflow from the outermost one, `nested` are the workflows of steps
    that the conductor gave to itself, `resumed` is where this run had gone on from."""
    before = {} if resumed is None else {each.step: each.said for each in resumed.paused.waiting}
    waiting, outputs = [], {}
    for result in run.steps:
        if result.reply is not None and result.reply.tool_calls:
            if result.index in nested:
                waiting.append(Waiting(result.index, result.step.worker, nested=nested[result.index]))
            else:
                said = before.get(result.index, ())
                waiting.append(memory.waiting_for(id, (*path, result.index), result.reply, said))
        elif result.reply is not None:
            outputs[result.index] = Output(result.worker or result.step.worker, result.reply.text)
        elif result.skipped == "failed":
            outputs[result.index] = Output(result.step.worker, None)
    earlier = () if resumed is None else (*resumed.paused.earlier, resumed.paused.id)
    return Paused(id, run.workflow, tuple(waiting), outputs, bare, tuple(rounds), earlier)


def asking(run: Run, paused: Paused) -> ChatReply:
    """The calls of all steps that wait, as one answer."""
    replies = [step.reply for step in run.steps if step.reply is not None and step.reply.tool_calls]
    last = run.steps[-1].reply
    return ChatReply(
        worker=" and ".join(dict.fromkeys(reply.worker for reply in replies)),
        # What an inner agent says beside its calls is not for the caller.
        text="" if last is None else last.text,
        tool_calls=paused.open_calls,
        finish_reason="tool_calls",
        usage=sum((reply.usage for reply in replies), Usage()),
    )


def continued(paused: Paused) -> Workflow:
    """The paused workflow, its waiting steps in the hands of those who asked for the tools."""
    asked = {waiting.step: waiting.worker for waiting in paused.waiting}
    steps = [replace(step, worker=asked.get(i, step.worker)) for i, step in enumerate(paused.workflow.steps)]
    return Workflow(tuple(steps))


def finished(paused: Paused) -> dict[int, StepResult]:
    """What was done before the pause, at no cost to this request."""
    results = {}
    for index, output in paused.outputs.items():
        step = paused.workflow.steps[index]
        if output.text is None:
            results[index] = StepResult(index, step, skipped="failed")
        else:
            reply = ChatReply(output.worker, output.text, attempts=0, cost_usd=0.0, cached=True)
            results[index] = StepResult(index, step, output.worker, reply)
    return results
