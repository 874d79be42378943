"""Plans: what is read out of a model's text, what is refused and why, how a workflow is named and drawn."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import (
    ConfigError,
    PlanAccessError,
    PlanEmptyError,
    PlanError,
    PlanLengthsError,
    PlanMissingError,
    PlanSubtaskError,
    PlanSyntaxError,
    PlanTooLongError,
    PlanWorkerError,
    PlanWorkerNotAllowedError,
)
from orchestrator.plan_text import defused, read_plan
from orchestrator.workflow import (
    MAX_STEPS,
    SELF,
    Step,
    Workflow,
    from_json,
    parse_workflow,
    render_workflow,
    to_dot,
    to_json,
    to_mermaid,
)

POOL = ("gpt", "Claude", "gemini-3.1", "7b")
TWO = Workflow((Step("gpt", "Find it."), Step("Claude", "Count it.", (0,))))


def flow(*reads: tuple[int, ...]) -> Workflow:
    return Workflow(tuple(Step("gpt", f"part {index}", access) for index, access in enumerate(reads)))


# Any text that can be sent to a model: everything but lone halves of surrogate pairs.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda text: bool(text.strip())
)


@st.composite
def workflows(draw: st.DrawFn, workers: tuple[str, ...] = POOL, subtasks: st.SearchStrategy[str] = texts) -> Workflow:
    count = draw(st.integers(1, MAX_STEPS))
    steps = []
    for index in range(count):
        reads = draw(st.sets(st.integers(0, index - 1))) if index else set()
        steps.append(Step(draw(st.sampled_from(workers)), draw(subtasks), tuple(sorted(reads))))
    return Workflow(tuple(steps))


@pytest.mark.parametrize(
    "text",
    [
        'model_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], ["all"]]',
        "model_id = [0, 1]\nsubtasks = ['Find it.', 'Count it.']\naccess_list = [[], [0]]",
        'First:\n```python\nmodel_id = [0, 1]\nsubtasks = ["Find it.", "Count it."]\naccess_list = [[], [0]]\n```',
        '```json\n{"model_id": [0, 1], "subtasks": ["Find it.", "Count it."], "access_list": [[], [0]]}\n```',
        '- **Model IDs**: [0, 1]\n- **Subtasks:** ["Find it.", "Count it."]\n* **Access List**: [[], ["all"]]',
        "1. `model_ids`: [0, 1]\n2. `subtasks`: [Find it., Count it.]\n3. `access_lists`: [[], all]",
        "Model IDs:\n```\n[0, 1]\n```\nSubtasks:\n```json\n[“Find it.”, “Count it.”]\n```\n"
        "Access list:\n```\n[[], [“all”]]\n```",
        "model_id: ['0', '1',]\nsubtasks: ['''Find it.''', \"\"\"Count it.\"\"\",]\naccess_list: [[], [0,],]",
        'model_id: ["Worker 0", "model 1"]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [["none"], ["step 0"]]',
        'MODEL_ID: ["GPT", "claude"]\nSUBTASKS: ["Find it.", "Count it."]\nACCESS_LIST: [[], "All"]',
        'access_list: [[], [0]]\nmodel_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]',
        'workers: [\n  0,  # finds\n  1   # counts\n]\nsubtasks: [\n  "Find it.",\n  "Count it."\n]\n'
        "access: [\n  [],\n  [0]\n]",
        '<think>model_id: [2] subtasks: ["No."] access_list: [[]]</think>'
        'model_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], [0]]',
        '…model_id: [2] subtasks: ["No."] access_list: [[]] no.\n</think>\n'
        'model_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], [0]]',
        '<think>So:\nmodel_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], [0]]',
        'model_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], [0]]\n<think>Is that right?</think>',
        # The last complete one counts, whatever stands before, between or after.
        'model_id: [2]\nsubtasks: ["No."]\naccess_list: [[]]\nBetter:\n'
        'model_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], [0]]\nOr model_id: [3], subtasks: ["',
        'model_id: [2, 3\nNo, again.\nmodel_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], [0]]',
        'The models = [0, 1, 2].\nmodel_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], [0]]',
        'access = ["all"] would do.\nmodel_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], [0]]',
        # Bullets for lists.
        "model_id:\n- 0\n- 1\nsubtasks:\n- Find it.\n- Count it.\naccess_list:\n- []\n- all",
        "**Model IDs:**\n* `gpt`\n* `Claude`\n\n**Subtasks:**\n\n* Find it.\n\n* Count it.\n\n"
        "**Access list:**\n* none\n* step 0\n\nThat should do.",
        '- model_id:\n  - 0\n  - 1\n- subtasks:\n  - "Find it.",\n  - “Count it.”\n- access_list:\n  - []\n  - ["all"]',
        "Workers:\r\n1. Worker 0\r\n2. Worker 1\r\nSubtasks:\r\n1) Find it.\r\n2) Count it.\r\n"
        "Access:\r\n1. []\r\n2. [0]",
        "model_id:\n```yaml\n- 0\n- 1\n```\nsubtasks:\n```\n• Find it.\n• Count it.\n```\n"
        "access_list:\n```\n-\n- 0\n```",
        "model_id: [0, 1]\nsubtasks:\n- Find it.\n- Count it.\naccess_list:\n- [[], [0]]",
        # What was written in brackets counts, however it is told again in bullets.
        'model_id: [0, 1]\nsubtasks: ["Find it.", "Count it."]\naccess_list: [[], [0]]\n\nThat is:\nModels:\n- gpt\n'
        "- Claude, which is careful\nSubtasks:\n- finding\n- counting\nAccess:\n- nothing\n- the first",
    ],
)
def test_forms_that_models_write(text: str) -> None:
    assert parse_workflow(text, POOL) == TWO


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("'the worker's part, at last'", "the worker's part, at last"),
        ('"say "yes" or "no" now"', 'say "yes" or "no" now'),
        (r'"a \"b\" \\ c\n\td\/e"', 'a "b" \\ c\n\td/e'),
        (r'"\frac{1}{2} \binom \alpha"', r"\frac{1}{2} \binom \alpha"),
        (r'"\u00e9\ud83d\ude00\ud83d"', "é😀�"),
        ('"one\ntwo"', "one\ntwo"),
        ("“He said ‘no’.”", "He said ‘no’."),
        ('"model_id: [1], subtasks: [2], access_list: [[]]"', "model_id: [1], subtasks: [2], access_list: [[]]"),
        ("\"__import__('os').system('true')\"", "__import__('os').system('true')"),
        ("42", "42"),
    ],
)
def test_quotes_and_escapes(written: str, read: str) -> None:
    text = f"model_id: [0]\nsubtasks: [{written}]\naccess_list: [[]]"
    assert parse_workflow(text, POOL).steps[0].subtask == read


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", PlanMissingError, "model_id, subtasks, access_list"),
        ("I would ask worker 2.", PlanMissingError, "model_id"),
        ('model_id: [0]\nsubtasks: ["x"]', PlanMissingError, "a list is missing: access_list"),
        ('<think>model_id: [0] subtasks: ["x"] access_list: [[]]</think> Done.', PlanMissingError, "model_id"),
        ('model_id: [0]\nsubtasks: ["x"]\naccess_list: [[], [0]', PlanSyntaxError, "access_list cannot be read"),
        ('model_id: [0]\nsubtasks: ["x]\naccess_list: [[]]', PlanSyntaxError, "subtasks cannot be read"),
        ('model_id: [[[[0]]]]\nsubtasks: ["x"]\naccess_list: [[]]', PlanSyntaxError, "nested too deep"),
        ('model_id: [0,,1]\nsubtasks: ["x"]\naccess_list: [[]]', PlanSyntaxError, "an item is empty"),
        ('model_id: [[0]]\nsubtasks: ["x"]\naccess_list: [[]]', PlanSyntaxError, "one worker, not a list"),
        ('model_id: [0]\nsubtasks: [["x"]]\naccess_list: [[]]', PlanSyntaxError, "must be a text"),
        ('model_id: [0]\nsubtasks: ["x"]\naccess_list: [[[0]]]', PlanSyntaxError, "list of positions"),
        ('model_id: [0, 1]\nsubtasks: ["x"]\naccess_list: [[]]', PlanLengthsError, "model_id has 2, subtasks 1 and"),
        ("model_id: []\nsubtasks: []\naccess_list: []", PlanEmptyError, "no steps"),
        (f"model_id: {[0] * 6}\nsubtasks: {['x'] * 6}\naccess_list: {[[]] * 6}", PlanTooLongError, "6 steps"),
        (f"model_id: [{'0,' * 1000}]\nsubtasks: []\naccess_list: []", PlanSyntaxError, "more than 256 items"),
        (f"model_id: [0]\nsubtasks: ['{'x' * 9000}']\naccess_list: [[]]", PlanTooLongError, "9000 characters"),
        ('model_id: [4]\nsubtasks: ["x"]\naccess_list: [[]]', PlanWorkerError, "'4', which is no worker: there are 4"),
        ('model_id: [-1]\nsubtasks: ["x"]\naccess_list: [[]]', PlanWorkerError, "'-1'"),
        ('model_id: [1.0]\nsubtasks: ["x"]\naccess_list: [[]]', PlanWorkerError, "'1.0'"),
        ('model_id: ["gpt-9"]\nsubtasks: ["x"]\naccess_list: [[]]', PlanWorkerError, "'gpt-9'"),
        ('model_id: ["conductor"]\nsubtasks: ["x"]\naccess_list: [[]]', PlanWorkerError, "'conductor'"),
        ('model_id: ["geheim\u0007!"]\nsubtasks: ["x"]\naccess_list: [[]]', PlanWorkerError, "something"),
        (f"model_id: [{'9' * 5000}]\nsubtasks: ['x']\naccess_list: [[]]", PlanWorkerError, "something"),
        ('model_id: [3]\nsubtasks: ["x"]\naccess_list: [[]]', PlanWorkerNotAllowedError, "names 7b"),
        ('model_id: [0]\nsubtasks: [" \\n "]\naccess_list: [[]]', PlanSubtaskError, "step 0 is empty"),
        ('model_id: [0]\nsubtasks: ["x"]\naccess_list: [[0]]', PlanAccessError, "there are none"),
        ('model_id: [0, 0]\nsubtasks: ["x", "y"]\naccess_list: [[1], []]', PlanAccessError, "step 0"),
        ('model_id: [0, 0]\nsubtasks: ["x", "y"]\naccess_list: [[], [-1]]', PlanAccessError, "not '-1': 0 to 0"),
        ('model_id: [0, 0]\nsubtasks: ["x", "y"]\naccess_list: [[], ["some"]]', PlanAccessError, "not 'some'"),
    ],
)
def test_what_is_refused_and_why(text: str, error: type[PlanError], says: str) -> None:
    with pytest.raises(PlanError, match=re.escape(says)) as raised:
        parse_workflow(text, POOL, allowed=POOL[:3])
    assert type(raised.value) is error
    assert raised.value.http_status == 422


def test_every_kind_of_refusal_has_its_own_word() -> None:
    kinds = [error.kind for error in PlanError.__subclasses__()]
    assert len(set(kinds)) == len(kinds) == 9


def test_bullets_hold_what_stands_further_in() -> None:
    text = (
        "model_id:\n- 2\n- 0\n- 1\nsubtasks:\n- Check these:\n  - the name\n  - model: the size of it\n"
        "- Find 'x' or \"y\".\n"
        '- "One\ntwo"\naccess_list:\n- -\n- none\n- 0 and 1'
    )
    with pytest.raises(PlanError):
        parse_workflow(text, POOL)
    read = parse_workflow(text.replace('"One\ntwo"', "1. One").replace("- -\n", "- ()\n"), POOL)
    assert read == Workflow(
        (
            Step("gemini-3.1", "Check these:\n- the name\n- model: the size of it"),
            Step("gpt", "Find 'x' or \"y\"."),
            Step("Claude", "1. One", (0, 1)),
        )
    )
    one = parse_workflow("model_id:\n- 0\nsubtasks:\n- Do it.\naccess_list:\n- []", POOL)
    assert one == Workflow((Step("gpt", "Do it."),))
    with pytest.raises(PlanTooLongError, match="6 steps"):
        parse_workflow("model_id:" + "\n- 0" * 6 + "\nsubtasks:" + "\n- x" * 6 + "\naccess_list:" + "\n- []" * 6, POOL)
    with pytest.raises(PlanSyntaxError, match="more than 256"):
        parse_workflow("model_id:" + "\n- 0" * 999 + "\nsubtasks:\n- x\naccess_list:\n- []", POOL)
    with pytest.raises(PlanLengthsError, match="model_id has 2, subtasks 1"):
        parse_workflow("model_id:\n- 0\n- 1\nsubtasks:\n- x\naccess_list:\n- []", POOL)


@given(
    workflows(subtasks=st.text("ab c.'", min_size=1).map(lambda text: f"Do {text}".strip())), st.sampled_from("-*•+")
)
def test_bullets_and_brackets_say_the_same(workflow: Workflow, mark: str) -> None:
    access = [str(list(step.access)) for step in workflow.steps]
    lists = {"model_id": [step.worker for step in workflow.steps], "subtasks": [s.subtask for s in workflow.steps]}
    lists["access_list"] = access
    text = "\n".join(f"{kind}:\n" + "\n".join(f"{mark} {item}" for item in items) for kind, items in lists.items())
    assert parse_workflow(text, POOL) == workflow


def test_names_that_could_be_two() -> None:
    pool = ("gpt", "GPT", "1", "worker 0")

    def named(name: str) -> str:
        return parse_workflow(f'model_id: ["{name}"]\nsubtasks: ["x"]\naccess_list: [[]]', pool).steps[0].worker

    assert [named(name) for name in ("gpt", "GPT", "1", "worker 0", "2")] == ["gpt", "GPT", "1", "worker 0", "1"]
    with pytest.raises(PlanWorkerError, match="gpt or GPT"):
        named("Gpt")
    assert parse_workflow('model_id: [1]\nsubtasks: ["x"]\naccess_list: [[]]', pool).steps[0].worker == "GPT"


def test_self_and_nothing_only_where_they_are_allowed() -> None:
    text = 'model_id: ["Conductor"]\nsubtasks: ["Plan the rest."]\naccess_list: [[]]'
    plan = parse_workflow(text, POOL, allowed=("gpt",), allow_self=True)
    assert plan.steps[0].worker == SELF
    assert parse_workflow(render_workflow(plan, POOL), POOL, allow_self=True) == plan
    with pytest.raises(ConfigError, match="rename it"):
        parse_workflow(text, (*POOL, SELF), allow_self=True)
    assert parse_workflow("model_id: []\nsubtasks: []\naccess_list: []", POOL, allow_empty=True) == Workflow(())
    assert parse_workflow(render_workflow(Workflow(()), POOL), POOL, allow_empty=True) == Workflow(())
    six = flow(*[()] * 6)
    assert parse_workflow(render_workflow(six, POOL), POOL, max_steps=6) == six


@given(workflows())
def test_what_is_rendered_is_read_back(workflow: Workflow) -> None:
    assert parse_workflow(render_workflow(workflow, POOL), POOL) == workflow
    assert from_json(to_json(workflow)) == workflow


@given(workflows(), st.text(max_size=200), st.text(max_size=200))
def test_a_plan_is_found_among_other_words(workflow: Workflow, before: str, after: str) -> None:
    text = f"{defused(before)}\n{render_workflow(workflow, POOL)}\n{defused(after)}"
    if "think" not in before + after and "reasoning" not in before + after:
        assert parse_workflow(text, POOL) == workflow


@given(workflows())
def test_python_lists_are_read_too(workflow: Workflow) -> None:
    # `repr` has escapes of its own for what cannot be printed.
    steps = [step for step in workflow.steps if step.subtask.isprintable()]
    text = f"model_id = {[0] * len(steps)}\nsubtasks = {[s.subtask for s in steps]}\naccess_list = {[[]] * len(steps)}"
    if steps and not any(mark in s.subtask for s in steps for mark in ("'", '"', "<")):
        assert [s.subtask for s in parse_workflow(text, POOL).steps] == [s.subtask for s in steps]


pieces = st.sampled_from(
    [
        *("model_id", "subtasks", "access_list", "Model IDs", ":", "=", "[", "]", ",", "'", '"', "“", "”", '"""', "\\"),
        *(
            "\\u12",
            "\\ud800",
            "0",
            "-1",
            "9" * 30,
            "all",
            "<think>",
            "</think>",
            "```",
            "```json\n",
            "\n",
            " ",
            "#",
            "//",
        ),
        *("- ", "\n- ", "\n  * ", "\n1. ", "model_id:\n", "subtasks:\n", "access_list:\n"),
        *("model_id: [0]\n", 'subtasks: ["x"]\n', "access_list: [[]]\n", "\ud800", "\0", "é", "{", "}"),
    ]
)


