"""What becomes of plans: each is parsed, carried out and graded, and earns a reward. No Ray here.

The reward (Conductor §3.1; Fugu report §3.2.1) is 0 for what is no workflow, 0.5 for one whose answer is wrong and 1
for one whose answer is right; the paper's code gives 1.5 instead of 1. A score between is a reward between. Where
workers failed or nothing could be graded nothing is known, and there is no reward.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from actors.errors import GradingError, PlanError
from actors.messages import ChatReply, ChatRequest, Message, Worker
from orchestrator.access import StepStyle
from orchestrator.assign import assigned, conversations, is_whole
from orchestrator.budget import Budget
from orchestrator.executor import ExecutorSettings, execute
from orchestrator.router import Router
from orchestrator.workflow import MAX_STEPS, parse_workflow
from training.calls import CallStore, Key, PaidOnce, call_cache
from training.grading import graded
from training.outcomes import Task


@dataclass(frozen=True)
class RolloutSettings:
    """`parsed` is the reward of any workflow, `right` of one whose answer is right. `steps` is how a step is told to
    its worker. `temperature` and `max_tokens` are the workers' (None: their own). `seconds` bound one rollout."""

    parsed: float = 0.5
    right: float = 1.0
    max_steps: int = MAX_STEPS
    steps: StepStyle = "full"
    temperature: float | None = 0.0
    max_tokens: int | None = 48
    seconds: float = 600.0


@dataclass(frozen=True)
class Written:
    """What a conductor wrote for a task, with the workers that it might use. `before` is the answer of an earlier
    round, which three empty lists keep; None in the first round. `workers` are those that a router gave the steps to
    (`orchestrator.assign`), None where the conductor's word holds."""

    task: Task
    text: str
    allowed: tuple[str, ...]
    before: str | None = None
    workers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Played:
    """What became of it. `reward` and `score` are None where nothing is known, and `excluded` says why; `failure` is
    the kind of mistake of a text that is no workflow. `seconds` is the run's, `critical_s` its longest chain's."""

    reward: float | None
    score: float | None
    answer: str | None = None
    failure: str = ""
    excluded: str = ""
    topology: str = ""
    workers: tuple[str, ...] = ()
    calls: int = 0
    cost_usd: float | None = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    critical_s: float = 0.0


class Rollouts(Protocol):
    """Plays texts, `played[i]` is what became of `written[i]`."""

    def play(self, written: Sequence[Written]) -> list[Played]: ...


async def play(
    written: Written, pool: Sequence[str], workers: Mapping[str, Worker], settings: RolloutSettings
) -> Played:
    """One rollout. `pool` are all workers in the order of their numbers; `workers` also holds judges."""
    try:
        workflow = parse_workflow(
            written.text,
            pool,
            allowed=written.allowed,
            max_steps=settings.max_steps,
            allow_empty=written.before is not None,
        )
    except PlanError as error:
        return Played(0.0, 0.0, failure=error.kind)
    if not workflow.steps:
        assert written.before is not None
        return await _graded(written, written.before, workers, settings, Played(None, None, topology="empty"))
    whole = written.workers is not None and is_whole(workflow)
    if written.workers is not None:
        workflow = assigned(workflow, written.workers)
    request = ChatRequest(
        (Message("user", written.task.prompt),),
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=None if settings.temperature == 0 else 0,  # so that the same question gets the same answer
    )
    run = await execute(
        request,
        workflow,
        {name: workers[name] for name in written.allowed},
        settings=ExecutorSettings(fallbacks=0, steps=settings.steps),
        budget=Budget(seconds=settings.seconds),
        prepare=lambda _step, asked: asked.with_(messages=request.messages) if whole else asked,
    )
    about = Played(
        None,
        None,
        topology=workflow.topology,
        workers=tuple(step.worker for step in workflow.steps),
        calls=run.calls,
        cost_usd=run.cost_usd,
        input_tokens=run.usage.input_tokens,
        output_tokens=run.usage.output_tokens,
        seconds=run.seconds,
        critical_s=run.critical_path_s,
    )
    if run.answer is None or not run.complete:
        reason = type(run.error).__name__ if run.error is not None else "no answer"
        return replace(about, excluded=reason)
    return await _graded(written, run.answer.text, workers, settings, about)


async def _graded(
    written: Written, answer: str, workers: Mapping[str, Worker], settings: RolloutSettings, about: Played
) -> Played:
    try:
        score = (await graded(written.task, answer, workers)).score
    except GradingError:
        return replace(about, answer=answer, excluded="GradingError")
    reward = settings.parsed + (settings.right - settings.parsed) * score
    return replace(about, answer=answer, score=score, reward=reward)


class InProcessRollouts:
    """Rollouts over workers of this process, all at the same time. Every answer is kept in `store` and looked up there,
    so that a question is asked once, in however many runs of it."""

    def __init__(
        self, pool: Sequence[str], workers: Mapping[str, Worker], settings: RolloutSettings, store: Path
    ) -> None:
        self._pool, self._settings = tuple(pool), settings
        self._store = CallStore(store)
        self._new: list[tuple[str, Key, ChatReply]] = []
        cache = call_cache(self._store.of(""))
        self._workers = {
            name: PaidOnce(worker, "", cache, lambda key, reply: self._new.append(("", key, reply)))
            for name, worker in workers.items()
        }
        self._runner = asyncio.Runner()

    def play(self, written: Sequence[Written]) -> list[Played]:
        async def all_of_them() -> list[Played]:
            return await asyncio.gather(*(play(one, self._pool, self._workers, self._settings) for one in written))

        try:
            return self._runner.run(all_of_them())
        finally:
            new, self._new = self._new, []
            self._store.add(new)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._runner.close()
        self._store.close()


@dataclass
class AssignedRollouts:
    """`rollouts` of plans whose steps a router gives to workers. What it said of a question is remembered."""

    rollouts: Rollouts
    pool: Sequence[str]
    router: Router
    max_steps: int = MAX_STEPS
    _known: dict[tuple[tuple[Message, ...], frozenset[str]], str] = field(default_factory=dict)

    def play(self, written: Sequence[Written]) -> list[Played]:
        asked = [(self._conversations(one), frozenset(one.allowed)) for one in written]
        every = dict.fromkeys((talk, allowed) for talks, allowed in asked for talk in talks)
        new = [key for key in every if key not in self._known]
        decided = self.router.decide([talk for talk, _ in new], [allowed for _, allowed in new], [None] * len(new))
        self._known.update((key, decision.worker) for key, decision in zip(new, decided, strict=True))
        return self.rollouts.play(
            [
                replace(one, workers=tuple(self._known[talk, allowed] for talk in talks))
                for one, (talks, allowed) in zip(written, asked, strict=True)
            ]
        )

    def _conversations(self, one: Written) -> list[tuple[Message, ...]]:
        """None for what is no plan, or has no step."""
        try:
            workflow = parse_workflow(
                one.text, self.pool, allowed=one.allowed, max_steps=self.max_steps, allow_empty=one.before is not None
            )
        except PlanError:
            return []
        return conversations(workflow, (Message("user", one.task.prompt),)) if workflow.steps else []
