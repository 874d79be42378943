"""A server for clients that starts in a second: the gateway, real adapters and a loopback provider behind them, over
real sockets; only Ray is left out, which other tests have."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from actors.config import FuguConfig, WorkerSpec
from actors.journal import state_dir
from actors.messages import ChatReply, ChatRequest, Chunk
from actors.worker import WorkerRuntime
from serve.api.health import Readiness
from serve.conductor import conducting
from serve.gateway import Gateway
from serve.router import OrderDecider
from serve.store import SqliteStore
from tests.clients.tape import Tape
from tests.loopback import LoopbackProvider
from tests.serve.linked import runtime_of

KEY = "clients-test-key-5b1d"
WORKERS = ("chatty", "claudine", "reasoner")


class _Worker:
    """A worker without an actor. Made in the event loop that it serves."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.name = spec.name
        self._spec = spec
        self._made: WorkerRuntime | None = None

    @property
    def _runtime(self) -> WorkerRuntime:
        if self._made is None:
            self._made = runtime_of(self._spec)
        return self._made

    async def complete(self, request: ChatRequest) -> ChatReply:
        return await self._runtime.complete(request)

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        return self._runtime.stream(request)


class ClientServer:
    """Runs in a thread from entering to leaving."""

    def __init__(self, provider: LoopbackProvider, **worker: Any) -> None:
        common = {"retry": {"attempts": 1}, "price": {"input": 1.0, "output": 2.0}, **worker}
        openai = {"provider": "openai", "model": "m", "base_url": provider.url_for("openai")}
        claude = {"provider": "anthropic", "model": "claude-opus-4-8", "base_url": provider.url_for("anthropic")}
        config = FuguConfig.model_validate(
            {
                "workers": [
                    {"name": "chatty", **openai, **common},
                    {"name": "claudine", **claude, **common},
                    {"name": "reasoner", "api": "responses", **openai, **common},
                ],
                "serve": {"api_keys": [KEY], "keep_alive": 1.0},
                "conductor": {"worker": "chatty"},
            }
        )
        workers = {spec.name: _Worker(spec) for spec in config.active}
        ultra = conducting(config, workers), SqliteStore(state_dir() / "workflows.sqlite")
        decider = OrderDecider(WORKERS)
        self.tape = Tape(Gateway(config, list(workers.values()), decider, Readiness({}), ultra=ultra))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self.tape, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> ClientServer:
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(10)
        self._socket.close()
