"""A worker on vLLM's `AsyncLLM` in this process. Used where vLLM is installed (`pip install 'fugu-ray[vllm]'`)."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from actors.adapters.base import CallContext
from actors.adapters.text_worker import Finished, TextAdapter, check_length, render
from actors.config import WorkerSpec
from actors.errors import ConfigError, RateLimitedError, WorkerRejectedError, WorkerUnavailableError, scrub
from actors.messages import ChatRequest, Usage

CPU_CACHE_GIB = "2"
"""Key-value cache on a CPU, as vLLM's environment variable wants it; on a GPU it takes the memory it is given."""
SAMPLING_EXTRAS = frozenset({"top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"})
STRUCTURED = "structured_outputs"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """vLLM with one model and its LoRA adapters. Make it with `load`, end it with `close`."""

    def __init__(self, llm: Any, adapters: Mapping[str, Any]) -> None:
        self._llm = llm
        self._adapters = dict(adapters)
        self._tokenizer = llm.get_tokenizer()
        self.context = int(llm.model_config.max_model_len)
        self._defaults = llm.model_config.get_diff_sampling_param()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: str = "auto",
        adapters: Mapping[str, Path] | None = None,
        max_batch: int = 16,
        context: int | None = None,
        gpus: float = 0.0,
    ) -> VllmEngine:
        """Start vLLM on a model folder with LoRA adapters (worker name → folder). Takes half a minute and more.

        vLLM is built either for CPUs or for GPUs, so `device` is only checked against what is installed. `gpus`
        below 1 is the share of a GPU's memory to take. `context` shortens the model's own context, in tokens.

        Raises:
            ConfigError: vLLM is not installed or not for this device, or it cannot load the model or an adapter.
        """
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
        # vLLM's own five seconds, for which it waits in a thread of its own, end half-second grammars on busy machines.
        os.environ.setdefault("VLLM_REGEX_COMPILATION_TIMEOUT_S", "30")
        try:
            from vllm import AsyncEngineArgs
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ConfigError(
                "a worker has provider vllm, but vLLM cannot be imported here "
                f"({scrub(str(error))}); install it with: pip install 'fugu-ray[vllm]'"
            ) from error
        on_cpu = current_platform.is_cpu()
        if device == ("cuda" if on_cpu else "cpu"):
            raise ConfigError(f"device is {device}, but the installed vLLM is not built for it; set device: auto")
        adapters = adapters or {}
        arguments = AsyncEngineArgs(
            model=str(folder),
            dtype="bfloat16" if on_cpu else "auto",
            enforce_eager=on_cpu,
            max_model_len=context,
            max_num_seqs=max_batch,
            enable_lora=bool(adapters),
            max_loras=max(1, len(adapters)),
            max_lora_rank=_lora_rank(adapters),
            disable_log_stats=True,
        )
        if not on_cpu and 0 < gpus < 1:
            arguments.gpu_memory_utilization = gpus
        try:
            llm = AsyncLLM.from_engine_args(arguments)
        except (ValueError, OSError, RuntimeError) as error:
            raise ConfigError(f"vLLM cannot load {folder}: {scrub(str(error))}") from error
        requests = {
            name: LoRARequest(name, index, str(path)) for index, (name, path) in enumerate(adapters.items(), start=1)
        }
        return cls(llm, requests)

    async def generate(
        self, request: ChatRequest, context: CallContext, adapter: str | None
    ) -> AsyncGenerator[str | Finished, None]:
        """Pieces of text, then `Finished`. Closing the generator aborts the generation in vLLM."""
        from vllm import SamplingParams
        from vllm.exceptions import GracefulHTTPError, VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = await asyncio.to_thread(self._encode, request)
        room = self.context - len(prompt)
        chosen = {
            "max_tokens": min(request.max_tokens or room, room),
            "temperature": request.temperature,
            # vLLM takes no 0, which says the same as a very small number.
            "top_p": 1e-6 if request.top_p == 0 else request.top_p,
            "seed": request.seed,
            "stop": list(request.stop) or None,
            "structured_outputs": _structure(request),
            **{name: value for name, value in request.extra.items() if name in SAMPLING_EXTRAS},
        }
        settings = {**self._defaults, **{name: value for name, value in chosen.items() if value is not None}}
        try:
            sampling = SamplingParams(**settings, output_kind=RequestOutputKind.DELTA)
            outputs = self._llm.generate(
                {"prompt_token_ids": prompt},
                sampling,
                str(uuid.uuid4()),
                lora_request=adapter and self._adapters[adapter],
            )
            async with aclosing(outputs):
                context.on_sent()
                text, count, cached = [], 0, 0
                async for output in outputs:
                    (piece,) = output.outputs
                    count += len(piece.token_ids)
                    cached = max(cached, output.num_cached_tokens or 0)
                    if piece.text:
                        text.append(piece.text)
                        yield piece.text
        except (VLLMClientError, ValueError, TypeError) as error:
            raise WorkerRejectedError(f"vLLM refuses the request: {scrub(str(error))}") from error
        except GracefulHTTPError as error:
            raise RateLimitedError("vLLM's queue is full") from error
        except (EngineDeadError, EngineGenerateError) as error:
            raise WorkerUnavailableError(f"vLLM failed: {type(error).__name__}") from error
        if piece.finish_reason not in ("stop", "length"):
            raise WorkerUnavailableError(f"vLLM ended the answer early: {piece.finish_reason}")
        # A number there is a token.
        by = piece.stop_reason if isinstance(piece.stop_reason, str) else ""
        yield Finished("".join(text), piece.finish_reason, Usage(len(prompt), count, cached), by)

    def close(self) -> None:
        """End vLLM's processes."""
        self._llm.shutdown()

    def _encode(self, request: ChatRequest) -> list[int]:
        text = render(self._tokenizer, request.messages)
        tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        check_length(len(tokens), self.context)
        return tokens


class VllmAdapter(TextAdapter):
    """Adapter over a `VllmEngine`. Closing it closes the engine, for all workers that share it."""

    def __init__(self, spec: WorkerSpec, engine: VllmEngine) -> None:
        super().__init__(spec.name, accepts={"response_format", STRUCTURED, *SAMPLING_EXTRAS})
        self._adapter = spec.name if spec.adapter else None
        self._engine = engine

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)

    def _generate(self, request: ChatRequest, context: CallContext) -> AsyncGenerator[str | Finished, None]:
        return self._engine.generate(request, context, self._adapter)


def _structure(request: ChatRequest) -> Any:
    """What the answer must look like: a response format, or vLLM's own `structured_outputs` (regex, grammar, …)."""
    from vllm.sampling_params import StructuredOutputsParams

    own = request.extra.get(STRUCTURED)
    if own is not None:
        return StructuredOutputsParams(**own)
    wanted = request.response_format
    if wanted is None or wanted.kind == "text":
        return None
    if wanted.kind == "json_schema" and wanted.schema is not None:
        return StructuredOutputsParams(json=dict(wanted.schema))
    return StructuredOutputsParams(json_object=True)


def _lora_rank(adapters: Mapping[str, Path]) -> int:
    """The smallest rank that vLLM can be built for and that holds every adapter."""
    ranks = [LORA_RANKS[0]]
    for name, folder in adapters.items():
        try:
            ranks.append(int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"]))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{name}: {folder} holds no LoRA adapter (adapter_config.json with its rank)") from error
    if max(ranks) > LORA_RANKS[-1]:
        raise ConfigError(f"an adapter has rank {max(ranks)}; vLLM takes at most {LORA_RANKS[-1]}")
    return min(rank for rank in LORA_RANKS if rank >= max(ranks))
