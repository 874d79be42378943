"""The head that ships, and the script that made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config import load_config
from actors.model_files import EMBEDDED_ID, GGUF_SHA256, resolve_model
from orchestrator.head import check_fits, load_checkpoint
from orchestrator.router import Router
from tests.orchestrator.tiny import said
from training.embedded import choose_settings, compare
from training.sft import SftSettings

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "embedded.yaml"
CHECKPOINT = ROOT / "checkpoints" / "embedded.safetensors"


def test_the_shipped_head_is_of_the_shipped_pool() -> None:
    config = load_config(CONFIG)
    assert config.router.checkpoint == CHECKPOINT
    head = load_checkpoint(CHECKPOINT)
    check_fits(
        head,
        workers=[spec.name for spec in config.workers],
        dimension=576,
        backbone=EMBEDDED_ID,
        revision=GGUF_SHA256[:12],
    )
    assert config.router.backbone == EMBEDDED_ID
    assert head.info.trained["command"] == "python -m training.embedded"
    # No hand-set weights: standardised features and a row per worker, none of them empty.
    assert head.shift is not None
    assert head.scale is not None
    assert bool((head.weight.abs().sum(1) > 0).all())


def test_the_shipped_heads_measured_table_is_what_the_readme_says() -> None:
    measured = load_checkpoint(CHECKPOINT).info.trained["test"]
    readme = (ROOT / "checkpoints" / "README.md").read_text(encoding="utf-8")
    for name, (mean, low, high) in measured.items():
        assert f"| {name} | {mean:.3f} | {low:.3f}–{high:.3f} |" in readme
    workers = load_checkpoint(CHECKPOINT).info.workers
    assert measured["oracle"][0] >= measured["router"][0] >= max(measured[name][0] for name in workers)


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_shipped_head_sends_clear_cases_to_different_workers() -> None:
    config = load_config(CONFIG)
    files = resolve_model(config.router.backbone, progress=False)
    router = Router.load(
        files.folder,
        CHECKPOINT,
        [spec.name for spec in config.workers],
        max_tokens=config.router.max_tokens,
        device="cpu",
        backbone=files.id,
        revision=files.revision,
    )
    # None of these is among the tasks it was trained or tested on; both are families in which one worker is clearly
    # better in `checkpoints/README.md`.
    asked = {
        "stepwise": [
            'Give a word that means the opposite of "dry".',
            'Give a word that means the opposite of "thick".',
        ],
        "direct": ['What is the plural of "garden"?', 'What is the plural of "window"?'],
    }
    talks = [said(text) for texts in asked.values() for text in texts]
    expected = [worker for worker, texts in asked.items() for _ in texts]
    decisions = router.decide(talks, [None] * len(talks), [None] * len(talks))
    assert [decision.worker for decision in decisions] == expected
    assert all(decision.source == "head" for decision in decisions)


def test_the_comparison_by_hand() -> None:
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    table = compare(scores, ("a", "b"), np.array([1.0, 1.0, 0.0, 0.5]), seed=0)
    assert {name: estimate.mean for name, estimate in table.items()} == {
        "a": 0.625,
        "b": 0.375,
        "random": 0.5,
        "router": 0.625,
        "oracle": 0.875,
    }
    assert all(estimate.low <= estimate.mean <= estimate.high for estimate in table.values())


def test_settings_are_chosen_by_what_is_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 4, generator=generator)
    scores = torch.stack([(hidden[:, 0] > 0).float(), (hidden[:, 0] <= 0).float()], dim=1)
    idle = SftSettings(epochs=1, learning_rate=1e-9)
    useful = SftSettings(epochs=100, weight_decay=0.1)
    assert choose_settings(hidden, scores, [idle, useful], seed=0) == useful
