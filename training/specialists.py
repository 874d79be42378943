"""Make a specialist: a LoRA adapter of the embedded model that is good on one ground, and measure it on all.

    python -m training.specialists --ground arithmetic --steps 2000 --out adapters/arithmetic
    python -m training.specialists --compare adapters/arithmetic adapters/words

The first trains (resumable with `--resume`), writes the adapter in peft's layout and, beside it, `metrics.json` with
the settings and what it gets right on fresh problems of each ground. The second measures several adapters and the
model without any on the same problems. Runs on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.lora import Learner, LoraSettings, Precision, Talk  # first: it sets up OpenMP before torch is imported

import numpy as np  # isort: skip
import torch  # isort: skip

from actors.adapters.local_engine import LocalEngine
from actors.errors import ConfigError, FuguError
from actors.messages import ChatRequest, Message
from actors.model_files import EMBEDDED_ALIAS, resolve_model
from training.evaluate import Estimate, bootstrap
from training.grading import grade
from training.ground_families import GROUNDS
from training.grounds import ground_tasks, problem_at
from training.lora_run import Course, learn

if TYPE_CHECKING:
    from rich.table import Table

SYSTEM = "Short answer."
"""Instructions of every specialist. Without any the model's chat template adds its own, which more than doubles the
tokens of a short question."""
BASE = "none"


@dataclass(frozen=True)
class Measure:
    """How adapters are measured: `tasks` fresh ones of each ground, asked `samples` times each. A task's score is the
    mean of its samples; intervals come from resampling tasks."""

    tasks: int = 100
    samples: int = 1
    temperature: float = 0.3
    max_tokens: int = 48
    batch: int = 32
    seed: int = 90_001

    def __post_init__(self) -> None:
        if self.tasks < 0 or min(self.samples, self.max_tokens, self.batch) < 1 or self.temperature < 0:
            raise ConfigError("tasks and temperature must not be negative; samples, tokens and batch at least 1")


@dataclass(frozen=True)
class Measured:
    """`grounds[adapter][ground]`: its mean score there; `families[adapter][family]` likewise, without interval."""

    grounds: Mapping[str, Mapping[str, Estimate]]
    families: Mapping[str, Mapping[str, float]]

    def json(self) -> dict[str, Any]:
        cells = {
            adapter: {ground: [cell.mean, cell.low, cell.high] for ground, cell in row.items()}
            for adapter, row in self.grounds.items()
        }
        return {"grounds": cells, "families": {name: dict(row) for name, row in self.families.items()}}

    def table(self) -> Table:
        from rich.table import Table

        columns = list(next(iter(self.grounds.values())))
        table = Table(title="share right on fresh problems, with 95% interval")
        table.add_column("adapter")
        for ground in columns:
            table.add_column(ground, justify="right")
        for adapter, row in self.grounds.items():
            table.add_row(adapter, *(str(row[ground]) for ground in columns))
        return table


@dataclass(frozen=True)
class SpecialistRun:
    """What to train and where to write it. `state` is the folder of the state to resume from and of `curve.jsonl`
    (None: `runs/specialists/<name of out>`). Every `validate_every` steps `validation` problems that are neither
    trained on nor measured are looked at."""

    ground: str
    out: Path
    settings: LoraSettings
    model: str = EMBEDDED_ALIAS
    system: str = SYSTEM
    state: Path | None = None
    checkpoint_every: int = 25
    validate_every: int = 50
    validation: int = 96
    measure: Measure = field(default_factory=Measure)
    device: str = "auto"
    precision: Precision = "auto"
    resume: bool = False
    progress: bool = True
    command: str = ""

    def __post_init__(self) -> None:
        if self.ground not in GROUNDS:
            raise ConfigError(f"no ground {self.ground}; there are {', '.join(GROUNDS)}")
        if min(self.checkpoint_every, self.validate_every, self.validation) < 1:
            raise ConfigError("checkpoints, validations and their problems must be at least 1")

    @property
    def folder(self) -> Path:
        return self.state or Path("runs/specialists") / self.out.name


@dataclass(frozen=True)
class SpecialistReport:
    """`loss` and `right` are of the last validation; `seconds` of this process's `steps` alone, without measuring."""

    out: Path
    ground: str
    numbers: int
    steps: int
    seconds: float
    loss: float
    right: float
    measured: Measured | None

    def json(self) -> dict[str, Any]:
        return {
            "ground": self.ground,
            "trained_numbers": self.numbers,
            "steps": self.steps,
            "seconds": self.seconds,
            "validation": {"loss": self.loss, "right": self.right},
            "measured": None if self.measured is None else self.measured.json(),
        }

    def table(self) -> Table:
        if self.measured is not None:
            return self.measured.table()
        from rich.table import Table

        table = Table(title=str(self.out))
        table.add_row("validation, share right", f"{self.right:.3f}")
        table.add_row("validation, loss", f"{self.loss:.4f}")
        return table


