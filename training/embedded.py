"""Make the head that ships for the embedded pool: measure its workers on small tasks, train on 70%, report the rest.

    python -m training.embedded

labels into `runs/embedded` (resumable), writes `checkpoints/embedded.safetensors` and prints the measured table.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.adapters.local import LocalAdapter
from actors.adapters.local_engine import LocalEngine
from actors.config import FuguConfig, load_config
from actors.errors import ConfigError, FuguError
from actors.messages import ChatReply, ChatRequest, Message
from actors.model_files import ModelFiles, cache_dir, resolve_model
from actors.worker import WorkerRuntime
from orchestrator.backbone import Backbone
from orchestrator.head import Checkpoint, CheckpointInfo, save_checkpoint
from training.evaluate import Estimate, bootstrap
from training.families import family_tasks
from training.features import features
from training.label import Sample, label
from training.outcomes import Outcomes, Task
from training.sft import SftSettings, reached, train

FAMILIES = (
    "add",
    "subtract",
    "multiply",
    "chain",
    "story",
    "fact",
    "opposite",
    "yes_no",
    "even_odd",
    "plural",
)
FOLDS = 5


@dataclass(frozen=True)
class InProcess:
    """A configured worker without Ray (`training.label.Answers`)."""

    runtime: WorkerRuntime

    @property
    def name(self) -> str:
        return self.runtime.spec.name

    async def complete(self, request: ChatRequest) -> ChatReply:
        return await self.runtime.complete(request)


def measure(
    config: FuguConfig, tasks: Sequence[Task], folder: Path, *, samples: int, batch: int, max_tokens: int
) -> Outcomes:
    """Ask every worker of the pool (all on one local model) every task, with a progress bar.

    Raises:
        ConfigError: a worker that is not `local`, or workers on different models.
        DataError: as `training.label.label`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    models = {(spec.provider, spec.model) for spec in config.active}
    if len(models) != 1 or next(iter(models))[0] != "local":
        raise ConfigError("this script measures pools whose workers share one local model")
    files = resolve_model(next(iter(models))[1])
    adapters = {spec.name: spec.adapter for spec in config.active if spec.adapter is not None}
    engine = LocalEngine.load(files.folder, adapters=adapters, max_batch=batch)
    # Labelling keeps the whole batch busy; serving limits are for serving.
    specs = [
        spec.model_copy(update={"limits": spec.limits.model_copy(update={"concurrency": batch})})
        for spec in config.active
    ]
    workers = [InProcess(WorkerRuntime(spec, LocalAdapter(spec, engine))) for spec in specs]
    columns = (TextColumn("asking the workers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns) as bar:
            total = len(tasks) * len(workers) * samples
            row = bar.add_task("label", total=total)

            def advance(_sample: Sample) -> None:
                bar.advance(row)

            return asyncio.run(
                label(
                    workers, tasks, folder, samples=samples, concurrency=batch, max_tokens=max_tokens, on_sample=advance
                )
            )
    finally:
        engine.close()


def choose_settings(hidden: Tensor, scores: Tensor, candidates: Sequence[SftSettings], seed: int) -> SftSettings:
    """The settings with the best mean reached score over cross-validation folds of the training tasks."""
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))
    folds = order.chunk(FOLDS)

    def held_out(settings: SftSettings) -> float:
        total = 0.0
        for fold in folds:
            rest = torch.ones(len(hidden), dtype=torch.bool)
            rest[fold] = False
            result = train(hidden[rest], scores[rest], settings)
            total += float(reached(result.logits(hidden[fold]), scores[fold]).sum())
        return total / len(hidden)

    return max(candidates, key=held_out)


