"""`fugu train evolve`: sep-CMA-ES over a router's numbers, with the end of a task as the only signal.

Beside the checkpoint, in `<its name>.evolve/`: `state.pkl` (the whole search after every generation; a pickle, load
only your own), `history.jsonl`, `tensorboard/`, `curves.png`, and for live sessions `calls.sqlite` (every answer that
was paid for).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actors.errors import ConfigError
from orchestrator.backbone import Backbone
from orchestrator.head import Checkpoint, load_checkpoint, save_checkpoint
from training.adapted import AdaptedBackbone, AdaptedPlayer
from training.curves import draw_curves, shown
from training.evolution import Evolution
from training.features import read_limit
from training.fit import unseen_logits
from training.generations import Course, Found, Player, evolve
from training.outcomes import Task, read_outcomes
from training.players import RecordedPlayer, known_results
from training.players import Table as Known
from training.policy import Policy, from_checkpoint, from_zeros
from training.start import EvolveRun, Reading, backbone_files, identity_of, policy_of, read, reading_of, some

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["EvolveReport", "EvolveRun", "Reading", "run"]

# TRINITY §A: episodes per candidate and generation.
LIVE_SIZE = 16


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
    if find_spec("matplotlib") is None:
        raise ConfigError("matplotlib, which draws the curves, is not installed; install the extra `train`")
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
        # Only live sessions need Ray.
        from training.live import live

        if settings.singular is not None:
            raise ConfigError("singular values are evolved on recorded outcomes, not in live sessions")
        with live(settings, start) as prepared_live:
            yield prepared_live
        return
    if settings.outcomes is None:
        raise ConfigError("there is nothing to evolve on: give --outcomes, or --config for live sessions")
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
    hidden, held_hidden = read(info, settings, (train.tasks, held.tasks), start.singular if start is not None else {})
    if start is None:
        base = from_zeros(info, hidden)
    else:
        base = from_checkpoint(start, hidden, workers=workers, roles=False, where=str(settings.checkpoint))
    policy, player = _player(settings, base, (train.tasks, hidden, train_table), (held.tasks, held_hidden, held_table))
    yield policy, player, identity_of(settings, policy, train.tasks, held.tasks, train_table.scores, held_table.scores)


def _player(
    settings: EvolveRun,
    base: Checkpoint,
    train: tuple[tuple[Task, ...], Tensor, Known],
    held: tuple[tuple[Task, ...], Tensor, Known],
) -> tuple[Policy, Player]:
    seed = settings.search.seed
    if settings.singular is None:
        policy = policy_of(settings, base, train[1])
        unseen = None
        if policy.axes is not None and settings.cross_fit and base.info.trained.get("split") == settings.split:
            scores = torch.from_numpy(train[2].scores).float()
            unseen = unseen_logits(base, train[1], scores, folds=settings.cross_fit, seed=seed)
        learned = train[1:]
        validation = learned if settings.val_split == settings.split and len(held[0]) == len(train[0]) else held[1:]
        return policy, RecordedPlayer(policy, learned, validation, choose=settings.choose, seed=seed, unseen=unseen)
    info, device = base.info, settings.reading.device
    folder = backbone_files(info, settings.reading).folder
    stored = Backbone.load(folder, reads=info.reads, device=device, dtype=torch.float32)
    running = Backbone.load(folder, reads=info.reads, device=device, singular=base.singular or None)
    adapted = AdaptedBackbone(stored, running, settings.singular)
    policy = policy_of(settings, base, train[1], tuple(adapted.sizes.items()))
    max_tokens = read_limit(info, settings.reading.max_tokens)
    return policy, AdaptedPlayer(policy, adapted, train, held, max_tokens=max_tokens, choose=settings.choose, seed=seed)


def how_trained(settings: EvolveRun, policy: Policy, course: Course, found: Found) -> dict[str, Any]:
    """The checkpoint's note on its making; nothing in it differs between equal runs."""
    return {
        "method": "sep-cma-es",
        "mode": settings.mode,
        "rollouts": "live" if settings.config else "recorded",
        "axes": None if policy.axes is None else len(policy.axes),
        "cross_fit": settings.cross_fit,
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
