"""Adapters side by side against peft's own way of mixing them in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from actors.adapters.local_engine import LocalEngine
from actors.adapters.local_model import load_model
from actors.adapters.mixed_lora import MixedLinear, Rows, mix_adapters
from actors.messages import ChatRequest, Message
from tests.actors.tiny_chat import random_adapter, tiny_chat_folder

NAMES = ("plain", "wide", "few")


def adapter(base: Path, folder: Path, seed: int, **how: Any) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **how))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of other ranks, scales and layers; one of them differs in rank from layer to layer."""
    home = tmp_path_factory.mktemp("adapters")
    wide = {"r": 7, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"o_proj": 3}}
    return {
        "plain": random_adapter(base, home / "plain", 1),
        "wide": adapter(base, home / "wide", 2, target_modules=["q_proj", "o_proj", "gate_proj"], **wide),
        "few": adapter(base, home / "few", 3, r=2, lora_alpha=16, target_modules=["up_proj"], layers_to_transform=[1]),
    }


def peft_model(base: Path, folders: Mapping[str, Path]) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, folder in folders.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
        else:
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    return model.eval()


@pytest.fixture(scope="module")
def both(base: Path, folders: dict[str, Path]) -> tuple[Any, Any, Rows]:
    mixed = mix_adapters(peft_model(base, folders))
    assert mixed is not None
    return peft_model(base, folders), *mixed


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from((None, *NAMES)), min_size=1, max_size=7), st.integers(1, 9))
@torch.inference_mode()
def test_every_row_is_what_peft_makes_of_it(both: tuple[Any, Any, Rows], who: list[str | None], length: int) -> None:
    peft, mixed, rows = both
    tokens = torch.randint(250, (len(who), length), generator=torch.Generator().manual_seed(len(who)))
    expected = peft(input_ids=tokens, adapter_names=[name or "__base__" for name in who]).logits
    rows.choose(who, torch.device("cpu"), torch.float32)
    found = mixed(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    rows.choose([None] * len(who), torch.device("cpu"), torch.float32)
    plain = mixed(input_ids=tokens).logits
    for row, name in enumerate(who):
        assert torch.allclose(plain[row], expected[row], atol=2e-4) == (name is None)


def test_only_layers_with_an_adapter_are_changed_and_hold_their_own_weights(both: tuple[Any, Any, Rows]) -> None:
    _, mixed, rows = both
    assert rows.widths == {"plain": 4, "wide": 7, "few": 2}
    layers = {name: module for name, module in mixed.named_modules() if isinstance(module, MixedLinear)}
    assert {name.rpartition(".")[2] for name in layers} == {
        "q_proj", "v_proj", "down_proj", "o_proj", "gate_proj", "up_proj"
    }  # fmt: skip
    assert sum(name.endswith("up_proj") for name in layers) == 1
    assert not any("lora_" in name for name, _ in mixed.named_parameters())


def test_what_is_more_than_plain_lora_is_left_to_peft(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    words = adapter(base, tmp_path / "words", 4, r=3, lora_alpha=3, target_modules=["embed_tokens", "q_proj"])
    loaded = load_model(base, device="cpu", adapters={**folders, "words": words}, dtype=torch.float32)
    assert loaded.rows is None
    assert isinstance(loaded.model, PeftModel)
    engine = LocalEngine(loaded)
    request = ChatRequest((Message("user", "hello"),), temperature=0, max_tokens=12)
    said = {name: engine.generate_batch([request], adapter=name)[0].text for name in ("words", *NAMES)}
    engine.close()
    assert load_model(base, device="cpu", adapters=folders, dtype=torch.float32).rows is not None
    without = LocalEngine.load(base, device="cpu", adapters=folders, dtype=torch.float32)
    for name in NAMES:
        assert without.generate_batch([request], adapter=name)[0].text == said[name]
    without.close()
    assert len(set(said.values())) > 2