def read(text: str) -> Workflow | PlanError:
    try:
        return parse_workflow(text, POOL, allow_empty=True, allow_self=True)
    except PlanError as error:
        return error


@given(st.one_of(st.text(), st.lists(pieces, max_size=40).map("".join)))
def test_any_text_is_a_workflow_or_a_typed_error(text: str) -> None:
    got = read(text)
    if isinstance(got, PlanError):
        assert type(got) in PlanError.__subclasses__()
        assert got.message
        assert "\n" not in got.message
    else:
        assert len(got.steps) <= MAX_STEPS
        assert all(step.worker in (*POOL, SELF) and step.subtask.strip() for step in got.steps)
        json.dumps([step.subtask for step in got.steps], ensure_ascii=False).encode()  # can be sent
        assert read(render_workflow(got, POOL)) == got


@given(workflows(), st.data())
def test_damaged_plans_are_read_or_refused(workflow: Workflow, data: st.DataObject) -> None:
    text = render_workflow(workflow, POOL)
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 8)))
    got = read(text[:begin] + data.draw(st.text(max_size=3)) + text[end:])
    assert isinstance(got, Workflow) or type(got) in PlanError.__subclasses__()


@given(st.one_of(st.text(), st.lists(pieces, max_size=40).map("".join)), workflows())
def test_no_plan_is_read_out_of_what_is_defused(text: str, workflow: Workflow) -> None:
    for hostile in (text, render_workflow(workflow, POOL), f"{text}{render_workflow(workflow, POOL)}"):
        with pytest.raises(PlanMissingError):
            read_plan(defused(hostile))


