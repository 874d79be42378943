"""Which worker something came from, written where any client carries it: into ids that it must hand back unchanged.

A tool call's id gets a suffix, `call_abc` → `call_abc_w3kq7zp`: `_w` and six letters that stand for the worker's name.
So who asked for a tool is known when its result comes, from a client that keeps no state with us, after a restart, and
in every replica. The suffix is taken off before the conversation goes upstream. It is no secret and gives no rights:
constraints hold as ever.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache

_MARKED = re.compile(r"(.*)_w([a-z2-7]{6})", re.DOTALL)


@lru_cache(maxsize=4096)
def worker_tag(worker: str) -> str:
    """Six letters (30 bits) that stand for a worker's name."""
    return base64.b32encode(hashlib.sha256(worker.encode()).digest()[:5]).decode().lower()[:6]


def mark(id: str, worker: str) -> str:
    """The id with its worker in it."""
    return f"{id}_w{worker_tag(worker)}"


def unmark(id: str) -> tuple[str, str | None]:
    """The id as the worker gave it, and the tag of the worker; None where there is no mark."""
    found = _MARKED.fullmatch(id)
    return (found[1], found[2]) if found else (id, None)
