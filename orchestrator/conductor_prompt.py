"""What the Conductor reads: the contract between its training and its serving (Conductor §3.1, App. E).

`paper` explains the task, shows examples and lists the models by number only, so that a conductor has to find out
what each is good for; names and a line about each are optional. It suits a large language model, trained or not.
`compact` is a few words and the task, for a conductor so small that it learns all else from its training: with a
short question it stays under 200 tokens. An adapter is only good for the style, names and limits it was trained with.

A number means the same worker whatever part of the pool a request may use; those it may not use are not listed
(Conductor §3.2).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from actors.errors import NoWorkerAllowedError, RequestError
from actors.messages import Message
from orchestrator.plan_text import defused
from orchestrator.workflow import MAX_STEPS, SELF, Step, Workflow, render_workflow

PromptStyle = Literal["paper", "compact"]

CUT = "\n[...]\n"


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """How the prompt is written. `show_names` names the workers beside their numbers; `examples` belong to the paper's
    style; `allow_self` lets a plan name the conductor as a worker. Longer questions lose their middle, longer results
    their beginning (Conductor App. A keeps the last 4,096 tokens); both limits are in characters."""

    style: PromptStyle = "paper"
    show_names: bool = False
    examples: bool = True
    allow_self: bool = False
    max_steps: int = MAX_STEPS
    question_characters: int = 48_000
    result_characters: int = 16_000


@dataclass(frozen=True, slots=True)
class Round:
    """A workflow that was carried out: what the conductor wrote, and what its last step answered."""

    plan: str
    result: str


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something the conductor wrote that is no workflow, and why."""

    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Example:
    """`steps`: (which of the available workers, subtask, access). The numbers of real workers are put in."""

    question: str
    thought: str
    steps: tuple[tuple[int, str, tuple[int, ...]], ...]


def conductor_messages(
    query: Sequence[Message],
    workers: Sequence[str],
    settings: PromptSettings | None = None,
    *,
    allowed: Collection[str] | None = None,
    about: Mapping[str, str] | None = None,
    tools: Sequence[str] = (),
    said: Sequence[Round | Mistake] = (),
) -> tuple[Message, ...]:
    """The conversation that a conductor is asked to continue with a plan.

    `query` is the caller's conversation, `workers` the whole pool in the order of its numbers, `allowed` those that
    this request may use (None: all), `about` a line about a worker (shown with its name only), `tools` the names of
    the caller's tools. `said` is what came of this conductor's earlier plans for the same query, oldest first.

    Raises:
        RequestError: an empty conversation.
        NoWorkerAllowedError: no worker of the pool is allowed.
    """
    settings = settings or PromptSettings()
    available = [(number, name) for number, name in enumerate(workers) if allowed is None or name in allowed]
    if not available:
        raise NoWorkerAllowedError("the constraints leave the conductor no worker", param="fugu")
    question = _crop_middle(question_text(query), settings.question_characters)
    if settings.style == "compact":
        messages = [Message("system", COMPACT_SYSTEM), Message("user", _compact(question, available, settings))]
    else:
        messages = [
            Message("system", _paper_system(workers, available, settings)),
            Message("user", _paper_user(question, available, settings, about or {}, tools)),
        ]
    for each in said:
        messages += _turn(each, settings)
    return tuple(messages)


def question_text(query: Sequence[Message]) -> str:
    """A conversation as one text: a lone user message as it is, else one part for each message.

    Raises:
        RequestError: an empty conversation.
    """
    if not query:
        raise RequestError("messages must not be empty", param="messages")
    if len(query) == 1 and query[0].role == "user":
        return _message_text(query[0])
    return "\n\n".join(f"{message.role}: {_message_text(message)}" for message in query)


def _message_text(message: Message) -> str:
    calls = [f"[calls {call.name} {_crop_middle(call.arguments, 400)}]" for call in message.tool_calls]
    images = ["[image]"] * len(message.images)
    return "\n".join(part for part in (message.text.strip(), *images, *calls) if part)


def quote(tag: str, text: str) -> str:
    """`text` inside a tag that it cannot close, whatever it holds."""
    inner = re.sub(rf"<(/?{tag}\b)", r"< \1", text.strip(), flags=re.IGNORECASE)
    return f"<{tag}>\n{inner}\n</{tag}>"