@pytest.mark.parametrize(
    "unit",
    [
        "model_id: [",
        "model_id: ['",
        'model_id: ["""',
        "subtasks: ['a', 'b' 'c ",
        "model_id: [0]\n",
        "model_id:\n- [x\n  y\n",
        "subtasks:\n- x\n  y\n\n",
        "\n  - model:\n    - [",
        "  x\n\n",
        "<think>",
        "'#",
        " ",
    ],
)
def test_reading_takes_linear_time(unit: str) -> None:
    def seconds_for(characters: int) -> float:
        text = f"model_id: [0, '{unit * (characters // len(unit))}"
        began = time.process_time()
        with pytest.raises(PlanError):
            parse_workflow(text, POOL)
        return time.process_time() - began

    # Twenty times the text: quadratic would take four hundred times as long.
    small = max(0.002, min(seconds_for(20_000) for _ in range(3)))
    assert min(seconds_for(400_000) for _ in range(3)) < 80 * small


def test_megabytes_are_read_in_seconds() -> None:
    text = "Let me think about this. " * 80_000
    began = time.process_time()
    assert parse_workflow(text + render_workflow(TWO, POOL) + text, POOL) == TWO
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("workflow", "topology", "depth", "waves"),
    [
        (Workflow(()), "empty", 0, ()),
        (flow(()), "single", 1, ((0,),)),
        (flow((), (0,)), "chain", 2, ((0,), (1,))),
        (flow((), (0,), (0, 1), (2,)), "chain", 4, ((0,), (1,), (2,), (3,))),
        (flow((), ()), "parallel", 1, ((0, 1),)),
        (flow((), (), (0, 1)), "parallel", 2, ((0, 1), (2,))),
        (flow((), (), (), (), (0, 1, 2, 3)), "parallel", 2, ((0, 1, 2, 3), (4,))),
        (flow((), (), (0, 1), (2,)), "tree", 3, ((0, 1), (2,), (3,))),
        (flow((), (), (0, 1), (0, 1, 2)), "tree", 3, ((0, 1), (2,), (3,))),
        (flow((), (), (0,), (1,), (2, 3)), "tree", 3, ((0, 1), (2, 3), (4,))),
        (flow((), (0,), (0,), (1, 2)), "graph", 3, ((0,), (1, 2), (3,))),
        (flow((), (0,), ()), "graph", 2, ((0, 2), (1,))),
    ],
)
def test_topology(workflow: Workflow, topology: str, depth: int, waves: tuple[tuple[int, ...], ...]) -> None:
    assert (workflow.topology, workflow.depth, workflow.waves()) == (topology, depth, waves)


