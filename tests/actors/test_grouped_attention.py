"""Attention without repeated keys against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from actors.adapters.grouped_attention import grouped_attention


class Layer(torch.nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "groups", "length"), [(6, 2, 1), (4, 4, 1), (6, 3, 5), (9, 3, 1), (8, 1, 1)])
def test_it_equals_attention_over_repeated_keys(heads: int, groups: int, length: int, masked: bool) -> None:
    torch.manual_seed(heads + length)
    rows, width, size = 3, 7, 8
    query = torch.randn(rows, heads, length, size)
    key, value = torch.randn(2, rows, groups, width, size)
    mask = None
    if masked:
        pads = torch.tensor([0, 3, 6])
        mask = (torch.arange(width) >= pads[:, None])[:, None, None, :].expand(rows, 1, length, width)
    arguments = (Layer(heads // groups), query, key, value, mask)
    expected, _ = sdpa_attention_forward(*arguments, scaling=0.3)
    got, _ = grouped_attention(*arguments, scaling=0.3)
    assert got.shape == (rows, length, heads, size)
    torch.testing.assert_close(got, expected)
