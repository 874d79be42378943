"""Whatever the grammar lets through parses, and every plan that can be rendered gets through."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import NoWorkerAllowedError
from orchestrator.plan_grammar import plan_regex
from orchestrator.workflow import SELF, Step, Workflow, parse_workflow, render_workflow

POOL = ("alpha", "beta", "gamma", "delta")
ALLOWED = frozenset({"beta", "delta"})
PRINTABLE = st.characters(min_codepoint=32, max_codepoint=0x2FFF)


@pytest.mark.parametrize("thought", [True, False])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_matches_parses(thought: bool, data: st.DataObject) -> None:
    grammar = plan_regex(POOL, allowed=ALLOWED, max_steps=4, allow_self=True, allow_empty=True, thought=thought)
    text = data.draw(st.from_regex(re.compile(grammar), fullmatch=True, alphabet=PRINTABLE | st.just("\n")))
    workflow = parse_workflow(text, POOL, allowed=ALLOWED, max_steps=4, allow_self=True, allow_empty=True)
    assert {step.worker for step in workflow.steps} <= ALLOWED | {SELF}
    assert len(workflow.steps) <= 4


@st.composite
def workflows(draw: st.DrawFn) -> Workflow:
    steps = []
    for index in range(draw(st.integers(1, 5))):
        subtask = draw(st.text("abc {0}'[],:;.?é", min_size=1, max_size=40).filter(str.strip)).strip()
        access = tuple(sorted(draw(st.sets(st.integers(0, index - 1))))) if index else ()
        steps.append(Step(draw(st.sampled_from([*POOL, SELF])), subtask, access))
    return Workflow(tuple(steps))


@given(workflows())
@settings(deadline=None)
def test_every_rendered_plan_matches(workflow: Workflow) -> None:
    text = render_workflow(workflow, POOL)
    assert re.fullmatch(plan_regex(POOL, allow_self=True, thought=False), text)
    assert re.fullmatch(plan_regex(POOL, allow_self=True), f"Two models, then a check.\n{text}")


@given(data=st.data())
@settings(max_examples=30)
def test_a_plan_is_no_longer_than_asked(data: st.DataObject) -> None:
    grammar = plan_regex(POOL, characters=800)
    text = data.draw(st.from_regex(re.compile(grammar), fullmatch=True, alphabet=PRINTABLE | st.just("\n")))
    # In words of usual length no more than 800 characters, and what the lists themselves take.
    words = text.split(" ")
    assert len(words) * 6 < 1_000
    assert max(map(len, words)) < 100
    long = plan_regex(POOL, max_steps=1)

    def single(words: int, length: int = 5) -> str:
        return f'model_id: [0]\nsubtasks: ["{" ".join(["x" * length] * words)}"]\naccess_list: [[]]'

    assert re.fullmatch(long, single(2_500 // 6))
    assert not re.fullmatch(long, single(2_700 // 6))
    assert re.fullmatch(long, single(3, length=40))
    assert not re.fullmatch(long, single(3, length=41))


def test_what_is_not_offered_does_not_match() -> None:
    two = 'model_id: [1, 1]\nsubtasks: ["a", "b"]\naccess_list: [[], [0]]'
    assert re.fullmatch(plan_regex(POOL), two)
    assert not re.fullmatch(plan_regex(POOL, max_steps=1), two)
    assert not re.fullmatch(plan_regex(POOL, allowed={"alpha"}), two)
    assert not re.fullmatch(plan_regex(POOL), two.replace("[0]", "[1]"))
    assert not re.fullmatch(plan_regex(POOL), two.replace('"a", ', ""))
    assert not re.fullmatch(plan_regex(POOL), two.replace('"a"', '" "'))
    assert not re.fullmatch(plan_regex(POOL), "model_id: []\nsubtasks: []\naccess_list: []")
    with pytest.raises(NoWorkerAllowedError):
        plan_regex(POOL, allowed=set())
