"""What conducting is worth: `fugu-ultra` against every worker, a router, votes, panels, an untrained conductor, and
itself without each worker in turn, on fresh tasks.

All workers share one local model, and a conductor is an adapter of it, so that everything is answered in this process
and equal questions are asked once. Gains are over the worker that is best alone on the same tasks, paired by task,
with intervals from resampling tasks. Each fixed way of answering gets as many calls as a conducted request takes on
average, or more.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.config import FuguConfig, WorkerSpec
from actors.config_file import load_config
from actors.errors import ConfigError, FuguError
from actors.messages import ChatRequest, Message, Usage, Worker
from orchestrator.conductor import ConductorSettings
from orchestrator.conductor_card import ConductorCard, read_card
from orchestrator.conductor_prompt import PromptSettings
from orchestrator.executor import ExecutorSettings
from training.composite import DOMAIN, composite_tasks
from training.deciding import Decider
from training.evaluate import Estimate, bootstrap
from training.grading import grade
from training.ground_families import GROUNDS
from training.grounds import ground_tasks
from training.grpo_train import shown_path
from training.in_process import in_process
from training.metering import Meter, MeteredWorker, PaidCalls, Purse
from training.outcomes import Task
from training.spending import Budget
from training.systems import pool_router, systems_of
from training.ultra_report import Row, UltraReport, draw_topologies, write_report
from training.ultra_systems import (
    Contestant,
    Told,
    alone,
    as_system,
    assigner,
    conducted,
    mixture_of_agents,
    panel,
    self_consistency,
)

TRAINED, WARM, UNTRAINED = "conductor", "conductor-warm", "conductor-untrained"
ULTRA = "fugu-ultra"
WARM_ONLY, NOT_TRAINED = "warm start only", "untrained conductor"
OWN = "its own choice of workers"
"""Beside a conductor whose steps a router assigns: the same where its own word holds."""


@dataclass(frozen=True)
class UltraRun:
    """What to measure. `config` is the pool, whose router (`fugu`) is measured where it has a checkpoint. `adapter` is
    the conductor's, `warm` the one that its training started with. Of `tasks` fresh composite tasks and `tasks` single
    ones (the grounds' in equal parts) each is asked once. `calls` is what fixed ways of answering may make; `subsets`
    also leaves out each worker in turn, `others` measures votes, panel and mixture of agents. `out` is the folder of
    the report, of a picture, and of all answers.
    """

    config: Path
    adapter: Path
    out: Path
    warm: Path | None = None
    tasks: int = 200
    seed: int = 70_001
    calls: int = 5
    temperature: float = 0.0
    max_tokens: int = 48
    plan_tokens: int = 160
    plan_temperature: float = 0.0
    retries: int = 2
    batch: int = 32
    untrained: bool = True
    subsets: bool = True
    others: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        if min(self.tasks, self.batch, self.max_tokens, self.plan_tokens) < 1 or self.calls < 3:
            raise ConfigError("tasks, batch and tokens must be at least 1, and calls at least 3")


@dataclass(frozen=True)
class Attempt:
    """One answer of one contestant. `score` None: it failed, and `error` says why."""

    name: str
    task: Task
    score: float | None
    calls: int = 0
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = 0.0
    seconds: float = 0.0
    critical_s: float | None = None
    topology: str = ""
    workers: tuple[str, ...] = ()
    planned: bool = False
    error: str = ""


def run(settings: UltraRun) -> UltraReport:
    """Measure, write `ultra.json` and `topologies.png` into `settings.out`, and report.

    Raises:
        ConfigError: workers on several models, or an adapter that cannot be loaded.
        CheckpointError: the conductor's card cannot be read, or the router's checkpoint is of another pool.
    """
    config = load_config(settings.config)
    names = [spec.name for spec in config.active]
    tasks = fresh_tasks(settings)
    specs = [*config.active, *_writers(settings, config)]
    settings.out.mkdir(parents=True, exist_ok=True)
    with in_process(specs, batch=settings.batch) as workers, closing(PaidCalls(settings.out / "calls.sqlite")) as paid:
        purse = Purse(Budget(), paid, {spec.name: spec for spec in specs}, {spec.name: _digest(spec) for spec in specs})
        playing = _Playing(settings, workers, purse)
        with asyncio.Runner() as runner:
            singles = runner.run(playing.all([alone(name) for name in names], tasks))
            ranking = _ranking(names, singles)
            others = runner.run(playing.all(_contestants(settings, config, ranking), tasks))
    attempts = [*singles, *others]
    report = _report(settings, names, ranking, attempts)
    draw_topologies(report.topologies, settings.out / "topologies.png")
    write_report(report, settings.out / "ultra.json")
    return report


def fresh_tasks(settings: UltraRun) -> list[Task]:
    """Test tasks, composite and single; none was trained or validated on."""
    each = -(-settings.tasks // len(GROUNDS))
    single = ground_tasks(list(GROUNDS), count=each, seed=settings.seed)
    return [*composite_tasks(count=settings.tasks, seed=settings.seed), *single]


def _writers(settings: UltraRun, config: FuguConfig) -> list[WorkerSpec]:
    """The conductors as workers of the same model: trained, after its warm start, and without any training."""
    base = config.active[0].model_copy(
        update={"system": None, "adapter": None, "defaults": type(config.active[0].defaults)()}
    )
    adapters = {TRAINED: settings.adapter, WARM: settings.warm, UNTRAINED: None}
    wanted = {TRAINED, *([WARM] if settings.warm else []), *([UNTRAINED] if settings.untrained else [])}
    return [base.model_copy(update={"name": name, "adapter": adapters[name]}) for name in adapters if name in wanted]


def _contestants(settings: UltraRun, config: FuguConfig, ranking: Sequence[str]) -> list[Contestant]:
    names = [spec.name for spec in config.active]
    card = read_card(settings.adapter) or ConductorCard(tuple(names), "compact", steps="bare")
    how = ConductorSettings(
        PromptSettings(style=card.style, show_names=card.show_names),
        retries=settings.retries,
        temperature=settings.plan_temperature,
        max_tokens=settings.plan_tokens,
        executor=ExecutorSettings(steps=card.steps),
    )
    best, calls = ranking[0], settings.calls
    routed = config.conductor is not None and config.conductor.assign == "router"
    decider = None if config.router.checkpoint is None else Decider(pool_router(config))
    assign = assigner(decider) if routed and decider is not None else None
    found = [conducted(ULTRA, TRAINED, card.workers, how, ranking=ranking, assign=assign)]
    if routed:
        found.append(conducted(f"{ULTRA}, {OWN}", TRAINED, card.workers, how, ranking=ranking))
    if settings.warm is not None:
        found.append(conducted(WARM_ONLY, WARM, card.workers, how, ranking=ranking, assign=assign))
        if routed:
            found.append(conducted(f"{WARM_ONLY}, {OWN}", WARM, card.workers, how, ranking=ranking))
    if settings.untrained:
        plain = replace(how, prompt=PromptSettings(), executor=ExecutorSettings())
        found.append(conducted(NOT_TRAINED, UNTRAINED, card.workers, plain, ranking=ranking, assign=assign))
    if settings.others:
        width = max(1, (calls - 1) // 2)
        found += [
            self_consistency(best, calls),
            panel([ranking[n % len(ranking)] for n in range(calls - 1)], best),
            mixture_of_agents([ranking[n % len(ranking)] for n in range(width)], 2, best),
        ]
    if decider is not None:
        found += [as_system(one) for one in systems_of(decider, names, config.router)]
    if settings.subsets and len(names) > 1:
        found += [
            conducted(
                f"{ULTRA} without {name}", TRAINED, card.workers, how, ranking=ranking, without=(name,), assign=assign
            )
            for name in names
        ]
    return found


@dataclass
class _Playing:
    """Contestants under measurement, as many at once as the engine takes."""

    settings: UltraRun
    workers: Mapping[str, Worker]
    purse: Purse

    async def all(self, contestants: Sequence[Contestant], tasks: Sequence[Task]) -> list[Attempt]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        turn = asyncio.Semaphore(2 * self.settings.batch)
        with Progress(*columns, console=Console(stderr=True), disable=not self.settings.progress) as bar:

            async def one(contestant: Contestant, task: Task, line: Any) -> Attempt:
                async with turn:
                    attempt = await self._attempt(contestant, task)
                bar.advance(line)
                return attempt

            found: list[Attempt] = []
            for contestant in contestants:  # one after the other: their seconds can be compared
                line = bar.add_task(contestant.name, total=len(tasks))
                found += await asyncio.gather(*(one(contestant, task, line) for task in tasks))
        return found

    async def _attempt(self, contestant: Contestant, task: Task) -> Attempt:
        meter = Meter()
        pool: dict[str, Worker] = {
            name: MeteredWorker(worker, self.purse, meter) for name, worker in self.workers.items()
        }
        request = ChatRequest(
            (Message("user", task.prompt),),
            temperature=self.settings.temperature,
            max_tokens=self.settings.max_tokens,
            seed=int.from_bytes(hashlib.sha256(task.task_id.encode()).digest()[:4], "big"),
        )
        began = time.perf_counter()
        try:
            told = await contestant.ask(request, pool)
        except FuguError as error:
            return Attempt(contestant.name, task, None, len(meter.acted), error=type(error).__name__)
        seconds = time.perf_counter() - began + meter.saved_s
        attempt = Attempt(
            contestant.name,
            task,
            await asyncio.to_thread(grade, task, told.reply.text),
            len(meter.acted),
            meter.usage,
            meter.cost_usd,
            seconds,
        )
        return _with_plan(attempt, told)


def _with_plan(attempt: Attempt, told: Told) -> Attempt:
    """What a conductor's plan was: its steps' seconds one after the other against the longest chain of them."""
    if told.conducted is None:
        return attempt
    last = told.conducted.rounds[-1]
    if last.run is None or last.workflow is None:
        return attempt
    return replace(
        attempt,
        planned=last.planned,
        topology=last.workflow.topology if last.planned else "none",
        workers=tuple(step.worker for step in last.workflow.steps),
        seconds=told.conducted.planning_s + sum(step.seconds for step in last.run.steps),
        critical_s=told.conducted.critical_path_s,
    )


def _ranking(names: Sequence[str], singles: Sequence[Attempt]) -> list[str]:
    """The workers, the one that is best alone first."""
    means = {name: np.mean([one.score or 0.0 for one in singles if one.name == name]) for name in names}
    return sorted(names, key=lambda name: -float(means[name]))


def _report(
    settings: UltraRun, names: Sequence[str], ranking: Sequence[str], attempts: Sequence[Attempt]
) -> UltraReport:
    contestants = list(dict.fromkeys(one.name for one in attempts))
    by_name = {name: [one for one in attempts if one.name == name] for name in contestants}
    kinds = ("composite", "single")
    rng = np.random.default_rng(settings.seed)
    scores = {
        kind: {
            name: _scores([one for one in by_name[name] if (one.task.domain == DOMAIN) == (kind == "composite")])
            for name in contestants
        }
        for kind in kinds
    }
    best: dict[str, str] = {}
    for kind in kinds:
        means = {name: float(scores[kind][name].mean()) for name in names}
        best[kind] = max(names, key=means.__getitem__)
    rows = []
    for name in contestants:
        mine = by_name[name]
        costs = [one.cost_usd for one in mine]
        chains = [one.critical_s for one in mine if one.critical_s is not None]
        rows.append(
            Row(
                name=name,
                score={kind: bootstrap(scores[kind][name], rng) for kind in kinds},
                gain={kind: bootstrap(scores[kind][name] - scores[kind][best[kind]], rng) for kind in kinds},
                calls=float(np.mean([one.calls for one in mine])),
                tokens=float(np.mean([one.usage.total_tokens for one in mine])),
                cost_usd=None if None in costs else float(np.mean([cost or 0.0 for cost in costs])),
                seconds=float(np.mean([one.seconds for one in mine])),
                critical_s=float(np.mean(chains)) if chains else None,
                planned=float(np.mean([one.planned for one in mine])) if chains else None,
                steps=float(np.mean([len(one.workers) for one in mine if one.planned] or [0])) if chains else None,
                failed=sum(one.score is None for one in mine),
            )
        )
    ultra = by_name[ULTRA]
    families = list(dict.fromkeys(one.task.dataset for one in ultra))
    return UltraReport(
        tasks={kind: len(scores[kind][ULTRA]) for kind in kinds},
        best_single=best,
        ranking=tuple(ranking),
        rows=tuple(rows),
        against=_against(scores, contestants, names, rng),
        families={
            family: {name: _mean_of(by_name[name], family) for name in (ULTRA, best["composite"])}
            for family in families
        },
        topologies={
            family: _shares([one.topology for one in ultra if one.task.dataset == family]) for family in families
        },
        workers={
            family: _shares([w for one in ultra if one.task.dataset == family for w in one.workers])
            for family in families
        },
        settings=json.loads(json.dumps(asdict(settings), default=shown_path)),
    )


def _against(
    scores: Mapping[str, Mapping[str, Any]], contestants: Sequence[str], names: Sequence[str], rng: np.random.Generator
) -> dict[str, Estimate]:
    """The comparisons that count, paired by task, on composite tasks: to the warm start, and without each worker to the
    best of those that remain."""
    composite = scores["composite"]
    found = {}
    for other in (WARM_ONLY, NOT_TRAINED, f"{ULTRA}, {OWN}"):
        if other in contestants:
            found[f"{ULTRA} over {other}"] = bootstrap(composite[ULTRA] - composite[other], rng)
    for name in names:
        rest = [one for one in names if one != name]
        if f"{ULTRA} without {name}" in contestants:
            best = max(rest, key=lambda one: float(composite[one].mean()))
            gain = composite[f"{ULTRA} without {name}"] - composite[best]
            found[f"{ULTRA} without {name} over {best}"] = bootstrap(gain, rng)
    if f"{WARM_ONLY}, {OWN}" in contestants:
        gain = composite[f"{ULTRA}, {OWN}"] - composite[f"{WARM_ONLY}, {OWN}"]
        found[f"{ULTRA} over {WARM_ONLY}, {OWN}"] = bootstrap(gain, rng)
    if "fugu" in contestants:
        found[f"{ULTRA} over fugu, single tasks"] = bootstrap(scores["single"][ULTRA] - scores["single"]["fugu"], rng)
    return found


def _scores(attempts: Sequence[Attempt]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """In the order of the tasks; what failed is wrong."""
    return np.array([one.score or 0.0 for one in attempts])


def _mean_of(attempts: Sequence[Attempt], family: str) -> float:
    return float(np.mean([one.score or 0.0 for one in attempts if one.task.dataset == family]))


def _shares(values: Sequence[str]) -> dict[str, float]:
    counts = Counter(value for value in values if value)
    return {value: count / counts.total() for value, count in sorted(counts.items())}


def _digest(spec: WorkerSpec) -> str:
    """Of what an answer depends on; an adapter counts by its file's bytes."""
    own = spec.model_dump_json(include={"provider", "model", "system", "defaults"})
    weights = b"" if spec.adapter is None else (spec.adapter / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(own.encode() + weights).hexdigest()[:16]
