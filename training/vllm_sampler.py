"""Sample a policy's completions with vLLM engines, each a Ray actor, that pick up the adapter after every step.

For models and lengths where `training.sampling` would take long. Sampling and learning then differ by rounding, as
everywhere where an engine samples for a trainer; with one update per batch the ratio is of the trainer's own numbers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.adapters.vllm import CPU_CACHE_GIB, LORA_RANKS
from actors.errors import ConfigError, DataError
from training.grpo import GrpoLearner, GrpoSettings

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

Prompts = Sequence[Sequence[int]]

_ENVIRONMENT = {
    # The engine in the actor's own process: it ends with the actor, however that ends.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # On a CPU: engines of one machine would otherwise all bind their threads to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class VllmEngine:
    """One vLLM engine in this process. `share` is the share of a GPU's memory that it takes."""

    def __init__(self, folder: str, rank: int, *, context: int, share: float, max_batch: int) -> None:
        """Raises:
        ConfigError: vLLM is not installed.
        """
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_CACHE_GIB)
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError("vLLM is not installed here; install the extra `vllm`, or sample in process") from error
        on_cpu = current_platform.is_cpu()
        self._llm = LLM(
            model=folder,
            dtype="bfloat16" if on_cpu else "auto",
            enforce_eager=on_cpu,
            max_model_len=context,
            max_num_seqs=max_batch,
            enable_lora=True,
            max_lora_rank=min(size for size in LORA_RANKS if size >= rank),
            # Two, so that the next adapter is there before the one before it goes.
            max_loras=2,
            **({} if on_cpu else {"gpu_memory_utilization": share}),
        )

    def sample(
        self, prompts: Prompts, copies: int, sampling: Mapping[str, Any], version: int, adapter: str | None
    ) -> list[list[list[int]]]:
        """`copies` completions of each prompt under the adapter in this folder (None: the model itself), whose
        `version` tells it from those before."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        seed = int(sampling["seed"])
        found = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [
                SamplingParams(n=copies, **{**sampling, "seed": (seed + number) % 2**31})
                for number in range(len(prompts))
            ],
            lora_request=None if adapter is None else LoRARequest(f"step{version}", version + 1, adapter),
            use_tqdm=False,
        )
        return [[list(one.token_ids) for one in output.outputs] for output in found]


class VllmSampler:
    """Spreads prompts over engine actors. `follow` hands them the learner's present adapter, through `folder`, which
    must be the same place for all (a shared file system, or one machine). Of a `group` the first bundle is the
    learner's, and each engine has one of those after it."""

    def __init__(
        self,
        model: Path,
        settings: GrpoSettings,
        folder: Path,
        *,
        engines: int = 1,
        gpus: float = 0.0,
        context: int = 9216,
        share: float = 0.45,
        max_batch: int = 256,
        seconds: float = 1800.0,
        group: PlacementGroup | None = None,
    ) -> None:
        """Raises:
        ConfigError: all weights are learnt, which no adapter carries over.
        """
        import ray

        from actors.placement import at

        if settings.lora is None:
            raise ConfigError("vLLM picks up adapters only; learn with LoRA, or sample in process")
        self._settings, self._folder, self._seconds = settings, folder.resolve(), seconds
        self._version = -1
        self._adapter: Path | None = None
        engine: Any = ray.remote(VllmEngine)
        options = {"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": _ENVIRONMENT}}
        self._engines = [
            engine.options(**options, **at(group, 1 + number)).remote(
                str(model), settings.lora.rank, context=context, share=share, max_batch=max_batch
            )
            for number in range(engines)
        ]

    def follow(self, learner: GrpoLearner, base: str) -> None:
        """Sample from what the learner knows now."""
        path = self._folder / f"step{learner.done}"
        learner.export(path, base=base)
        if self._adapter is not None and self._adapter != path:
            shutil.rmtree(self._adapter, ignore_errors=True)
        self._version, self._adapter = learner.done, path

    def sample(
        self, prompts: Prompts, *, copies: int, generator: torch.Generator, temperature: float | None = None
    ) -> list[list[list[int]]]:
        """As `GrpoLearner.sample`.

        Raises:
            DataError: an engine was lost, or took too long.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError, RayTaskError

        sampling = {
            "temperature": self._settings.temperature if temperature is None else temperature,
            "top_p": self._settings.top_p,
            "max_tokens": self._settings.max_tokens,
            "seed": int(torch.randint(2**31, (), generator=generator)),
            "skip_special_tokens": False,
        }
        adapter = None if self._adapter is None else str(self._adapter)
        size = -(-len(prompts) // len(self._engines))
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        asked = [
            engine.sample.remote(
                part, copies, {**sampling, "seed": sampling["seed"] + 7919 * n}, self._version, adapter
            )
            for n, (engine, part) in enumerate(zip(self._engines, parts, strict=False))
        ]
        try:
            return [one for part in ray.get(asked, timeout=self._seconds) for one in part]
        except GetTimeoutError:
            raise DataError(f"vLLM took longer than {self._seconds:g} s; allow more, or shorter plans") from None
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None  # a fault of ours or of vLLM's, not of the cluster's
        except RayError as error:
            reason = (str(error).strip().splitlines() or [""])[-1].strip()[:300]
            raise DataError(
                f"an engine was lost ({type(error).__name__}: {reason}); resume the run when that is mended"
            ) from error

    def close(self) -> None:
        import ray

        for engine in self._engines:
            ray.kill(engine)
