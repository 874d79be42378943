"""Completions by real vLLM under an adapter that changes between two steps."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs this in its own environment")

from actors.messages import Message
from actors.model_files import resolve_model
from tests.actors.tiny_chat import random_adapter
from training.grpo import GrpoLearner, GrpoSettings, LoraShape
from training.vllm_sampler import VllmEngine

pytestmark = [pytest.mark.vllm, pytest.mark.model, pytest.mark.timeout(600)]


def test_an_engine_samples_under_the_adapter_of_each_step(tmp_path: Path) -> None:
    folder = resolve_model("SmolLM2-135M-Instruct").folder
    settings = GrpoSettings(steps=1, max_tokens=12, lora=LoraShape(rank=4, alpha=8))
    learner = GrpoLearner(folder, settings, device="cpu")
    prompts = [learner.encode((Message("user", f"Name a colour {word}."),)) for word in ("now", "please")]
    engine = VllmEngine(str(folder), 4, context=512, share=0.4, max_batch=16)
    greedy = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 12, "seed": 1}
    plain = engine.sample(prompts, 1, greedy, 0, None)
    # A fresh adapter changes nothing; what the learner samples itself is the same but for rounding.
    learner.export(tmp_path / "step0", base="model")
    fresh = engine.sample(prompts, 1, greedy, 0, str(tmp_path / "step0"))
    assert fresh == plain
    import torch

    own = learner.sample(prompts, copies=1, generator=torch.Generator().manual_seed(0), temperature=1e-6)
    assert [one[0][:3] for one in own] == [one[0][:3] for one in fresh]
    changed = engine.sample(prompts, 1, greedy, 1, str(random_adapter(folder, tmp_path / "step1", seed=1, scale=0.05)))
    assert changed != plain
    several = engine.sample(prompts, 3, {**greedy, "temperature": 1.0}, 1, str(tmp_path / "step1"))
    assert [len(copies) for copies in several] == [3, 3]
    assert several == engine.sample(prompts, 3, {**greedy, "temperature": 1.0}, 1, str(tmp_path / "step1"))
    # An end token, where one was drawn, is part of its completion, as the learner counts it.
    long = engine.sample(prompts, 2, {**greedy, "temperature": 0.5, "max_tokens": 200}, 0, None)
    assert any(one[-1] == learner.end for copies in long for one in copies)
