"""Live rollouts over a cluster: sessions as Ray tasks. No torch, so that a lane's process starts fast.

A Ray task (a lane) plays many sessions at the same time in one event loop, so that neither the driver nor Ray does
anything per session but carry its result. All sessions on one task of the task set are a group and go to one lane: what
candidates ask alike is then asked once, without any process between them. Lanes take groups when they have room for
them, so that none waits while another has work. Results and answers come back as they are there; when a process or a
node is lost, what is missing is played again, with every answer that came in.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.config import FuguConfig, PlacementConfig
from actors.errors import ConfigError, DataError
from actors.messages import ChatReply, Message, Worker
from actors.placement import cpus
from actors.pool import WorkerPool
from training.calls import Key, PaidOnce, call_cache
from training.lost import pause, streamed
from training.outcomes import Task
from training.rollout import Choice, Episode, Reward, SessionSettings, decider, play_session

logger = logging.getLogger(__name__)

Vector = NDArray[np.float64]
# Of a CPU: a lane mostly waits for workers; the rest is grading.
_CPUS = 0.2
_SESSIONS_PER_LANE = 64
# What ended is handed to the driver at least this often (seconds), and what is asked of the backbone waits this long
# for others to join.
_HAND_OVER = 0.05
_GATHER = 0.003


@dataclass(frozen=True, eq=False)
class Group:
    """All sessions on one task: `players` are (place in the results, who plays): a row of the population, or with
    `by_worker` a column of the pool. `known` are answers that are paid for."""

    task: Task
    sample: int
    uniforms: Vector
    players: tuple[tuple[int, int], ...]
    known: Mapping[Key, ChatReply] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Context:
    """What every lane needs. `workers` are the first rows of the heads, `prior` `[rows]` is added to what they say.
    `connect` gives the workers, in the lane's process; `digests` tell a worker from another configuration of the same
    name; `states` is a `training.states.StatesActor` (None where `by_worker`: then nobody decides)."""

    workers: tuple[str, ...]
    settings: SessionSettings
    connect: Callable[[], Mapping[str, Worker]]
    digests: Mapping[str, str]
    states: Any = None
    prior: Vector | None = None
    reward: str | None = None
    by_worker: bool = False


@dataclass(frozen=True, eq=False)
class Ended:
    """What a lane hands over: episodes by place, and answers that were not known, by task and call."""

    episodes: tuple[tuple[int, Episode], ...]
    answers: tuple[tuple[str, Key, ChatReply], ...]


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class GroupQueue:
    """Groups that no lane has taken yet. `number` tells a filling from the one before, which a lane that is being
    cancelled may still ask for. Lost with its node it starts again empty: lanes end, and what is missing is filled in
    again."""

    def __init__(self) -> None:
        self._number = -1
        self._groups: deque[Group] = deque()

    def fill(self, number: int, groups: Sequence[Group]) -> None:
        self._number = number
        self._groups = deque(groups)

    def take(self, number: int, sessions: int) -> list[Group]:
        """The next groups, with at least so many sessions together; none when all are taken."""
        taken: list[Group] = []
        while number == self._number and self._groups and sessions > 0:
            taken.append(self._groups.popleft())
            sessions -= len(taken[-1].players)
        return taken


class FanOut:
    """Plays groups on the cluster this process is connected to: at most `concurrency` sessions at the same time in at
    most `lanes` Ray tasks, each of which asks for `where` of a node. `on_answers` gets answers as they come; what it
    raises ends the playing. `known` gives the answers for a task before it is played."""

    def __init__(
        self,
        context: Context,
        concurrency: int,
        lanes: int,
        known: Callable[[str], Mapping[Key, ChatReply]],
        on_answers: Callable[[Sequence[tuple[str, Key, ChatReply]]], None],
        where: Mapping[str, float] | None = None,
    ) -> None:
        self._context = ray.put(context)
        lane: Any = play_lane
        self._play_lane = lane.options(resources=dict(where or {}))
        self._concurrency = concurrency
        self._lanes = lanes
        self._known = known
        self._on_answers = on_answers
        queue: Any = GroupQueue
        # Beside the driver: a node that is lost takes lanes with it, not the queue.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._queue = queue.options(scheduling_strategy=here).remote()
        self._fillings = 0

    def play(self, heads: Vector | None, groups: Sequence[Group]) -> dict[int, Episode]:
        """Episodes by place, whatever was lost on the way. `heads [K, rows, d]` are the candidates'.

        Raises:
            DataError: lanes were lost again and again.
        """
        return asyncio.run(self._play(heads, groups))

    async def _play(self, heads: Vector | None, groups: Sequence[Group]) -> dict[int, Episode]:
        population = ray.put(heads)
        found: dict[int, Episode] = {}
        losses = 0
        while left := [rest for group in groups if (rest := self._missing(group, found)).players]:
            before = len(found)
            lost = await self._round(population, left, found)
            losses = losses + 1 if len(found) == before else 0
            await asyncio.sleep(pause(losses, lost or DataError("lanes ended before their sessions did")))
        return dict(sorted(found.items()))

    async def _round(self, heads: Any, groups: Sequence[Group], found: dict[int, Episode]) -> RayError | None:
        """Let lanes play until none is left; the reason why one of them was lost, if one was."""
        self._fillings += 1
        await self._queue.fill.remote(self._fillings, groups)
        lanes = max(1, min(self._lanes, len(groups)))
        each = -(-self._concurrency // lanes)
        try:
            async with asyncio.TaskGroup() as running:
                ends = [running.create_task(self._lane(heads, each, found)) for _ in range(lanes)]
        except BaseExceptionGroup as errors:
            # One reason is enough, and callers know it by its type.
            raise errors.exceptions[0] from None
        return next((end.result() for end in ends if end.result() is not None), None)

    async def _lane(self, heads: Any, concurrency: int, found: dict[int, Episode]) -> RayError | None:
        task = self._play_lane.remote(self._context, heads, self._queue, self._fillings, concurrency)
        try:
            async with aclosing(streamed(task)) as ends:
                async for ended in ends:
                    found.update(ended.episodes)
                    self._on_answers(ended.answers)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None  # a fault of ours, not of the cluster's
        except RayError as error:
            logger.warning("rollouts were lost (%s); what is missing is played again", type(error).__name__)
            return error
        return None

    def _missing(self, group: Group, found: Mapping[int, Episode]) -> Group:
        players = tuple(player for player in group.players if player[0] not in found)
        return replace(group, players=players, known=self._known(group.task.task_id) if players else {})


@ray.remote(num_cpus=_CPUS, max_retries=0, num_returns="streaming", scheduling_strategy="SPREAD")
def play_lane(context: Context, heads: Vector | None, queue: Any, number: int, concurrency: int) -> Iterator[Ended]:
    """Never retried by Ray: what was handed over once would come again in another order."""
    reward = None if context.reward is None else reward_function(context.reward)
    workers = context.connect()
    with asyncio.Runner() as runner:
        lane = _Lane(context, heads, workers, reward, concurrency)
        runner.run(lane.start(queue, number))
        while (ended := runner.run(lane.next())) is not None:
            yield ended


class _Lane:
    def __init__(
        self,
        context: Context,
        heads: Vector | None,
        workers: Mapping[str, Worker],
        reward: Reward | None,
        concurrency: int,
    ) -> None:
        self._context = context
        self._heads = heads
        self._workers = workers
        self._reward = reward
        self._concurrency = concurrency
        self._turn = asyncio.Semaphore(concurrency)
        self._sessions = 0
        self._room = asyncio.Event()
        self._episodes: list[tuple[int, Episode]] = []
        self._answers: list[tuple[str, Key, ChatReply]] = []
        self._running: set[asyncio.Task[None]] = set()
        self._reader = None if context.states is None else _Reader(context)

    async def start(self, queue: Any, number: int) -> None:
        self._running.add(asyncio.ensure_future(self._feed(queue, number)))

    async def _feed(self, queue: Any, number: int) -> None:
        """Take groups until there are none: as many sessions as can run and some that wait, so that none of the lane is
        ever idle for want of the queue's answer."""
        ahead = max(1, self._concurrency // 8)
        while True:
            free = self._concurrency + ahead - self._sessions
            if free < max(1, ahead // 2):
                self._room.clear()
                await self._room.wait()
                continue
            groups: list[Group] = await queue.take.remote(number, free)
            if not groups:
                return
            for group in groups:
                workers = self._paid_once(group)
                self._sessions += len(group.players)
                for place, who in group.players:
                    self._running.add(asyncio.ensure_future(self._session(group, place, who, workers)))

    async def next(self) -> Ended | None:
        """What has come in since; None when all is handed over."""
        if self._running:
            done, _ = await asyncio.wait(self._running, timeout=_HAND_OVER, return_when=asyncio.FIRST_COMPLETED)
            if done and len(self._running) > len(done):
                # Others end at nearly the same time; they travel together.
                await asyncio.sleep(_HAND_OVER / 5)
            self._running -= done
            for task in done:
                task.result()
        elif not self._episodes and not self._answers:
            return None
        ended = Ended(tuple(self._episodes), tuple(self._answers))
        self._episodes.clear()
        self._answers.clear()
        return ended

    async def _session(self, group: Group, place: int, who: int, workers: Mapping[str, Worker]) -> None:
        context = self._context
        async with self._turn:
            if context.by_worker:
                decide = _always(Choice((context.workers[who],)))
            else:
                assert self._heads is not None
                assert self._reader is not None
                decide = decider(
                    self._heads[who], context.workers, self._reader, group.uniforms, context.settings, context.prior
                )
            episode = await play_session(
                group.task,
                group.sample,
                decide,
                {name: workers[name] for name in context.workers},
                context.settings,
                judges=workers,
                reward=self._reward,
            )
        self._episodes.append((place, episode))
        self._sessions -= 1
        self._room.set()

    def _paid_once(self, group: Group) -> dict[str, Worker]:
        cache = call_cache(group.known)
        digests = self._context.digests

        def note(key: Key, reply: ChatReply) -> None:
            self._answers.append((group.task.task_id, key, reply))

        return {name: PaidOnce(worker, digests.get(name, ""), cache, note) for name, worker in self._workers.items()}


def _always(choice: Choice) -> Any:
    async def decide(_transcript: tuple[Message, ...]) -> Choice:
        return choice

    return decide


class _Reader:
    """Features of transcripts. Each is asked for once per lane; those asked for at nearly the same time
    travel together."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._known: dict[tuple[Message, ...], asyncio.Future[Vector]] = {}
        self._waiting: list[tuple[Message, ...]] = []
        self._sender: asyncio.Task[None] | None = None

    async def __call__(self, transcript: tuple[Message, ...]) -> Vector:
        if transcript not in self._known:
            self._known[transcript] = asyncio.get_running_loop().create_future()
            self._waiting.append(transcript)
            if self._sender is None:
                self._sender = asyncio.ensure_future(self._send())
        return await asyncio.shield(self._known[transcript])

    async def _send(self) -> None:
        await asyncio.sleep(_GATHER)
        waiting, self._waiting, self._sender = self._waiting, [], None
        try:
            states = (await self._context.states.states.remote(waiting)).astype(np.float64)
        except Exception as error:
            for transcript in waiting:
                self._known.pop(transcript).set_exception(error)
            return
        for transcript, state in zip(waiting, states, strict=True):
            self._known[transcript].set_result(state)


@dataclass(frozen=True)
class Connect:
    """Gives a lane its workers, through the provider actors of the cluster."""

    config: FuguConfig

    def __call__(self) -> Mapping[str, Worker]:
        return WorkerPool.connect(self.config).workers


def reward_function(name: str) -> Reward:
    """The function that `module:function` names.

    Raises:
        ConfigError: there is none.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"there is no reward function {name}: {error}") from error
    if not callable(found):
        raise ConfigError(f"the reward {name} is not a function")
    function: Reward = found
    return function


def cluster_lanes(placement: PlacementConfig, concurrency: int) -> int:
    """One lane for each CPU of the nodes that rollouts run on. Where the cluster can start more of those
    (`placement.required`), as many as the sessions fill: lanes that wait are what it grows by."""
    now = cpus(placement.rollouts, placement)
    return max(now, -(-concurrency // _SESSIONS_PER_LANE)) if placement.required else now