@given(workflows())
def test_waves_keep_the_order_of_reading(workflow: Workflow) -> None:
    level = {index: number for number, wave in enumerate(workflow.waves()) for index in wave}
    assert sorted(level) == list(range(len(workflow.steps)))
    for index, step in enumerate(workflow.steps):
        assert level[index] == max((level[i] + 1 for i in step.access), default=0)
        assert index not in workflow.needed or set(step.access) <= workflow.needed


@pytest.mark.parametrize("access", [(0,), (1,), (-1,), (0, 0)])
def test_a_workflow_cannot_be_built_with_a_loop(access: tuple[int, ...]) -> None:
    steps = (Step("gpt", "x"), Step("gpt", "y", access)) if access == (0, 0) else (Step("gpt", "x", access),)
    with pytest.raises(PlanAccessError, match="earlier steps"):
        Workflow(steps)


def test_rendering_a_worker_that_is_gone() -> None:
    with pytest.raises(PlanWorkerError, match="Claude, which is not in the pool"):
        render_workflow(TWO, ("gpt",))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": 3}', '{"steps": [{"worker": "a"}]}', "[" * 10_000])
def test_what_is_no_stored_workflow(text: str) -> None:
    with pytest.raises(PlanSyntaxError, match="not a stored workflow"):
        from_json(text)


def test_drawn_as_mermaid_and_dot() -> None:
    hostile = 'say "hi" <b>]; --> x[`\\n`]\nend'
    drawn = to_mermaid(Workflow((Step("gpt", "Find it."), Step("Claude", hostile, (0,)))))
    assert drawn.splitlines() == [
        "flowchart TD",
        '    s0["0 gpt<br/>Find it."]',
        '    s1["1 Claude<br/>say #34;hi#34; #60;b#62;#93;#59; --#62; x#91;#96;#92;n#96;#93; end"]',
        "    s0 --> s1",
        "    style s1 stroke-width:3px",
    ]
    assert to_dot(Workflow((Step("gpt", hostile),))).splitlines() == [
        "digraph workflow {",
        "    node [shape=box];",
        '    s0 [label="0 gpt\\nsay \\"hi\\" <b>]; --> x[`\\\\n`] end", penwidth=3];',
        "}",
    ]
    assert json.loads(to_json(TWO)) == {
        "topology": "chain",
        "depth": 2,
        "steps": [
            {"worker": "gpt", "subtask": "Find it.", "access": []},
            {"worker": "Claude", "subtask": "Count it.", "access": [0]},
        ],
    }


@given(workflows())
def test_no_subtask_breaks_out_of_its_box(workflow: Workflow) -> None:
    count, edges = len(workflow.steps), sum(len(step.access) for step in workflow.steps)
    mermaid = to_mermaid(workflow).splitlines()
    boxes = [line for line in mermaid if re.fullmatch(r'    s\d\["\d [^"<>`]*<br/>[^"<>`\[\]{}]*"\]', line)]
    assert (len(boxes), len(mermaid)) == (count, count + edges + 2)
    dot = to_dot(workflow).split("\n")
    labels = [line for line in dot if re.fullmatch(r'    s\d \[label="(?:[^"\\]|\\.)*"(, penwidth=3)?\];', line)]
    assert (len(labels), len(dot)) == (count, count + edges + 4)


def test_the_picture_in_the_guide_is_of_the_plan_in_it() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "ultra.md").read_text(encoding="utf-8")
    plan, picture = (
        re.search(r"```text\n(.*?)```", guide, re.DOTALL),
        re.search(r"```mermaid\n(.*?)```", guide, re.DOTALL),
    )
    assert plan is not None
    assert picture is not None
    workflow = parse_workflow(plan[1], ("gpt", "claude", "gemini"))
    assert to_mermaid(workflow) == picture[1]
    assert workflow.topology == "parallel"
    for error in PlanError.__subclasses__():
        assert f"`{error.kind}`" in guide
