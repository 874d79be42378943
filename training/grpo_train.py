"""Train a conductor by GRPO: it writes workflows, the pool carries them out, and what is right is rewarded.

The policy is a small model in this process (on a GPU where there is one). Where all workers share one local model
they answer in this process too, in one batch; other pools answer through their provider actors, with rollouts spread
over a Ray cluster. Every random draw comes from the step's number, so that a resumed run goes on as if it had never
stopped, as far as workers answer alike: their answers are kept in the state's folder and asked for once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from training.grpo import GrpoLearner, GrpoSettings  # first: it sets up OpenMP before torch is imported
from training.lora import STATE, Precision

import torch  # isort: skip

from actors.config import FuguConfig
from actors.config_file import load_config
from actors.errors import ConfigError
from actors.model_files import EMBEDDED_ALIAS, ModelFiles, resolve_model
from orchestrator.assign import WhoAssigns
from orchestrator.conductor_card import ConductorCard, write_card
from orchestrator.conductor_prompt import PromptSettings
from training.conductor_questions import Number, Question, Subsets, endless, listed, question_at
from training.conductor_rollouts import AssignedRollouts, InProcessRollouts, Rollouts, RolloutSettings, Written
from training.grpo_curves import draw, shown
from training.grpo_rounds import Recursion, Sampler, make_batch, summary
from training.in_process import in_process, shares_one_model
from training.lora_run import rows_of
from training.systems import pool_router

if TYPE_CHECKING:
    from rich.table import Table

COMPACT = PromptSettings(style="compact")


@dataclass(frozen=True)
class VllmSettings:
    """Engines that sample, with a GPU (or a part of one) each; `share` is the share of its memory that one takes. On a
    cluster they are reserved together with the learner (`training.grpo_placed`)."""

    engines: int = 1
    gpus: float = 0.0
    context: int = 9216
    share: float = 0.45


@dataclass(frozen=True)
class GrpoRun:
    """What to train, on what, and where to write it.

    `config` holds the pool; its order is the numbering that is learnt. `start` is the adapter to begin with (a warm
    start). `sources` are tasks as `training.tasks.load_tasks` takes them; without any, the embedded world's composite
    tasks with a share `single` for one specialist each. Every `validate_every` steps `validation` fixed questions of
    the split `val` are planned at `val_temperature`. `batch` bounds the calls at once of workers in this process;
    others run over Ray (`address`: join one), `concurrency` rollouts at once on each CPU, a batch in `seconds`.
    `assign` "router": the pool's head says who does a step, and only what is to be done is learnt.
    With `vllm` plans are sampled by engines over Ray that pick up the adapter each step, else by the model that learns.
    `gpus` are for the learner where a cluster has nodes for it (None: what engines leave of one, if there is any).
    `architecture` describes a model whose files are not there, for a dry run (keys as in its `config.json`).
    """

    out: Path
    config: Path
    grpo: GrpoSettings
    start: Path | None = None
    model: str = EMBEDDED_ALIAS
    sources: tuple[str, ...] = ()
    single: float = 0.3
    subsets: Subsets = field(default_factory=Subsets)
    recursion: Recursion = field(default_factory=Recursion)
    vllm: VllmSettings | None = None
    assign: WhoAssigns = "conductor"
    rollouts: RolloutSettings = field(default_factory=RolloutSettings)
    prompt: PromptSettings = COMPACT
    state: Path | None = None
    checkpoint_every: int = 5
    validate_every: int = 10
    validation: int = 48
    val_temperature: float = 0.2
    batch: int = 32
    address: str | None = None
    gpus: float | None = None
    concurrency: int = 16
    seconds: float = 3600.0
    device: str = "auto"
    precision: Precision = "auto"
    resume: bool = False
    progress: bool = True
    architecture: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if min(self.checkpoint_every, self.validate_every, self.batch) < 1 or self.validation < 0:
            raise ConfigError("checkpoints, validations and batches must be at least 1")
        if not 0 <= self.single <= 1 or not 0 <= self.recursion.share <= 1 or not 0 <= self.recursion.discount <= 1:
            raise ConfigError("shares and the discount must be between 0 and 1")

    @property
    def folder(self) -> Path:
        return self.state or Path("runs/conductor") / self.out.name


@dataclass(frozen=True)
class GrpoReport:
    """`first` and `last` are means over the first and last tenth of the steps (reward, right, parsed); `validation` is
    (step, right, parsed) of each validation. `seconds` of this process."""

    out: Path
    steps: int
    numbers: int
    seconds: float
    first: Mapping[str, float]
    last: Mapping[str, float]
    validation: tuple[tuple[int, float, float], ...]
    calls: int
    usd: float | None
    curves: Path

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"out": shown_path(self.out), "curves": shown_path(self.curves)}

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.out}: {self.steps} steps of GRPO", caption=f"curves: {self.curves}")
        for column in ("", "first tenth", "last tenth"):
            table.add_column(column, justify="left" if not column else "right")
        for name, value in self.first.items():
            table.add_row(name, f"{value:.3f}", f"{self.last[name]:.3f}")
        for step, right, parsed in self.validation:
            table.add_row(f"validation after {step}", f"right {right:.3f}", f"parsed {parsed:.3f}")
        return table


def run(settings: GrpoRun, rollouts: Rollouts | None = None) -> GrpoReport:
    """Train, write the adapter (or model) with `grpo.json` and the card that serving reads beside it, and `curves.png`
    in the state's folder. Ctrl-C loses the step in progress, a kill the steps since the last checkpoint. `rollouts`
    plays and rewards in another way than the pool does.

    Raises:
        ConfigError: settings that make no sense, or a model that cannot be loaded.
        CheckpointError: nothing to resume, or the state of another run.
        DataError: no tasks, or rollouts that were lost again and again.
    """
    config = load_config(settings.config)
    pool = tuple(spec.name for spec in config.active)
    tasks, held = task_numbers(settings)
    files = resolve_model(settings.model)
    learner = GrpoLearner(
        files.folder,
        settings.grpo,
        start=settings.start,
        identity=identity(settings, config, f"{files.id}@{files.revision}"),
        device=settings.device,
        precision=settings.precision,
    )
    if settings.resume:
        learner.restore(settings.folder)
    elif (settings.folder / STATE).exists():
        raise ConfigError(f"{settings.folder} holds the state of a run; resume it, or remove that folder")
    validation = [Question(held(index), pool) for index in range(settings.validation)]
    started = time.monotonic()
    router = pool_router(config) if settings.assign == "router" else None
    with nullcontext(rollouts) if rollouts is not None else rollouts_of(settings, config) as played:
        if router is not None:
            played = AssignedRollouts(played, pool, router, settings.rollouts.max_steps)
        _train(learner, settings, played, pool, tasks, validation, files)
    learner.export(settings.out, base=files.id)
    prompt = settings.prompt
    write_card(settings.out, ConductorCard(pool, prompt.style, prompt.show_names, settings.rollouts.steps))
    history = rows_of(settings.folder / "curve.jsonl", learner.done)
    curves = settings.folder / "curves.png"
    draw(history, curves, title=f"{settings.out.name}: {learner.done} steps of GRPO")
    report = _report(settings, learner, history, curves, round(time.monotonic() - started, 1))
    about = {
        "model": f"{files.id}@{files.revision}",
        "workers": pool,
        "prompt": asdict(prompt),
        "settings": described(settings),
        "torch": torch.__version__,
        "device": str(learner.model.device),
    }
    (settings.out / "grpo.json").write_text(json.dumps(about | report.json(), indent=2) + "\n", encoding="utf-8")
    return report


def task_numbers(settings: GrpoRun) -> tuple[Number, Number]:
    """The tasks to learn from and those to validate on, by number.

    Raises:
        DataError: there are none of a split.
    """
    seed = settings.grpo.seed
    if settings.sources:
        return listed(settings.sources, seed, "train"), listed(settings.sources, seed, "val")
    return endless(seed, "train", settings.single), endless(seed, "val", settings.single)


@contextmanager
def rollouts_of(settings: GrpoRun, config: FuguConfig) -> Iterator[Rollouts]:
    """In this process where all workers share one local model, else over Ray."""
    pool = tuple(spec.name for spec in config.active)
    if shares_one_model(config.active):
        with (
            in_process(config.active, batch=settings.batch) as workers,
            InProcessRollouts(pool, workers, settings.rollouts, settings.folder / "calls.sqlite") as rollouts,
        ):
            yield rollouts
        return
    from training.label import connected

    with connected(settings.address):
        # After Ray is there: what it is told on import depends on it.
        from training.conductor_fanout import RayRollouts

        yield RayRollouts(config, pool, settings.rollouts, concurrency=settings.concurrency, seconds=settings.seconds)


def _train(
    learner: GrpoLearner,
    settings: GrpoRun,
    rollouts: Rollouts,
    pool: tuple[str, ...],
    tasks: Number,
    validation: list[Question],
    files: ModelFiles,
) -> None:
    """All steps that are left."""
    total, size, seed = settings.grpo.steps, settings.grpo.questions, settings.grpo.seed
    with (
        shown(settings.folder, steps=total, done=learner.done, progress=settings.progress) as show,
        _sampler(learner, settings, files) as follow,
    ):
        try:
            while learner.done < total:
                step, began = learner.done, time.monotonic()
                sampler = follow()
                before = _validated(learner, sampler, settings, rollouts, pool, validation) if step == 0 else None
                numbers = range(step * size, (step + 1) * size)
                batch = make_batch(
                    learner,
                    sampler,
                    [question_at(number, tasks, pool, settings.subsets, seed) for number in numbers],
                    rollouts,
                    pool=pool,
                    prompt=settings.prompt,
                    recursion=settings.recursion,
                    generator=torch.Generator().manual_seed(_seed(seed, step)),
                )
                played = time.monotonic()
                update = learner.step(batch.groups)
                learnt = time.monotonic()
                last = learner.done == total or learner.done % settings.validate_every == 0
                after = _validated(learner, follow(), settings, rollouts, pool, validation) if last else None
                show(
                    {
                        "step": learner.done,
                        **summary(batch.played, batch.tokens, pool),
                        **asdict(update),
                        "validation": after,
                        "start": before,
                        "seconds": {"rollouts": round(played - began, 2), "update": round(learnt - played, 2)},
                    }
                )
                if learner.done % settings.checkpoint_every == 0 or learner.done == total:
                    learner.save(settings.folder)
        except KeyboardInterrupt:
            learner.save(settings.folder)
            raise


@contextmanager
def _sampler(learner: GrpoLearner, settings: GrpoRun, files: ModelFiles) -> Iterator[Callable[[], Sampler]]:
    """Gives who samples what the learner knows at that moment."""
    if settings.vllm is None:
        yield lambda: learner
        return
    from training.label import connected
    from training.vllm_sampler import VllmSampler

    how = settings.vllm
    with connected(settings.address):
        from ray.util import get_current_placement_group

        engines = VllmSampler(
            files.folder,
            settings.grpo,
            settings.folder / "adapters",
            engines=how.engines,
            gpus=how.gpus,
            context=how.context,
            share=how.share,
            seconds=settings.seconds,
            group=get_current_placement_group(),
        )

        def follow() -> Sampler:
            engines.follow(learner, files.id)
            return engines

        try:
            yield follow
        finally:
            engines.close()


def _validated(
    learner: GrpoLearner,
    sampler: Sampler,
    settings: GrpoRun,
    rollouts: Rollouts,
    pool: tuple[str, ...],
    questions: list[Question],
) -> dict[str, float] | None:
    """Right answers and parsed plans on the validation questions, one plan each."""
    if not questions:
        return None
    written: list[Written] = []
    generator = torch.Generator().manual_seed(settings.grpo.seed)
    width = settings.grpo.questions * settings.grpo.group
    for start in range(0, len(questions), width):
        part = questions[start : start + width]
        prompts = [learner.encode(question.messages(pool, settings.prompt)) for question in part]
        plans = sampler.sample(prompts, copies=1, generator=generator, temperature=settings.val_temperature)
        written += [
            Written(question.task, learner.decode(copies[0]), question.allowed)
            for question, copies in zip(part, plans, strict=True)
        ]
    played = rollouts.play(written)
    return {
        "right": fmean(one.score or 0.0 for one in played),
        "parsed": fmean(not one.failure for one in played),
    }


def _seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def identity(settings: GrpoRun, config: FuguConfig, model: str) -> dict[str, Any]:
    """What a run must agree in to be gone on with, beside its GRPO settings."""
    about = described(settings)
    own = {"provider", "model", "system", "defaults", "adapter"}
    workers = [spec.model_dump(mode="json", include={"name", *own}) for spec in config.active]
    kept = ("start", "sources", "single", "assign", "subsets", "recursion", "rollouts", "prompt")
    return {"model": model, "workers": json.dumps(workers)} | {name: json.dumps(about[name]) for name in kept}


def described(settings: GrpoRun) -> dict[str, Any]:
    """The settings as JSON values, without what does not change the result."""
    about: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=shown_path))
    for name in ("resume", "progress", "address", "gpus", "state", "architecture"):
        del about[name]
    return about


def shown_path(path: object) -> str:
    """A path as a report that travels has it: from where the command ran, nothing of the machine above that."""
    whole = Path(str(path)).resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else whole.name


def _report(
    settings: GrpoRun, learner: GrpoLearner, history: list[dict[str, Any]], curves: Path, seconds: float
) -> GrpoReport:
    part = max(1, len(history) // 10)

    def mean(rows: list[dict[str, Any]]) -> dict[str, float]:
        found = {name: [row[name] for row in rows if row[name] is not None] for name in ("reward", "right", "parsed")}
        return {name: fmean(values) if values else float("nan") for name, values in found.items()}

    start = history[0].get("start") if history else None
    held = [(0, start)] if start else []
    held += [(row["step"], row["validation"]) for row in history if row["validation"]]
    costs = [row["usd"] for row in history]
    return GrpoReport(
        out=settings.out,
        steps=learner.done,
        numbers=learner.numbers,
        seconds=seconds,
        first=mean(history[:part]),
        last=mean(history[-part:]),
        validation=tuple((step, found["right"], found["parsed"]) for step, found in held),
        calls=sum(row["calls"] for row in history),
        usd=None if None in costs else sum(costs),
        curves=curves,
    )
