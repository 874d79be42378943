"""Load a transformers model with its tokenizer and LoRA adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.adapters.grouped_attention import use_grouped_attention
from actors.adapters.mixed_lora import Rows, mix_adapters
from actors.errors import ConfigError

MAX_THREADS = 16


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """`model` is a transformers model; `adapters` maps a worker's name to its adapter's name in it. `rows` says before
    each pass whose rows it has; where it is None and there are adapters, `model` is a peft one and is told in each
    call."""

    model: Any
    tokenizer: Any
    adapters: Mapping[str, str]
    rows: Rows | None = None


def load_model(
    folder: Path, *, device: str, adapters: Mapping[str, Path], dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load a chat model for inference; the arguments are those of `LocalEngine.load`.

    Raises:
        ConfigError: the folder holds no chat model we can load, an adapter does not fit, or there is no GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU here; set device: cpu or auto")
    if device == "cpu":
        # Ray sets OMP_NUM_THREADS=1 for actors that reserve no CPU.
        torch.set_num_threads(min(_cpus(), MAX_THREADS))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or _fastest_dtype(device), local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot load a model from {folder}: {_first_line(error)}") from error
    if not tokenizer.chat_template:
        raise ConfigError(f"the model in {folder} has no chat template: it is no chat model")
    use_grouped_attention(model)
    model, names = _with_adapters(model.to(device), adapters)
    model.eval().requires_grad_(False)
    mixed = mix_adapters(model) if names else None
    if mixed is None:
        return LoadedModel(model, tokenizer, names)
    return LoadedModel(mixed[0], tokenizer, names, mixed[1])


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fastest_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it; a CPU that only emulates it is faster in float32."""
    if device != "cpu":
        return torch.bfloat16
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


def _with_adapters(model: Any, adapters: Mapping[str, Path]) -> tuple[Any, dict[str, str]]:
    """The model with every adapter loaded over it, and each worker's name for peft (which allows no dots)."""
    from peft import LoraConfig, PeftConfig, PeftModel

    names = {worker: f"adapter{index}" for index, worker in enumerate(adapters)}
    for worker, folder in adapters.items():
        try:
            config = PeftConfig.from_pretrained(str(folder))
            if not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save:
                raise ConfigError(f"{worker}: the adapter in {folder} is not a plain LoRA adapter")
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), names[worker], autocast_adapter_dtype=False)
            else:
                model = PeftModel.from_pretrained(
                    model, str(folder), adapter_name=names[worker], autocast_adapter_dtype=False
                )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(f"{worker}: cannot load the adapter in {folder}: {_first_line(error)}") from error
    return model, names


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
