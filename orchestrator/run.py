"""What became of a run of a workflow and of each of its steps, and the events on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from actors.errors import AllWorkersFailedError, FuguError
from actors.messages import ChatReply, Chunk, Usage
from orchestrator.budget import Resource
from orchestrator.workflow import Step, Workflow

Skipped = Literal["failed", "unread", "budget", "cut", "waiting"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of a step. Seconds are since the run began. `skipped` says why it has no whole reply: every
    worker failed; its output would not be read; no budget was left for it; the run ended before it did (`cut`: what a
    streamed answer had said by then is its reply); or it waits for a step that waits for a tool. `failures` holds
    (worker, error) of those that were tried in vain."""

    index: int
    step: Step
    worker: str | None = None
    reply: ChatReply | None = None
    started_s: float | None = None
    ended_s: float | None = None
    failures: tuple[tuple[str, FuguError], ...] = ()
    skipped: Skipped | None = None

    @property
    def seconds(self) -> float:
        return 0.0 if self.started_s is None or self.ended_s is None else self.ended_s - self.started_s


@dataclass(frozen=True, slots=True)
class StepStarted:
    """A worker is asked; `attempt` counts from 1, above it is a fallback."""

    index: int
    worker: str
    attempt: int
    at_s: float


@dataclass(frozen=True, slots=True)
class StepChunk:
    """A piece of the last step's answer."""

    index: int
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class StepEnded:
    result: StepResult


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The last event of `stream`."""

    run: Run


StepEvent = StepStarted | StepChunk | StepEnded


@dataclass(frozen=True, slots=True)
class Run:
    """What happened. `steps` has one result per step of the workflow. `answer` is the last step's reply, or where it
    has none the best so far; None if there is nothing at all, a failure ended the run by policy, or the last step broke
    off after pieces of it had been passed on. `out_of` is what
    ran out, if anything did. `error` says why the last step has no reply. `waiting` names steps whose tool calls the
    caller has to answer before the run can go on (`done`)."""

    workflow: Workflow
    steps: tuple[StepResult, ...]
    answer: ChatReply | None
    seconds: float
    out_of: Resource | None = None
    error: FuguError | None = None
    waiting: tuple[int, ...] = ()

    def answered(self) -> ChatReply:
        """The answer.

        Raises:
            FuguError: there is none; the run's error.
        """
        if self.answer is not None:
            return self.answer
        raise self.error or AllWorkersFailedError({})

    @property
    def complete(self) -> bool:
        """Whether the answer is the last step's, and whole."""
        return bool(self.steps) and self.steps[-1].skipped is None

    @property
    def usage(self) -> Usage:
        """Tokens of all steps that were answered."""
        return sum((step.reply.usage for step in self.steps if step.reply is not None), Usage())

    @property
    def cost_usd(self) -> float | None:
        """Cost of all steps that were answered; None where one's price is unknown."""
        costs = [step.reply.cost_usd for step in self.steps if step.reply is not None]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    @property
    def calls(self) -> int:
        """Upstream calls: those of the replies, and one for each failure."""
        return sum(len(step.failures) + (step.reply.attempts if step.reply is not None else 0) for step in self.steps)

    @property
    def critical_path_s(self) -> float:
        """Seconds of the slowest chain of steps that read one another: the least that the workflow could take."""
        lengths: list[float] = []
        for result in self.steps:
            lengths.append(result.seconds + max((lengths[i] for i in result.step.access), default=0.0))
        return max(lengths, default=0.0)
