"""`fugu eval` live: every worker of a pool and every system on it, on real tasks through the real provider actors.

The workers are labelled as `fugu label` does it, into the same outcomes folder, so that the recorded evaluation knows
their answers, too. Systems are played on the tasks that every worker has a score for; what a worker was asked by the
labelling is not asked again, and what else is asked is kept in `systems.sqlite` beside it. So nothing is paid twice: a
run that was stopped, or that measures one more checkpoint, pays only for what is new.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from actors.config import FuguConfig, WorkerSpec
from actors.config_file import load_config
from actors.errors import ConfigError, DataError, FuguError, GradingError
from actors.messages import ChatReply, ChatRequest, Message, Timing, Usage, Worker
from orchestrator.backbone import Device
from orchestrator.head import load_checkpoint
from training import label
from training.grading import check_task, graded
from training.journal import Key, Sample, known_outcomes, opened
from training.label import LabelRun, chosen, connected, tasks_of
from training.live_report import Attempt, LiveData, LiveReport, report_of, write_report
from training.metering import Meter, MeteredWorker, PaidCalls, Purse
from training.outcomes import Task
from training.plan import Plan, worker_digest
from training.rollout import SessionSettings
from training.spending import Budget, most_usd
from training.systems import System, router_systems, worker_system
from training.tasks import TaskSource, check_tasks

if TYPE_CHECKING:
    from actors.pool import WorkerPool

__all__ = ["LiveReport", "LiveRun", "run"]

STORE = "systems.sqlite"
# Attempts in flight for each call that the workers' limits allow: they also decide and are graded.
_AHEAD = 2
_MOST_ATTEMPTS = 256


@dataclass(frozen=True)
class LiveRun:
    """Whom to measure, on what, and at what cost.

    `outcomes` is the folder that answers are kept in. `config` is the pool, each of whose `workers` (none: all in use)
    is measured, and `checkpoints` are heads for it, each of which makes a `fugu` (and a `fugu-trinity`). `url` is an
    OpenAI-compatible endpoint and `models` what it serves; they are measured as they are. `sources` are texts as
    `training.tasks.load_tasks` reads them; none takes the tasks of the folder. `limit` takes so many of them, spread
    evenly.

    `budget_usd` and `max_requests` bound what all runs of this folder spend together: nothing is asked that could pass
    them. `min_gain` makes the run a gate over every system, which a run that was stopped by its budget does not pass.
    `out` is a folder for the report and plots, `max_read` how much of a conversation a router reads (none: as the
    configuration says), `address` the Ray to join.
    """

    outcomes: Path
    config: Path | None = None
    checkpoints: tuple[Path, ...] = ()
    url: str | None = None
    models: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    sources: tuple[str, ...] = ()
    source: TaskSource = field(default_factory=TaskSource)
    workers: tuple[str, ...] = ()
    split: str | None = "test"
    limit: int | None = None
    samples: int = 1
    seed: int = 0
    max_tokens: int | None = None
    temperature: float | None = None
    budget_usd: float | None = None
    max_requests: int | None = None
    concurrency: int | None = None
    min_gain: float | None = None
    out: Path | None = None
    backbone: str | None = None
    max_read: int | None = None
    device: Device = "auto"
    address: str | None = None
    progress: bool = True


def run(settings: LiveRun, more: Sequence[System] = ()) -> LiveReport:
    """Measure the workers, the routers' systems, the endpoint's models, and `more` systems.

    Everything that can be known to be wrong is found before the first call. Ctrl-C loses at most the calls in flight.

    Raises:
        ConfigError: the configuration, a worker's name, or a budget that cannot be kept.
        CheckpointError: a checkpoint of another pool or backbone.
        DataError: tasks that cannot be used, answers of other tasks or workers in the folder, a worker that does not
            work.
    """
    _check(settings)
    whole = None if settings.config is None else load_config(settings.config)
    names = () if whole is None else tuple(spec.name for spec in chosen(whole, settings.workers).active)
    tasks = _tasks(settings)
    endpoint = endpoint_specs(settings.url or "", settings.models, settings.api_key, taken=names)
    systems = [
        *(() if whole is None else _of_checkpoints(settings, whole, names)),
        *(worker_system(spec.name) for spec in endpoint),
        *more,
    ]
    _check_names([one.name for one in systems], names)
    specs = {spec.name: spec for spec in (*_called(whole, tasks, names), *endpoint)}
    session = SessionSettings(max_tokens=settings.max_tokens, temperature=settings.temperature, seed=settings.seed)
    for task in tasks:
        check_task(task, frozenset(specs))
    if settings.budget_usd is not None:
        for spec in specs.values():
            most_usd(session.request(tasks[0], 0), spec)
    pool = FuguConfig(workers=tuple(specs.values()))
    settings.outcomes.mkdir(parents=True, exist_ok=True)
    with closing(PaidCalls(settings.outcomes / STORE)) as paid, connected(settings.address), _actors(pool) as actors:
        stopped = _label(settings, tasks, paid) if names else ""
        with opened(settings.outcomes) as journal:
            usd, requests = paid.spent
            budget = Budget(settings.budget_usd, settings.max_requests, usd + journal.usd, requests + journal.requests)
            plan = Plan(tasks, names, settings.samples, settings.seed)
            digests = {name: worker_digest(spec, plan) for name, spec in specs.items()}
            purse = Purse(budget, paid, specs, digests)
            answers = {key: sample for key, sample in journal.samples.items() if sample.score is not None}
            able = [
                task
                for task in tasks
                if all((task.task_id, name, index) in answers for name in names for index in range(settings.samples))
            ]
            playing = _Playing(settings, session, actors.workers, names, purse, answers)
            attempts = asyncio.run(_ended_by_sigterm(playing.all(systems, able)))
    if not able:
        raise DataError(f"no task was tried by every worker: {stopped or 'their calls failed'}")
    report = report_of(
        LiveData(able, names, answers, tuple(systems), attempts, settings.samples),
        wanted=len(tasks),
        reference=_reference(settings, names),
        spent=(budget.spent_usd, budget.spent_requests),
        stopped=stopped or purse.stopped,
        seed=settings.seed,
        min_gain=settings.min_gain,
    )
    if settings.out is not None:
        write_report(report, settings.out)
    return report


def endpoint_specs(
    url: str, models: Sequence[str], api_key: str | None, *, taken: Sequence[str] = ()
) -> tuple[WorkerSpec, ...]:
    """An endpoint's models, each as a worker that is asked through it. Names are the models', with what no name may
    hold put as a dash; one that is `taken` gets a mark.

    Raises:
        ConfigError: the address or a model's name cannot be used.
    """
    base = url.rstrip("/")
    found = []
    for model in dict.fromkeys(models):
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("._-")[:48]
        values = {
            "name": f"{name}-endpoint" if name in taken else name,
            "provider": "openai",
            "model": model,
            "base_url": base if base.endswith("/v1") else f"{base}/v1",
            "api_key": api_key or "none",
        }
        try:
            found.append(WorkerSpec.model_validate(values))
        except ValidationError as error:
            # Its own text quotes the values, the key among them.
            fields = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
            raise ConfigError(f"the model {model!r} at {url!r} cannot be asked: check its {fields}") from None
    return tuple(found)


def _check(settings: LiveRun) -> None:
    if settings.config is None and settings.url is None:
        raise ConfigError("there is nothing to measure: give --config, a pool, or --url, a running endpoint")
    if (settings.url is None) != (not settings.models):
        raise ConfigError("--url and --model go together: the endpoint, and which of its models to measure")
    if settings.config is None and (settings.checkpoints or settings.workers):
        raise ConfigError("--checkpoint and --workers are about a pool; give --config")
    for name in ("samples", "limit", "concurrency"):
        if (value := getattr(settings, name)) is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if settings.min_gain is not None and not (settings.checkpoints or settings.models):
        raise ConfigError("--min-gain is about systems; give a checkpoint (--checkpoint) or an endpoint (--url)")


def _check_names(systems: Sequence[str], workers: Sequence[str]) -> None:
    if twice := sorted({name for name in systems if systems.count(name) > 1}):
        raise ConfigError(f"two systems are called {', '.join(twice)}; the table could not tell them apart")
    if clash := sorted(set(systems) & set(workers)):
        raise ConfigError(f"a worker of the pool is called {', '.join(clash)}, as a system is; rename it")


def _tasks(settings: LiveRun) -> list[Task]:
    """The tasks to measure on; with `limit` so many of them, evenly spread."""
    given = LabelRun(Path(), settings.outcomes, settings.sources, settings.source, split=settings.split)
    tasks = tasks_of(given, known_outcomes(settings.outcomes))
    if settings.limit is not None and settings.limit < len(tasks):
        # Labelling changes the order in the folder; what is measured must not follow it.
        tasks = sorted(tasks, key=lambda task: task.task_id)
        tasks = [tasks[index * len(tasks) // settings.limit] for index in range(settings.limit)]
    check_tasks(tasks)
    return tasks


def _of_checkpoints(settings: LiveRun, whole: FuguConfig, names: Sequence[str]) -> list[System]:
    several = len(settings.checkpoints) > 1
    systems = []
    for path in settings.checkpoints:
        systems += router_systems(
            path,
            [spec.name for spec in whole.workers],
            names,
            whole.router,
            suffix=f" ({path.stem})" if several else "",
            backbone=settings.backbone,
            max_tokens=settings.max_read,
            device=settings.device,
        )
    return systems


def _called(whole: FuguConfig | None, tasks: Sequence[Task], names: Sequence[str]) -> tuple[WorkerSpec, ...]:
    """The workers that will be called: the measured ones and judges."""
    judges = {task.grader.partition(":")[2] for task in tasks if task.grader.startswith("judge:")}
    if whole is None:
        if judges:
            raise ConfigError(f"the tasks are judged by {', '.join(sorted(judges))}, a worker; give --config")
        return ()
    return chosen(whole, (*names, *sorted(judges - set(names)))).active


@contextmanager
def _actors(config: FuguConfig) -> Iterator[WorkerPool]:
    """The provider actors; they end with us if we were the first to want them."""
    from actors.pool import WorkerPool
    from training.label_tasks import provider_actors

    shared = bool(provider_actors())
    pool = WorkerPool.connect(config)
    try:
        asyncio.run(pool.ready())
        yield pool
    finally:
        if not shared:
            pool.release()


def _label(settings: LiveRun, tasks: Sequence[Task], paid: PaidCalls) -> str:
    """Have every worker try every task, within what the systems have left of the budget; why that stopped."""
    assert settings.config is not None
    usd, requests = paid.spent
    report = label.run(
        LabelRun(
            settings.config,
            settings.outcomes,
            workers=settings.workers,
            samples=settings.samples,
            seed=settings.seed,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            budget_usd=None if settings.budget_usd is None else max(0.0, settings.budget_usd - usd),
            max_requests=None if settings.max_requests is None else max(0, settings.max_requests - requests),
            address=settings.address,
            progress=settings.progress,
        ),
        tasks,
    )
    return report.stopped


def _reference(settings: LiveRun, names: Sequence[str]) -> tuple[str, str] | None:
    """The worker that is best where nothing of the measured tasks is seen, and where that was; None if it cannot be
    known."""
    known = known_outcomes(settings.outcomes)
    if names and known is not None and settings.split != "train" and any(task.split == "train" for task in known.tasks):
        part = known.split("train")
        if set(names) <= set(part.workers):
            return names[int(np.nanmean(part.scores(names), axis=0).argmax())], "the training tasks"
    for path in settings.checkpoints:
        named = load_checkpoint(path).info.trained.get("best_single")
        if named in names:
            return str(named), "the head's training tasks"
    return None


async def _ended_by_sigterm(playing: Coroutine[Any, Any, list[Attempt]]) -> list[Attempt]:
    """SIGTERM ends it as Ctrl-C does: provider actors of ours go with us."""
    this = asyncio.current_task()
    assert this is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, this.cancel)
    try:
        return await playing
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


class _Playing:
    """Attempts of systems, all in this process: they mostly wait for workers."""

    def __init__(
        self,
        settings: LiveRun,
        session: SessionSettings,
        workers: Mapping[str, Worker],
        names: Sequence[str],
        purse: Purse,
        answers: Mapping[Key, Sample],
    ) -> None:
        self._settings = settings
        self._session = session
        self._workers = workers
        self._names = names
        self._purse = purse
        self._answers = answers
        limits = sum(spec.limits.concurrency for spec in purse.specs.values())
        self._turn = asyncio.Semaphore(settings.concurrency or min(_AHEAD * limits, _MOST_ATTEMPTS))

    async def all(self, systems: Sequence[System], tasks: Sequence[Task]) -> list[Attempt]:
        """Every system on every task, sample by sample, until the budget refuses."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not self._settings.progress) as bars:
            rows = {one.name: bars.add_task(one.name, total=len(tasks) * self._settings.samples) for one in systems}

            async def one(system: System, task: Task, index: int) -> Attempt | None:
                async with self._turn:
                    attempt = None if self._purse.stopped else await self._attempt(system, task, index)
                bars.advance(rows[system.name])
                return attempt

            try:
                async with asyncio.TaskGroup() as group:
                    running = [
                        group.create_task(one(system, task, index))
                        for index in range(self._settings.samples)
                        for task in tasks
                        for system in systems
                    ]
            except BaseExceptionGroup as errors:
                # One reason is enough, and callers know it by its type.
                raise errors.exceptions[0] from None
        return [attempt for end in running if (attempt := end.result()) is not None]

    async def _attempt(self, system: System, task: Task, index: int) -> Attempt | None:
        """One attempt, graded; None where the budget did not allow it to be what it is."""
        meter = Meter()
        workers = {name: self._metered(name, meter, task, index) for name in self._purse.specs}
        began = time.perf_counter()
        try:
            reply = await system.ask(self._session.request(task, index), workers)
        except FuguError as error:
            return None if meter.refused else Attempt(system.name, task.task_id, index, error=error.message)
        latency = time.perf_counter() - began + meter.saved_s
        judging = Meter()
        judges = {name: MeteredWorker(self._workers[name], self._purse, judging) for name in self._purse.specs}
        try:
            score = (await graded(task, reply.text, judges)).score
        except GradingError as error:
            if meter.refused or judging.refused:
                return None
            return Attempt(system.name, task.task_id, index, error=error.message)
        if meter.refused:
            return None
        return Attempt(
            system.name,
            task.task_id,
            index,
            score,
            tuple(meter.acted),
            meter.cost_usd,
            latency,
            meter.usage.total_tokens,
        )

    def _metered(self, name: str, meter: Meter, task: Task, index: int) -> MeteredWorker:
        asked = (Message("user", task.prompt),)

        def recorded(request: ChatRequest) -> ChatReply | None:
            """What the labelling heard when it asked just this."""
            sample = self._answers.get((task.task_id, name, index)) if name in self._names else None
            if sample is None or request.messages != asked or request.tools or request.response_format:
                return None
            usage = Usage(sample.input_tokens, sample.output_tokens)
            timing = Timing(total_s=sample.latency_s)
            return ChatReply(name, sample.response, usage=usage, cost_usd=sample.cost_usd, timing=timing)

        return MeteredWorker(self._workers[name], self._purse, meter, recorded)
