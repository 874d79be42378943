from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel

from actors.errors import CheckpointError
from orchestrator.backbone import Backbone
from orchestrator.singular import apply_scales, decompose, matrices
from tests.orchestrator.tiny import DIMENSION, tiny_folder


def test_a_known_matrix_by_hand() -> None:
    # Singular values 4 and 2 (mass 6). Scales 0.5 and 2 give 2 and 4, mass 6 again: the values trade places.
    factors = decompose(torch.diag(torch.tensor([4.0, 2.0])))
    torch.testing.assert_close(factors.rebuild(torch.tensor([-0.5, 1.0])), torch.diag(torch.tensor([2.0, 4.0])))
    # Scale 2 on the first only: 8 and 2, times 6/10.
    torch.testing.assert_close(factors.rebuild(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([4.8, 1.2])))
    # One scale for all changes nothing, because the mass is kept.
    torch.testing.assert_close(factors.rebuild(torch.tensor([0.7, 0.7])), torch.diag(torch.tensor([4.0, 2.0])))


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_identity_mass_and_directions(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    factors = decompose(weight)
    same = factors.rebuild(torch.zeros(12 if 12 in shape else 16))
    assert float((same - weight).norm() / weight.norm()) < 1e-5
    offsets = 0.3 * torch.randn(min(shape), generator=generator)
    changed = factors.rebuild(offsets)
    assert float(torch.linalg.svdvals(changed).sum()) == pytest.approx(float(factors.s.sum()), rel=1e-5)
    # Each singular direction keeps its place; its value is scaled as the formula says.
    values = torch.diag(factors.u.T @ changed @ factors.vh.T)
    scaled = factors.s * (1 + offsets)
    torch.testing.assert_close(values, scaled * factors.s.sum() / scaled.sum(), rtol=1e-4, atol=1e-5)


def test_offsets_that_leave_no_mass_or_do_not_fit_are_refused() -> None:
    factors = decompose(torch.eye(3))
    with pytest.raises(ValueError, match="no positive sum"):
        factors.rebuild(torch.full((3,), -1.0))
    with pytest.raises(ValueError, match="3 singular values"):
        factors.rebuild(torch.zeros(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def test_the_matrices_of_a_layer_in_order(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    names = matrices(model, 2)
    assert [name.removeprefix("layers.2.").removesuffix(".weight") for name in names] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert list(names.values()) == [32, 16, 16, 32, 32, 32, 32]
    assert matrices(model, -2) == names
    assert matrices(model, -2, embeddings=True) == {"embed_tokens.weight": DIMENSION, **names}
    with pytest.raises(ValueError, match="the model has 4"):
        matrices(model, 4)


def test_scales_are_part_of_the_loaded_weights(folder: Path) -> None:
    plain = AutoModel.from_pretrained(folder, dtype=torch.float32)
    name = "layers.2.mlp.up_proj.weight"
    offsets = torch.linspace(-0.4, 0.4, 32)
    zero = Backbone.load(
        folder, dtype=torch.float32, singular={key: torch.zeros(n) for key, n in matrices(plain, 2).items()}
    )
    scaled = Backbone.load(folder, dtype=torch.float32, singular={name: offsets})
    for key, weight in plain.state_dict().items():
        assert torch.equal(zero.model.state_dict()[key], weight), key
        assert torch.equal(scaled.model.state_dict()[key], weight) == (key != name), key
    torch.testing.assert_close(
        scaled.model.state_dict()[name], decompose(plain.state_dict()[name]).rebuild(offsets), rtol=0, atol=0
    )
    prompt = [[1, 2, 3, 4]]
    assert torch.equal(zero.hidden(prompt), Backbone.load(folder, dtype=torch.float32).hidden(prompt))
    assert not torch.allclose(zero.hidden(prompt), scaled.hidden(prompt), atol=1e-3)


def test_offsets_of_another_model_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(CheckpointError, match=r"singular\.layers\.9\.w: the backbone has no such matrix"):
        apply_scales(model, {"layers.9.w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"singular\.0\.bias: the backbone has no such matrix"):
        apply_scales(model, {"0.bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="the matrix has 2 singular values"):
        apply_scales(model, {"0.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"singular\.0\.weight: the scaled singular values have no positive sum"):
        apply_scales(model, {"0.weight": torch.full((2,), -1.0)})
