"""What a client said to the server, and the server to it: kept as a small file, and said again where the client is
not at hand.

A recording has every request of the client in order, with the status and the kinds of events that answered it. Paths,
addresses, keys and ids of the machine that it was made on are places to fill in (`{repository}`), long texts are cut
(the server does not read them), and what recurs is written once. Ids of tool calls are the server's: where a request
gives back one of the recorded answers, the replay says the one that it got itself.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.sse import SSEDecoder

LONGEST_TEXT = 400
LONGEST_DESCRIPTION = 40
_KEPT_HEADERS = ("content-type", "accept", "anthropic-version", "anthropic-beta")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_HEX = re.compile(r"\b[0-9a-f]{40,64}\b")
_DATE = re.compile(r"\b20\d\d[-/]\d\d[-/]\d\d\b")
_HOST = re.compile(r"https?://(?!127\.0\.0\.1)[^\s\"'<>)\\]+")
_REFERENCE = "$shared"


@dataclass(slots=True)
class Exchange:
    """A request, and what answered it."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    status: int = 0
    stream: bool = False
    raw: bytearray = field(default_factory=bytearray)

    def heard(self) -> Heard:
        return Heard.of(self.status, self.stream, bytes(self.raw))


@dataclass(frozen=True, slots=True)
class Heard:
    """An answer: its status, the kinds of its events (runs of one kind count once, keep-alives not at all), the ids of
    the tool calls in it, in order, and its text."""

    status: int
    kinds: tuple[str, ...]
    calls: tuple[str, ...]
    text: str

    @classmethod
    def of(cls, status: int, stream: bool, raw: bytes) -> Heard:
        if not stream:
            body = json.loads(raw) if raw else None
            return cls(status, (), tuple(dict.fromkeys(_calls(body))), "".join(_texts(body)))
        kinds: list[str] = []
        calls: list[str] = []
        text = ""
        for event in SSEDecoder().feed(raw):
            data = None if event.data == "[DONE]" else json.loads(event.data)
            kind = "[DONE]" if data is None else _kind(data)
            if kind != "ping" and kinds[-1:] != [kind]:
                kinds.append(kind)
            calls += _calls(data)
            text += "".join(_deltas(data or {}))
        return cls(status, tuple(kinds), tuple(dict.fromkeys(calls)), text)


