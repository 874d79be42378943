"""Tools inside a workflow: who called which, and how a workflow that waits for its caller's tools goes on.

Any step's worker may call a tool at any time. The call goes to the caller under an id that names the paused workflow
and the step, so that its result finds the way back to the agent that asked (Fugu report §3.2.2). Inside a workflow an
agent sees its own calls and their results only; those of earlier workflows are part of the conversation, which all
see. What is kept of a paused workflow is plan, outputs and what its agents said; results stay with the caller, who
sends the conversation again.

A pause is never changed: the next one has an id of its own. So a request that is sent twice goes on twice from the
same place.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from actors.errors import PlanError, RequestError, WorkflowGoneError
from actors.messages import ChatReply, Message, Thought, ToolCall
from orchestrator import workflow as plans
from orchestrator.conductor_prompt import Round
from orchestrator.workflow import Workflow

_VERSION = 1
_ID = re.compile(r"wf_([a-z2-7]{16})((?:_\d{1,2}){1,4})_(\d{1,3})", re.ASCII)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_NOTES = ("system", "developer")
_LOST = "(This result is no longer in the conversation.)"


@dataclass(frozen=True, slots=True)
class CallRef:
    """What a tool call's id says: the pause it belongs to, the step that made it, and its number there. A step inside
    one that the conductor gave to itself has the way to it in `path`, from the outermost."""

    pause: str
    path: tuple[int, ...]
    number: int

    def __str__(self) -> str:
        """At most 35 letters, digits and underscores: every provider takes that for an id."""
        return f"wf_{self.pause}_{'_'.join(map(str, self.path))}_{self.number}"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A step that waits for its caller's tools. `said` are its worker's messages in this workflow, oldest first, each
    with the calls under the ids that the caller knows; those of the last one are open. A step that the conductor gave
    to itself said nothing: the workflow that it runs waits (`nested`)."""

    step: int
    worker: str
    said: tuple[Message, ...] = ()
    nested: Paused | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What a finished step came to; `text` is None where it failed."""

    worker: str
    text: str | None


@dataclass(frozen=True, slots=True)
class Paused:
    """A workflow that waits. `bare`: its only step is the conversation itself (no plan was made); `rounds` are those
    before this one, `earlier` the ids of this workflow's earlier pauses."""

    id: str
    workflow: Workflow
    waiting: tuple[Waiting, ...]
    outputs: Mapping[int, Output]
    bare: bool = False
    rounds: tuple[Round, ...] = ()
    earlier: tuple[str, ...] = ()

    @property
    def open_calls(self) -> tuple[ToolCall, ...]:
        """What the caller is to do, step by step."""
        return tuple(
            call
            for waiting in self.waiting
            for call in (waiting.said[-1].tool_calls if waiting.nested is None else waiting.nested.open_calls)
        )


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a paused workflow goes on: `base` is the conversation that it answers, `histories[step]` the step's own
    messages and tool results, `nested[step]` where the workflow of that step goes on (its `base` is made when it
    does)."""

    paused: Paused
    base: tuple[Message, ...]
    histories: Mapping[int, tuple[Message, ...]]
    nested: Mapping[int, Resumed] = field(default_factory=dict)


def new_pause_id() -> str:
    """80 random bits: nobody guesses another caller's."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(16))


def waiting_for(pause: str, path: tuple[int, ...], reply: ChatReply, before: Sequence[Message] = ()) -> Waiting:
    """A step (the last of `path`) whose worker has just called tools; its calls get ids of ours. `before` is what it
    said earlier."""
    calls = tuple(replace(call, id=str(CallRef(pause, path, number))) for number, call in enumerate(reply.tool_calls))
    said = Message("assistant", reply.text, tool_calls=calls, thoughts=reply.thoughts)
    return Waiting(path[-1], reply.worker, (*before, said))


def call_ref(id: str | None) -> CallRef | None:
    """What an id of ours says; None for one of somebody else's."""
    found = _ID.fullmatch(id or "")
    return None if found is None else CallRef(found[1], tuple(map(int, found[2][1:].split("_"))), int(found[3]))


def awaited(messages: Sequence[Message], asides: Collection[int] = ()) -> str | None:
    """The pause whose tools a conversation ends with the results of; None where it ends otherwise. What the client's
    program notes after them (as `system`, or in the `asides` of a `ChatRequest`) is no turn of the user's.

    Raises:
        RequestError: the last results belong to several pauses.
    """
    pauses = set()
    for at in range(len(messages) - 1, -1, -1):
        message = messages[at]
        if message.role in _NOTES or at in asides:
            continue
        if message.role != "tool":
            break
        ref = call_ref(message.tool_call_id)
        if ref is not None:
            pauses.add(ref.pause)
    if len(pauses) > 1:
        raise RequestError("messages: the last tool results belong to several answers", param="messages")
    return pauses.pop() if pauses else None


def resume(paused: Paused, messages: Sequence[Message], asides: Collection[int] = ()) -> Resumed:
    """Bring a conversation's tool results to the steps that asked for them.

    Raises:
        RequestError: an open call has no result; names its id.
    """
    ours = {paused.id, *paused.earlier}
    begin = next(
        (index for index, message in enumerate(messages) if message.tool_calls and _pauses(message) & ours),
        # The caller kept the results only, and not who asked for them.
        next(index for index, message in enumerate(messages) if _answers(message) in ours),
    )
    results = _Results.of(messages[begin:], {at - begin for at in asides})
    missing = [call.id for call in paused.open_calls if call.id not in results.said]
    if missing:
        raise RequestError(f"messages: the tool call {missing[0]} has no result", param="messages")
    return _resumed(paused, tuple(messages[:begin]), results)


