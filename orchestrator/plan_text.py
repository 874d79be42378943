"""The three lists of a plan in free text: a scanner that takes what models really write, in time linear in the text.

    model_id: [2, 0]
    subtasks: ["Find the word.", "Count its letters."]
    access_list: [[], ["all"]]

Read as well: code fences, bullets and bold labels, JSON objects, `Model IDs =`, typographic and triple quotes, quotes
left unescaped inside a text, words without quotes, trailing commas, comments, and think blocks, which are left out;
and lists written as bullets or numbered lines under their label. Of several plans the last complete one counts, one in
brackets before one in bullets. Nothing is ever evaluated: lists hold integers, texts and lists of these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from actors.errors import PlanMissingError, PlanSyntaxError

Item = int | str | list["Item"]
Kind = Literal["model_id", "subtasks", "access_list"]

KINDS: tuple[Kind, ...] = ("model_id", "subtasks", "access_list")
MAX_ITEMS = 256
MAX_DEPTH = 3
# A list that breaks off may hide the labels behind it, so that reading goes back to where it began; only so often that
# no more than these plus the text's own number of characters are read twice.
REREAD = 65_536

# Every repetition is bounded, so that one attempt at one place takes constant time.
_LABEL = re.compile(
    r"(?<![A-Za-z0-9])(?:(?P<model>(?:model|worker|agent)[ _-]?(?:ids?|s|list)?|workers[ _-]list)"
    r"|(?P<sub>sub[ _-]?tasks?(?:[ _-]?list)?)|(?P<access>access(?:[ _-]?lists?)?))"
    r"[\"'“”‘’*_`)\t ]{0,8}[:=]",
    re.IGNORECASE,
)
_OPENING = re.compile(r"[\"'“”*_`>\s-]{0,64}(?:(?:python|json|text)\s{1,32})?\[", re.IGNORECASE)
# From a label to the bullets under it: the rest of its line, empty lines, the beginning of a code block.
_TO_BULLETS = re.compile(r"[\"'“”*_`\r\t ]{0,16}\n(?:[\r\t ]{0,64}(?:```[A-Za-z]{0,16}[\r\t ]{0,16})?\n){0,3}")
_BULLET = re.compile(r"(?P<indent>[\t ]{0,64})(?:[-*+•–]|\d{1,3}[.)])(?:[\t ]{1,16}|[\r\t ]{0,16}\Z)")
_MARKS = re.compile(r"[\"'“”*_`\t ]{0,16}")
_THINK = re.compile(r"<(/?)(think|thinking|reasoning)>", re.IGNORECASE)
_SPACE = re.compile(r"(?:[\s\u00a0\ufeff]+|#[^\n]*(?:\n|\Z)|//[^\n]*(?:\n|\Z))*")
# What may follow a closing quote; a quote before anything else belongs to the text ("the worker's part").
_AFTER = re.compile(r"[\s\u00a0]*(?:(?:#|//)[^\n]{0,200}\n[\s\u00a0]*)?(?:[,\]]|\Z)")
_AND = re.compile(r"\s{0,8}(?:,|&|\band\b)\s{0,8}", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?\d{1,9}")
_BARE = re.compile(r"(?:[^,\[\]\n#]|(?<!\s)#)*")

_CLOSING = {'"': '"', "'": "'", "`": "`", "“": '”“"', "”": '”"', "„": '“”"', "‘": "’'", "’": "’'", "«": "»"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "'": "'", "\\": "\\", "/": "/", "\n": ""}
_PAIR = re.compile(r"\\.", re.DOTALL)
_WRITTEN = {"\\b": "\\u0008", "\\f": "\\u000c"}
_ENDS = {ends: re.compile(rf"[\\{re.escape(ends)}]") for ends in set(_CLOSING.values())}


@dataclass(frozen=True, slots=True)
class _Found:
    kind: Kind
    items: list[Item] | None  # None: unreadable
    reason: str = ""
    bulleted: bool = False


class _UnreadableError(Exception):
    """Why a list could not be read, and at which character."""

    def __init__(self, reason: str, at: int) -> None:
        super().__init__(reason)
        self.at = at


def read_plan(text: str) -> tuple[list[Item], list[Item], list[Item]]:
    """The items of `model_id`, `subtasks` and `access_list` of the last complete plan.

    Text in closed think blocks, and before a closing tag that was never opened, is left out; after an opening tag that
    is never closed it counts, because a model that was made to stop thinking writes its plan there.

    Raises:
        PlanMissingError: there are not all three lists.
        PlanSyntaxError: all three are there, but one of them cannot be read.
    """
    found = _lists(_without_thoughts(text))
    readable = [one for one in found if one.items is not None]
    # Who writes lists in brackets may go over them once more in bullets, in other words.
    bracketed = [one for one in readable if not one.bulleted]
    plan = _last_plan(bracketed) or _last_plan(readable)
    if plan is not None:
        models, subtasks, access = (plan[kind] for kind in KINDS)
        return models, subtasks, access
    for one in reversed(found):
        if one.items is None:
            raise PlanSyntaxError(f"the list {one.kind} cannot be read: {one.reason}")
    missing = [kind for kind in KINDS if all(one.kind != kind for one in found)]
    raise PlanMissingError(f"the text has no complete plan; a list is missing: {', '.join(missing or KINDS)}")


def quoted(text: str) -> str:
    """`text` as a string that `read_plan` reads back exactly."""
    # A think tag inside a subtask would be taken for one around it; `\\b` and `\\f` are not read as escapes.
    written = json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")
    return _PAIR.sub(lambda pair: _WRITTEN.get(pair[0], pair[0]), written)


def defused(text: str) -> str:
    """`text` with a dash for the colon after each plan label, so that no plan is ever read out of it: for what others
    wrote, where a writer of plans is shown it."""
    return _LABEL.sub(lambda label: f"{label[0][:-1]}–", text)


def _without_thoughts(text: str) -> str:
    kept: list[str] = []
    begin, opened = 0, None
    for tag in _THINK.finditer(text):
        if not tag[1]:
            opened = tag.start() if opened is None else opened
        elif opened is None:
            kept, begin = [], tag.end()
        else:
            kept.append(text[begin:opened])
            begin, opened = tag.end(), None
    return "\n".join([*kept, text[begin:]])


def _lists(text: str) -> list[_Found]:
    """Every labelled list, in order. What stands inside a list that was read is not looked at again."""
    found: list[_Found] = []
    at, reread = 0, REREAD + len(text)
    while (label := _LABEL.search(text, at)) is not None:
        at = label.end()
        kind: Kind = "model_id" if label["model"] else "subtasks" if label["sub"] else "access_list"
        bullets, end = _bullets(text, at)
        if bullets and not _holds_the_list(bullets, kind):
            found.append(_of_bullets(kind, bullets))
            at = end
            continue
        opening = _OPENING.match(text, at)
        if opening is None:
            continue
        begin = opening.end()
        try:
            items, at = _read_list(text, begin, 1)
            found.append(_Found(kind, items))
        except _UnreadableError as error:
            found.append(_Found(kind, None, str(error)))
            reread -= error.at - begin
            at = begin if reread >= 0 else error.at
    return found


def _bullets(text: str, at: int) -> tuple[list[str], int]:
    """The texts of the bullets under a label that ends at `at`, and where they end; none where there are none. What
    stands further in belongs to the bullet above it."""
    lead = _TO_BULLETS.match(text, at)
    if lead is None:
        return [], at
    bullets: list[list[str]] = []  # the lines of each
    indent = 0
    end = at = lead.end()
    while at < len(text) and len(bullets) <= MAX_ITEMS:
        stop = text.find("\n", at)
        stop = len(text) if stop < 0 else stop
        line = text[at:stop]
        at = stop + 1
        if not line.strip():
            continue
        bullet = _BULLET.match(line)
        inside = len(line) - len(line.lstrip("\t ")) > indent
        if bullet is not None and (not bullets or len(bullet["indent"]) == indent):
            marks = _MARKS.match(line, bullet.end())
            if _LABEL.match(line, bullet.end() if marks is None else marks.end()):
                break
            indent = len(bullet["indent"])
            bullets.append([line[bullet.end() :]])
        elif bullets and inside:
            bullets[-1].append(line.strip())
        else:
            break
        end = stop
    return ["\n".join(lines) for lines in bullets], end


def _holds_the_list(bullets: Sequence[str], kind: Kind) -> bool:
    """A single bullet with the whole list in brackets (and not just the one access of a single step)."""
    first = bullets[0].strip()
    return len(bullets) == 1 and first.startswith("[") and (kind != "access_list" or first[1:].lstrip()[:1] == "[")


def _of_bullets(kind: Kind, bullets: Sequence[str]) -> _Found:
    if len(bullets) > MAX_ITEMS:
        return _Found(kind, None, f"it has more than {MAX_ITEMS} items", bulleted=True)
    try:
        return _Found(kind, [_bullet_item(kind, bullet.strip()) for bullet in bullets], bulleted=True)
    except _UnreadableError as error:
        return _Found(kind, None, str(error), bulleted=True)


def _bullet_item(kind: Kind, text: str) -> Item:
    if kind == "subtasks":
        if text[:1] in _CLOSING:
            try:
                read, end = _read_string(text, 1, _CLOSING[text[0]])
            except _UnreadableError:
                return _clean(text)
            return _clean(text) if text[end:].strip(" \t\r,") else read
        return _clean(text)
    if kind == "access_list" and text.startswith("["):
        items, end = _read_list(text, 1, 2)
        if text[end:].strip(" \t\r,.*`"):
            raise _UnreadableError("words follow an access in brackets", end)
        return items
    words = [word.strip(" \t\r\n\"'“”*_`().") for word in _AND.split(text.strip(" ,"))]
    read_words: list[Item] = [int(word) if _NUMBER.fullmatch(word) else _clean(word) for word in words]
    return read_words if kind == "access_list" else read_words[0] if len(read_words) == 1 else _clean(text)


def _last_plan(found: list[_Found]) -> dict[Kind, list[Item]] | None:
    return _last_in_order(found) or _last_in_any_order(found)


def _last_in_order(found: list[_Found]) -> dict[Kind, list[Item]] | None:
    for end in range(len(found), len(KINDS) - 1, -1):
        plan = found[end - len(KINDS) : end]
        if tuple(one.kind for one in plan) == KINDS:
            return {one.kind: one.items for one in plan if one.items is not None}
    return None


def _last_in_any_order(found: list[_Found]) -> dict[Kind, list[Item]] | None:
    plan: dict[Kind, list[Item]] | None = None
    window: dict[Kind, list[Item]] = {}
    for one in found:
        if one.kind in window:
            kinds = list(window)
            window = {kind: window[kind] for kind in kinds[kinds.index(one.kind) + 1 :]}
        if one.items is not None:
            window[one.kind] = one.items
        if len(window) == len(KINDS):
            plan, window = window, {}
    return plan


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


def _read_list(text: str, at: int, depth: int) -> tuple[list[Item], int]:
    """The items after an opening bracket that ends at `at`, and where the list ends."""
    items: list[Item] = []
    while True:
        at = _skip(text, at)
        if at >= len(text):
            raise _UnreadableError("it has no end", at)
        if text[at] == "]":
            return items, at + 1
        if len(items) >= MAX_ITEMS:
            raise _UnreadableError(f"it has more than {MAX_ITEMS} items", at)
        if text[at] == "[":
            if depth >= MAX_DEPTH:
                raise _UnreadableError("its brackets are nested too deep", at)
            item, at = _read_item_list(text, at, depth)
        else:
            item, at = _read_item(text, at)
        items.append(item)
        at = _skip(text, at)
        if at < len(text) and text[at] == ",":
            at += 1
        elif at < len(text) and text[at] != "]":
            raise _UnreadableError("a comma or a closing bracket is missing", at)


def _read_item_list(text: str, at: int, depth: int) -> tuple[Item, int]:
    items, end = _read_list(text, at + 1, depth + 1)
    return items, end


def _read_item(text: str, at: int) -> tuple[Item, int]:
    for triple in ('"""', "'''"):
        if text.startswith(triple, at):
            end = text.find(triple, at + 3)
            if end < 0:
                raise _UnreadableError("a text in triple quotes has no end", len(text))
            return _clean(text[at + 3 : end]), end + 3
    if text[at] in _CLOSING:
        return _read_string(text, at + 1, _CLOSING[text[at]])
    bare = _BARE.match(text, at)
    word = bare[0].strip() if bare is not None else ""
    if not word:
        raise _UnreadableError("an item is empty", at)
    end = at + len(bare[0]) if bare is not None else at
    return (int(word) if _NUMBER.fullmatch(word) else _clean(word)), end


