"""The pool and the head that ship: they belong together, measured as their tables say, and clear cases go where they
should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.config_file import load_config
from actors.model_files import EMBEDDED_ID, GGUF_SHA256, resolve_model
from orchestrator.head import check_fits, load_checkpoint
from orchestrator.router import Router
from tests.orchestrator.tiny import said
from training.ground_families import GROUNDS

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "embedded.yaml"
CHECKPOINT = ROOT / "checkpoints" / "embedded.safetensors"
# Questions in which one worker is clearly better than the others.
CLEAR = {
    "arithmetic": [
        "What is 147 + 122?",
        "Quentin has 31 marbles and finds 12. How many marbles does Quentin have now?",
    ],
    "words": ['Write "saxophone" in capital letters.', 'What is the last letter of "xylophone"?'],
    "counting": ["What is the largest of 412, 977, 530?", "How many words are in this list: koala, emu, gecko, ibis"],
    "logic": [
        "Wanda is taller than Igor. Igor is taller than Pepe. Who is the shortest?",
        "Is this True or False: not False and True",
    ],
    "general": ["What is the capital of Sweden?", "Write a sentence about a volcano."],
}


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
    # Nothing is set by hand: no worker's row is empty.
    assert bool((head.weight.abs().sum(1) > 0).all())


def test_each_specialist_is_best_on_its_own_ground() -> None:
    measured = json.loads((ROOT / "adapters" / "matrix.json").read_text(encoding="utf-8"))["grounds"]
    assert set(measured) == {"none", *GROUNDS}
    for ground in GROUNDS:
        others = max(cells[ground][0] for name, cells in measured.items() if name != ground)
        assert measured[ground][ground][0] >= others + 0.1
    readme = (ROOT / "adapters" / "README.md").read_text(encoding="utf-8")
    for name, cells in measured.items():
        assert f"| {name} | " + " | ".join(f"{cells[ground][0]:.2f}" for ground in GROUNDS) + " |" in readme


def test_the_shipped_heads_measured_table_is_what_the_readme_says() -> None:
    measured = json.loads((ROOT / "checkpoints" / "embedded.json").read_text(encoding="utf-8"))
    readme = (ROOT / "checkpoints" / "README.md").read_text(encoding="utf-8")
    for row in measured["rows"]:
        score = row["score"]
        assert f"| {row['name']} | {score['mean']:.3f} | {score['low']:.3f}–{score['high']:.3f} |" in readme


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_shipped_head_sends_clear_cases_to_their_specialists() -> None:
    config = load_config(CONFIG)
    assert config.router.checkpoint is not None
    files = resolve_model(config.router.backbone, progress=False)
    router = Router.load(
        files.folder,
        config.router.checkpoint,
        [spec.name for spec in config.workers],
        max_tokens=config.router.max_tokens,
        device="cpu",
        backbone=files.id,
        revision=files.revision,
    )
    talks = [said(text) for texts in CLEAR.values() for text in texts]
    expected = [worker for worker, texts in CLEAR.items() for _ in texts]
    decisions = router.decide(talks, [None] * len(talks), [None] * len(talks))
    assert [decision.worker for decision in decisions] == expected
    assert all(decision.source == "head" for decision in decisions)
