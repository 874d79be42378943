"""Sample continuations of token sequences, several of each, in one batch.

A prompt is read once however many continuations it gets; rows that are done leave the batch. What is drawn depends on
the generator's state and nothing else, as far as the model's arithmetic does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    copies: int,
    max_tokens: int,
    ends: Collection[int],
    generator: torch.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[list[list[int]]]:
    """`copies` continuations of each prompt: `result[prompt][copy]` are token ids, the end token included where one
    was drawn within `max_tokens`. Temperature 0 takes the most probable token; `generator` is on the CPU.
    """
    device = model.device
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    cache: Any = DynamicCache()
    logits = _forward(model, tokens.to(device), mask.to(device), (mask.cumsum(1) - 1).clamp(min=0).to(device), cache)
    logits = logits.repeat_interleave(copies, 0)
    mask = mask.repeat_interleave(copies, 0)
    cache.batch_repeat_interleave(copies)
    rows = torch.arange(len(prompts) * copies)  # of the batch as it is now
    written: list[list[int]] = [[] for _ in rows]
    for _ in range(max_tokens):
        drawn = _draw(logits, temperature, top_p, generator)
        for row, token in zip(rows.tolist(), drawn.tolist(), strict=True):
            written[row].append(token)
        going = torch.tensor([token not in ends for token in drawn.tolist()])
        if not going.any() or len(written[int(rows[going][0])]) == max_tokens:
            break
        if not going.all():
            rows, drawn, mask = rows[going], drawn[going], mask[going]
            cache.batch_select_indices(going.nonzero()[:, 0].to(device))
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        logits = _forward(model, drawn[:, None].to(device), mask.to(device), positions.to(device), cache)
    return [written[start : start + copies] for start in range(0, len(written), copies)]


def _forward(model: Any, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Logits [rows, vocabulary] after the last token."""
    output = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1].float()
    return logits


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """A token per row [rows], on the CPU."""
    if temperature == 0:
        return logits.argmax(-1).cpu()
    shares = torch.softmax(logits / temperature, -1).cpu()
    if top_p < 1:
        ordered, order = shares.sort(descending=True)
        # The token that crosses the bound still counts.
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        shares = torch.zeros_like(shares).scatter_(-1, order, ordered)
    return torch.multinomial(shares, 1, generator=generator)[:, 0]