def _crop_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    side = max(1, (limit - len(CUT)) // 2)
    return f"{text[:side]}{CUT}{text[-side:]}"


def _turn(said: Round | Mistake, settings: PromptSettings) -> list[Message]:
    compact = settings.style == "compact"
    if isinstance(said, Mistake):
        reason = f"Error: {said.reason}" if compact else _MISTAKE.format(reason=said.reason)
        return [Message("assistant", _crop_middle(said.text, 4_000)), Message("user", reason)]
    result = defused(said.result.strip())  # a plan that a worker wrote is not for copying
    if len(result) > settings.result_characters:
        result = f"[...]{result[-settings.result_characters :]}"
    after = f"Result: {result}\n{COMPACT_AGAIN}" if compact else f"{quote('result', result)}\n\n{_AGAIN}"
    return [Message("assistant", said.plan), Message("user", after)]


# The compact style ---------------------------------------------------------------------------------------------------

COMPACT_SYSTEM = "Plan the task for the workers."
COMPACT_AGAIN = "Plan again, or write empty lists to keep it."


def _compact(question: str, available: Sequence[tuple[int, str]], settings: PromptSettings) -> str:
    listed = [f"{number} {name}" if settings.show_names else str(number) for number, name in available]
    if settings.allow_self:
        listed.append(SELF)
    return f"Workers: {', '.join(listed)}\nTask: {question}"


# The paper's style ---------------------------------------------------------------------------------------------------

_SYSTEM = """\
You conduct a group of language models. You do not answer the question yourself: you write a workflow, and the models \
carry it out.

A workflow has 1 to {max_steps} steps. A step hands one subtask to one model, in plain words. That model reads the \
user's question, its own subtask, and the answers of exactly those earlier steps that you let it read. Steps that wait \
for nobody run at the same time. The answer of the last step goes to the user as it is, so its subtask has to ask for \
the whole answer in the form that the question wants.

Think first, in a few sentences: what does the question take, where would a model on its own go wrong, is a second \
opinion worth its price? An easy question needs one step. A hard one gains from models that plan, that try different \
ways without seeing each other, that check, or that put together what others found. Models differ; nobody but you \
decides who is good at what.

Then end with exactly three lists of equal length, each on a line of its own:

model_id: the number of each step's model
subtasks: what each step has to do, each in double quotes
access_list: for each step a list with the positions of the earlier steps that it may read, counted from 0; [] for \
none, ["all"] for all of them"""

_SELF = f"""

One more model can be named: "{SELF}", which is you. Such a step writes and runs a workflow of its own for its \
subtask; give it only what is too large for one model."""

_CLOSING = "Think in a few sentences about how to break this down, then write the three lists."

_MISTAKE = """\
That cannot be carried out: {reason}
Write the workflow again, ending with the three lists model_id, subtasks and access_list."""

_AGAIN = """\
This is what your workflow came to. If it answers the question well, keep it by writing three empty lists. If it does \
not, say in a sentence what went wrong and write another workflow; its first step, and those that may read ["all"], \
also read this result."""

_EXAMPLES = (
    _Example(
        "Which gas do plants take in for photosynthesis? Reply with its chemical formula only.",
        "Common knowledge with a fixed form of answer. One model will do.",
        ((1, "Answer the question. Reply with the chemical formula only.", ()),),
    ),
    _Example(
        "A farm shop sells eggs in boxes of 6 and boxes of 10. Somebody buys 11 boxes and has 86 eggs. How many boxes "
        "of 10 are among them?",
        "Two unknowns, two equations: easy to set up, easy to slip in. One model solves it, another puts the numbers "
        "back into the story and answers.",
        (
            (2, "Set up both equations, solve them step by step, and state how many boxes of each kind there are.", ()),
            (0, "Check that the counts found give 11 boxes and 86 eggs; correct them if not. Answer with the number of "
             "boxes of 10.", (0,)),
        ),
    ),
    _Example(
        "A 58-year-old has had a dry cough for three weeks. It began after a new tablet for high blood pressure. There "
        "is no fever and the lungs sound clear. What is the most likely cause, and what is usually done?",
        "Judgement is asked for, and a first idea can stick. Two models judge without seeing each other, from two "
        "sides; a third weighs what they say.",
        (
            (0, "Go through what this new tablet could be and which of its kinds is known for such a cough.", ()),
            (1, "Leaving the tablet aside, list other causes of a dry cough of three weeks and what speaks for or "
             "against each here.", ()),
            (2, "Weigh both views and answer: the most likely cause, why, and what is usually done about it.", (0, 1)),
        ),
    ),
    _Example(
        "Write a function that returns the shortest list of coins for an amount, given the kinds of coin. It has to be "
        "right for any kinds, and fast for amounts up to a million.",
        "Taking the largest coin first is wrong for some kinds, and a table by amount needs care with amounts that "
        "cannot be paid. A plan, the code, tests by somebody who sees only the question, then a final version.",
        (
            (1, "Do not write code. Describe an algorithm that is right for any kinds of coin, how it recovers the "
             "coins themselves, and which special cases matter.", ()),
            (0, "Do not solve it. Write down small test cases with their right results, among them amounts that cannot "
             "be paid and kinds for which taking the largest first is wrong.", ()),
            (2, "Write the function after this plan.", (0,)),
            (1, "Go through the function with each of the test cases by hand, and say exactly what is wrong with it, "
             "if anything.", (1, 2)),
            (2, "Write the final function, with what the review found put right.", (2, 3)),
        ),
    ),
)  # fmt: skip


def _paper_system(workers: Sequence[str], available: Sequence[tuple[int, str]], settings: PromptSettings) -> str:
    examples = [
        f"Example {count}\n\nQuestion: {example.question}\n\n{example.thought}\n\n{_lists(example, workers, available)}"
        for count, example in enumerate(
            (each for each in _EXAMPLES if settings.examples and len(each.steps) <= settings.max_steps), start=1
        )
    ]
    note = _SELF if settings.allow_self else ""
    return "\n\n".join([_SYSTEM.format(max_steps=settings.max_steps) + note, *examples])


def _lists(example: _Example, workers: Sequence[str], available: Sequence[tuple[int, str]]) -> str:
    steps = [Step(available[index % len(available)][1], subtask, access) for index, subtask, access in example.steps]
    return render_workflow(Workflow(tuple(steps)), workers)


def _paper_user(
    question: str,
    available: Sequence[tuple[int, str]],
    settings: PromptSettings,
    about: Mapping[str, str],
    tools: Sequence[str],
) -> str:
    if settings.show_names:
        lines = [f"{number}: {name}" + (f", {about[name]}" if about.get(name) else "") for number, name in available]
        pool = "\n".join(["The models you can use, by number:", *lines])
    else:
        pool = f"The models you can use: {', '.join(str(number) for number, _ in available)}"
    parts = [quote("question", question), pool]
    if tools:
        parts.append(f"Any model may call these tools of the user: {', '.join(tools)}")
    return "\n\n".join([*parts, _CLOSING])
