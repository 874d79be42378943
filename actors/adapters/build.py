"""Adapters for a group of workers that share an actor. What only one kind needs is imported only for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.adapters.base import Adapter
from actors.config import WorkerSpec
from actors.errors import ConfigError
from actors.model_files import resolve_model
from actors.transport import make_transport


async def build_adapters(specs: Sequence[WorkerSpec]) -> dict[str, Adapter]:
    """One adapter per worker name. Local and vLLM workers in one group share one engine, each with its own LoRA
    adapter.

    Raises:
        ConfigError: a model, an adapter folder or recorded outcomes are not where the configuration says, or what a
            provider kind needs is not installed.
    """
    provider = specs[0].provider
    if any(spec.provider != provider for spec in specs):
        raise ConfigError("workers of several providers cannot share an actor")
    if provider in ("local", "vllm"):
        return await _with_engine(specs)
    return {spec.name: adapter_of(spec) for spec in specs}


def adapter_of(spec: WorkerSpec) -> Adapter:
    """The adapter of a worker that is called over HTTP, or answers from recorded outcomes."""
    match spec.provider:
        case "openai" if spec.api == "responses":
            from actors.adapters.openai_responses import OpenAIResponsesAdapter

            return OpenAIResponsesAdapter(spec, make_transport(spec))
        case "openai":
            from actors.adapters.openai import OpenAIAdapter

            return OpenAIAdapter(spec, make_transport(spec))
        case "anthropic":
            from actors.adapters.anthropic import AnthropicAdapter

            return AnthropicAdapter(spec, make_transport(spec))
        case "gemini":
            from actors.adapters.gemini import GeminiAdapter

            return GeminiAdapter(spec, make_transport(spec))
        case _:
            from actors.adapters.replay import ReplayAdapter

            return ReplayAdapter(spec)


async def _with_engine(specs: Sequence[WorkerSpec]) -> dict[str, Adapter]:
    first = specs[0]
    folder = (await asyncio.to_thread(resolve_model, first.model, progress=False)).folder
    adapters = {spec.name: spec.adapter for spec in specs if spec.adapter is not None}
    max_batch = max(spec.max_batch for spec in specs)
    contexts = [spec.context for spec in specs]
    context = None if None in contexts else max(context for context in contexts if context is not None)
    if first.provider == "local":
        from actors.adapters.local import LocalAdapter
        from actors.adapters.local_engine import LocalEngine

        local = await asyncio.to_thread(
            LocalEngine.load, folder, device=first.device, adapters=adapters, max_batch=max_batch, context=context
        )
        return {spec.name: LocalAdapter(spec, local) for spec in specs}
    from actors.adapters.vllm import VllmAdapter, VllmEngine

    vllm = await asyncio.to_thread(
        VllmEngine.load,
        folder,
        device=first.device,
        adapters=adapters,
        max_batch=max_batch,
        context=context,
        gpus=first.gpus,
    )
    return {spec.name: VllmAdapter(spec, vllm) for spec in specs}
