from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel

from actors.errors import ConfigError
from actors.model_files import resolve_model
from orchestrator.backbone import Backbone, batches, fitting_dtype
from orchestrator.head import Read
from orchestrator.prompt import encode
from tests.orchestrator.tiny import DIMENSION, said, tiny_folder

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [30], [12, 13], [40 + n for n in range(50)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def states_of(folder: Path, prompt: list[int]) -> tuple[torch.Tensor, ...]:
    """The library's own hidden states of one prompt alone: per layer `[tokens, d]`."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return tuple(state[0] for state in model(torch.tensor([prompt]), output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("position", ["penultimate", "last", "mean", "body"])
@pytest.mark.parametrize("layer", [-1, 1, 3])
def test_the_right_token_and_layer_are_read(folder: Path, position: str, layer: int) -> None:
    backbone = Backbone.load(folder, dtype=torch.float32, reads=[Read(layer, position)])  # type: ignore[arg-type]
    got = backbone.hidden(PROMPTS)
    assert got.shape == (4, DIMENSION)
    assert got.dtype == torch.float32
    for row, prompt in zip(got, PROMPTS, strict=True):
        states = states_of(folder, prompt)[layer]
        expected = {
            "penultimate": states[-2] if len(prompt) > 1 else states[-1],
            "last": states[-1],
            "mean": states.mean(0),
            "body": states[1:].mean(0) if len(prompt) > 1 else states[0],
        }[position]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_several_reads_come_side_by_side_from_one_pass(folder: Path) -> None:
    reads = [Read(2, "mean"), Read(-1, "last"), Read(2, "last"), Read(1, "body")]
    backbone = Backbone.load(folder, dtype=torch.float32, reads=reads)
    assert backbone.dimension == 4 * DIMENSION
    passes = []
    backbone.model.register_forward_hook(lambda *_: passes.append(1))
    got = backbone.hidden(PROMPTS)
    assert passes == [1]
    alone = [Backbone.load(folder, dtype=torch.float32, reads=[read]).hidden(PROMPTS) for read in reads]
    torch.testing.assert_close(got, torch.cat(alone, dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["penultimate", "last", "mean", "body"])
def test_batch_mates_do_not_matter(folder: Path, position: str) -> None:
    backbone = Backbone.load(folder, dtype=torch.float32, reads=[Read(-1, position)])  # type: ignore[arg-type]
    together = backbone.hidden(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(together[index], backbone.hidden([prompt])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.hidden(PROMPTS[::-1]), together.flip(0), rtol=1e-4, atol=1e-4)


def test_bulk_reading_gives_each_prompt_its_own_state(folder: Path) -> None:
    backbone = Backbone.load(folder, dtype=torch.float32)
    got = torch.zeros(len(PROMPTS), DIMENSION)
    for indices, states in backbone.hidden_all(PROMPTS, batch_tokens=16):
        got[indices] = states
    torch.testing.assert_close(got, backbone.hidden(PROMPTS), rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 2000))
def test_batches_are_a_partition_within_the_limit(lengths: list[int], limit: int) -> None:
    groups = batches(lengths, limit)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= limit
    in_order = [lengths[i] for group in groups for i in group]
    assert in_order == sorted(lengths)


def test_what_cannot_be_read_is_refused(folder: Path, tmp_path: Path) -> None:
    backbone = Backbone.load(folder)
    with pytest.raises(ValueError, match="at least one token"):
        backbone.hidden([[1], []])
    with pytest.raises(ValueError, match="at least one token"):
        backbone.hidden([])
    with pytest.raises(ValueError, match="513 tokens, the backbone reads 512"):
        backbone.hidden([[1] * 513])
    with pytest.raises(ConfigError, match="the backbone has 4 layers"):
        Backbone.load(folder, reads=[Read(5)])
    with pytest.raises(ConfigError, match="does not exist"):
        Backbone.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot load the backbone"):
        Backbone.load(tmp_path / "empty")


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_embedded_model_reads_alike_alone_and_in_company() -> None:
    files = resolve_model("SmolLM2-135M-Instruct", progress=False)
    backbone = Backbone.load(files.folder, device="cpu")
    assert backbone.dtype == fitting_dtype(torch.device("cpu"))
    assert backbone.dimension == 576
    texts = ["What is 17 + 25?", "Spell the word cat backwards.", "Tell me about rivers. " * 12]
    prompts = encode(backbone.tokenizer, [said(text) for text in texts], "chat", 256)
    together = backbone.hidden(prompts)
    for row, prompt in zip(together, prompts, strict=True):
        alone = backbone.hidden([prompt])[0]
        # bf16 rounds to 8 bits in each of 30 layers; different prompts differ several times as much.
        assert float(torch.cosine_similarity(row, alone, dim=0)) > 0.995
    assert float(torch.cosine_similarity(together[0], together[2], dim=0)) < 0.985