@dataclass(frozen=True, slots=True)
class _Results:
    """By id of call: what a tool said, and what the client's program noted right after it and those beside it."""

    said: dict[str | None, Message] = field(default_factory=dict)
    notes: dict[str | None, list[Message]] = field(default_factory=dict)

    @classmethod
    def of(cls, messages: Sequence[Message], asides: Collection[int]) -> _Results:
        results = cls()
        beside: list[str | None] = []
        for at, message in enumerate(messages):
            noted = message.role in _NOTES or at in asides
            if message.role == "tool":
                results.said[message.tool_call_id] = message
                beside.append(message.tool_call_id)
            elif not noted:
                beside = []
            for id in beside if noted else ():
                results.notes.setdefault(id, []).append(message)
        return results


def _resumed(paused: Paused, base: tuple[Message, ...], results: _Results) -> Resumed:
    histories = {each.step: _history(each.said, results) for each in paused.waiting if each.nested is None}
    nested = {each.step: _resumed(each.nested, (), results) for each in paused.waiting if each.nested is not None}
    return Resumed(paused, base, histories, nested)


def _history(said: Sequence[Message], results: _Results) -> tuple[Message, ...]:
    history: list[Message] = []
    for message in said:
        history.append(message)
        for call in message.tool_calls:
            history.append(results.said.get(call.id) or Message("tool", _LOST, tool_call_id=call.id))
        # After all results: they must follow the calls without a gap.
        history += dict.fromkeys(note for call in message.tool_calls for note in results.notes.get(call.id, ()))
    return tuple(history)


def _pauses(message: Message) -> set[str]:
    return {ref.pause for call in message.tool_calls if (ref := call_ref(call.id)) is not None}


def _answers(message: Message) -> str | None:
    ref = call_ref(message.tool_call_id) if message.role == "tool" else None
    return None if ref is None else ref.pause


# As text, for a store -------------------------------------------------------------------------------------------------


def to_text(paused: Paused) -> str:
    return json.dumps({"version": _VERSION, **_told(paused)}, ensure_ascii=False)


def _told(paused: Paused) -> dict[str, Any]:
    return {
        "workflow": plans.as_dict(paused.workflow),
        "waiting": [
            {
                "step": waiting.step,
                "worker": waiting.worker,
                "said": [_message(message) for message in waiting.said],
                **({} if waiting.nested is None else {"nested": _told(waiting.nested)}),
            }
            for waiting in paused.waiting
        ],
        "outputs": {str(step): [output.worker, output.text] for step, output in paused.outputs.items()},
        "bare": paused.bare,
        "rounds": [[each.plan, each.result] for each in paused.rounds],
        "earlier": list(paused.earlier),
    }


def from_text(id: str, text: str) -> Paused:
    """Read what `to_text` wrote.

    Raises:
        WorkflowGoneError: another version of this program wrote it, or it is damaged.
    """
    try:
        data = json.loads(text)
        if data["version"] != _VERSION:
            raise WorkflowGoneError(_gone(id, "was kept by another version of this server"), param="messages")
        return _paused(id, data)
    except (ValueError, KeyError, TypeError, AttributeError, PlanError, RecursionError):
        raise WorkflowGoneError(_gone(id, "was not kept whole"), param="messages") from None


def _paused(id: str, data: Mapping[str, Any]) -> Paused:
    """Raises:
    ValueError, or another error of its kind: the parts do not fit together.
    """
    workflow = plans.from_json(json.dumps(data["workflow"]))
    steps = range(len(workflow.steps))
    waiting = tuple(_waiting(id, each) for each in data["waiting"])
    outputs = {int(step): Output(str(worker), text) for step, (worker, text) in data["outputs"].items()}
    rounds = tuple(Round(str(plan), str(result)) for plan, result in data["rounds"])
    if any(step not in steps for step in [*outputs, *(each.step for each in waiting)]):
        raise ValueError("a step that the workflow does not have")
    if any(not each.said and each.nested is None for each in waiting):
        raise ValueError("a step that waits for nothing")
    return Paused(id, workflow, waiting, outputs, bool(data["bare"]), rounds, tuple(map(str, data["earlier"])))


def gone(id: str) -> WorkflowGoneError:
    """The error for an id that the store does not know (any more)."""
    return WorkflowGoneError(_gone(id, "is not known here, or no longer"), param="messages")


def _gone(id: str, why: str) -> str:
    return (
        f"messages: the workflow that the tool calls wf_{id}_… belong to {why}; add a user message to the "
        "conversation and it will be planned anew, with these tool results in view"
    )


def _message(message: Message) -> dict[str, Any]:
    return {
        "text": message.text,
        "calls": [[call.id, call.name, call.arguments] for call in message.tool_calls],
        "thoughts": [asdict(thought) for thought in message.thoughts],
    }


def _waiting(id: str, data: Mapping[str, Any]) -> Waiting:
    said = tuple(
        Message(
            "assistant",
            str(each["text"]),
            tool_calls=tuple(ToolCall(str(id), str(name), str(arguments)) for id, name, arguments in each["calls"]),
            thoughts=tuple(Thought(**thought) for thought in each["thoughts"]),
        )
        for each in data["said"]
    )
    nested = _paused(id, data["nested"]) if "nested" in data else None
    return Waiting(int(data["step"]), str(data["worker"]), said, nested)
