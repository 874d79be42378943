"""Rollouts: what becomes of tasks when candidates decide. No Ray.

Recorded single-turn rollouts are table look-ups, done for a whole population at once. Live ones are sessions over
`actors.messages.Worker`s: one worker (`fugu`), or Thinker, Worker and Verifier (`fugu-trinity`) played by
`orchestrator.coordinator`, and graded by `training.grading` or a reward function of the user's own.

Common random numbers: all candidates of a generation get the same tasks, the same samples and the same uniform draws,
so that they differ by what they decide and by nothing else.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actors.errors import DataError, FuguError, GradingError, WorkerError
from actors.messages import ChatReply, ChatRequest, Message, Worker
from orchestrator import coordinator
from orchestrator.choice import ROLES, pick
from orchestrator.coordinator import Session
from training.grading import graded
from training.outcomes import Task

Mode = Literal["fugu", "fugu-trinity"]
Choose = Literal["argmax", "sample"]
Vector = NDArray[np.float64]
Reward = Callable[[Task, str], float]


@dataclass(frozen=True, slots=True)
class Episode:
    """One orchestrated attempt at a task. `cost_usd` is what its calls would cost without any cache, None where a
    price is unknown; `workers` and `roles` have one entry per turn. `excluded` says why there is no reward: it is
    then left out of every mean, never counted as zero."""

    task_id: str
    reward: float | None
    turns: int
    cost_usd: float | None
    workers: tuple[str, ...]
    roles: tuple[str, ...]
    excluded: str = ""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Episodes of K candidates on M tasks. `reward`, `turns` and `cost_usd` `[K, M]`: NaN where excluded or not
    played, cost also where unknown. `chosen [K, M, L]` counts the turns of each worker. `excluded` counts reasons."""

    reward: Vector
    turns: Vector
    cost_usd: Vector
    chosen: NDArray[np.int64]
    excluded: Mapping[str, int] = field(default_factory=dict)

    @property
    def played(self) -> int:
        """Episodes with a reward."""
        return int(np.isfinite(self.reward).sum())


@dataclass(frozen=True, eq=False)
class Draw:
    """What one generation is played on: `tasks [M]` (positions in the task set), which recorded or asked-for sample of
    each, and uniforms `[M, turns, 2]` (worker, role), the same for every candidate."""

    tasks: NDArray[np.int64]
    samples: NDArray[np.int64]
    uniforms: Vector

    def part(self, begin: int, end: int) -> Draw:
        return Draw(self.tasks[begin:end], self.samples[begin:end], self.uniforms[begin:end])


