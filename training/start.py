"""What an evolution is given: its settings, the way tasks are read, and what tells one run from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actors.errors import CheckpointError, ConfigError
from actors.model_files import EMBEDDED_ALIAS, ModelFiles, resolve_model
from orchestrator.backbone import Device
from orchestrator.head import FINAL, Checkpoint, CheckpointInfo, PromptFormat, Read
from training.evolution import Settings
from training.features import read_limit, task_states
from training.fitness import Worth
from training.outcomes import Task
from training.policy import AXES, Policy, principal_axes
from training.rollout import Choose, Mode


@dataclass(frozen=True)
class Reading:
    """How tasks are read. `backbone` is a name or folder (None: the start's, or the embedded model). `reads` and
    `prompt_format` are for a start from zeros; a checkpoint brings its own, and `max_tokens` (none: 1024) cannot be
    more than it was trained on."""

    backbone: str | None = None
    reads: tuple[Read, ...] = FINAL
    prompt_format: PromptFormat = "chat"
    max_tokens: int | None = None
    device: Device = "auto"


@dataclass(frozen=True)
class EvolveRun:
    """What to evolve and on what.

    `out` is the checkpoint to write. `outcomes` is a folder of recorded outcomes. With `config` the rollouts are live
    sessions of `mode` through the provider actors of that configuration, on the tasks of that folder or of `sources`
    (texts as `training.tasks.load_tasks` reads them); `address` is the Ray to join (None: start one), `concurrency` the
    sessions played at once (None: twice what the workers' limits allow). `checkpoint` is the start (usually by
    SFT), None starts from zeros. `workers` none: the checkpoint's, else all of the outcomes or configuration.

    `size` tasks per candidate and generation: None is all of `split` for recorded outcomes, where a look-up costs
    nothing, and 16 for live sessions. At most `validation_tasks` of `val_split` validate (None: all recorded, 300
    live). `racing` stops hopeless candidates early (None: in live sessions with roles). `max_calls` and `budget_usd`
    count all runs of this folder and end a live one at its last whole generation; calls in flight then are cancelled,
    and may have been paid for. `reward` replaces the tasks' own graders: `module:function`, called with task and
    response. `axes` is how many principal axes of the head's features are searched along (0: every weight by itself;
    None: 64 for a head on landmarks, else 0). A start on landmarks that was fitted on the same tasks is refitted
    without each of `cross_fit` parts of them, and candidates are changes to what it then says of that part, as it would
    of new tasks (0: to what it says of tasks that it knows; recorded outcomes only). `singular` also evolves the
    singular values of that layer of the backbone (0-based, negative from the end; recorded outcomes only): it then runs
    for every candidate and task.
    """

    out: Path
    outcomes: Path | None = None
    config: Path | None = None
    sources: tuple[str, ...] = ()
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
    axes: int | None = None
    cross_fit: int = 5
    singular: int | None = None
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


def reading_of(settings: EvolveRun, info: CheckpointInfo | None, workers: tuple[str, ...]) -> CheckpointInfo:
    """The way of reading, the start's or the settings'."""
    if info is not None:
        return info
    reading = settings.reading
    files = resolve_model(reading.backbone or EMBEDDED_ALIAS)
    roles = settings.mode == "fugu-trinity"
    info = CheckpointInfo(tuple(workers), files.id, files.revision, reading.reads, reading.prompt_format, roles)
    return replace(info, max_tokens=read_limit(info, reading.max_tokens))


def read(
    info: CheckpointInfo, settings: EvolveRun, groups: Sequence[Sequence[Task]], singular: Mapping[str, Tensor]
) -> list[Tensor]:
    """Hidden states of each group of tasks, as the router sees them when they are asked; kept on disk."""
    states = task_states(
        [task for group in groups for task in group],
        info,
        backbone_files(info, settings.reading).folder,
        singular=singular,
        max_tokens=read_limit(info, settings.reading.max_tokens),
        device=settings.reading.device,
        progress=settings.progress,
    )
    return list(states.split([len(group) for group in groups]))


def policy_of(
    settings: EvolveRun, base: Checkpoint, hidden: Tensor, singular: tuple[tuple[str, int], ...] = ()
) -> Policy:
    """What is searched: `base` is the start, `hidden [N, d]` are the training tasks.

    Raises:
        ConfigError: a number of axes below zero.
    """
    count = settings.axes
    if count is None:
        count = 0 if base.landmarks is None else AXES
    if count < 0:
        raise ConfigError(f"axes is {count}; it must be 0 or more")
    if settings.cross_fit < 0 or settings.cross_fit == 1:
        raise ConfigError(f"cross_fit is {settings.cross_fit}; it must be 0 or at least 2")
    return Policy(base, singular, principal_axes(base, hidden, count) if count else None)


def backbone_files(info: CheckpointInfo, reading: Reading) -> ModelFiles:
    """Where the backbone that `info` names is.

    Raises:
        CheckpointError: another backbone or revision is there.
    """
    files = resolve_model(reading.backbone or info.backbone, revision=info.revision)
    if (files.id, files.revision) != (info.backbone, info.revision):
        raise CheckpointError(
            f"the start was trained on the backbone {info.backbone}, revision {info.revision}; "
            f"this is {files.id}, {files.revision}"
        )
    return files


def some(count: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """A fixed choice of `wanted` among `count`, in order."""
    return np.sort(np.random.default_rng([seed, 4]).permutation(count)[:wanted])


def identity_of(
    settings: EvolveRun, policy: Policy, train: Sequence[Task], held: Sequence[Task], *tables: Any
) -> dict[str, Any]:
    """Everything that decides the course of a run, small enough to be told where it differs."""
    digest = hashlib.sha256()
    for task in (*train, *held):
        digest.update(f"{task.task_id}\0{task.prompt}\0{task.reference}\0{task.grader}\n".encode())
    for table in tables:
        digest.update(np.ascontiguousarray(table).tobytes())
    keys = ("mode", "size", "samples", "choose", "racing", "validate_every", "max_excluded", "max_turns", "max_tokens")
    more = ("temperature", "guard", "reward", "singular", "axes", "cross_fit")
    return {key: getattr(settings, key) for key in (*keys, *more)} | {
        "search": str(settings.search),
        "worth": str(settings.worth),
        "workers": policy.workers,
        "tasks": (len(train), len(held)),
        "data": digest.hexdigest()[:16],
        "start": hashlib.sha256(policy.vector().tobytes()).hexdigest()[:16],
        "backbone": f"{policy.base.info.backbone}@{policy.base.info.revision}",
    }
