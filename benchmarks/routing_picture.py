"""Draw what the trained head of the default pool decides: one bar per query, one colour per worker.

    python benchmarks/routing_picture.py [--out docs/routing.png]

The queries below are drawn as they are; none was left out. Prints the same probabilities and, as its last line, one
JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from actors.config_file import load_config
from actors.messages import Message
from actors.model_files import resolve_model
from orchestrator.router import Router

ROOT = Path(__file__).resolve().parent.parent
QUERIES = (
    "What is 7 + 5?",
    "What is 14 * 6?",
    "What is 31 - 9?",
    "What is the opposite of hot?",
    "What is the plural of mouse?",
    "What is the capital of France?",
    "Spell the word house backwards.",
    "Write a short poem about the sea.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "routing.png")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "embedded.yaml")
    parser.add_argument("--quick", action="store_true", help="the same; it takes seconds")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    if config.router.checkpoint is None:
        raise SystemExit(f"{arguments.config} has no checkpoint: nothing is trained")
    names = [worker.name for worker in config.workers]
    router = Router.load(resolve_model(config.router.backbone).folder, config.router.checkpoint, names)
    conversations = [(Message("user", query),) for query in QUERIES]
    decisions = router.decide(conversations, [None] * len(QUERIES), [None] * len(QUERIES))
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(QUERIES) + 1.1), layout="constrained")
    places = list(range(len(QUERIES)))
    left = [0.0] * len(QUERIES)
    for name in names:
        shares = [decision.probabilities[name] for decision in decisions]
        bars = axes.barh(places, shares, left=left, label=name, height=0.72)
        axes.bar_label(bars, [f"{share:.0%}" if share >= 0.08 else "" for share in shares], label_type="center")
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_yticks(places, QUERIES)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability of each worker")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)
    for query, decision in zip(QUERIES, decisions, strict=True):
        print(f"{query:40}", *(f"{name} {share:.2f}" for name, share in decision.probabilities.items()))
    print(json.dumps({query: decision.probabilities for query, decision in zip(QUERIES, decisions, strict=True)}))


if __name__ == "__main__":
    main()
