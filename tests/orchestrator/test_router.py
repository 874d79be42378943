from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import CheckpointError, ConfigError, FuguError, NoWorkerAllowedError, RequestError
from actors.messages import Message
from orchestrator.backbone import Backbone
from orchestrator.head import Checkpoint, CheckpointInfo, Read, save_checkpoint
from orchestrator.landmarks import Landmarks
from orchestrator.prompt import encode
from orchestrator.router import Decision, Router
from tests.orchestrator.tiny import DIMENSION, said, tiny_folder

WORKERS = ("a", "b", "c")
INFO = CheckpointInfo(WORKERS, "tiny", "r1")
TALKS = [said("What is 2 + 2?"), said("Translate rain."), said("Tell me a long story about ships and storms.")]


def head(info: CheckpointInfo = INFO, size: float = 0.1) -> Checkpoint:
    generator = torch.Generator().manual_seed(7)
    return Checkpoint(info, size * torch.randn(info.rows, DIMENSION * len(info.reads), generator=generator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def router(folder: Path) -> Router:
    return Router(Backbone.load(folder, dtype=torch.float32), head(), max_tokens=256)


def decide(router: Router, talks: Any = TALKS, **how: Any) -> list[Decision]:
    count = len(talks)
    return router.decide(
        talks, how.get("allowed", [None] * count), how.get("seeds", [None] * count), how.get("choose", "argmax")
    )


def test_a_decision_is_the_softmax_of_the_heads_logits(router: Router) -> None:
    backbone = router.backbone
    states = backbone.hidden(encode(backbone.tokenizer, TALKS, "chat", 256))
    expected = torch.softmax(states @ router.checkpoint.weight.T, dim=-1)
    for decision, row in zip(decide(router), expected, strict=True):
        assert list(decision.probabilities) == list(WORKERS)
        assert list(decision.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-4)
        assert decision.worker == WORKERS[int(row.argmax())]
        assert (decision.source, decision.role) == ("head", None)
        assert decision.seconds > 0


def test_a_constraint_renormalises_over_what_is_left(router: Router) -> None:
    free = decide(router)[0]
    (bound,) = decide(router, TALKS[:1], allowed=[frozenset({"a", "c", "not of this head"})])
    total = free.probabilities["a"] + free.probabilities["c"]
    assert bound.probabilities == pytest.approx(
        {name: free.probabilities[name] / total for name in ("a", "c")}, abs=1e-4
    )
    assert sum(bound.probabilities.values()) == pytest.approx(1, abs=1e-9)
    assert bound.worker == max(bound.probabilities, key=bound.probabilities.__getitem__)


def test_constraints_differ_within_one_batch(router: Router) -> None:
    allowed = [frozenset({"b"}), None, frozenset({"a", "b"})]
    decisions = decide(router, allowed=allowed)
    assert [set(decision.probabilities) for decision in decisions] == [{"b"}, {"a", "b", "c"}, {"a", "b"}]
    assert [decision.source for decision in decisions] == ["single", "head", "head"]
    assert decisions[0].worker == "b"
    assert decisions[0].probabilities == {"b": 1.0}
    assert decisions[1].probabilities == pytest.approx(decide(router)[1].probabilities, abs=1e-4)


def test_a_seed_repeats_a_sample_whoever_else_is_in_the_batch(router: Router) -> None:
    first = [decide(router, TALKS[:1], seeds=[seed], choose="sample")[0].worker for seed in range(20)]
    again = [decide(router, TALKS, seeds=[seed, 1, 2], choose="sample")[0].worker for seed in range(20)]
    assert first == again
    assert len(set(first)) > 1


def test_samples_follow_the_probabilities(folder: Path) -> None:
    router = Router(Backbone.load(folder, dtype=torch.float32), head(), max_tokens=256, rng=random.Random(3))
    probabilities = decide(router, TALKS[:1])[0].probabilities
    assert max(probabilities.values()) < 0.9  # else there is little to sample
    drawn = Counter(decision.worker for _ in range(30) for decision in decide(router, TALKS[:1] * 40, choose="sample"))
    for name in WORKERS:
        assert drawn[name] / 1200 == pytest.approx(probabilities[name], abs=0.06)


def test_roles_are_three_more_logits_with_a_softmax_of_their_own(folder: Path) -> None:
    info = replace(INFO, roles=True)
    router = Router(Backbone.load(folder, dtype=torch.float32), head(info), max_tokens=256)
    backbone = router.backbone
    logits = backbone.hidden(encode(backbone.tokenizer, TALKS, "chat", 256)) @ router.checkpoint.weight.T
    for decision, row in zip(decide(router), logits, strict=True):
        assert decision.role == ("worker", "thinker", "verifier")[int(row[3:].argmax())]
        assert list(decision.probabilities.values()) == pytest.approx(torch.softmax(row[:3], 0).tolist(), abs=1e-4)
    (single,) = decide(router, TALKS[:1], allowed=[frozenset({"b"})])
    assert single.worker == "b"
    assert single.role == decide(router)[0].role


def test_bad_calls(router: Router) -> None:
    with pytest.raises(NoWorkerAllowedError):
        decide(router, TALKS[:1], allowed=[frozenset({"nobody"})])
    with pytest.raises(NoWorkerAllowedError):
        decide(router, TALKS[:1], allowed=[frozenset()])
    with pytest.raises(RequestError, match="must not be empty"):
        decide(router, [()])
    with pytest.raises(ValueError, match="equal length"):
        router.decide(TALKS, [None], [None])
    assert decide(router, []) == []


def test_an_unusable_hidden_state_is_an_error_not_a_guess(folder: Path) -> None:
    backbone = Backbone.load(folder, dtype=torch.float32)
    with torch.no_grad():
        backbone.model.get_parameter("norm.weight")[0] = float("nan")
    with pytest.raises(FuguError, match="no usable hidden state"):
        decide(Router(backbone, head(), max_tokens=256))


def test_loading_checks_the_pool_the_backbone_and_the_limit(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_checkpoint(path, head())
    router = Router.load(folder, path, ("c", "a", "b"), max_tokens=128, device="cpu", backbone="tiny", revision="r1")
    assert router.workers == WORKERS  # rows keep the checkpoint's order
    assert decide(router)[0].source == "head"
    with pytest.raises(
        CheckpointError, match=r"head\.safetensors does not fit: it has no row for d; it has rows for b"
    ):
        Router.load(folder, path, ("a", "c", "d"))
    with pytest.raises(CheckpointError, match="trained on revision r1 of the backbone, this is r2"):
        Router.load(folder, path, WORKERS, backbone="tiny", revision="r2")
    with pytest.raises(ConfigError, match=r"max_tokens is 4096; this backbone can read 32 to 512"):
        Router.load(folder, path, WORKERS, max_tokens=4096)
    save_checkpoint(path, Checkpoint(INFO, torch.zeros(3, 8)))
    with pytest.raises(CheckpointError, match="hidden states of size 8, this backbone has 32"):
        Router.load(folder, path, WORKERS)


def test_the_checkpoint_says_what_is_read(folder: Path, tmp_path: Path) -> None:
    info = replace(INFO, reads=(Read(2, "mean"), Read(3, "last")), prompt_format="raw")
    path = tmp_path / "head.safetensors"
    save_checkpoint(path, head(info))
    router = Router.load(folder, path, WORKERS, max_tokens=128)
    assert router.backbone.reads == (Read(2, "mean"), Read(3, "last"))
    with pytest.raises(
        CheckpointError, match=r"the head reads mean of layer 2; last of layer 3, .* gives last of the fin"
    ):
        Router(Backbone.load(folder, reads=[Read(-1, "last")]), head(info), max_tokens=128)


def test_no_more_is_read_than_in_training(folder: Path) -> None:
    backbone = Backbone.load(folder, dtype=torch.float32)
    short, free = (Router(backbone, head(replace(INFO, max_tokens=most)), max_tokens=256) for most in (40, None))
    assert (short.max_tokens, free.max_tokens) == (40, 256)
    talk = said("one " * 30 + "MIDDLE" * 40 + " two" * 30)
    states = backbone.hidden(encode(backbone.tokenizer, [talk], "chat", 40))
    expected = torch.softmax(states @ short.checkpoint.weight.T, dim=-1)[0].tolist()
    assert list(decide(short, [talk])[0].probabilities.values()) == pytest.approx(expected, abs=1e-4)
    # What the prompt's limit does not allow is not asked for.
    assert Router(backbone, head(replace(INFO, max_tokens=5)), max_tokens=256).max_tokens == 32


def test_a_head_on_landmarks_decides_as_its_checkpoint_says(folder: Path) -> None:
    backbone = Backbone.load(folder, dtype=torch.float32)
    states = backbone.hidden(encode(backbone.tokenizer, TALKS, "chat", 256))
    centres = torch.nn.functional.normalize(states[:2, :3])
    landmarks = Landmarks(torch.eye(3, DIMENSION), centres, torch.tensor([2.0]))
    weight = torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    info = replace(INFO, domains=("one", "other"))
    made = Checkpoint(info, weight, prior=torch.tensor([0.0, 0.0, 1.0]), landmarks=landmarks)
    router = Router(backbone, made, max_tokens=256)
    for decision, row in zip(decide(router), torch.softmax(made.logits(states), -1), strict=True):
        assert list(decision.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-4)
    # The first two are where the landmarks are; with both far away the prior would choose c.
    assert [decision.worker for decision in decide(router)[:2]] == ["a", "b"]
    assert [decision.domain for decision in decide(router)[:2]] == ["one", "other"]


def test_the_ranking_begins_with_the_choice_and_keeps_order_among_equals() -> None:
    assert Decision("b", {"a": 0.2, "b": 0.1, "c": 0.5, "d": 0.2}).ranking == ("b", "c", "a", "d")
    assert Decision("a", dict.fromkeys(WORKERS, 1 / 3)).ranking == WORKERS


def test_only_the_ends_of_a_long_conversation_are_read(router: Router) -> None:
    def talk(middle: str, end: str) -> tuple[Message, ...]:
        return Message("user", "start " + "x" * 500), Message("assistant", middle * 5000), Message("user", end * 200)

    first, second, third = decide(router, [talk("y", "end"), talk("z", "end"), talk("y", "fin")])
    assert first.probabilities == pytest.approx(second.probabilities, abs=1e-6)
    assert first.probabilities != pytest.approx(third.probabilities, abs=1e-6)
