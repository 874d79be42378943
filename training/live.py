"""Live rollouts for an evolution: the workers of a configuration, through their provider actors, on the cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from torch import Tensor

from actors.config import FuguConfig
from actors.config_file import load_config
from actors.errors import ConfigError, DataError
from actors.messages import ChatReply
from actors.model_files import cache_dir
from actors.placement import resources
from actors.pool import WorkerPool
from orchestrator.head import Checkpoint
from training.calls import CallStore, Key
from training.fanout import Connect, Context, FanOut, Group, cluster_lanes, reward_function
from training.features import read_limit
from training.generations import BudgetReachedError, Spent
from training.grading import check_task
from training.label import chosen, connected
from training.label_tasks import provider_actors
from training.outcomes import Task, read_tasks
from training.policy import Policy, from_checkpoint, from_zeros
from training.rollout import Draw, Episode, Rollouts, SessionSettings, decided, gathered
from training.start import EvolveRun, backbone_files, identity_of, policy_of, read, reading_of, some
from training.states import StatesActor
from training.tasks import check_tasks, load_tasks

Vector = NDArray[np.float64]
VALIDATION_TASKS = 300  # TRINITY's code validates on 300 tasks
_VALIDATION = 3
# Sessions in flight for each call that the workers' limits allow: they also read, decide and are graded.
_AHEAD = 2
_MOST_SESSIONS = 2048


class LivePlayer:
    """Candidates in live sessions.

    With one worker per session (`fugu`) everything is decided before anything is asked: a generation's calls are the
    different (task, worker) pairs among all its candidates' decisions, and what was once asked is known for good.
    """

    def __init__(
        self,
        policy: Policy,
        train: tuple[Sequence[Task], Tensor],
        validation: tuple[Sequence[Task], Tensor],
        settings: SessionSettings,
        fan_out: FanOut,
        store: CallStore,
    ) -> None:
        self._policy = policy
        self._train, self._features = train[0], policy.features(train[1])
        self._held, self._held_features = validation[0], policy.features(validation[1])
        self._settings = settings
        self._fan_out = fan_out
        self._store = store
        self._results: dict[tuple[str, int, int], Episode] = {}
        count = len(self._held)
        draws = np.random.default_rng([settings.seed, _VALIDATION]).random((count, settings.turns, 2))
        self._validation = Draw(np.arange(count), np.zeros(count, dtype=np.int64), draws)

    @property
    def tasks(self) -> int:
        return len(self._train)

    @property
    def workers(self) -> tuple[str, ...]:
        return self._policy.workers

    def play(self, thetas: Vector, drawn: Draw) -> Rollouts:
        return self._played(thetas, drawn, self._train, self._features)

    def validate(self, theta: Vector) -> Rollouts:
        return self._played(theta[None], self._validation, self._held, self._held_features)

    def spent(self) -> Spent:
        return Spent(self._store.calls, self._store.usd)

    def _played(self, thetas: Vector, drawn: Draw, tasks: Sequence[Task], features: Vector) -> Rollouts:
        if self._settings.mode == "fugu-trinity":
            return self._sessions(thetas, drawn, tasks)
        logits = self._policy.logits(thetas, features[drawn.tasks])
        picked = decided(logits, drawn.uniforms[:, 0, 0] if self._settings.choose == "sample" else None)
        self._ask(picked, drawn, tasks)
        episodes = [
            [
                self._results[tasks[task].task_id, int(sample), int(worker)]
                for task, sample, worker in zip(drawn.tasks, drawn.samples, line, strict=True)
            ]
            for line in picked
        ]
        rollouts = gathered(episodes, self.workers)
        # What failed may work when it is wanted again.
        self._results = {key: episode for key, episode in self._results.items() if episode.reward is not None}
        return rollouts

    def _ask(self, picked: NDArray[np.int64], drawn: Draw, tasks: Sequence[Task]) -> None:
        """Play whatever (task, sample, worker) has no result yet."""
        groups: list[Group] = []
        wanted: list[tuple[str, int, int]] = []
        for place, (row, sample) in enumerate(zip(drawn.tasks, drawn.samples, strict=True)):
            task, players = tasks[row], []
            for worker in sorted(set(picked[:, place].tolist())):
                key = (task.task_id, int(sample), worker)
                if key not in self._results and key not in wanted:
                    players.append((len(wanted), worker))
                    wanted.append(key)
            if players:
                groups.append(Group(task, int(sample), drawn.uniforms[place], tuple(players)))
        if groups:
            found = self._fan_out.play(None, groups)
            self._results.update((wanted[place], episode) for place, episode in found.items())

    def _sessions(self, thetas: Vector, drawn: Draw, tasks: Sequence[Task]) -> Rollouts:
        count = len(drawn.tasks)
        groups = [
            Group(
                tasks[row],
                int(drawn.samples[place]),
                drawn.uniforms[place],
                tuple((candidate * count + place, candidate) for candidate in range(len(thetas))),
            )
            for place, row in enumerate(drawn.tasks)
        ]
        found = self._fan_out.play(self._policy.heads(thetas), groups)
        episodes = [[found[row * count + place] for place in range(count)] for row in range(len(thetas))]
        return gathered(episodes, self.workers)


@contextmanager
def live(settings: EvolveRun, start: Checkpoint | None) -> Iterator[tuple[Policy, LivePlayer, dict[str, Any]]]:
    """Policy and player of a live run, and what identifies it; Ray and provider actors for as long as it lasts.

    Raises:
        ConfigError, DataError, CheckpointError: as `training.evolve.run`; a worker that cannot answer a tiny call is
            named before the first session.
    """
    assert settings.config is not None
    whole = load_config(settings.config)
    config = chosen(whole, settings.workers or (start.info.workers if start is not None else ()))
    names = tuple(spec.name for spec in config.active)
    if settings.reward is not None:
        reward_function(settings.reward)
    train, held = _tasks(settings)
    judges = {task.grader.partition(":")[2] for task in (*train, *held) if task.grader.startswith("judge:")}
    everyone = chosen(whole, (*names, *sorted(judges - set(names))))
    for task in (*train, *held):
        if settings.reward is None:
            check_task(task, frozenset(spec.name for spec in everyone.active))
    held = tuple(
        held[row] for row in some(len(held), settings.validation_tasks or VALIDATION_TASKS, settings.search.seed)
    )
    roles = settings.mode == "fugu-trinity"
    info = reading_of(settings, start.info if start is not None else None, names)
    singular = start.singular if start is not None else {}
    hidden, held_hidden = read(info, settings, (train, held), singular)
    if start is None:
        base = from_zeros(info, hidden)
    else:
        base = from_checkpoint(start, hidden, workers=names, roles=roles, where=str(settings.checkpoint))
    policy = policy_of(settings, base, hidden)
    session = SessionSettings(
        settings.mode,
        settings.max_turns,
        settings.max_tokens,
        settings.temperature,
        settings.choose,
        settings.search.seed,
        settings.guard,
    )
    digests = {spec.name: _digest(spec) for spec in everyone.active}
    limits = sum(spec.limits.concurrency for spec in config.active)
    concurrency = settings.concurrency or min(_AHEAD * limits, _MOST_SESSIONS)
    identity = identity_of(settings, policy, train, held) | {"pool": tuple(sorted(digests.items()))}
    store = CallStore(settings.folder / "calls.sqlite")

    def keep(answers: Sequence[tuple[str, Key, ChatReply]]) -> None:
        store.add(answers)
        if settings.max_calls is not None and store.calls >= settings.max_calls:
            raise BudgetReachedError(f"{store.calls} of {settings.max_calls} calls were made")
        if settings.budget_usd is not None and store.usd >= settings.budget_usd:
            raise BudgetReachedError(f"${store.usd:.4f} of ${settings.budget_usd:g} were spent")

    try:
        with connected(settings.address), _pool(everyone):
            states = _states_actor(settings, base, info) if roles else None
            context = Context(
                names,
                session,
                Connect(everyone),
                digests,
                states,
                None if base.prior is None else base.prior.double().numpy(),
                settings.reward,
                by_worker=not roles,
            )
            lanes = cluster_lanes(config.placement, concurrency)
            where = resources(config.placement.rollouts, config.placement)
            fan_out = FanOut(context, concurrency, lanes, store.of, keep, where)
            try:
                yield (
                    policy,
                    LivePlayer(policy, (train, hidden), (held, held_hidden), session, fan_out, store),
                    identity,
                )
            finally:
                if states is not None:
                    ray.kill(states)
    finally:
        store.close()


def _tasks(settings: EvolveRun) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    if settings.sources:
        tasks = load_tasks(settings.sources)
    elif settings.outcomes is not None:
        tasks = list(read_tasks(settings.outcomes))
        check_tasks(tasks)
    else:
        raise ConfigError("there are no tasks: give --outcomes or --tasks")
    parts = []
    for name in (settings.split, settings.val_split):
        part = tuple(task for task in tasks if task.split == name)
        if not part:
            have = ", ".join(sorted({task.split for task in tasks}))
            raise DataError(f"no task has the split {name}; there are {have}")
        parts.append(part)
    return parts[0], parts[1]


@contextmanager
def _pool(config: FuguConfig) -> Iterator[None]:
    """The provider actors, each worker having answered once; they end with us if we were the first to want them."""
    shared = bool(provider_actors())
    pool = WorkerPool.connect(config)
    try:
        asyncio.run(_answers(pool))
        yield
    finally:
        if not shared:
            pool.release()


async def _answers(pool: WorkerPool) -> None:
    await pool.ready()
    for found in await asyncio.gather(*(pool.check(name) for name in pool.workers)):
        if found.error is not None:
            raise DataError(f"worker {found.name} cannot answer: {found.error.message}")


def _states_actor(settings: EvolveRun, base: Checkpoint, info: Any) -> Any:
    revision = f"{info.backbone}@{info.revision}"
    if base.singular:
        offsets = b"".join(name.encode() + base.singular[name].numpy().tobytes() for name in sorted(base.singular))
        revision += f"+{sha256(offsets).hexdigest()}"
    gpu = 0.25 if ray.cluster_resources().get("GPU") else 0
    actor: Any = StatesActor
    return actor.options(num_gpus=gpu).remote(
        str(backbone_files(info, settings.reading).folder),
        base,
        read_limit(info, settings.reading.max_tokens),
        settings.reading.device,
        cache_dir() / "features.sqlite",
        revision,
    )


def _digest(spec: Any) -> str:
    own = spec.model_dump_json(include={"provider", "model", "system", "defaults", "adapter", "outcomes"})
    return sha256(f"{own}|{spec.url}".encode()).hexdigest()[:16]
