"""Ray tasks whose process or node may be lost: how their results are read, and how often what is lost is done again."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray.exceptions import RayError

from actors.errors import DataError

_LOSSES = 6
_PAUSE = 0.5


async def streamed(ends: Any) -> AsyncGenerator[Any, None]:
    """The values behind the references of a task with `num_returns="streaming"`. The task is cancelled when nobody
    waits for the rest. One that has ended is left alone: a cancellation that meets the end of its task makes Ray's
    driver exit with a failed check.

    Raises:
        RayTaskError: the task raised.
        RayError: the task is lost.
    """
    try:
        async for reference in ends:
            yield await reference
    except RayError:
        raise
    except BaseException:
        ray.cancel(ends, force=False)
        raise


def pause(losses: int, reason: BaseException | None = None) -> float:
    """Seconds to wait before the next try, after as many losses in a row without any result in between. They double;
    in all they are longer than it takes a cluster to notice that a node is gone and to start its actors elsewhere.

    Raises:
        DataError: it was lost too often.
    """
    if losses >= _LOSSES:
        raise DataError(f"rollouts were lost {losses} times in a row: {reason}") from reason
    return _PAUSE * 2.0 ** (losses - 1) if losses else 0.0
