"""`/healthz`: this process answers. `/readyz`: every model is loaded; else 503 and which part is not ready."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

log = logging.getLogger("fugu.gateway")

Check = Callable[[], Awaitable[str | None]]

CHECK_SECONDS = 2.0
REUSE_SECONDS = 1.0


class Readiness:
    """Named checks, each giving None or what is not ready. Answers are reused for a second, so that a prober cannot
    load the pool."""

    def __init__(self, checks: dict[str, Check]) -> None:
        self._checks = checks
        self._parts: dict[str, str] = {}
        self._asked = float("-inf")
        self._lock = asyncio.Lock()

    async def body(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and body: `{"status": "ready" | "not ready", "parts": {part: "ready" | why not}}`."""
        async with self._lock:
            if time.monotonic() - self._asked > REUSE_SECONDS:
                names = list(self._checks)
                states = await asyncio.gather(*(_run(name, self._checks[name]) for name in names))
                self._parts = dict(zip(names, states, strict=True))
                self._asked = time.monotonic()
        ready = all(state == "ready" for state in self._parts.values())
        return (200 if ready else 503), {"status": "ready" if ready else "not ready", "parts": dict(self._parts)}


async def _run(name: str, check: Check) -> str:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await check() or "ready"
    except TimeoutError:
        return "starting (no answer yet)"
    # Ray and Serve have many errors for something that is not up yet; all of them mean "not ready".
    except Exception as error:
        log.warning("readiness of %s: %s", name, type(error).__name__)
        return f"not reachable ({type(error).__name__})"
