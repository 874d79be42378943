"""Do answers of two hours survive? Streams in every dialect, and an answer that is not streamed, as long as may be.

    python benchmarks/long_streams.py            119 minutes: the default limit of a request is 120
    python benchmarks/long_streams.py --quick    2 minutes

The real server (`fugu serve`, HAProxy, its timeouts as they are by default) in front of two workers, OpenAI's and
Anthropic's wire formats. For each of Chat, Responses and Messages, at either worker, one stream says a word every half
a minute, and one shows signs of life only (a comment or `ping` every 90 s, within `timeout.idle`) between its first
word and its last. A last request is not streamed: nothing comes for the whole time (its worker has `timeout.whole` for
it). Callers give up where they hear nothing for 40 s; the server's own signs of life come every 15 s.

Prints how each ended and its longest silence; the last line is one JSON object. Exits with 1 if one did not end whole
with the right text, or if a provider was asked twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when it is run as a file

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.faults import CHAT, PATHS, Reader, body_of, number_in
from tests.loopback import Behaviour, LoopbackProvider, Recorded
from tests.loopback_dialects import Answer
from tests.serve.running import RunningServer

WORKERS = {"first": "openai", "second": "anthropic"}
KINDS = ("words", "signs of life", "whole")
WORD_SECONDS = 30.0
SIGN_SECONDS = 90.0
SILENCE_SECONDS = 40.0
MARGIN_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request; its `number` is in its text, so that the provider knows what to do."""

    number: int
    kind: str
    path: str
    worker: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How it ended ("whole", or what went wrong), after how many seconds, and the longest without a byte."""

    ending: str
    seconds: float
    silence: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 minutes")
    parser.add_argument("--minutes", type=float, help="how long (119)")
    arguments = parser.parse_args()
    seconds = 60 * (arguments.minutes or (2 if arguments.quick else 119))
    requests = [
        Asked(number, kind, path, worker)
        for number, (kind, path, worker) in enumerate(
            [(kind, path, worker) for kind in KINDS[:2] for path in PATHS for worker in WORKERS]
            + [(KINDS[2], CHAT, "first")]
        )
    ]
    with tempfile.TemporaryDirectory(prefix="fugu-long-streams-") as folder, LoopbackProvider() as provider:
        provider.chooses = lambda request: behaviour(requests[number_in(request)], request, seconds)
        workers = [
            {
                "name": name,
                "provider": kind,
                "model": "long",
                "base_url": provider.url_for(kind),
                "api_key": "not-needed-here",
                "timeout": {"whole": seconds + MARGIN_SECONDS},
            }
            for name, kind in WORKERS.items()
        ]
        with RunningServer(Path(folder), {"workers": workers}, patience=300) as server:
            ended = asyncio.run(watched(server.url, requests, seconds))
        asked = len(provider.requests)
    table = Table("kind", "endpoint", "worker", "seconds", "longest silence, s", "ended")
    for request, end in zip(requests, ended, strict=True):
        times = (f"{end.seconds:.0f}", f"{end.silence:.1f}")
        table.add_row(request.kind, request.path, request.worker, *times, end.ending)
    Console().print(table)
    whole = sum(end.ending == "whole" for end in ended)
    rows = [asdict(request) | asdict(end) for request, end in zip(requests, ended, strict=True)]
    print(json.dumps({"benchmark": "long_streams", "minutes": seconds / 60, "asked": asked, "requests": rows}))
    raise SystemExit(0 if whole == len(requests) == asked else 1)


def text_for(asked: Asked, seconds: float) -> str:
    """No two alike."""
    return " ".join(f"w{asked.number}x{at}" for at in range(max(2, int(seconds / WORD_SECONDS))))


def behaviour(asked: Asked, request: Recorded, seconds: float) -> Behaviour:
    text = text_for(asked, seconds)
    if asked.kind == "whole":
        return Behaviour(text=text, delay=seconds)
    made = Behaviour(text=text)
    if asked.kind == "signs of life":
        made = Behaviour(text=text, pieces=2, pings=int(seconds / SIGN_SECONDS))
    return replace(made, chunk_delay=seconds / (len(Answer.make(request, made).events()) - 1))


async def watched(url: str, requests: list[Asked], seconds: float) -> list[Ended]:
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(ask(url, request, text_for(request, seconds))) for request in requests]
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("streaming", total=seconds)
            while not all(task.done() for task in running):
                await asyncio.wait(running, timeout=1.0)
                over = sum(task.done() for task in running)
                progress.update(bar, completed=time.monotonic() - began, description=f"{over} have ended")
    return [task.result() for task in running]


async def ask(url: str, asked: Asked, text: str) -> Ended:
    """Never raises: what goes wrong is how it ended."""
    streamed = asked.kind != "whole"
    body: dict[str, Any] = body_of(asked.path, asked.number, streamed)
    timeout = httpx.Timeout(SILENCE_SECONDS if streamed else None, connect=5.0)
    headers = {"x-fugu-allow": asked.worker}
    began = heard = time.monotonic()
    silence, content, ending = 0.0, b"", "whole"
    reader = Reader(asked.path, streamed)
    try:
        async with (
            httpx.AsyncClient(timeout=timeout, trust_env=False) as http,
            http.stream("POST", url + asked.path, json=body, headers=headers) as response,
        ):
            async for piece in response.aiter_raw():
                now = time.monotonic()
                silence, heard = max(silence, now - heard), now
                content += piece
        reader.read(response.status_code, content)
        if not reader.whole or reader.text != text:
            ending = f"error: {reader.error}" if reader.error else "not the right text"
    except (httpx.HTTPError, AssertionError, ValueError, KeyError) as error:
        ending = f"{type(error).__name__} {str(error)[:60]}"
    return Ended(ending, time.monotonic() - began, silence)


if __name__ == "__main__":
    main()