def run(settings: SpecialistRun) -> SpecialistReport:
    """Train a specialist, write its adapter, measure it and the model without it. Ctrl-C loses the step in progress,
    a kill the steps since the last checkpoint; `resume` goes on as if nothing had happened.

    Raises:
        ConfigError: settings that make no sense, or a model that cannot be loaded.
        CheckpointError: nothing to resume, or the state of another run.
    """
    files = resolve_model(settings.model)
    instructions = Message("system", settings.system)

    def talk(index: int, split: str = "train") -> Talk:
        problem = problem_at(settings.ground, index, seed=settings.settings.seed, split=split)
        return Talk((instructions, Message("user", problem.prompt)), problem.answer)

    learner = Learner(
        files.folder,
        settings.settings,
        talk,
        identity={"ground": settings.ground, "system": settings.system, "model": f"{files.id}@{files.revision}"},
        device=settings.device,
        precision=settings.precision,
    )
    if settings.resume:
        learner.restore(settings.folder)
    elif (settings.folder / "state.pt").exists():
        raise ConfigError(f"{settings.folder} holds the state of a run; resume it, or remove that folder")
    validation = [talk(index, "val") for index in range(settings.validation)]
    course = Course(
        settings.ground, settings.folder, settings.checkpoint_every, settings.validate_every, settings.progress
    )
    learnt = learn(learner, course, validation)
    learner.export(settings.out, base=files.id)
    found = None
    if settings.measure.tasks:
        adapters = {settings.ground: settings.out}
        found = measure(files.folder, adapters, settings.measure, system=settings.system, device=settings.device)
    report = SpecialistReport(
        settings.out,
        settings.ground,
        learner.numbers,
        learnt.steps,
        learnt.seconds,
        learnt.loss,
        learnt.right,
        found,
    )
    about = {
        "command": settings.command,
        "model": f"{files.id}@{files.revision}",
        "system": settings.system,
        "settings": asdict(settings.settings),
        "measure": asdict(settings.measure),
        "torch": torch.__version__,
        "device": str(learner.model.device),
    }
    (settings.out / "metrics.json").write_text(json.dumps(about | report.json(), indent=2) + "\n", encoding="utf-8")
    return report


def measure(
    folder: Path, adapters: Mapping[str, Path], how: Measure, *, system: str = SYSTEM, device: str = "auto"
) -> Measured:
    """What the model in `folder` gets right with each adapter and without (`none`), on test problems of all grounds,
    answered by the engine that serves them.

    Raises:
        ConfigError: a model or adapter that cannot be loaded, or an adapter called `none`.
    """
    if BASE in adapters:
        raise ConfigError(f"an adapter cannot be called {BASE}: that is the model without one")
    tasks = ground_tasks(list(GROUNDS), count=how.tasks, seed=how.seed)
    requests = [
        ChatRequest(
            (Message("system", system), Message("user", task.prompt)),
            temperature=how.temperature,
            max_tokens=how.max_tokens,
            seed=how.seed + how.samples * number + sample,
        )
        for number, task in enumerate(tasks)
        for sample in range(how.samples)
    ]
    engine = LocalEngine.load(folder, device=device, adapters=adapters, max_batch=how.batch)
    grounds: dict[str, dict[str, Estimate]] = {}
    families: dict[str, dict[str, float]] = {}
    try:
        for name in (BASE, *adapters):
            replies = engine.generate_batch(requests, adapter=None if name == BASE else name)
            asked = [task for task in tasks for _ in range(how.samples)]
            scores = np.array([grade(task, reply.text) for task, reply in zip(asked, replies, strict=True)])
            scores = scores.reshape(len(tasks), how.samples).mean(1)
            rng = np.random.default_rng(how.seed)
            grounds[name] = {
                ground: bootstrap(scores[[task.domain == ground for task in tasks]], rng) for ground in GROUNDS
            }
            families[name] = {
                family: float(scores[[task.dataset == family for task in tasks]].mean())
                for family in dict.fromkeys(task.dataset for task in tasks)
            }
    finally:
        engine.close()
    return Measured(grounds, families)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    defaults = LoraSettings(steps=1)
    how = Measure()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ground", choices=list(GROUNDS), help="train a specialist for this ground")
    what.add_argument("--compare", type=Path, nargs="+", metavar="ADAPTER", help="only measure these")
    parser.add_argument("--out", type=Path, help="folder of the adapter (default: adapters/GROUND)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--rank", type=int, default=defaults.rank)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--state", type=Path, help="folder to resume from (default: runs/specialists/NAME OF OUT)")
    parser.add_argument("--checkpoint-every", type=int, default=25)
    parser.add_argument("--validate-every", type=int, default=50)
    parser.add_argument("--tasks", type=int, default=how.tasks, help="measured of each ground; 0: do not measure")
    parser.add_argument("--samples", type=int, default=how.samples)
    parser.add_argument("--temperature", type=float, default=how.temperature)
    parser.add_argument("--model", default=EMBEDDED_ALIAS)
    parser.add_argument("--system", default=SYSTEM, help="instructions the specialist is trained and measured with")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="one more file for the report")
    options = parser.parse_args(arguments)
    try:
        _run(options, "python -m training.specialists " + shlex.join(arguments))
    except FuguError as error:
        print(error.message, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace, command: str) -> None:
    from rich.console import Console

    how = Measure(tasks=options.tasks, samples=options.samples, temperature=options.temperature)
    report: Measured | SpecialistReport
    if options.compare:
        if not how.tasks:
            raise ConfigError("there is nothing to compare on: tasks is 0")
        adapters = {folder.name: folder for folder in options.compare}
        if len(adapters) < len(options.compare):
            raise ConfigError("two of the adapters to compare have the same name")
        folder = resolve_model(options.model).folder
        report = measure(folder, adapters, how, system=options.system, device=options.device)
    else:
        report = run(
            SpecialistRun(
                options.ground,
                options.out or Path("adapters") / options.ground,
                LoraSettings(
                    steps=options.steps,
                    batch=options.batch,
                    rank=options.rank,
                    alpha=2 * options.rank,
                    learning_rate=options.learning_rate,
                    seed=options.seed,
                ),
                model=options.model,
                system=options.system,
                state=options.state,
                checkpoint_every=options.checkpoint_every,
                validate_every=options.validate_every,
                measure=how,
                device=options.device,
                precision=options.precision,
                resume=options.resume,
                command=command,
            )
        )
    Console(width=120).print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.json(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
