"""Who a conversation stays with inside a tool loop."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import WorkerUnavailableError
from actors.marks import mark, unmark, worker_tag
from actors.messages import ChatRequest, Chunk, Message, ToolCall
from serve.sticky import Marks
from tests.serve.test_gateway import Fixed, Scripted, gateway, post
from tests.serve.test_responses import Says, calls
from tests.serve.test_session import Plan, Player, trinity

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@given(st.text(max_size=40), st.text(min_size=1, max_size=20))
def test_a_mark_comes_off_as_it_went_on(id: str, worker: str) -> None:
    marked = mark(id, worker)
    assert unmark(marked) == (id, worker_tag(worker))
    assert marked.isascii() == id.isascii()
    assert len(marked) == len(id) + 8


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(("x", "y", "call_1_wabcdef"))), max_size=6))
def test_ids_stay_distinct_and_results_find_their_calls(asked: list[tuple[str, str]]) -> None:
    messages: list[Message] = []
    for worker, id in dict.fromkeys(asked):
        messages.append(Message("assistant", tool_calls=(ToolCall(mark(id, worker), "f", "{}"),)))
        messages.append(Message("tool", "done", tool_call_id=mark(id, worker)))
    restored, asker = Marks("ab").restore(ChatRequest(tuple(messages)))
    ids = [call.id for message in restored.messages for call in message.tool_calls]
    results = [message.tool_call_id for message in restored.messages if message.role == "tool"]
    assert ids == results
    assert len(set(ids)) == len(ids)
    # The first of each is as its worker gave it.
    firsts = {id: worker for worker, id in reversed(list(dict.fromkeys(asked)))}
    assert set(firsts) <= set(ids)
    assert asker == (list(dict.fromkeys(asked))[-1][0] if asked else None)


def test_marks_of_strangers_are_left_alone() -> None:
    call = ToolCall(mark("x", "gone"), "f", "{}")
    request = ChatRequest((Message("assistant", tool_calls=(call,)), Message("tool", "y", tool_call_id=call.id)))
    assert Marks("ab").restore(request) == (request, None)


def loop(id: str, *after: dict[str, Any]) -> list[dict[str, Any]]:
    function = {"name": "look", "arguments": "{}"}
    return [
        {"role": "user", "content": "look!"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": id, "content": "blue"},
        *after,
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_result_goes_to_who_asked_without_a_decision(stream: bool) -> None:
    decider = Fixed("a", {"a": 0.9, "b": 0.1})
    asker, other = Says("b", calls("look", "{}")), Says("a", Chunk("no"))
    app = gateway(other, asker, decider=decider)
    asked = (await post(app, tools=TOOLS, fugu={"allow": ["b"]})).json()
    id = asked["choices"][0]["message"]["tool_calls"][0]["id"]
    asker.chunks = (Chunk("blue"),)
    before = len(decider.questions)
    answer = await post(app, tools=TOOLS, messages=loop(id), stream=stream, fugu={"trace": True})
    assert "blue" in answer.text
    assert '"source":"tool_loop"' in answer.text
    assert (len(other.requests), len(decider.questions)) == (0, before)
    assert asker.requests[1].messages[1].tool_calls[0].id == "call_0"
    # A new question is a new decision.
    turn = ({"role": "assistant", "content": "blue"}, {"role": "user", "content": "and now?"})
    await post(app, tools=TOOLS, messages=loop(id, *turn))
    assert len(other.requests) == 1


async def test_constraints_and_failures_free_the_loop() -> None:
    asker, other = Says("b", Chunk("by b")), Says("a", Chunk("by a"))
    app = gateway(other, asker)
    messages = loop(mark("c", "b"))
    assert "by b" in (await post(app, messages=messages)).text
    assert "by a" in (await post(app, messages=messages, fugu={"deny": ["b"]})).text
    app = gateway(other, Scripted("b", WorkerUnavailableError("down", worker="b")))
    assert "by a" in (await post(app, messages=messages)).text


async def test_a_session_goes_on_with_who_asked() -> None:
    a, b = Player("a"), Player("b")
    plan = Plan(("a", "verifier"))
    app = trinity(a, b, plan=plan, max_turns=2)
    body = (await post(app, model="fugu-trinity", messages=loop(mark("c", "b")), fugu={"trace": True})).json()
    turns = body["fugu"]["turns"]
    assert [(turn["worker"], turn["role"], turn["source"]) for turn in turns] == [
        ("b", "worker", "tool_loop"),
        ("a", "verifier", "head"),
    ]
    assert len(plan.questions) == 1, "the first turn needs no decision"
