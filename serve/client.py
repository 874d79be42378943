"""`fugu ask`: one question to a running server, its answer as it comes, the decision as bars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from actors.errors import FuguError
from actors.sse import SSEDecoder

CONNECT_SECONDS = 5.0
# The server sends a comment every `serve.keep_alive` seconds; silence for this long means that it is gone.
SILENCE_SECONDS = 300.0


def ask(url: str, body: Mapping[str, Any], key: str | None, *, console: Console) -> None:
    """Stream the answer to the console, then the trace where the server sent one.

    Raises:
        FuguError: there is no server, it refused, or its answer broke off; says what to do.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
    try:
        with (
            httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) as client,
            client.stream("POST", "/v1/chat/completions", json=dict(body)) as response,
        ):
            if response.status_code != 200:
                raise FuguError(_refusal(response.status_code, response.read()))
            trace = _show(response, console)
    except httpx.ConnectError:
        raise FuguError(f"no server at {url}. Start one with `fugu serve`, or give --url or --config") from None
    except httpx.TransportError as error:
        raise FuguError(f"the connection to {url} broke off ({type(error).__name__})") from None
    if trace is not None:
        show_trace(trace, console)


def _show(response: httpx.Response, console: Console) -> dict[str, Any] | None:
    decoder = SSEDecoder()
    trace: dict[str, Any] | None = None
    for piece in response.iter_bytes():
        for event in decoder.feed(piece):
            if event.data == "[DONE]":
                console.print()
                return trace
            chunk = json.loads(event.data)
            if "error" in chunk:
                console.print()
                raise FuguError(str(chunk["error"]["message"]))
            trace = chunk.get("fugu", trace)
            for choice in chunk["choices"]:
                if console.is_terminal:  # a pipe wants the answer only
                    said = choice["delta"].get("reasoning_content") or ""
                    console.print(said, end="", markup=False, soft_wrap=True, style="dim")
                said = choice["delta"].get("content") or choice["delta"].get("refusal") or ""
                console.print(said, end="", markup=False, soft_wrap=True)
    console.print()
    raise FuguError("the answer broke off before its end")


def _refusal(status: int, raw: bytes) -> str:
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status} without saying why"


def show_trace(trace: Mapping[str, Any], console: Console) -> None:
    """A bar per worker, then what it took."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    for name, probability in sorted(trace["probabilities"].items(), key=lambda item: -item[1]):
        chosen = name == trace["worker"]
        bar = ProgressBar(total=1.0, completed=probability, width=30, complete_style="green" if chosen else "cyan")
        table.add_row("→" if chosen else " ", escape(name), bar, f"{probability:6.1%}")
    console.print()
    console.print(table)
    for number, turn in enumerate(trace.get("turns", ()), 1):
        console.print(f"turn {number}: {turn['role']} {escape(turn['worker'])}", soft_wrap=True)
    for number, each in enumerate(trace.get("rounds", ()), 1):
        _show_round(number, each, console)
    for attempt in trace["attempts"]:
        if not attempt["ok"]:
            console.print(f"[yellow]{escape(attempt['worker'])} failed:[/] {escape(attempt['reason'])}", soft_wrap=True)
    for warning in trace["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True)
    console.print(f"[dim]{escape(_summary(trace))}[/]", soft_wrap=True)


def _show_round(number: int, each: Mapping[str, Any], console: Console) -> None:
    """A round of `fugu-ultra`: the shape of its workflow, and a line for each step."""
    plan = "the answer stands" if each["kept"] else each["fallback"] or each["plan"]["topology"]
    console.print(f"round {number}: {escape(plan)}", soft_wrap=True)
    if each["plan"] is None:
        return
    for step, result in zip(each["plan"]["steps"], each["steps"], strict=False):
        reads = f" (reads {', '.join(str(at + 1) for at in step['access'])})" if step["access"] else ""
        took = f"{result['seconds']:.2f} s" if result["worker"] else result["skipped"]
        who = escape(result["worker"] or step["worker"])
        console.print(f"  {result['index'] + 1}. {who}{reads}: {escape(step['subtask'])} · {took}", soft_wrap=True)


def _summary(trace: Mapping[str, Any]) -> str:
    timings = trace["timings"]
    parts = [f"decided by {trace['source']} in {1000 * (timings['decision_s'] or 0):.0f} ms"]
    if timings["first_byte_s"] is not None:
        parts.append(f"first byte {timings['first_byte_s']:.2f} s")
    parts.append(f"total {timings['total_s']:.2f} s")
    if "usage" in trace:
        parts.append(f"{trace['usage']['prompt_tokens']} + {trace['usage']['completion_tokens']} tokens")
    if trace.get("cost_usd") is not None:
        parts.append(f"${trace['cost_usd']:.6f}")
    return " · ".join(parts)