class Tape:
    """An ASGI application that notes what passes between its callers and the one behind it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.exchanges: list[Exchange] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        query = scope.get("query_string", b"").decode()
        path = f"{scope['path']}?{query}" if query else scope["path"]
        kept = {name: headers[name] for name in _KEPT_HEADERS if name in headers}
        exchange = Exchange(scope["method"], path, kept, None)
        self.exchanges.append(exchange)
        said = bytearray()

        async def hear() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                said.extend(message.get("body", b""))
                if not message.get("more_body"):
                    with suppress(ValueError):  # what is not JSON is for the server to refuse
                        exchange.body = json.loads(bytes(said)) if said else None
            return message

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                exchange.stream = any(
                    name == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message["headers"]
                )
            else:
                exchange.raw.extend(message.get("body", b""))
            await send(message)

        await self._app(scope, hear, tell)


def save(path: Path, exchanges: list[Exchange], places: Mapping[str, str], keep: tuple[str, ...]) -> None:
    """Write a recording. `places` are texts and the names that stand for them, `keep` words that must survive where
    a text is cut."""
    entries: list[dict[str, Any]] = []
    for each in exchanges:
        heard = each.heard()
        entry: dict[str, Any] = {"method": each.method, "path": each.path, "headers": each.headers}
        entry["body"] = _scrubbed(each.body, places, keep)
        entry["answer"] = {"status": heard.status, "kinds": list(heard.kinds), "calls": list(heard.calls)}
        entries.append(entry)
    shared: list[Any] = []
    counted = Counter(json.dumps(part, sort_keys=True) for entry in entries for part in _large(entry))
    numbers: dict[str, int] = {}
    for text, count in counted.items():
        if count > 1:
            numbers[text] = len(shared)
            shared.append(json.loads(text))
    written = {"shared": shared, "exchanges": [_with_references(entry, numbers) for entry in entries]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")


def load(path: Path, places: Mapping[str, str]) -> list[dict[str, Any]]:
    """The entries of a recording, `places` (name to text) filled in."""
    written = json.loads(path.read_text())
    entries: list[dict[str, Any]] = _without_references(written["exchanges"], written["shared"])
    text = json.dumps(entries)
    for name, value in places.items():
        text = text.replace("{" + name + "}", json.dumps(value)[1:-1])
    filled: list[dict[str, Any]] = json.loads(text)
    return filled


def replay(entries: list[dict[str, Any]], url: str, key: str) -> list[tuple[dict[str, Any], Heard]]:
    """Say the recorded requests again, in order; each recorded answer beside what was heard now."""
    ids: dict[str, str] = {}
    found = []
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        for entry in entries:
            said = None if entry["body"] is None else json.dumps(entry["body"])
            for old, new in ids.items():
                said = said and said.replace(f'"{old}"', f'"{new}"')
            headers = {**entry["headers"], "authorization": f"Bearer {key}"}
            response = http.request(entry["method"], entry["path"], content=said, headers=headers)
            stream = response.headers.get("content-type", "").startswith("text/event-stream")
            heard = Heard.of(response.status_code, stream, response.content)
            ids |= dict(zip(entry["answer"]["calls"], heard.calls, strict=False))
            found.append((entry["answer"], heard))
    return found


# Answers


def _kind(data: dict[str, Any]) -> str:
    if "type" in data:
        delta = data.get("delta")
        return f"{data['type']}:{delta['type']}" if isinstance(delta, dict) and "type" in delta else data["type"]
    if "error" in data:
        return "error"
    choices = data.get("choices") or []
    parts = [name for choice in choices for name, value in choice["delta"].items() if value]
    return "chunk:" + ",".join(parts or (["finish"] if choices else ["usage"]))


def _calls(data: Any) -> Iterator[str]:
    """Ids of tool calls, wherever in an event or a body of any dialect."""
    if isinstance(data, list):
        for each in data:
            yield from _calls(each)
    elif isinstance(data, dict):
        if data.get("type") == "function" and data.get("id"):
            yield data["id"]
        elif data.get("type") in ("function_call", "custom_tool_call"):
            yield data["call_id"]
        elif data.get("type") == "tool_use":
            yield data["id"]
        for value in data.values():
            yield from _calls(value)


def _deltas(data: dict[str, Any]) -> Iterator[str]:
    if data.get("type") == "response.output_text.delta":
        yield data["delta"]
    elif data.get("type") == "content_block_delta":
        yield data["delta"].get("text", "")
    for choice in data.get("choices") or ():
        yield choice["delta"].get("content") or ""


def _texts(body: Any) -> Iterator[str]:
    """The text of a whole answer."""
    if not isinstance(body, dict):
        return
    for choice in body.get("choices") or ():
        yield choice["message"].get("content") or ""
    for item in body.get("content") or ():
        yield item.get("text", "")
    for item in body.get("output") or ():
        for part in item.get("content") or ():
            yield part.get("text", "")


# Making it small, and nobody's


def _scrubbed(value: Any, places: Mapping[str, str], keep: tuple[str, ...], name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(each, places, keep, key) for key, each in value.items()}
    if isinstance(value, list):
        return [_scrubbed(each, places, keep) for each in value]
    if not isinstance(value, str):
        return value
    for text, place in places.items():
        value = value.replace(text, "{" + place + "}")
    value = _UUID.sub("00000000-0000-4000-8000-000000000000", value)
    value = _HEX.sub(lambda found: "0" * len(found[0]), value)
    value = _HOST.sub("https://example.org/", _DATE.sub("2026-01-01", value))
    longest = LONGEST_DESCRIPTION if name == "description" else LONGEST_TEXT
    if len(value) <= longest:
        return value
    cut = value[: longest // 2]
    return cut + " …" + "".join(f" {word}" for word in keep if word in value and word not in cut)


def _large(value: Any) -> Iterator[Any]:
    """The parts that are worth writing once, the largest first."""
    if isinstance(value, (dict, list)):
        if len(json.dumps(value)) > 200:
            yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _large(each)


def _with_references(value: Any, numbers: Mapping[str, int]) -> Any:
    if not isinstance(value, (dict, list)):
        return value
    number = numbers.get(json.dumps(value, sort_keys=True))
    if number is not None:
        return {_REFERENCE: number}
    if isinstance(value, list):
        return [_with_references(each, numbers) for each in value]
    return {key: _with_references(each, numbers) for key, each in value.items()}


def _without_references(value: Any, shared: list[Any]) -> Any:
    if isinstance(value, list):
        return [_without_references(each, shared) for each in value]
    if isinstance(value, dict):
        if set(value) == {_REFERENCE}:
            return shared[value[_REFERENCE]]
        return {key: _without_references(each, shared) for key, each in value.items()}
    return value
