"""A gateway in this process with real workers, over a provider on the loopback interface."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from actors.adapters.build import adapter_of
from actors.config import FuguConfig, WorkerSpec
from actors.link_client import Link
from actors.link_server import LinkServer
from actors.messages import ChatReply, ChatRequest, Chunk, Worker
from actors.worker import WorkerRuntime
from serve.api.health import Readiness
from serve.conductor import conducting
from serve.gateway import Gateway
from serve.router import Decider, OrderDecider
from serve.store import SqliteStore


class Direct:
    """A worker without an actor."""

    def __init__(self, runtime: WorkerRuntime) -> None:
        self.runtime = runtime
        self.name = runtime.spec.name

    async def complete(self, request: ChatRequest) -> ChatReply:
        return await self.runtime.complete(request)

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        return self.runtime.stream(request)


class Linked:
    """A worker behind the connection that leads to an actor."""

    def __init__(self, name: str, link: Link) -> None:
        self.name = name
        self._link = link

    async def complete(self, request: ChatRequest) -> ChatReply:
        return await self._link.complete(self.name, request)

    def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        return self._link.stream(self.name, request)


def runtime_of(spec: WorkerSpec) -> WorkerRuntime:
    return WorkerRuntime(spec, adapter_of(spec))


@asynccontextmanager
async def linked(*runtimes: WorkerRuntime) -> AsyncIterator[list[Linked]]:
    """The workers of one actor, over its connection."""
    server = LinkServer({runtime.spec.name: runtime for runtime in runtimes})
    link = await Link.connect(await server.start("127.0.0.1"))
    try:
        yield [Linked(runtime.spec.name, link) for runtime in runtimes]
    finally:
        await link.close()
        await server.close()


@dataclass(frozen=True, slots=True)
class Serving:
    app: Gateway
    runtimes: dict[str, WorkerRuntime]

    def client(self, secret: str = "") -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app)  # type: ignore[arg-type]
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return httpx.AsyncClient(transport=transport, base_url="http://fugu", headers=headers, timeout=30)


@asynccontextmanager
async def serving(
    folder: Path, config: FuguConfig, *, over_link: bool = False, decider: Decider | None = None
) -> AsyncIterator[Serving]:
    """Every model is served that the configuration has; the workers are asked in the order of the file, unless
    `decider` says otherwise."""
    runtimes = {spec.name: runtime_of(spec) for spec in config.active}
    async with AsyncExitStack() as stack:
        for runtime in runtimes.values():
            stack.push_async_callback(runtime.close)
        workers: list[Worker] = [Direct(runtime) for runtime in runtimes.values()]
        if over_link:
            workers = [*await stack.enter_async_context(linked(*runtimes.values()))]
        ultra: Any = None
        if config.conductor is not None:
            conductor = conducting(config, {worker.name: worker for worker in workers})
            ultra = conductor, SqliteStore(folder / "workflows.sqlite")
        options = {} if ultra is None else {"ultra": ultra}
        app = Gateway(config, workers, decider or OrderDecider(list(runtimes)), Readiness({}), no_roles=None, **options)
        yield Serving(app, runtimes)
