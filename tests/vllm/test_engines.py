"""Two vLLM engines, each an actor of a Ray of this test, that sample for a learner and follow it step by step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs this in its own environment")

import psutil
import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.errors import DataError
from actors.messages import Message
from tests.orchestrator.tiny import tiny_tokenizer
from training.grpo import GrpoLearner, GrpoSettings, LoraShape
from training.vllm_sampler import VllmSampler

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(900)]
SETTINGS = GrpoSettings(steps=3, max_tokens=8, lora=LoraShape(rank=4, alpha=8))


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """The session's Ray, whose engines reserve little memory for their caches."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        request.getfixturevalue("ray_session")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights whose heads are of a size that vLLM computes on a CPU."""
    place = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for weight in model.parameters():  # the library's own initial weights are too small to tell prompts apart
        if weight.ndim == 2:
            weight.data.mul_(8)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def processes(sampler: VllmSampler) -> list[list[psutil.Process]]:
    """Of each engine: its actor's process and all that that has started."""
    engines: list[Any] = sampler._engines
    asked = [engine.__ray_call__.remote(lambda _engine: os.getpid()) for engine in engines]
    actors = [psutil.Process(pid) for pid in ray.get(asked, timeout=600)]
    return [[actor, *actor.children(recursive=True)] for actor in actors]


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_two_engines_follow_the_learner_and_leave_nothing(cluster: None, folder: Path, tmp_path: Path) -> None:
    learner = GrpoLearner(folder, SETTINGS, device="cpu", precision="bfloat16")
    prompts = [learner.encode((Message("user", f"Name {word}."),)) for word in ("red", "green", "a blue one", "none")]
    before = ray.available_resources()["CPU"]
    place = tmp_path / "adapters"
    sampler = VllmSampler(folder, SETTINGS, place, engines=2, context=256, max_batch=8, seconds=600)
    try:
        sampler.follow(learner, "tiny")
        first = sampler.sample(prompts, copies=1, generator=seed(1), temperature=0.0)
        assert [len(copies) for copies in first] == [1] * 4
        # What the learner samples itself is the same but for rounding.
        own = learner.sample(prompts, copies=1, generator=seed(1), temperature=0.0)
        assert [copies[0][:2] for copies in first] == [copies[0][:2] for copies in own]
        one, other = processes(sampler)
        assert {process.pid for process in one}.isdisjoint(process.pid for process in other)

        # A step of learning: both engines sample from what is known now, and the last step's adapter is gone.
        with torch.no_grad():
            for number, weight in enumerate(learner._learnt):
                weight.normal_(std=0.3, generator=seed(number))
        learner.done = 1
        sampler.follow(learner, "tiny")
        second = sampler.sample(prompts, copies=1, generator=seed(1), temperature=0.0)
        own = learner.sample(prompts, copies=1, generator=seed(1), temperature=0.0)
        assert [copies[0][:2] for copies in second] == [copies[0][:2] for copies in own]
        assert second[:2] != first[:2]
        assert second[2:] != first[2:]
        assert [path.name for path in place.iterdir()] == ["step1"]

        drawn = sampler.sample(prompts, copies=3, generator=seed(2))
        assert [len(copies) for copies in drawn] == [3] * 4
        assert len({tuple(tokens) for tokens in drawn[0]}) > 1
        assert sampler.sample(prompts, copies=3, generator=seed(2)) == drawn
        # Fewer prompts than engines: some rest.
        assert sampler.sample(prompts[:1], copies=1, generator=seed(1), temperature=0.0) == second[:1]

        other[0].send_signal(signal.SIGKILL)
        with pytest.raises(DataError, match="an engine was lost"):
            sampler.sample(prompts, copies=1, generator=seed(3))
    finally:
        began = time.monotonic()
        sampler.close()
    _, left = psutil.wait_procs([*one, *other], timeout=30)
    assert left == []
    assert time.monotonic() - began < 30
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU") != before:
        assert time.monotonic() < until, "the engines' CPUs were not given back"
        time.sleep(0.2)
