"""The backbone: a small language model without its LM head; tokens in, one hidden state per prompt out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from actors.errors import ConfigError
from orchestrator.head import FINAL, Position, Read
from orchestrator.singular import apply_scales

Device = Literal["auto", "cpu", "cuda"]


class Backbone:
    """A causal language model that is read at some tokens and layers (`orchestrator.head.Read`) in one forward pass.
    Layers behind the last one that is read are neither kept nor run."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reads: Sequence[Read] = FINAL,
        context: int,
    ) -> None:
        self.reads = tuple(reads)
        # What a layer gave in the pass that holds the lock.
        self._seen: dict[int, Tensor] = {}
        self._pass = threading.Lock()
        _tap(model, {read.layer for read in self.reads}, self._seen)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.context = context
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        reads: Sequence[Read] = FINAL,
        device: Device = "auto",
        dtype: torch.dtype | None = None,
        singular: Mapping[str, Tensor] | None = None,
    ) -> Backbone:
        """Load from a folder in the transformers layout; nothing is fetched. `singular` holds singular-value
        offsets by matrix (`orchestrator.singular`). `dtype` defaults to `fitting_dtype(device)`.

        Raises:
            ConfigError: the folder holds no model that can be loaded, it lacks a layer that is to be read, or CUDA is
            asked for and absent.
            CheckpointError: the offsets do not fit the model.
        """
        target = pick_device(device)
        dtype = fitting_dtype(target) if dtype is None else dtype
        if not Path(folder).is_dir():
            raise ConfigError(f"the backbone folder {folder} does not exist")
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a service's log is no place for one
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # Offsets act on the stored weights: rebuilding from rounded ones would not be the trained model.
            model = AutoModel.from_pretrained(folder, dtype=torch.float32 if singular else dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the backbone from {folder}: {error}") from error
        finally:
            if bars:
                logging.enable_progress_bar()
        if singular:
            apply_scales(model, singular)
        context = int(model.config.max_position_embeddings)
        model = model.to(device=target, dtype=dtype)
        return cls(model, tokenizer, reads=reads, context=context)

    @property
    def dimension(self) -> int:
        """Size d of what `hidden` gives: the model's hidden size times the number of reads."""
        return int(self.model.config.hidden_size) * len(self.reads)

    @torch.inference_mode()
    def hidden(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states of token prompts in one forward pass: `[B, d]`, float32, on the CPU; the reads side by side.

        Prompts are padded on the right and masked, so that a row does not depend on the others beyond
        rounding.

        Raises:
            ValueError: no prompt, an empty one, or one longer than the model's context.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) < 1:
            raise ValueError("every prompt needs at least one token")
        longest = max(lengths)
        if longest > self.context:
            raise ValueError(f"a prompt has {longest} tokens, the backbone reads {self.context}")
        tokens = torch.tensor(
            [[*prompt, *[self._pad] * (longest - len(prompt))] for prompt in prompts], device=self.device
        )
        length = torch.tensor(lengths, device=self.device)
        mask = torch.arange(longest, device=self.device) < length[:, None]
        # Without padding there is nothing to mask, and the attention kernels are faster without one.
        padded = min(lengths) != longest
        with self._pass:
            self._seen.clear()
            final = self.model(
                input_ids=tokens, attention_mask=mask.long() if padded else None, use_cache=False
            ).last_hidden_state
            seen = {-1: final, **self._seen}
            self._seen.clear()
        parts = [_at(seen[read.layer], mask, length, read.position) for read in self.reads]
        return torch.cat(parts, dim=-1).cpu()

    def hidden_all(
        self, prompts: Sequence[Sequence[int]], *, batch_tokens: int = 4096
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Hidden states of many prompts, batch by batch: yields (indices into `prompts`, states `[b, d]`).
        Prompts of like length go together, so that little padding is computed."""
        for indices in batches([len(prompt) for prompt in prompts], batch_tokens):
            yield indices, self.hidden([prompts[index] for index in indices])


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped by length, shortest first, each group at most `batch_tokens` with its padding (a longer
    prompt is a group of its own). Every index occurs exactly once; the grouping depends on the lengths
    alone."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and lengths[index] * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def pick_device(device: Device) -> torch.device:
    """The device meant by "auto" is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch finds none")
    return torch.device(device)


def fitting_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU and on CPUs that multiply bf16 natively, where it takes about half the time of fp32
    (`benchmarks/decision.py` measures both); fp32 on other CPUs, where bf16 is emulated and slower."""
    if device.type == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _at(states: Tensor, mask: Tensor, length: Tensor, position: Position) -> Tensor:
    """States `[B, T, d]` of right-padded prompts → `[B, d]`, float32, at one position of each."""
    if position in ("mean", "body"):
        weights = mask.to(torch.float32)[:, :, None]
        if position == "body":
            # A prompt of one token has no other to read.
            weights[:, 0] = (length == 1)[:, None]
        return (states.float() * weights).sum(1) / weights.sum(1)
    index = (length - (2 if position == "penultimate" else 1)).clamp(min=0)
    return states[torch.arange(len(states), device=states.device), index].float()


def _tap(model: PreTrainedModel, wanted: set[int], seen: dict[int, Tensor]) -> None:
    """Drop the layers behind the last of `wanted`, and let the others note in `seen` what they give."""
    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    for layer in wanted - {-1}:
        if not 1 <= layer <= len(layers):
            raise ConfigError(f"layer {layer}: the backbone has {len(layers)} layers")

    def note(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    for layer in wanted - {-1}:
        layers[layer - 1].register_forward_hook(note(layer))
    if -1 not in wanted:
        last = max(wanted)
        model.set_submodule("layers", layers[:last])
        model.set_submodule("norm", nn.Identity())
        model.config.num_hidden_layers = last
