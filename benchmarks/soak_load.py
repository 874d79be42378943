"""The callers of `benchmarks/soak.py`: so many requests per second whatever becomes of them, and how each ended."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import aiohttp

from tests.faults import CHAT, PATHS, Reader, body_of, kind_of

Ending = Literal["answered", "typed error", "left", "hung", "wrong bytes", "no reply"]
BAD: tuple[Ending, ...] = ("hung", "wrong bytes", "no reply")
LONGEST = 150.0
"""Seconds after which a request that has not ended is hung: well above every timeout of the server."""
LEAVING = 0.02
"""The share of the callers who go away while they are answered."""
AT_ONCE = 512
_DIRECT_EVERY = 10


@dataclass(frozen=True, slots=True)
class Ended:
    """One request. `at`: seconds since the beginning when it was sent. `clean`: one call, which the provider answered
    at once."""

    at: float
    seconds: float
    ending: Ending
    clean: bool
    stream: bool
    model: str
    path: str
    error: str = ""


@dataclass(slots=True)
class Load:
    """What was sent and became of it. `direct` are (at, seconds) of calls to the provider without the server between;
    `unsent` counts requests whose time came with `AT_ONCE` others under way, or
    not at all."""

    ended: list[Ended] = field(default_factory=list)
    direct: list[tuple[float, float]] = field(default_factory=list)
    sent: int = 0
    unsent: int = 0
    running: int = 0

    def endings(self) -> Counter[str]:
        return Counter(each.ending for each in self.ended)

    def errors(self) -> Counter[str]:
        return Counter(each.error for each in self.ended if each.error)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send: the server and its key, the provider behind it (None: it is not asked directly), how many of its
    answers fail, and which models are asked for, with their weights."""

    url: str
    key: str
    provider: str | None
    seed: int
    share: float
    models: tuple[tuple[str, float], ...] = (("fugu", 1.0),)


async def drive(target: Target, load: Load, *, rate: float, seconds: float) -> None:
    """Send `rate` requests per second for `seconds`, then wait for the last of them. A generator that is late sends
    what it owes at once, and nothing after the time is over. What happens is in `load` as it happens."""
    rng = random.Random(target.seed)
    timeout = aiohttp.ClientTimeout(total=LONGEST)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as http:
        began = time.perf_counter()
        under_way: set[asyncio.Task[None]] = set()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, number / rate - (time.perf_counter() - began)))
            path, stream, leaves = rng.choice(PATHS), rng.random() < 0.5, rng.random() < LEAVING
            [model] = rng.choices([name for name, _ in target.models], [weight for _, weight in target.models])
            if len(under_way) >= AT_ONCE or time.perf_counter() - began > seconds + 1:
                load.unsent += 1
                continue
            load.sent += 1
            tasks = [_one(http, target, load, number, model, path, stream, leaves, began)]
            if target.provider is not None and number % _DIRECT_EVERY == 0:
                tasks.append(_directly(http, target, load, number, began))
            for each in tasks:
                task = asyncio.create_task(each)
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            load.running = len(under_way)
        if under_way:
            await asyncio.wait(under_way, timeout=LONGEST + 10)
        load.running = len(under_way)


async def _one(
    http: aiohttp.ClientSession,
    target: Target,
    load: Load,
    number: int,
    model: str,
    path: str,
    stream: bool,
    leaves: bool,
    began: float,
) -> None:
    start = time.perf_counter()
    reader = Reader(path, stream)
    # Only such a request is one call, whose time can be told from the provider's own.
    clean = model == "fugu" and kind_of(target.seed, target.share, number) == "clean"
    error = ""
    try:
        headers = {"authorization": f"Bearer {target.key}", "x-api-key": target.key}
        body = body_of(path, number, stream, model=model, store=number % 2 == 0)
        async with http.post(target.url + path, json=body, headers=headers) as response:
            if leaves:
                await response.content.read(1)
                response.close()
                ending: Ending = "left"
            else:
                reader.read(response.status, await response.read())
                reader.check(number)
                error = reader.error
                ending = "typed error" if error else "answered"
    except TimeoutError:
        ending = "hung"
    except aiohttp.ClientError as broken:
        ending, error = "no reply", type(broken).__name__
    except (AssertionError, ValueError, KeyError, TypeError, LookupError) as wrong:
        ending, error = "wrong bytes", f"{type(wrong).__name__}: {str(wrong)[:200]}"
    seconds = time.perf_counter() - start
    load.ended.append(Ended(start - began, seconds, ending, clean, stream, model, path, error))


async def _directly(http: aiohttp.ClientSession, target: Target, load: Load, number: int, began: float) -> None:
    """The same question to the provider itself, if it answers it at once."""
    if kind_of(target.seed, target.share, number) != "clean":
        return
    start = time.perf_counter()
    body = {**body_of(CHAT, number, False), "model": "direct"}
    async with http.post(f"{target.provider}/chat/completions", json=body) as response:
        await response.read()
    load.direct.append((start - began, time.perf_counter() - start))