def draw(seed: int, generation: int, *, tasks: int, size: int, samples: int, turns: int) -> Draw:
    """The draw of a generation, from its number alone: nothing has to be kept to go on. Tasks come in passes over the
    whole set, each in an order of its own."""
    places = np.arange(generation * size, (generation + 1) * size)
    passes = {int(one): np.random.default_rng([seed, 1, int(one)]).permutation(tasks) for one in set(places // tasks)}
    rng = np.random.default_rng([seed, 2, generation])
    return Draw(
        np.array([passes[int(place) // tasks][place % tasks] for place in places], dtype=np.int64),
        rng.integers(samples, size=size),
        rng.random((size, turns, 2)),
    )


def decided(logits: Vector, draws: Vector | None, allowed: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Logits `[K, M, L]` → chosen column `[K, M]`: the largest (the first of equals), or with `draws [M]` the one in
    whose share of the softmax the draw falls. `allowed [M, L]` masks before the softmax."""
    if allowed is not None:
        logits = np.where(allowed, logits, -np.inf)
    if draws is None:
        return np.asarray(logits.argmax(-1), dtype=np.int64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    reached = weights.cumsum(-1) > draws[:, None] * weights.sum(-1, keepdims=True)
    # Rounding may leave a sliver above the last share.
    last = weights.shape[-1] - 1 - (weights[..., ::-1] > 0).argmax(-1)
    return np.where(reached.any(-1), reached.argmax(-1), last).astype(np.int64)


def looked_up(chosen: NDArray[np.int64], scores: Vector, costs: Vector) -> Rollouts:
    """Single-turn rollouts whose results are known: chosen workers `[K, M]`, scores and costs `[M, L]`."""
    column = np.arange(chosen.shape[1])
    reward = scores[column, chosen]
    known = np.isfinite(reward)
    counts = (chosen[..., None] == np.arange(scores.shape[1])) & known[..., None]
    turns = np.where(known, 1.0, np.nan)
    return Rollouts(reward, turns, np.where(known, costs[column, chosen], np.nan), counts.astype(np.int64))


def merged(parts: Sequence[Rollouts], axis: int = 1) -> Rollouts:
    """One of several: the same candidates on more tasks, or with `axis` 0 more candidates on the same tasks."""
    excluded: Counter[str] = Counter()
    for part in parts:
        excluded.update(part.excluded)
    return Rollouts(
        np.concatenate([part.reward for part in parts], axis=axis),
        np.concatenate([part.turns for part in parts], axis=axis),
        np.concatenate([part.cost_usd for part in parts], axis=axis),
        np.concatenate([part.chosen for part in parts], axis=axis),
        dict(excluded),
    )


def gathered(episodes: Sequence[Sequence[Episode]], workers: Sequence[str]) -> Rollouts:
    """Episodes `[K][M]` as arrays."""
    shape = (len(episodes), len(episodes[0]) if episodes else 0)
    reward, turns, cost = (np.full(shape, np.nan) for _ in range(3))
    chosen = np.zeros((*shape, len(workers)), dtype=np.int64)
    column = {name: index for index, name in enumerate(workers)}
    excluded: Counter[str] = Counter()
    for row, line in enumerate(episodes):
        for place, episode in enumerate(line):
            if episode.reward is None:
                excluded[episode.excluded] += 1
                continue
            reward[row, place], turns[row, place] = episode.reward, episode.turns
            cost[row, place] = np.nan if episode.cost_usd is None else episode.cost_usd
            for name in episode.workers:
                chosen[row, place, column[name]] += 1
    return Rollouts(reward, turns, cost, chosen, dict(excluded))


@dataclass(frozen=True)
class SessionSettings:
    """How sessions are played: mode, turns at most (K = 5, TRINITY §3.2), how workers are asked, how decisions are
    made. `guard` as in `orchestrator.coordinator.play`: without it a Verifier with nothing to verify ends the session
    with reward 0, as in the paper's training."""

    mode: Mode = "fugu"
    max_turns: int = coordinator.MAX_TURNS
    max_tokens: int | None = None
    temperature: float | None = None
    choose: Choose = "argmax"
    seed: int = 42
    guard: bool = True

    @property
    def turns(self) -> int:
        return self.max_turns if self.mode == "fugu-trinity" else 1

    def request(self, task: Task, sample: int) -> ChatRequest:
        """What a session on a task begins with: equal for all candidates and generations, so that a call is paid
        once."""
        digest = hashlib.sha256(f"{self.seed}\0{task.task_id}\0{sample}".encode()).digest()
        return ChatRequest(
            messages=(Message("user", task.prompt),),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=int.from_bytes(digest[:4], "big") >> 1,
            sample_index=sample,
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate's decision for one turn (`orchestrator.coordinator.TurnDecision`): no fallback, since the reward
    belongs to whom it chose."""

    ranking: tuple[str, ...]
    role: str | None = None


States = Callable[[tuple[Message, ...]], Awaitable[Vector]]


def decider(
    head: Vector,
    workers: Sequence[str],
    states: States,
    uniforms: Vector,
    settings: SessionSettings,
    prior: Vector | None = None,
) -> coordinator.Decide:
    """The decisions of one candidate in one session: its head `[rows, m]` on the transcript's features `[m]` plus
    `prior [rows]`, turn t with the draws `uniforms[t]`."""
    turn = 0
    sampled = settings.choose == "sample"

    async def decide(transcript: tuple[Message, ...]) -> Choice:
        nonlocal turn
        logits = head @ await states(transcript)
        if prior is not None:
            logits = logits + prior
        drawn = uniforms[min(turn, len(uniforms) - 1)]
        turn += 1
        worker = pick(_softmax(logits[: len(workers)]), float(drawn[0]) if sampled else None)
        role = None
        if len(logits) > len(workers):
            role = ROLES[pick(_softmax(logits[len(workers) :]), float(drawn[1]) if sampled else None)]
        return Choice((workers[worker],), role)

    return decide


async def play_session(
    task: Task,
    sample: int,
    decide: coordinator.Decide,
    workers: Mapping[str, Worker],
    settings: SessionSettings,
    *,
    judges: Mapping[str, Worker] | None = None,
    reward: Reward | None = None,
) -> Episode:
    """Play one session and grade its response. A worker that fails, a grader that cannot run or a reward function that
    raises makes an excluded episode; only cancellation comes out as an exception."""
    watched = {name: _Watched(worker) for name, worker in workers.items()}
    session = Session()
    request = settings.request(task, sample)
    try:
        if settings.mode == "fugu-trinity":
            await coordinator.play(
                request,
                decide,
                watched,
                max_turns=settings.max_turns,
                fallbacks=0,
                guard=settings.guard,
                session=session,
            )
        else:
            name = (await decide(request.messages)).ranking[0]
            session.response = await watched[name].complete(request)
            session.turns.append(coordinator.Turn(name, "worker", session.response))
    except FuguError as error:
        failed = next((one.failure for one in watched.values() if one.failure is not None), error)
        return _excluded(task, session, _because(failed))
    for one in watched.values():
        if one.failure is not None:
            return _excluded(task, session, _because(one.failure))
    if session.response is None:
        # Nobody gave an answer: that is the candidate's doing, and worth nothing.
        return _episode(task, session, 0.0)
    try:
        return _episode(task, session, await _scored(task, session.response.text, judges or {}, reward))
    except GradingError as error:
        return _excluded(task, session, error.message)


async def _scored(task: Task, response: str, judges: Mapping[str, Worker], reward: Reward | None) -> float:
    if reward is None:
        return (await graded(task, response, judges)).score
    try:
        value: Any = reward(task, response)
        value = float(await value if inspect.isawaitable(value) else value)
    except Exception as error:
        # Somebody else's code: whatever it stumbles over is no score.
        raise GradingError(f"task {task.task_id}: the reward function raised {error!r}") from error
    if not 0 <= value <= 1:
        raise GradingError(f"task {task.task_id}: the reward function returned {value}, not a number in 0..1")
    return value


def _episode(task: Task, session: Session, reward: float) -> Episode:
    names = tuple(turn.worker for turn in session.turns)
    turns = max(1, len(names))
    return Episode(task.task_id, reward, turns, session.cost_usd, names, tuple(turn.role for turn in session.turns))


def _excluded(task: Task, session: Session, reason: str) -> Episode:
    names = tuple(turn.worker for turn in session.turns)
    roles = tuple(turn.role for turn in session.turns)
    return Episode(task.task_id, None, len(names), session.cost_usd, names, roles, reason)


def _because(error: FuguError) -> str:
    return f"worker {error.worker}: {error.message}" if error.worker else error.message


class _Watched:
    """A worker that remembers its failure: the coordinator ends a session with the response it has when a later turn
    fails, which is right for a user and wrong for a reward."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.name = worker.name
        self.failure: FuguError | None = None

    async def complete(self, request: ChatRequest) -> ChatReply:
        try:
            return await self._worker.complete(request)
        except WorkerError as error:
            error.worker = error.worker or self.name
            self.failure = error
            raise

    def stream(self, request: ChatRequest) -> Any:
        return self._worker.stream(request)


def _softmax(logits: Vector) -> list[float]:
    if not np.isfinite(logits).all():
        raise DataError("a candidate's logits are not finite")
    weights = np.exp(logits - logits.max())
    return list((weights / weights.sum()).tolist())
