"""Warm a conductor up: teach a small model to write plans that parse, before reinforcement teaches it good ones.

A LoRA adapter is fitted (`training.lora`) to well-formed plans whose workers are drawn at random (`training.plans`).
Afterwards plans for problems that were not trained on are sampled and parsed: that share is what the warm start is
for. Resumable; a resumed run equals a straight one bit for bit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from training.lora import STATE, Learner, LoraSettings, Precision  # first: it sets up OpenMP

import torch  # isort: skip

from actors.errors import ConfigError, PlanError
from actors.model_files import EMBEDDED_ALIAS, resolve_model
from orchestrator.workflow import parse_workflow
from training.lora_run import Course, learn
from training.plans import PlanExample, PlanSettings, plan_example
from training.sampling import sample

if TYPE_CHECKING:
    from rich.table import Table

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


@dataclass(frozen=True)
class WarmStart:
    """What to train and where to write it. `state` is the folder of the state to resume from and of `curve.jsonl`
    (None: `runs/conductor/<name of out>-warm`). `checks` plans are sampled at `temperature` and parsed in the end."""

    out: Path
    settings: LoraSettings
    plans: PlanSettings = field(default_factory=PlanSettings)
    model: str = EMBEDDED_ALIAS
    state: Path | None = None
    checkpoint_every: int = 10
    validate_every: int = 20
    validation: int = 48
    checks: int = 100
    temperature: float = 1.0
    max_tokens: int = 160
    device: str = "auto"
    precision: Precision = "auto"
    resume: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if min(self.checkpoint_every, self.validate_every, self.validation, self.max_tokens) < 1 or self.checks < 0:
            raise ConfigError("checkpoints, validations, their plans and tokens must be at least 1, checks at least 0")

    @property
    def folder(self) -> Path:
        return self.state or Path("runs/conductor") / f"{self.out.name}-warm"


@dataclass(frozen=True)
class WarmStartReport:
    """`parsed` is the share of sampled plans that are workflows, `failures` counts why the others are not. `loss` is of
    held-out plans, in nats per token; `prompt_tokens` and `plan_tokens` are means of one example."""

    out: Path
    numbers: int
    steps: int
    seconds: float
    loss: float
    parsed: float
    failures: Mapping[str, int]
    prompt_tokens: float
    plan_tokens: float

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"out": self.out.name}

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title=f"warm start: {self.out}", show_header=False)
        table.add_row("plans that parse", f"{self.parsed:.3f}")
        for kind, count in self.failures.items():
            table.add_row(f"  {kind}", str(count))
        table.add_row("loss of held-out plans", f"{self.loss:.4f}")
        table.add_row("tokens of a prompt, a plan", f"{self.prompt_tokens:.0f}, {self.plan_tokens:.0f}")
        table.add_row("steps, seconds", f"{self.steps}, {self.seconds:.0f}")
        return table


def run(settings: WarmStart) -> WarmStartReport:
    """Train, write the adapter and, beside it, `warm_start.json` with settings and results.

    Raises:
        ConfigError: settings that make no sense, or a model that cannot be loaded.
        CheckpointError: nothing to resume, or the state of another run.
    """
    files = resolve_model(settings.model)
    learner = Learner(
        files.folder,
        settings.settings,
        lambda index: plan_example(index, settings.plans).talk,
        identity={"plans": asdict(settings.plans), "model": f"{files.id}@{files.revision}"},
        device=settings.device,
        precision=settings.precision,
    )
    if settings.resume:
        learner.restore(settings.folder)
    elif (settings.folder / STATE).exists():
        raise ConfigError(f"{settings.folder} holds the state of a run; resume it, or remove that folder")
    course = Course("plans", settings.folder, settings.checkpoint_every, settings.validate_every, settings.progress)
    validation = [plan_example(index, settings.plans, split="val").talk for index in range(settings.validation)]
    learnt = learn(learner, course, validation)
    learner.export(settings.out, base=files.id)
    failures = check_plans(learner, settings)
    encoded = [learner.encode(talk) for talk in validation]
    report = WarmStartReport(
        out=settings.out,
        numbers=learner.numbers,
        steps=learnt.steps,
        seconds=learnt.seconds,
        loss=learnt.loss,
        parsed=1 - failures.total() / settings.checks if settings.checks else float("nan"),
        failures=dict(failures.most_common()),
        prompt_tokens=fmean(len(one.prompt) for one in encoded),
        plan_tokens=fmean(one.answer for one in encoded),
    )
    about = {
        "model": f"{files.id}@{files.revision}",
        "plans": asdict(settings.plans),
        "settings": asdict(settings.settings),
        "torch": torch.__version__,
        "device": str(learner.model.device),
    }
    (settings.out / "warm_start.json").write_text(json.dumps(about | report.json(), indent=2) + "\n", encoding="utf-8")
    return report


def check_plans(learner: Learner, settings: WarmStart) -> Counter[str]:
    """Sample a plan for each of `settings.checks` held-out prompts; counts the kinds of those that do not parse."""
    first = settings.validation  # prompts that no validation looked at
    examples = [plan_example(first + index, settings.plans, split="val") for index in range(settings.checks)]
    generator = torch.Generator().manual_seed(settings.plans.seed)
    failures: Counter[str] = Counter()
    for start in range(0, len(examples), settings.settings.batch):
        part = examples[start : start + settings.settings.batch]
        for example, text in zip(part, _texts(learner, settings, part, generator), strict=True):
            try:
                parse_workflow(text, example.workers, allowed=example.allowed, allow_empty=example.again)
            except PlanError as error:
                failures[error.kind] += 1
    return failures


def _texts(
    learner: Learner, settings: WarmStart, examples: Sequence[PlanExample], generator: torch.Generator
) -> list[str]:
    written = sample(
        learner.model,
        [learner.encode(example.talk).prompt for example in examples],
        copies=1,
        max_tokens=settings.max_tokens,
        ends={learner.end},
        generator=generator,
        temperature=settings.temperature,
    )
    return [learner.tokenizer.decode(copies[0], skip_special_tokens=True) for copies in written]