def _read_string(text: str, at: int, ends: str) -> tuple[str, int]:
    """The text after an opening quote, up to one of the characters `ends` that is really a closing quote."""
    parts: list[str] = []
    while (stop := _ENDS[ends].search(text, at)) is not None:
        parts.append(text[at : stop.start()])
        at = stop.end()
        if stop[0] != "\\":
            if _AFTER.match(text, at):
                return _clean("".join(parts)), at
            parts.append(stop[0])
            continue
        part, at = _read_escape(text, at)
        parts.append(part)
    raise _UnreadableError("a text has no closing quote", len(text))


def _read_escape(text: str, at: int) -> tuple[str, int]:
    """The character that the escape after a backslash stands for. Unknown ones stay as they are, and so do `\\b` and
    `\\f`: nobody means them, but `\\frac` and `\\binom` are common."""
    mark = text[at : at + 1]
    if mark == "u":
        digits = text[at + 1 : at + 5]
        if re.fullmatch(r"[0-9A-Fa-f]{4}", digits):
            return chr(int(digits, 16)), at + 5
    if mark in _ESCAPES:
        return _ESCAPES[mark], at + 1
    return "\\", at


def _clean(text: str) -> str:
    """Surrogate pairs joined, lone halves replaced: they cannot be sent to anybody."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
