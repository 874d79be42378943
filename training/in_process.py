"""A pool whose workers share one local model, without Ray: they answer in this process, in one batch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from actors.adapters.local import LocalAdapter
from actors.adapters.local_engine import LocalEngine
from actors.config import WorkerSpec
from actors.errors import ConfigError
from actors.messages import ChatReply, ChatRequest, Chunk
from actors.model_files import resolve_model
from actors.worker import WorkerRuntime


@dataclass(frozen=True)
class InProcess:
    """A configured worker in this process (`actors.messages.Worker`)."""

    runtime: WorkerRuntime

    @property
    def name(self) -> str:
        return self.runtime.spec.name

    async def complete(self, request: ChatRequest) -> ChatReply:
        return await self.runtime.complete(request)

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        return self.runtime.stream(request)


def shares_one_model(specs: Sequence[WorkerSpec]) -> bool:
    return {(spec.provider, spec.model) for spec in specs} == {("local", specs[0].model)} if specs else False


@contextmanager
def in_process(specs: Sequence[WorkerSpec], *, batch: int) -> Iterator[Mapping[str, InProcess]]:
    """The workers of `specs`, up to `batch` calls at once in all; their engine is closed in the end.

    Raises:
        ConfigError: a worker that is not `local`, workers on different models, or an adapter that cannot be loaded.
    """
    if not shares_one_model(specs):
        raise ConfigError("only workers that share one local model can answer in this process; use Ray for others")
    files = resolve_model(specs[0].model)
    adapters = {spec.name: spec.adapter for spec in specs if spec.adapter is not None}
    engine = LocalEngine.load(files.folder, device=specs[0].device, adapters=adapters, max_batch=batch)
    # Limits are for serving; here the whole batch is kept busy.
    open_specs = [
        spec.model_copy(update={"limits": spec.limits.model_copy(update={"concurrency": 4096, "max_wait": 3600.0})})
        for spec in specs
    ]
    try:
        yield {spec.name: InProcess(WorkerRuntime(spec, LocalAdapter(spec, engine))) for spec in open_specs}
    finally:
        engine.close()
