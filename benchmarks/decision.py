"""What a routing decision costs beside one bare forward pass of its backbone, at the same batch and length.

    python benchmarks/decision.py [--quick] [--model FOLDER OR NAME] [--tokens 64]

Bare: the backbone's forward pass on ready token tensors. Decision: `Router.decide`, from messages to decisions
(template, tokens, pass, head, masks, choice). Both alternate, and each ratio is the median over rounds of one
round's decision time over its bare time, so that a machine that slows down slows both. Also times the backbone in
bf16 and fp32, which is how the default for this CPU was chosen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Spinning threads make times mean nothing on a machine that does anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table

from actors.messages import Message
from actors.model_files import resolve_model
from orchestrator.backbone import Backbone
from orchestrator.head import Checkpoint, CheckpointInfo
from orchestrator.prompt import encode
from orchestrator.router import Router

WORKERS = ("a", "b", "c", "d")


def conversation(tokens: int, backbone: Backbone, index: int) -> tuple[Message, ...]:
    """A conversation that encodes to exactly `tokens` tokens."""
    text = f"Request {index % 10}:"
    while len(encode(backbone.tokenizer, [(Message("user", text),)], "chat", 8192)[0]) < tokens:
        text += " river"
    return (Message("user", text),)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(router: Router, batch: int, tokens: int, rounds: int) -> dict[str, float]:
    backbone = router.backbone
    talks = [conversation(tokens, backbone, index) for index in range(batch)]
    ids = torch.tensor(encode(backbone.tokenizer, talks, "chat", 8192), device=backbone.device)

    @torch.inference_mode()
    def bare() -> None:
        backbone.model(input_ids=ids, use_cache=False).last_hidden_state[:, -2].float().cpu()

    def decide() -> None:
        router.decide(talks, [None] * batch, [None] * batch)

    bare()  # both once, to warm
    decide()
    pairs = []
    for round_ in range(rounds):
        if round_ % 2:
            pairs.append((seconds(bare), seconds(decide)))
        else:
            decided = seconds(decide)
            pairs.append((seconds(bare), decided))
    return {
        "bare_ms": 1000 * statistics.median(bare_s for bare_s, _ in pairs),
        "decision_ms": 1000 * statistics.median(decision_s for _, decision_s in pairs),
        "ratio": statistics.median(decision_s / bare_s for bare_s, decision_s in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; within a minute")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    files = resolve_model(options.model)
    console = Console()
    results: dict[str, float] = {}

    backbone = Backbone.load(files.folder)
    info = CheckpointInfo(WORKERS, files.id, files.revision)
    weight = 0.1 * torch.randn(len(WORKERS), backbone.dimension, generator=torch.Generator().manual_seed(0))
    router = Router(backbone, Checkpoint(info, weight), max_tokens=1024)
    table = Table(title=f"decision over bare forward pass, {options.tokens} tokens, {backbone.dtype}")
    for column in ("batch", "bare ms", "decision ms", "ratio"):
        table.add_column(column, justify="right")
    for batch in (1, 8, 32):
        rounds = {1: 15, 8: 5, 32: 3}[batch] if options.quick else {1: 60, 8: 25, 32: 15}[batch]
        got = measure(router, batch, options.tokens, rounds)
        table.add_row(str(batch), f"{got['bare_ms']:.1f}", f"{got['decision_ms']:.1f}", f"{got['ratio']:.3f}")
        results |= {
            f"bare_ms_b{batch}": round(got["bare_ms"], 2),
            f"decision_ms_b{batch}": round(got["decision_ms"], 2),
            f"decision_ratio_b{batch}": round(got["ratio"], 4),
        }
    console.print(table)

    if backbone.device.type == "cpu":
        times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        backbones = {dtype: Backbone.load(files.folder, dtype=dtype) for dtype in times}
        prompts = [list(range(100, 100 + options.tokens))] * 8
        for round_ in range(3 if options.quick else 10):
            for dtype, model in backbones.items():
                spent = seconds(lambda model=model: model.hidden(prompts))  # type: ignore[misc]
                if round_:  # the first one warms
                    times[dtype].append(spent)
        ratio = statistics.median(times[torch.float32]) / statistics.median(times[torch.bfloat16])
        console.print(f"fp32 takes {ratio:.2f} times as long as bf16 at batch 8; in use: {backbone.dtype}")
        results["fp32_over_bf16_b8"] = round(ratio, 3)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
