"""The three roles of a `fugu-trinity` session: what each is told, and what is read from its answer (TRINITY §3.2).

A Worker sees the query, the thoughts so far and perhaps a suggestion; its reply is the session's response. A Thinker
only advises: a suggestion and who should act next. A Verifier sees the bare query and the latest response and begins
its reply with ACCEPT or REVISE. What one model writes is quoted to the next inside tags whose closing form is broken
up in the quoted text, so that a reply cannot forge another's part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from actors.messages import Message, Part, TextPart

Role = Literal["worker", "thinker", "verifier"]

SYSTEM = (
    "You are one of several language models that solve a task together over a few turns. "
    "Do the part that you are given, and only that part."
)

_WORKER = (
    "Solve the task. Earlier thoughts and advice may help or may be wrong: check before you use them. "
    "Give the full answer to the task in the form that it asks for. If another turn might follow, you may put the one "
    "thing worth remembering between <idea> and </idea>."
)
_THINKER = (
    "Do not solve the task. Say in a few sentences how it is best approached, and what to watch for, between "
    "<suggestion> and </suggestion>. Then say who should act next: <next>worker</next> to have it solved, or "
    "<next>verifier</next> to have the latest response checked."
)
_VERIFIER = (
    "Judge the response to the task. Begin with the single word ACCEPT if it is right and complete, or REVISE if it is "
    "not; then give the reason in a sentence or two."
)

_TAGS = ("task", "thought", "advice", "response")


@dataclass(frozen=True, slots=True)
class Advice:
    """What a Thinker said. `next_role` is None unless it named one clearly."""

    suggestion: str
    next_role: Role | None


def worker_messages(query: Sequence[Message], thoughts: Sequence[str], suggestion: str | None) -> tuple[Message, ...]:
    """The conversation as it is, with thoughts, suggestion and instruction appended to its last user message."""
    notes = [_quote("thought", text, number) for number, text in enumerate(thoughts, 1)]
    if suggestion:
        notes.append(_quote("advice", suggestion))
    return with_note(query, "\n\n".join([*notes, _WORKER]))


def thinker_messages(query: Sequence[Message], thoughts: Sequence[str], response: str | None) -> tuple[Message, ...]:
    notes = [_quote("thought", text, number) for number, text in enumerate(thoughts, 1)]
    if response is not None:
        notes.append(_quote("response", response))
    return with_note(query, "\n\n".join([*notes, _THINKER]))


def verifier_messages(query: Sequence[Message], response: str) -> tuple[Message, ...]:
    """The bare query and the latest response, without the thoughts that led there."""
    return with_note(query, f"{_quote('response', response)}\n\n{_VERIFIER}")


def transcript(query: Sequence[Message], thoughts: Sequence[str]) -> tuple[Message, ...]:
    """What the router reads before a turn: the query with the accumulated thoughts in its last user message."""
    if not thoughts:
        return tuple(query)
    return with_note(query, "\n\n".join(_quote("thought", text, n) for n, text in enumerate(thoughts, 1)), system=None)


def read_idea(reply: str) -> str:
    """The text between idea tags, or the whole reply."""
    found = _between("idea", reply)
    return reply.strip() if found is None else found


def answer_text(reply: str) -> str:
    """A Worker's reply as the caller sees it: without the idea, which is for the next turn; the idea's text where there
    is nothing else."""
    begin, end = reply.find("<idea>"), reply.find("</idea>")
    if not 0 <= begin < end:
        return reply
    rest = f"{reply[:begin].rstrip()}\n\n{reply[end + len('</idea>') :].lstrip()}".strip()
    return rest or read_idea(reply)


def read_advice(reply: str) -> Advice | None:
    """Suggestion and next role; None where the reply does not hold both (it is then ignored)."""
    suggestion, following = _between("suggestion", reply), _between("next", reply)
    if not suggestion or following is None:
        return None
    word = following.strip().lower()
    if word in ("worker", "solver"):
        return Advice(suggestion, "worker")
    if word == "verifier":
        return Advice(suggestion, "verifier")
    return None


def read_verdict(reply: str) -> bool:
    """True for ACCEPT. A reply that begins with neither word accepts only if it says "accept" and never "reject"
    or "revise"."""
    first = re.match(r"\W*(\w+)", reply)
    word = first[1].lower() if first else ""
    if word in ("accept", "accepted"):
        return True
    if word in ("revise", "reject", "rejected"):
        return False
    lowered = reply.lower()
    return "accept" in lowered and "reject" not in lowered and "revise" not in lowered


def _between(tag: str, text: str) -> str | None:
    begin = text.find(f"<{tag}>")
    if begin < 0:
        return None
    begin += len(tag) + 2
    end = text.find(f"</{tag}>", begin)
    return text[begin:end].strip() if end >= 0 else None


def _quote(tag: str, text: str, number: int | None = None) -> str:
    for known in _TAGS:
        text = text.replace(f"</{known}", f"< /{known}").replace(f"<{known}", f"< {known}")
    label = f'<{tag} number="{number}">' if number is not None else f"<{tag}>"
    return f"{label}\n{text.strip()}\n</{tag}>"


def with_note(query: Sequence[Message], note: str, *, system: str | None = SYSTEM) -> tuple[Message, ...]:
    """The conversation with `system` before it and `note` appended to its last user message."""
    messages = list(query)
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if last is None:
        messages.append(Message("user", note))
    else:
        old = messages[last].content
        content: str | tuple[Part, ...] = (
            f"{old}\n\n{note}" if isinstance(old, str) else (*old, TextPart(f"\n\n{note}"))
        )
        messages[last] = Message("user", content, messages[last].name)
    return (Message("system", system), *messages) if system is not None else tuple(messages)
