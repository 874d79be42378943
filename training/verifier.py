"""Asking `training.verify`, which runs shut in, and starting it again when it had to be ended."""

from __future__ import annotations

import functools
import json
import os
import select
import sys
import threading
import time
from pathlib import Path
from typing import Any

from actors.errors import GradingError
from training.sandbox import Bounds, Started

_PROGRAM = Path(__file__).with_name("verify.py")
_BOUNDS = Bounds(wall_s=None, cpu_s=None, memory_bytes=3 << 30, processes=16)
# Importing sympy and the verifiers' packages, on a busy machine.
_START_SECONDS = 120.0
# The program has its own clock; this is for the case that it is stuck itself.
_GRACE_SECONDS = 5.0


class LateError(GradingError):
    """The verifier did not come to an end in its time."""


class Verifier:
    """One verifier process, started when first asked. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: Started | None = None
        self._warm: set[str] = set()

    def ask(self, kind: str, seconds: float, **data: Any) -> float:
        """The score from one verifier.

        Raises:
            LateError: not within `seconds`.
            GradingError: it cannot run here, or failed on this input; says why.
        """
        with self._lock:
            try:
                reply = self._exchange(kind, {"kind": kind, "seconds": seconds, **data}, seconds)
            except (EOFError, BrokenPipeError):
                # Ended with the thread that had started it, or killed; the request is repeated once.
                self.close()
                try:
                    reply = self._exchange(kind, {"kind": kind, "seconds": seconds, **data}, seconds)
                except (EOFError, BrokenPipeError):
                    self.close()
                    raise GradingError("the verifier process died twice") from None
        if "score" in reply:
            return float(reply["score"])
        raise (LateError if reply.get("late") else GradingError)(str(reply["error"]))

    def close(self) -> None:
        if self._started is not None:
            self._started.__exit__()
            self._started = None
            self._warm.clear()

    def _exchange(self, kind: str, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._started is None:
            self._started = Started(
                (sys.executable, "-I", str(_PROGRAM)), bounds=_BOUNDS, readable=(str(_PROGRAM.parent),)
            )
        process = self._started.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
        process.stdin.flush()
        limit = seconds + _GRACE_SECONDS + (0 if kind in self._warm else _START_SECONDS)
        deadline = time.monotonic() + limit
        said = b""
        while not said.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.close()
                raise LateError(f"the verifier process did not answer within {limit:g} s")
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                raise EOFError
            said += data
        self._warm.add(kind)
        reply: dict[str, Any] = json.loads(said)
        return reply


@functools.cache
def verifier() -> Verifier:
    """This process's own."""
    return Verifier()
