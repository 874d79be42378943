"""`fugu train evolve`: sep-CMA-ES over a router's numbers, with the end of a task as the only signal.

Beside the checkpoint, in `<its name>.evolve/`: `state.pkl` (the whole search after every generation; a pickle, load
only your own), `history.jsonl`, `tensorboard/`, `curves.png`, and for live sessions `calls.sqlite` (every answer that
was paid for).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from actors.errors import CheckpointError, ConfigError
from actors.messages import Message
from actors.model_files import EMBEDDED_ALIAS, cache_dir, resolve_model
from orchestrator.backbone import Backbone, Device
from orchestrator.head import FINAL, CheckpointInfo, PromptFormat, Read, load_checkpoint, save_checkpoint
from training.curves import draw_curves, shown
from training.evolution import Evolution, Settings
from training.features import features
from training.fitness import Worth
from training.generations import Course, Found, Player, evolve
from training.outcomes import Task, read_outcomes
from training.players import RecordedPlayer, known_results
from training.policy import Policy, from_checkpoint, from_zeros
from training.rollout import Choose, Mode

if TYPE_CHECKING:
    from rich.table import Table

# TRINITY §A: episodes per candidate and generation.
LIVE_SIZE = 16
VALIDATION_TASKS = 300


@dataclass(frozen=True)
class Reading:
    """How tasks are read. `backbone` is a name or folder (None: the start's, or the embedded model). `reads` and
    `prompt_format` are for a start from zeros; a checkpoint brings its own."""

    backbone: str | None = None
    reads: tuple[Read, ...] = FINAL
    prompt_format: PromptFormat = "chat"
    max_tokens: int = 1024
    device: Device = "auto"


@dataclass(frozen=True)
class EvolveRun:
    """What to evolve and on what.

    `out` is the checkpoint to write. `outcomes` is a folder of recorded outcomes; its tasks are also those of live
    sessions where `config` is given. With `config` the rollouts are live sessions of `mode` through the provider
    actors of that configuration, played with `session`; `address` is the Ray to join (None: start one), `concurrency`
    the sessions played at once (None: twice what the workers' limits allow). `checkpoint` is the start (usually by
    SFT), None starts from zeros. `workers` none: the checkpoint's, else all of the outcomes or configuration.

    `size` tasks per candidate and generation: None is all of `split` for recorded outcomes, where a look-up costs
    nothing, and 16 for live sessions. At most `validation_tasks` of `val_split` validate (None: all recorded, 300
    live). `racing` stops hopeless candidates early (None: in live sessions with roles). `max_calls` and `budget_usd`
    end a live run cleanly; what is in flight then still comes in. `reward` replaces the tasks' own graders:
    `module:function`, called with task and response.
    """

    out: Path
    outcomes: Path
    config: Path | None = None
    workers: tuple[str, ...] = ()
    checkpoint: Path | None = None
    split: str = "train"
    val_split: str = "val"
    mode: Mode = "fugu"
    generations: int = 60
    size: int | None = None
    samples: int = 1
    search: Settings = field(default_factory=Settings)
    worth: Worth = field(default_factory=Worth)
    choose: Choose = "argmax"
    racing: bool | None = None
    validate_every: int = 5
    validation_tasks: int | None = None
    max_excluded: float = 0.2
    max_turns: int = 5
    max_tokens: int | None = None
    temperature: float | None = None
    guard: bool = True
    reward: str | None = None
    concurrency: int | None = None
    max_calls: int | None = None
    budget_usd: float | None = None
    reading: Reading = field(default_factory=Reading)
    address: str | None = None
    resume: bool = False
    progress: bool = True

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.evolve")

    @property
    def turns(self) -> int:
        return self.max_turns if self.mode == "fugu-trinity" else 1


@dataclass(frozen=True)
class EvolveReport:
    """What an evolution did. `start` and `best` are validation values; `best_generation` 0 says that nothing better
    than the start was found and that the start was written. `rollouts` were played, `saved` were not needed (racing);
    `calls` were made upstream, `naive_calls` would have been without cache and common random numbers. `stopped` says
    why it ended early, empty if it did not."""

    out: Path
    folder: Path
    workers: tuple[str, ...]
    numbers: int
    population: int
    generations: int
    start: float
    best: float
    best_generation: int
    rollouts: int
    saved: int
    calls: int
    naive_calls: int
    usd: float
    seconds: float
    optimiser_seconds: float
    shares: Mapping[str, float]
    stopped: str = ""

    @property
    def improved(self) -> bool:
        return self.best_generation > 0

    def json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"out": str(self.out), "folder": str(self.folder), "improved": self.improved}

    def table(self) -> Table:
        from rich.table import Table

        found = (
            f"generation {self.best_generation}"
            if self.improved
            else "nothing better than the start was found: the start was written"
        )
        table = Table(title=f"{self.numbers} numbers, {self.population} candidates", caption=self.stopped or None)
        table.add_column("")
        table.add_column("", justify="right")
        table.add_row("validation, start", f"{self.start:.4f}")
        table.add_row("validation, best", f"{self.best:.4f}")
        table.add_row("best found at", found)
        table.add_row("generations", str(self.generations))
        table.add_row("rollouts", f"{self.rollouts} (racing saved {self.saved})")
        if self.calls:
            table.add_row("worker calls", f"{self.calls} (naive loop: {self.naive_calls})")
            table.add_row("USD", f"{self.usd:.4f}")
        table.add_row("seconds", f"{self.seconds:.1f} (optimiser {self.optimiser_seconds:.1f})")
        for name, share in self.shares.items():
            table.add_row(f"share of {name}", f"{share:.1%}")
        table.add_row("checkpoint", str(self.out))
        table.add_row("curves", str(self.folder / "curves.png"))
        return table


def run(settings: EvolveRun) -> EvolveReport:
    """Evolve a router and write the best validated one; never worse on the validation tasks than the start, which is
    written itself where nothing better was found. Ctrl-C loses the generation in progress at most, and none of its
    answers; `resume` goes on bit-identically.

    Raises:
        ConfigError: settings, configuration, or a state that is not this run's.
        CheckpointError: a start for other workers or another backbone.
        DataError: tasks or outcomes that cannot be used, or too many episodes without a reward; names the reasons.
    """
    with prepared(settings) as (policy, player, identity):
        course = course_of(settings, player)
        state = settings.folder / "state.pkl"
        done = Evolution.load(state)[0].generation if settings.resume else 0
        with shown(settings.folder, generations=course.generations, done=done, progress=settings.progress) as watch:
            found = evolve(
                player, policy.vector(), course, state, identity=identity, resume=settings.resume, watch=watch
            )
    trained = how_trained(settings, policy, course, found)
    save_checkpoint(settings.out, policy.checkpoint(found.theta, trained))
    if found.history:
        title = f"{settings.mode}, {len(policy.workers)} workers, {policy.size} numbers"
        draw_curves(found.history, settings.folder / "curves.png", start=found.start_value, title=title)
    return report_of(settings, policy, found)


def course_of(settings: EvolveRun, player: Player) -> Course:
    size = settings.size or (min(LIVE_SIZE, player.tasks) if settings.config else player.tasks)
    live_roles = settings.config is not None and settings.mode == "fugu-trinity"
    racing = live_roles if settings.racing is None else settings.racing
    return Course(
        search=settings.search,
        generations=settings.generations,
        size=size,
        samples=settings.samples,
        turns=settings.turns,
        worth=settings.worth,
        stages=(size // 4, size // 2) if racing else (),
        validate_every=settings.validate_every,
        max_excluded=settings.max_excluded,
    )


@contextmanager
def prepared(settings: EvolveRun) -> Iterator[tuple[Policy, Player, dict[str, Any]]]:
    """Policy and player of a run, and what identifies it. Everything that can be known to be wrong is found here,
    before anything is paid."""
    if settings.mode == "fugu-trinity" and settings.config is None:
        raise ConfigError(
            "sessions with roles cannot be looked up in recorded outcomes; give a configuration (--config)"
        )
    start = None if settings.checkpoint is None else load_checkpoint(settings.checkpoint)
    if settings.config is not None:
        from training.live import live

        with live(settings, start) as prepared_live:
            yield prepared_live
        return
    found = read_outcomes(settings.outcomes)
    workers = settings.workers or (start.info.workers if start is not None else found.workers)
    usd = settings.worth.usd > 0
    train, train_table = known_results(
        found.split(settings.split), workers, usd=usd, where=f"{settings.outcomes}: split {settings.split}"
    )
    held, held_table = known_results(
        found.split(settings.val_split), workers, usd=usd, where=f"{settings.outcomes}: split {settings.val_split}"
    )
    if settings.validation_tasks is not None and settings.validation_tasks < len(held.tasks):
        rows = some(len(held.tasks), settings.validation_tasks, settings.search.seed)
        held, held_table = type(held)(tuple(held.tasks[row] for row in rows), held.outcomes), held_table.part(rows)
    info = reading_of(settings, start.info if start is not None else None, workers)
    hidden, held_hidden = read(info, settings.reading, (train.tasks, held.tasks))
    base = from_zeros(info, hidden) if start is None else from_checkpoint(start, hidden, workers=workers, roles=False)
    policy = Policy(base)
    player = RecordedPlayer(
        policy, (hidden, train_table), (held_hidden, held_table), choose=settings.choose, seed=settings.search.seed
    )
    yield policy, player, identity_of(settings, policy, train.tasks, held.tasks, train_table.scores, held_table.scores)


def reading_of(settings: EvolveRun, info: CheckpointInfo | None, workers: tuple[str, ...]) -> CheckpointInfo:
    """The way of reading, the start's or the settings'."""
    if info is not None:
        return info
    reading = settings.reading
    files = resolve_model(reading.backbone or EMBEDDED_ALIAS)
    roles = settings.mode == "fugu-trinity"
    return CheckpointInfo(tuple(workers), files.id, files.revision, reading.reads, reading.prompt_format, roles)


def read(info: CheckpointInfo, reading: Reading, groups: tuple[tuple[Task, ...], ...]) -> list[Tensor]:
    """Hidden states of each group of tasks, as the router sees them when they are asked; cached on disk."""
    backbone = load_backbone(info, reading)
    talks = [(Message("user", task.prompt),) for group in groups for task in group]
    states = features(
        backbone,
        talks,
        prompt_format=info.prompt_format,
        max_tokens=reading.max_tokens,
        revision=f"{info.backbone}@{info.revision}",
        cache=cache_dir() / "features.sqlite",
    )
    return list(states.split([len(group) for group in groups]))


def load_backbone(info: CheckpointInfo, reading: Reading) -> Backbone:
    """The backbone that `info` names, from where `reading` says.

    Raises:
        CheckpointError: another backbone or revision is there.
    """
    files = resolve_model(reading.backbone or info.backbone, revision=info.revision)
    if (files.id, files.revision) != (info.backbone, info.revision):
        raise CheckpointError(
            f"the start was trained on the backbone {info.backbone}, revision {info.revision}; "
            f"this is {files.id}, {files.revision}"
        )
    return Backbone.load(files.folder, reads=info.reads, device=reading.device)


def some(count: int, wanted: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A fixed choice of `wanted` among `count`, in order."""
    return np.sort(np.random.default_rng([seed, 4]).permutation(count)[:wanted])


def identity_of(
    settings: EvolveRun, policy: Policy, train: tuple[Task, ...], held: tuple[Task, ...], *tables: Any
) -> dict[str, Any]:
    """Everything that decides the course of a run, small enough to be told where it differs."""
    digest = sha256()
    for task in (*train, *held):
        digest.update(f"{task.task_id}\0{task.prompt}\0{task.reference}\0{task.grader}\n".encode())
    for table in tables:
        digest.update(np.ascontiguousarray(table).tobytes())
    keys = ("mode", "size", "samples", "choose", "racing", "validate_every", "max_excluded", "max_turns", "max_tokens")
    more = ("temperature", "guard", "reward")
    return {key: getattr(settings, key) for key in (*keys, *more)} | {
        "search": str(settings.search),
        "worth": str(settings.worth),
        "workers": policy.workers,
        "tasks": (len(train), len(held)),
        "data": digest.hexdigest()[:16],
        "start": sha256(policy.vector().tobytes()).hexdigest()[:16],
        "backbone": f"{policy.base.info.backbone}@{policy.base.info.revision}",
    }


def how_trained(settings: EvolveRun, policy: Policy, course: Course, found: Found) -> dict[str, Any]:
    """The checkpoint's note on its making; nothing in it differs between equal runs."""
    return {
        "method": "sep-cma-es",
        "mode": settings.mode,
        "rollouts": "live" if settings.config else "recorded",
        "start": dict(policy.base.info.trained) if settings.checkpoint else "zeros",
        "generations": len(found.history),
        "sigma": course.search.sigma,
        "population": course.search.population,
        "mirrored": course.search.mirrored,
        "seed": course.search.seed,
        "tasks_per_generation": course.size,
        "choose": settings.choose,
        "fitness": {"diversity": course.worth.diversity, "turns": course.worth.turns, "usd": course.worth.usd},
        "validation": {
            "split": settings.val_split,
            "start": found.start_value,
            "best": found.best_value,
            "best_generation": found.best_generation,
        },
        "note": "" if found.improved else "nothing better than the start was found; this is the start",
    }


def report_of(settings: EvolveRun, policy: Policy, found: Found) -> EvolveReport:
    rows = found.history
    last = rows[-1] if rows else {}
    return EvolveReport(
        out=settings.out,
        folder=settings.folder,
        workers=policy.workers,
        numbers=policy.size,
        population=Evolution(policy.vector(), settings.search).population,
        generations=len(rows),
        start=found.start_value,
        best=found.best_value,
        best_generation=found.best_generation,
        rollouts=sum(row["rollouts"] for row in rows),
        saved=sum(row["saved"] for row in rows),
        calls=last.get("calls", 0),
        naive_calls=sum(row["naive_calls"] for row in rows),
        usd=last.get("usd", 0.0),
        seconds=sum(row["seconds_s"] for row in rows),
        optimiser_seconds=sum(row["optimiser_s"] for row in rows),
        shares=last.get("shares", {}),
        stopped=found.stopped,
    )