def compare(
    scores: NDArray[np.float64], names: Sequence[str], routed: NDArray[np.float64], seed: int
) -> dict[str, Estimate]:
    """Mean score with its 95% interval of each worker, a random one, the router and the best one per task."""
    rng = np.random.default_rng(seed)
    columns = {name: scores[:, index] for index, name in enumerate(names)}
    columns |= {"random": scores.mean(1), "router": routed, "oracle": scores.max(1)}
    return {name: bootstrap(values, rng) for name, values in columns.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/embedded.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/embedded"), help="outcomes folder, resumable")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/embedded.safetensors"))
    parser.add_argument("--tasks", type=int, default=32, help="of each family, at most")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=48, help="answers are cut there while measuring")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        run(options)
    except FuguError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    config = load_config(options.config)
    tasks = family_tasks(FAMILIES, count=options.tasks, seed=options.seed)
    found = measure(
        config, tasks, options.folder, samples=options.samples, batch=options.batch, max_tokens=options.max_tokens
    )
    names = [spec.name for spec in config.active]
    files = resolve_model(config.router.backbone)
    # Fitting on the CPU in float32 makes the same file on every machine, as far as its arithmetic allows.
    backbone = Backbone.load(files.folder)
    hidden = {
        split: read(backbone, files, found.split(split).tasks, config.router.max_tokens) for split in ("train", "test")
    }
    scores = {split: torch.from_numpy(found.split(split).scores(names)) for split in ("train", "test")}
    candidates = [
        SftSettings(tau=tau, weight_decay=decay, epochs=150, seed=options.seed)
        for tau in (0.1, 0.25, 0.5)
        for decay in (0.3, 1.0, 3.0, 10.0)
    ]
    settings = choose_settings(hidden["train"], scores["train"], candidates, options.seed)
    result = train(hidden["train"], scores["train"], settings)
    logits = result.logits(hidden["test"])
    routed = reached(logits, scores["test"]).double().numpy()
    table = compare(scores["test"].double().numpy(), names, routed, options.seed)
    # The best single worker is chosen where the head was trained; the gain over it is paired by task.
    best = int(scores["train"].mean(0).argmax())
    gain = bootstrap(routed - scores["test"][:, best].double().numpy(), np.random.default_rng(options.seed))
    shares = torch.bincount(logits.argmax(-1), minlength=len(names)) / len(logits)
    trained: dict[str, Any] = {
        "method": "sft",
        "command": "python -m training.embedded",
        "tau": settings.tau,
        "weight_decay": settings.weight_decay,
        "epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "seed": options.seed,
        "samples": options.samples,
        "max_tokens": options.max_tokens,
        "tasks": {split: len(hidden[split]) for split in hidden},
        "test": {name: [estimate.mean, estimate.low, estimate.high] for name, estimate in table.items()},
        "gain": {"over": names[best], "points": [gain.mean, gain.low, gain.high]},
        "routing_share": dict(zip(names, shares.tolist(), strict=True)),
    }
    info = CheckpointInfo(tuple(names), files.id, files.revision, trained=trained)
    save_checkpoint(options.out, Checkpoint(info, result.weight, result.shift, result.scale))
    report(found.split("test"), names, logits, table, trained)
    print(f"wrote {options.out}")


def read(backbone: Backbone, files: ModelFiles, tasks: Sequence[Task], max_tokens: int) -> Tensor:
    """Hidden states of the tasks' prompts, as the router sees them when they are asked."""
    talks = [(Message("user", task.prompt),) for task in tasks]
    return features(
        backbone,
        talks,
        prompt_format="chat",
        max_tokens=max_tokens,
        revision=f"{files.id}@{files.revision}",
        cache=cache_dir() / "features.sqlite",
    )


def report(
    test: Outcomes, names: Sequence[str], logits: Tensor, table: dict[str, Estimate], trained: dict[str, Any]
) -> None:
    """The measured tables in Markdown, for people and for `checkpoints/README.md`."""
    print(f"\nHeld-out tasks: {trained['tasks']['test']}, mean score with 95% bootstrap interval\n")
    print("| | mean | 95% interval |\n|---|---|---|")
    for name, estimate in table.items():
        print(f"| {name} | {estimate.mean:.3f} | {estimate.low:.3f}–{estimate.high:.3f} |")
    mean, low, high = trained["gain"]["points"]
    over = trained["gain"]["over"]
    print(f"\nRouter less {over} (best single on train), paired by task: {mean:+.3f} ({low:+.3f} to {high:+.3f})")
    chosen = logits.argmax(-1).tolist()
    scores = test.scores(names)
    print(f"\n| family | tasks | {' | '.join(names)} | router | {' | '.join(f'to {name}' for name in names)} |")
    print(f"|---|---|{'---|' * (2 * len(names) + 1)}")
    for family in dict.fromkeys(task.dataset for task in test.tasks):
        rows = [index for index, task in enumerate(test.tasks) if task.dataset == family]
        means = [f"{scores[rows, column].mean():.2f}" for column in range(len(names))]
        routed = np.mean([scores[row, chosen[row]] for row in rows])
        shares = [f"{sum(chosen[row] == column for row in rows) / len(rows):.0%}" for column in range(len(names))]
        print(f"| {family} | {len(rows)} | {' | '.join(means)} | {routed:.2f} | {' | '.join(shares)} |")
    print()


if __name__ == "__main__":
    raise SystemExit(main())
