"""Labelling: every worker tries every task several times; what comes back is graded and kept as it comes.

`label.jsonl` in the outcomes folder (`training.journal`) holds each answer the moment it is there. A run that was
stopped goes on where it was and asks for nothing twice; when it ends, in whatever way, the folder's parquet files are
written from it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from actors.config import FuguConfig
from actors.config_file import load_config
from actors.errors import ConfigError, DataError
from training.journal import JOURNAL, Journal, Sample, fold, known_outcomes, opened
from training.label_report import LabelReport, WorkerReport, shown
from training.labelling import Answers, Call, Done, Labelling, Lane, answer
from training.outcomes import Outcomes, Task
from training.plan import Plan, worker_digest
from training.spending import Budget
from training.tasks import TaskSource, load_tasks

__all__ = ["JOURNAL", "LabelReport", "LabelRun", "Sample", "WorkerReport", "label", "run"]

# Calls that one Ray task makes at the same time.
BATCH = 16
# Seconds without any success after which a worker that worked before ends the run.
PATIENCE = 300.0


@dataclass(frozen=True)
class LabelRun:
    """What to label, with whom, into which folder, and at what cost.

    `out` is the outcomes folder. `sources` are texts as `training.tasks.load_tasks` reads them; none takes the tasks
    that the folder holds. `workers` are names of the configuration (none: all in use). `split` keeps only the tasks of
    this split. `budget_usd` and `max_requests` bound what all runs of this folder's journal spend together, judges
    included: what is in flight, or was when a run was killed, counts with the most it can cost. `address` is the Ray
    to join (None: start one).
    """

    config: Path
    out: Path
    sources: tuple[str, ...] = ()
    source: TaskSource = field(default_factory=TaskSource)
    workers: tuple[str, ...] = ()
    split: str | None = None
    samples: int = 1
    seed: int = 0
    max_tokens: int | None = None
    temperature: float | None = None
    budget_usd: float | None = None
    max_requests: int | None = None
    address: str | None = None
    progress: bool = True


def run(settings: LabelRun, tasks: Sequence[Task] | None = None) -> LabelReport:
    """Label with the workers of a configuration, through their provider actors, as Ray tasks. `tasks` given are
    labelled in place of those that the settings name.

    Everything that can be known to be wrong is found before the first call. Ctrl-C and SIGTERM lose at most the calls
    in flight: the folder is written, then KeyboardInterrupt is raised.

    Raises:
        ConfigError: the configuration, a worker's name, or a budget that cannot be kept.
        DataError: tasks that cannot be used, a journal of other tasks or workers, a worker that does not work, or
            graders that do not; what came in is kept and written.
    """
    config = chosen(load_config(settings.config), settings.workers)
    names = [spec.name for spec in config.active]
    known = known_outcomes(settings.out)
    tasks = tasks_of(settings, known) if tasks is None else tasks
    judges = frozenset(task.grader.partition(":")[2] for task in tasks if task.grader.startswith("judge:"))
    everyone = chosen(load_config(settings.config), (*names, *sorted(judges - set(names))))
    specs = {spec.name: spec for spec in everyone.active}
    plan = Plan(tasks, names, settings.samples, settings.seed, settings.max_tokens, settings.temperature, specs)
    plan.check(known)
    budget = Budget(settings.budget_usd, settings.max_requests)
    lanes = {
        name: Lane(
            name,
            concurrency=specs[name].limits.concurrency,
            batch=max(1, min(BATCH, specs[name].limits.concurrency // 2)),
            tries=specs[name].retry.attempts,
            patience=PATIENCE,
        )
        for name in names
    }
    with opened(settings.out) as journal:
        plan.fill(lanes, journal, budget)
        if not any(lane.queue for lane in lanes.values()):
            return finish(settings.out, plan, lanes, journal, known)
        for name in names:
            journal.worker(name, worker_digest(specs[name], plan))
        total = len(tasks) * settings.samples
        with connected(settings.address), shown(settings.progress, lanes, journal, total) as (on_sample, on_change):
            from training.label_tasks import submitter

            labelling = Labelling(lanes, journal, budget, submitter(everyone), on_sample, on_change)
            try:
                asyncio.run(_until_done(everyone, labelling))
            finally:
                with _uninterrupted():
                    report = finish(settings.out, plan, lanes, journal, known, labelling.stopped, labelling.errors)
    return report


async def _until_done(config: FuguConfig, labelling: Labelling) -> None:
    from actors.pool import WorkerPool
    from training.label_tasks import provider_actors

    this = asyncio.current_task()
    assert this is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, this.cancel)
    shared = bool(provider_actors())
    pool = WorkerPool.connect(config)
    try:
        await pool.ready()
        await labelling.run()
    except asyncio.CancelledError:
        # Of Ctrl-C asyncio makes a KeyboardInterrupt by itself, of SIGTERM nothing.
        raise KeyboardInterrupt from None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        if not shared:
            # Nobody had provider actors here before; they would stay for ever.
            pool.release()


async def label(
    workers: Sequence[Answers],
    tasks: Sequence[Task],
    folder: Path,
    *,
    samples: int,
    concurrency: int,
    seed: int = 0,
    max_tokens: int | None = None,
    on_sample: Callable[[Sample], None] = lambda _sample: None,
) -> Outcomes:
    """Label in this process, without Ray: ask for what the journal lacks, at most `concurrency` calls of a worker at
    once, then write and return the outcomes.

    Answers are cut at `max_tokens`; None leaves each worker its own limit. Each call has its own seed and
    `sample_index`, so repeated samples differ and a repeated run does not. A call that fails is left out (and asked
    again by the next run); a pair of task and worker without any sample has no outcome.

    Raises:
        DataError: no workers, tasks or samples; tasks that cannot be graded; a journal of other tasks; a worker that
            failed five times in a row, with its last reason; another labelling of the same folder at this moment.
    """
    by_name = {worker.name: worker for worker in workers}

    async def submit(calls: Sequence[Call]) -> AsyncIterator[Done]:
        running = [asyncio.ensure_future(answer(call, by_name[call.worker], by_name)) for call in calls]
        try:
            for end in asyncio.as_completed(running):
                yield await end
        finally:
            for task in running:
                task.cancel()

    known = known_outcomes(folder)
    plan = Plan(tasks, list(by_name), samples, seed, max_tokens)
    plan.check(known)
    lanes = {name: Lane(name, concurrency) for name in by_name}
    with opened(folder) as journal:
        plan.fill(lanes, journal, budget := Budget())
        for old in journal.samples.values():
            on_sample(old)
        try:
            await Labelling(lanes, journal, budget, submit, on_sample).run()
        finally:
            found = fold(folder, tasks, journal.samples.values(), known)
    return found


def chosen(config: FuguConfig, names: Sequence[str]) -> FuguConfig:
    """The configuration with these workers only, in its own order; no names: those in use.

    Raises:
        ConfigError: a name it does not have, or one that is not in use, with the reason.
    """
    if not names:
        return config
    have = {spec.name for spec in config.workers}
    for name in names:
        if name not in have:
            raise ConfigError(f"the configuration has no worker {name}; there are {', '.join(sorted(have))}")
        if name in config.disabled:
            raise ConfigError(f"worker {name} is not in use: {config.disabled[name]}")
    return config.model_copy(update={"workers": tuple(spec for spec in config.workers if spec.name in names)})


def tasks_of(settings: LabelRun, known: Outcomes | None) -> list[Task]:
    """The tasks to label.

    Raises:
        DataError: there are none, or they cannot be used.
    """
    if settings.sources:
        tasks = load_tasks(settings.sources, settings.source)
    elif known is not None:
        tasks = list(known.tasks)
    else:
        raise DataError(f"{settings.out} holds no tasks; say which to label")
    if settings.split is not None:
        kept = [task for task in tasks if task.split == settings.split]
        if not kept:
            have = ", ".join(sorted({task.split for task in tasks}))
            raise DataError(f"no task has the split {settings.split}; there are {have}")
        tasks = kept
    return tasks


def finish(
    folder: Path,
    plan: Plan,
    lanes: Mapping[str, Lane],
    journal: Journal,
    known: Outcomes | None,
    stopped: str = "",
    errors: Sequence[tuple[str, str, str]] = (),
) -> LabelReport:
    """Write the folder's files and say what was done."""
    fold(folder, plan.tasks, journal.samples.values(), known)
    ids = {task.task_id for task in plan.tasks}
    rows = []
    for name, lane in lanes.items():
        mine = [
            sample
            for sample in journal.samples.values()
            if sample.worker == name and sample.task_id in ids and sample.sample < plan.samples
        ]
        scores = [sample.score for sample in mine if sample.score is not None]
        mean = sum(scores) / len(scores) if scores else None
        ungraded = len(mine) - len(scores)
        rows.append(WorkerReport(name, len(mine), lane.samples, lane.failed, ungraded, mean, lane.usd, lane.requests))
    wanted = len(plan.tasks) * len(lanes) * plan.samples
    return LabelReport(
        folder, len(plan.tasks), wanted, tuple(rows), journal.usd, journal.requests, stopped, tuple(errors)
    )


@contextmanager
def connected(address: str | None, *, logs: bool = False) -> Iterator[None]:
    """A Ray to work on: the one this process is connected to, the one at `address`, or one of our own that ends with
    the context. With `logs`, what its processes print is printed here."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address=address or "local", namespace="fugu", include_dashboard=False, log_to_driver=logs)
    try:
        yield
    finally:
        with _uninterrupted():
            ray.shutdown()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until what must be finished is."""
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda number, _frame: heard.append(number))
    except ValueError:  # not in the main thread, where no signal arrives
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        raise KeyboardInterrupt
