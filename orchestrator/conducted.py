"""What became of a conducted request, and the events on the way. Filled while it runs; readable at any moment."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from actors.errors import FuguError
from actors.messages import ChatReply, Usage
from orchestrator.budget import Resource
from orchestrator.memory import Paused
from orchestrator.run import Run, StepEvent
from orchestrator.workflow import Workflow


@dataclass(frozen=True, slots=True)
class Writing:
    """Something the conductor wrote: a workflow, or (`error`) why it is none. `seconds` is how long that took."""

    reply: ChatReply
    seconds: float
    error: FuguError | None = None


@dataclass(slots=True)
class PlanRound:
    """One round: what was written, and the run that came of it. `kept`: three empty lists, so the answer before stands.
    `bare`: the conversation as it is went to one worker, because no workflow came about (`reason` says why), or because
    the plan had one step and a router says whose it is. `nested` holds what became of steps that the conductor gave to
    itself."""

    number: int
    writings: list[Writing] = field(default_factory=list)
    workflow: Workflow | None = None
    run: Run | None = None
    kept: bool = False
    bare: bool = False
    reason: str | None = None
    resumed: bool = False
    nested: list[Conducted] = field(default_factory=list)

    @property
    def planned(self) -> bool:
        """The workflow is one that the conductor wrote."""
        return self.workflow is not None and not (self.bare and (self.resumed or self.reason is not None))

    @property
    def planning_s(self) -> float:
        return sum(writing.seconds for writing in self.writings)


@dataclass(slots=True)
class Conducted:
    """`answer` is the latest complete answer, or the best there is; with `paused` it holds the tool calls for the
    caller. `out_of` is what of the budget ran out, if anything did. `depth` is 0 but for steps the conductor gave to
    itself."""

    depth: int = 0
    rounds: list[PlanRound] = field(default_factory=list)
    answer: ChatReply | None = None
    paused: Paused | None = None
    out_of: Resource | None = None

    @property
    def replies(self) -> list[ChatReply]:
        """Every reply that was paid for, in no certain order; one of the conductor as a worker stands for its own."""
        written = [writing.reply for each in self.rounds for writing in each.writings]
        runs = [each.run for each in self.rounds if each.run is not None]
        return written + [step.reply for run in runs for step in run.steps if step.reply is not None]

    @property
    def usage(self) -> Usage:
        return sum((reply.usage for reply in self.replies), Usage())

    @property
    def visible(self) -> Usage:
        """What the first call read and what the answering call wrote; the rest is orchestration (Fugu's usage
        object)."""
        first = next((reply.usage for reply in self.replies if reply.usage.input_tokens), Usage())
        last = self.answer.usage if self.answer is not None else Usage()
        return replace(first, output_tokens=last.output_tokens, reasoning_tokens=last.reasoning_tokens)

    @property
    def cost_usd(self) -> float | None:
        """None where one reply's price is unknown."""
        costs = [reply.cost_usd for reply in self.replies]
        return None if None in costs else sum(cost for cost in costs if cost is not None)

    @property
    def calls(self) -> int:
        """Upstream calls, failed steps included."""
        failed = sum(len(step.failures) for each in self.rounds if each.run is not None for step in each.run.steps)
        return failed + sum(reply.attempts for reply in self.replies)

    @property
    def planning_s(self) -> float:
        return sum(each.planning_s for each in self.rounds)

    @property
    def critical_path_s(self) -> float:
        """Seconds of planning and of the slowest chain of steps, round after round: the least it could have taken."""
        return self.planning_s + sum(each.run.critical_path_s for each in self.rounds if each.run is not None)


@dataclass(frozen=True, slots=True)
class Planned:
    """A workflow was written."""

    depth: int
    round: int
    workflow: Workflow
    seconds: float


@dataclass(frozen=True, slots=True)
class Rejected:
    """What was written is no workflow; it is written again, `left` more times at most."""

    depth: int
    round: int
    reason: str
    left: int


@dataclass(frozen=True, slots=True)
class Kept:
    """The conductor keeps the answer that there is."""

    depth: int
    round: int


@dataclass(frozen=True, slots=True)
class FellBack:
    """No workflow came about: the best single worker is asked."""

    depth: int
    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """Something happened to a step."""

    depth: int
    round: int
    event: StepEvent


ConductEvent = Planned | Rejected | Kept | FellBack | Stepped
