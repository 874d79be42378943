"""What becomes of plans: each is parsed, carried out and graded, and earns a reward. No Ray here.

The reward (Conductor §3.1; Fugu report §3.2.1) is 0 for what is no workflow, 0.5 for one whose answer is wrong and 1
for one whose answer is right; the paper's code gives 1.5 instead of 1. A score between is a reward between. Where
workers failed or nothing could be graded nothing is known, and there is no reward.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from orchestrator.workflow import MAX_STEPS, Workflow, parse_workflow
from training.calls import CallStore, Key, PaidOnce, call_cache
from training.deciding import Rankings
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
    round, which three empty lists keep; None in the first round. `plan` is what the text says with its steps in the
    hands of whom a router named (`orchestrator.assign`), None where the text is still to be read and its word holds."""

    task: Task
    text: str
    allowed: tuple[str, ...]
    before: str | None = None
    plan: Workflow | None = None


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


def read_plan(written: Written, pool: Sequence[str], max_steps: int) -> Workflow:
    """Raises:
    PlanError: it is no workflow that this writer might write.
    """
    return parse_workflow(
        written.text, pool, allowed=written.allowed, max_steps=max_steps, allow_empty=written.before is not None
    )


async def play(
    written: Written, pool: Sequence[str], workers: Mapping[str, Worker], settings: RolloutSettings
) -> Played:
    """One rollout. `pool` are all workers in the order of their numbers; `workers` also holds judges."""
    try:
        workflow = written.plan or read_plan(written, pool, settings.max_steps)
    except PlanError as error:
        return Played(0.0, 0.0, failure=error.kind)
    if not workflow.steps:
        assert written.before is not None
        return await _graded(written, written.before, workers, settings, Played(None, None, topology="empty"))
    whole = written.plan is not None and is_whole(workflow)
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


class AssignedRollouts:
    """`rollouts` of plans whose steps a router gives to workers. What it said of a question is remembered."""

    def __init__(self, rollouts: Rollouts, pool: Sequence[str], router: Router, max_steps: int = MAX_STEPS) -> None:
        self._rollouts, self._pool, self._max_steps = rollouts, tuple(pool), max_steps
        self._rankings = Rankings(router)

    def play(self, written: Sequence[Written]) -> list[Played]:
        plans = [self._plan(one) for one in written]
        asked = [
            [] if plan is None else conversations(plan, (Message("user", one.task.prompt),))
            for one, plan in zip(written, plans, strict=True)
        ]
        self._rankings.read([talk for talks in asked for talk in talks])
        hands = [
            [decision.worker for decision in self._rankings.decide(talks, [frozenset(one.allowed)] * len(talks))]
            for one, talks in zip(written, asked, strict=True)
        ]
        return self._rollouts.play(
            [
                one if plan is None else replace(one, plan=assigned(plan, workers))
                for one, plan, workers in zip(written, plans, hands, strict=True)
            ]
        )

    def _plan(self, one: Written) -> Workflow | None:
        try:
            return read_plan(one, self._pool, self._max_steps)
        except PlanError:
            return None  # who plays it says what is wrong
