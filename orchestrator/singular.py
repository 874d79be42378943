"""Singular-value scales: the second set of trained numbers beside the head (TRINITY; Transformer², Sun et al.
2025).

Of a chosen weight matrix W = U · diag(S) · Vᵀ only the singular values change. The trained number per singular value is
an offset, its scale is 1 + offset, and the total singular mass is kept:

    W' = U · diag(S · scale) · Vᵀ · (ΣS / Σ(S · scale))

Zero offsets are the identity. The new weights replace the old ones at load, so serving costs nothing extra.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actors.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Factors:
    """A matrix `[m, n]` taken apart, r = min(m, n): `u [m, r]`, `s [r]`, `vh [r, n]`, float32. Training keeps
    these to try many offsets for the price of one decomposition."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def rebuild(self, offsets: Tensor) -> Tensor:
        """The matrix `[m, n]` under `offsets [r]`, float32.

        Raises:
            ValueError: wrong number of offsets, or scales whose total mass is not positive.
        """
        if offsets.shape != self.s.shape:
            raise ValueError(f"{list(offsets.shape)} offsets for {self.s.shape[0]} singular values")
        scaled = self.s * (1 + offsets.to(self.s))
        mass = scaled.sum()
        if not float(mass) > 0:
            raise ValueError("the scaled singular values have no positive sum")
        return (self.u * (scaled * (self.s.sum() / mass))) @ self.vh


def decompose(weight: Tensor) -> Factors:
    """Singular value decomposition of one matrix, in float32."""
    u, s, vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return Factors(u, s, vh)


def matrices(model: nn.Module, layer: int, *, embeddings: bool = False) -> dict[str, int]:
    """Names of the 2-D weights of transformer layer `layer` (0-based; negative counts from the end), in the
    order of the state dict, with their number of singular values. `embeddings` adds the input embeddings and
    the language model head where the model has them (the paper's choice: layer 26 of 28 with both).

    Raises:
        ValueError: the model has no such layer.
    """
    layers = {int(name.split("layers.", 1)[1].split(".", 1)[0]) for name in model.state_dict() if "layers." in name}
    index = layer + len(layers) if layer < 0 else layer
    if index not in layers:
        raise ValueError(f"layer {layer}: the model has {len(layers)}")
    return {
        name: min(weight.shape)
        for name, weight in model.state_dict().items()
        if weight.ndim == 2
        and (
            f"layers.{index}." in name
            or (embeddings and "layers." not in name and ("embed_tokens" in name or "lm_head" in name))
        )
    }


@torch.no_grad()
def apply_scales(model: nn.Module, offsets: Mapping[str, Tensor]) -> None:
    """Rebuild, in place, each named weight under its offsets. Matrices whose offsets are all zero stay
    bit-identical.

    Raises:
        CheckpointError: a name is no 2-D weight of the model, or its offsets do not fit.
    """
    weights = dict(model.named_parameters())
    for name, offset in offsets.items():
        weight = weights.get(name)
        if weight is None or weight.ndim != 2:
            raise CheckpointError(f"singular.{name}: the backbone has no such matrix")
        if offset.shape != (min(weight.shape),):
            raise CheckpointError(
                f"singular.{name}: {list(offset.shape)} offsets, the matrix has {min(weight.shape)} singular values"
            )
        if not bool(offset.any()):
            continue
        try:
            weight.copy_(decompose(weight).rebuild(offset.to(weight.device)))
        except ValueError as error:
            raise CheckpointError(f"singular.{name}: {error}") from error
