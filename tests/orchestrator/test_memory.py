"""Call ids that find their way back, and a paused workflow that survives being written down."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import RequestError, WorkflowGoneError
from actors.messages import ChatReply, Message, Thought, ToolCall
from orchestrator.conductor_prompt import Round
from orchestrator.memory import (
    CallRef,
    Output,
    Paused,
    Waiting,
    awaited,
    call_ref,
    from_text,
    new_pause_id,
    resume,
    to_text,
    waiting_for,
)
from orchestrator.workflow import Step, Workflow

PAUSE, OTHER = "a" * 16, "b" * 16
TEXT = st.text(max_size=30)


def calls(pause: str, step: int, *arguments: str) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(str(CallRef(pause, (step,), n)), "look", text) for n, text in enumerate(arguments))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 99))
def test_an_id_names_pause_and_step(path: list[int], number: int) -> None:
    ref = CallRef(new_pause_id(), tuple(path), number)
    assert call_ref(str(ref)) == ref
    # What every provider takes for an id, and short enough for each of them with a mark on top.
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,31}", str(ref))


@given(st.text())
def test_ids_of_others_are_none_of_ours(text: str) -> None:
    assert call_ref(text) is None
    assert call_ref(f"wf_{text}") is None


def test_pause_ids_differ() -> None:
    assert len({new_pause_id() for _ in range(1000)}) == 1000


@st.composite
def paused(draw: st.DrawFn) -> Paused:
    count = draw(st.integers(1, 5))
    steps = [
        Step(draw(TEXT), draw(TEXT), tuple(sorted(draw(st.sets(st.integers(0, index - 1)))) if index else ()))
        for index in range(count)
    ]
    said = st.builds(
        Message,
        st.just("assistant"),
        TEXT,
        tool_calls=st.lists(st.builds(ToolCall, TEXT, TEXT, TEXT), max_size=2).map(tuple),
        thoughts=st.lists(st.builds(Thought, TEXT, TEXT, st.booleans(), TEXT), max_size=2).map(tuple),
    )
    at = st.integers(0, count - 1)
    waiting = st.builds(Waiting, at, TEXT, st.lists(said, min_size=1, max_size=3).map(tuple))
    return Paused(
        new_pause_id(),
        Workflow(tuple(steps)),
        tuple(draw(st.lists(waiting, min_size=1, max_size=3))),
        draw(st.dictionaries(at, st.builds(Output, TEXT, st.none() | TEXT))),
        draw(st.booleans()),
        tuple(draw(st.lists(st.builds(Round, TEXT, TEXT), max_size=2))),
        tuple(draw(st.lists(TEXT, max_size=2))),
    )


@given(paused())
def test_what_is_kept_reads_back_the_same(each: Paused) -> None:
    assert from_text(each.id, to_text(each)) == each


@given(TEXT | st.recursive(st.none() | st.integers() | TEXT, lambda part: st.lists(part) | st.dictionaries(TEXT, part)))
def test_what_was_not_kept_by_us_is_gone(data: object) -> None:
    with pytest.raises(WorkflowGoneError, match="add a user message"):
        from_text(PAUSE, data if isinstance(data, str) else json.dumps(data))


def test_a_damaged_record_is_gone() -> None:
    whole = Paused(PAUSE, Workflow((Step("a", "x"),)), (Waiting(0, "a", (Message("assistant", "hm"),)),), {})
    data = json.loads(to_text(whole))
    damages = (
        {"version": 2},
        {"waiting": [{**data["waiting"][0], "step": 3}]},
        {"waiting": [{**data["waiting"][0], "said": []}]},
        {"waiting": [{**data["waiting"][0], "nested": {}}]},
        {"waiting": [{**data["waiting"][0], "nested": {**data, "outputs": {"7": ["a", "x"]}}}]},
        {"outputs": {"7": ["a", "x"]}},
        {"outputs": {"0": "x"}},
        {"workflow": {"steps": [{"worker": "a", "subtask": "x", "access": [0]}]}},
    )
    for damage in damages:
        with pytest.raises(WorkflowGoneError):
            from_text(PAUSE, json.dumps({**data, **damage}))


def test_calls_get_ids_of_ours_and_what_was_said_before_stays() -> None:
    before = (Message("assistant", "earlier"),)
    thoughts = (Thought("because", "signed"),)
    reply = ChatReply(
        "a", "now", tool_calls=(ToolCall("x", "look", "{}"), ToolCall("y", "find", "[]")), thoughts=thoughts
    )
    waiting = waiting_for(PAUSE, (2,), reply, before)
    inner = waiting_for(PAUSE, (0, 2), reply)
    assert (inner.step, inner.said[0].tool_calls[1].id) == (2, f"wf_{PAUSE}_0_2_1")
    assert (waiting.step, waiting.worker, waiting.said[0]) == (2, "a", before[0])
    assert [call.id for call in waiting.said[1].tool_calls] == [f"wf_{PAUSE}_2_0", f"wf_{PAUSE}_2_1"]
    assert [call.arguments for call in waiting.said[1].tool_calls] == ["{}", "[]"]
    assert waiting.said[1].thoughts == thoughts


def test_what_a_conversation_waits_for() -> None:
    asked = Message("assistant", tool_calls=calls(PAUSE, 0, "x", "y"))
    results = [Message("tool", "1", tool_call_id=call.id) for call in asked.tool_calls]
    question = Message("user", "?")
    assert awaited([question, asked, *results]) == PAUSE
    assert awaited([question, asked, *results, Message("user", "never mind")]) is None
    assert awaited([question, asked, *results, Message("system", "The file has changed.")]) == PAUSE
    assert awaited([question]) is None
    assert awaited([question, Message("tool", "1", tool_call_id="call_1")]) is None
    with pytest.raises(RequestError, match="several answers"):
        awaited([question, Message("tool", "1", tool_call_id=str(CallRef(OTHER, (0,), 0))), results[0]])


def test_results_reach_their_steps_however_the_caller_splits_them() -> None:
    north, south = calls(PAUSE, 0, "north"), calls(PAUSE, 1, "south")
    kept = Paused(
        PAUSE,
        Workflow((Step("a", "x"), Step("b", "y"), Step("c", "z", (0, 1)))),
        (
            Waiting(0, "a", (Message("assistant", "n", tool_calls=north),)),
            Waiting(1, "b", (Message("assistant", "s", tool_calls=south),)),
        ),
        {},
    )
    question = Message("user", "?")
    rain, sun = (Message("tool", text, tool_call_id=call.id) for text, (call,) in (("rain", north), ("sun", south)))
    together = [question, Message("assistant", tool_calls=(*north, *south)), sun, rain]
    apart = [question, Message("assistant", tool_calls=north), rain, Message("assistant", tool_calls=south), sun]
    bare = [question, rain, sun]
    for conversation in (together, apart, bare):
        resumed = resume(kept, conversation)
        assert resumed.base == (question,)
        assert resumed.histories == {0: (kept.waiting[0].said[0], rain), 1: (kept.waiting[1].said[0], sun)}


def test_what_a_program_notes_after_results_reaches_the_steps_that_get_them() -> None:
    """Claude Code tells of changed files in a `system` message; results must follow their calls without a gap."""
    old, north, south = calls(OTHER, 0, "old"), calls(PAUSE, 0, "north", "up"), calls(PAUSE, 1, "south")
    said = (Message("assistant", "1", tool_calls=old), Message("assistant", "2", tool_calls=north))
    kept = Paused(
        PAUSE,
        Workflow((Step("a", "x"), Step("b", "y"), Step("c", "z", (0, 1)))),
        (Waiting(0, "a", said), Waiting(1, "b", (Message("assistant", "s", tool_calls=south),))),
        {},
        earlier=(OTHER,),
    )
    first, last = Message("system", "changed"), Message("developer", "hurry")
    result = {call.id: Message("tool", call.name, tool_call_id=call.id) for call in (*old, *north, *south)}
    conversation = [
        Message("user", "?"),
        said[0],
        result[old[0].id],
        first,
        Message("assistant", tool_calls=(*north, *south)),
        *(result[call.id] for call in (*south, *reversed(north))),
        last,
    ]
    resumed = resume(kept, conversation)
    assert resumed.histories[0] == (said[0], result[old[0].id], first, said[1], *(result[c.id] for c in north), last)
    assert resumed.histories[1] == (kept.waiting[1].said[0], result[south[0].id], last)


def test_a_result_that_the_caller_dropped_is_said_to_be_lost() -> None:
    old, new = calls(OTHER, 0, "old"), calls(PAUSE, 0, "new")
    said = (Message("assistant", "1", tool_calls=old), Message("assistant", "2", tool_calls=new))
    kept = Paused(PAUSE, Workflow((Step("a", "x"),)), (Waiting(0, "a", said),), {}, earlier=(OTHER,))
    result = Message("tool", "fine", tool_call_id=new[0].id)
    resumed = resume(kept, [Message("user", "?"), said[1], result])
    assert [message.text for message in resumed.histories[0]] == [
        "1",
        "(This result is no longer in the conversation.)",
        "2",
        "fine",
    ]
    earlier = Message("tool", "old", tool_call_id=old[0].id)
    whole = resume(kept, [Message("user", "?"), said[0], earlier, said[1], result])
    assert whole.base == (Message("user", "?"),)
    assert whole.histories[0][1] == earlier
