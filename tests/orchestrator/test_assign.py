"""Steps in the hands of whom a router names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from actors.messages import Message
from orchestrator.assign import Conversation, assigned, conversations, is_whole
from orchestrator.conductor import ConductorSettings
from orchestrator.workflow import SELF, Step, Workflow
from tests.orchestrator.test_conductor import CHAIN, QUERY, conducting, plan, pool, seen, writer

TALK = (Message("user", "hello"), Message("assistant", "hi"), Message("user", "and now?"))


def steps() -> st.SearchStrategy[Workflow]:
    def built(rows: list[tuple[str, bool]]) -> Workflow:
        return Workflow(
            tuple(
                Step(worker, f"part {index}", (index - 1,) if reads and index else ())
                for index, (worker, reads) in enumerate(rows)
            )
        )

    return st.lists(st.tuples(st.sampled_from(("a", "b", SELF)), st.booleans()), min_size=1, max_size=5).map(built)


@given(steps(), st.lists(st.sampled_from("abc"), min_size=5, max_size=5))
def test_each_step_goes_to_who_was_named_for_it_and_nothing_else_changes(workflow: Workflow, named: list[str]) -> None:
    asked = conversations(workflow, TALK)
    mine = [index for index, step in enumerate(workflow.steps) if step.worker != SELF]
    assert len(asked) == len(mine)
    found = assigned(workflow, named[: len(asked)])
    for turn, index in enumerate(mine):
        assert found.steps[index].worker == named[turn]
        expected = TALK if is_whole(workflow) else (Message("user", f"part {index}"),)
        assert asked[turn] == expected
    assert [replace(step, worker="") for step in found.steps] == [replace(step, worker="") for step in workflow.steps]
    assert all(found.steps[i].worker == SELF for i in range(len(found.steps)) if i not in mine)


async def test_the_routers_word_holds_over_the_plans() -> None:
    asked: list[tuple[Sequence[Conversation], frozenset[str]]] = []

    async def assign(talks: Sequence[Conversation], allowed: frozenset[str]) -> Sequence[str]:
        asked.append((talks, allowed))
        return ["c", "a"]

    workers = replace(pool(a="28", b="never", c="pmal"), assign=assign)
    result, _ = await conducting(writer(CHAIN), workers)
    assert result.answer is not None
    assert (result.answer.text, result.answer.worker) == ("28", "a")
    assert asked == [
        ([(Message("user", "reverse the word"),), (Message("user", "count and multiply"),)], frozenset("abc"))
    ]
    assert seen(workers, "b") == []
    assert result.rounds[0].workflow == Workflow((Step("c", "reverse the word"), Step("a", "count and multiply", (0,))))
    assert result.rounds[0].planned


async def test_a_plan_of_one_step_gives_the_conversation_as_it_is_to_the_routers_best() -> None:
    async def assign(talks: Sequence[Conversation], _allowed: frozenset[str]) -> Sequence[str]:
        assert list(talks) == [QUERY.messages]
        return ["b"]

    workers = replace(pool(a="never", b="28"), assign=assign)
    result, _ = await conducting(writer(plan(("a", "a bad copy of the qestion", ()))), workers)
    assert result.answer is not None
    assert result.answer.worker == "b"
    assert seen(workers, "b")[0].messages == QUERY.messages
    assert result.rounds[0].planned


async def test_a_result_of_one_worker_can_be_planned_upon_again() -> None:
    async def assign(talks: Sequence[Conversation], _allowed: frozenset[str]) -> Sequence[str]:
        return ["b"] * len(talks)

    workers = replace(pool(a="never", b="28"), assign=assign)
    conductor = writer(plan(("a", "x", ())), CHAIN)
    result, _ = await conducting(conductor, workers, settings=ConductorSettings(max_rounds=2))
    assert [len(each.workflow.steps) for each in result.rounds if each.workflow is not None] == [1, 2]
