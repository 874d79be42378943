"""Rows of one batch, each under its own LoRA adapter (Hu et al. 2021), in two multiplications a layer.

peft sends the rows of each adapter through matrices of their own and hangs a hook on every layer before each pass. With
a small model on a CPU that takes longer than the model. Here the matrices of all adapters stand side by side; what a
row would get from adapters that are not its own is multiplied by 0 between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Rows:
    """Under whose adapter each row of the next pass is. `choose` sets it; all layers read it. `widths`: the rank of
    each adapter, in the order in which they stand side by side."""

    widths: dict[str, int]
    part: slice | None = field(default=None, init=False)
    mask: Tensor | None = field(default=None, init=False)

    def choose(self, adapters: Sequence[str | None], device: torch.device, dtype: torch.dtype) -> None:
        """One adapter for each row; None: the model itself."""
        starts, total = {}, 0
        for name, width in self.widths.items():
            starts[name] = total
            total += width
        used = {name for name in adapters if name is not None}
        self.part = self.mask = None
        if not used:
            return
        first = min(starts[name] for name in used)
        last = max(starts[name] + self.widths[name] for name in used)
        self.part = slice(first, last)
        if len(set(adapters)) > 1:
            mask = torch.zeros(len(adapters), 1, last - first, dtype=dtype)
            for row, own in enumerate(adapters):
                if own is not None:
                    mask[row, 0, starts[own] - first : starts[own] - first + self.widths[own]] = 1
            self.mask = mask.to(device)


class MixedLinear(nn.Module):
    """A linear layer with the adapters' part: `down` [ranks, in] and `up` [ranks, out], in which each adapter's scale
    is contained."""

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, rows: Rows) -> None:
        super().__init__()
        self.base = base
        self.rows = rows
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        rows = self.rows
        if rows.part is None:
            return result
        inner = nn.functional.linear(x, self.down[rows.part])
        if rows.mask is not None:
            inner = inner * rows.mask
        return torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), self.up[rows.part]).view(result.shape)


def mix_adapters(model: Any) -> tuple[Any, Rows] | None:
    """The model inside a peft one, its layers replaced by `MixedLinear`; None where an adapter does anything beyond
    plain LoRA on linear layers, and the peft model is left as it is."""
    from peft.tuners.lora.layer import Linear, LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside = model.get_base_model()
    layers = {name: module for name, module in inside.named_modules() if isinstance(module, LoraLayer)}
    plain = all(
        type(layer) is Linear and not layer.lora_variant and not any(layer.lora_bias.values())
        for layer in layers.values()
    )
    if not plain or any(isinstance(module, AuxiliaryTrainingWrapper) for module in inside.modules()):
        return None
    # The same places in every layer, so that one mask is right for all.
    widths = {name: max(layer.r.get(name, 0) for layer in layers.values()) for name in model.peft_config}
    rows = Rows(widths)
    for place, layer in layers.items():
        inside.set_submodule(place, _mixed(layer, rows))
    return inside, rows


def _mixed(layer: Any, rows: Rows) -> MixedLinear:
    weight = layer.get_base_layer().weight
    down = torch.zeros(sum(rows.widths.values()), layer.in_features, dtype=weight.dtype, device=weight.device)
    up = torch.zeros(len(down), layer.out_features, dtype=weight.dtype, device=weight.device)
    start = 0
    for name, width in rows.widths.items():
        if name in layer.lora_A:
            end = start + layer.r[name]
            down[start:end] = layer.lora_A[name].weight.data
            up[start:end] = (layer.lora_B[name].weight.data * layer.scaling[name]).T
        start += width
    return MixedLinear(layer.get_base_layer(), down, up, rows)
