"""The store of paused workflows as a Ray actor: one for all gateway replicas of the cluster, on a SQLite file.

A gateway that dies loses nothing, and the actor is restarted by Ray wherever there is room. So that a lost node loses
nothing either, `conductor.memory` names a file on storage that the nodes share.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.errors import OverloadedError
from actors.journal import state_dir
from serve.store import Kept, SqliteStore

log = logging.getLogger("fugu.memory")

_SECONDS = 15.0
_FILE = "workflows.sqlite"

Result = TypeVar("Result")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)
class MemoryActor:
    """Hosts a `SqliteStore`. Its methods can be called twice without harm, so Ray may retry them."""

    def __init__(self, path: Path | None) -> None:
        self._store = SqliteStore(path or state_dir() / _FILE)

    async def put(self, values: Sequence[Kept], owner: str, seconds: float) -> None:
        await self._store.put(values, owner, seconds=seconds)

    async def get(self, kind: str, id: str, owner: str) -> bytes | None:
        return await self._store.get(kind, id, owner)

    async def delete(self, kind: str, id: str, owner: str) -> bool:
        return await self._store.delete(kind, id, owner)


class ActorStore:
    """A `serve.store.Store` in an actor. Every wait is bounded.

    Raises (all methods): OverloadedError: the actor did not answer in time.
    """

    def __init__(self, path: Path | None, *, namespace: str = "fugu") -> None:
        self._path = path
        self._namespace = namespace
        self._name = f"fugu-memory:{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        self._actor: ActorHandle[Any] | None = None

    async def put(self, values: Sequence[Kept], owner: str, *, seconds: float) -> None:
        await self._bounded(self._found().put.remote(tuple(values), owner, seconds))

    async def get(self, kind: str, id: str, owner: str) -> bytes | None:
        found: bytes | None = await self._bounded(self._found().get.remote(kind, id, owner))
        return found

    async def delete(self, kind: str, id: str, owner: str) -> bool:
        return bool(await self._bounded(self._found().delete.remote(kind, id, owner)))

    def shutdown(self) -> None:
        """End the actor; the file stays."""
        with suppress(ValueError):
            ray.kill(ray.get_actor(self._name, namespace=self._namespace), no_restart=True)

    def _found(self) -> ActorHandle[Any]:
        if self._actor is None:
            self._actor = MemoryActor.options(  # type: ignore[attr-defined]
                name=self._name, namespace=self._namespace, lifetime="detached", get_if_exists=True
            ).remote(self._path)
        return self._actor

    async def _bounded(self, answer: Coroutine[Any, Any, Result]) -> Result:
        try:
            async with asyncio.timeout(_SECONDS):
                return await answer
        except (RayError, TimeoutError) as error:
            log.error("the memory of workflows does not answer: %s", type(error).__name__)
            self._actor = None
            raise OverloadedError("the memory of workflows does not answer", retry_after=5) from None
