"""The `fugu` object of a reply: who answered, how that was decided, what it took. Never a prompt, never a key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.messages import ChatReply, Usage
from orchestrator.dispatch import Attempt, Record
from serve.translate import tokens_body, usage_body


@dataclass(frozen=True, slots=True)
class Choice:
    """What the decision came to. `source` is head (the trained router), canary (the checkpoint on trial), order (that
    of the file), single (one worker was allowed), tool_loop (who asked for the tool) or stay (no other was better by
    the margin); `worker` is None where the order of the file decides; `seconds` as the gateway saw it. `domain` is the
    kind of training tasks that the conversation is like, None where that is not known."""

    worker: str | None
    probabilities: Mapping[str, float]
    source: str
    role: str | None = None
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """What calls took; `usd` is None where a price is unknown. `estimated`: of one that was broken off, or whose
    provider told no usage, and so partly a guess."""

    usage: Usage
    usd: float | None
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was answered. `role` is answer, a turn's thinker, worker or verifier, or a workflow's plan or step;
    `domain` that of the decision it was made by."""

    worker: str
    role: str
    domain: str | None


@dataclass(slots=True)
class Trace:
    """Gathered while a request runs. All times in seconds. `turns` is of a session (`serve.api.session`), else None.
    `decisions` are all that were made, `choice` the one by which the answer came. `spent` are the calls that were made,
    those that came to nothing too; `calls` those that were answered, `failures` the worker and the error's code of the
    others; `waits` how long each waited for its worker's limits, as far as that is known. `ended` is what all calls
    took, where it came to an answer's end. `first_piece_s` is when a stream's first piece of the answer was there,
    since the request began."""

    request_id: str
    started: float
    choice: Choice | None = None
    record: Record = field(default_factory=Record)
    decisions: list[Choice] = field(default_factory=list)
    dropped: tuple[str, ...] = ()
    turns: list[dict[str, Any]] | None = None
    spent: list[Spent] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    waits: list[tuple[str, float]] = field(default_factory=list)
    ended: Spent | None = None
    first_piece_s: float | None = None
    workflow: dict[str, Any] | None = None

    @property
    def taken(self) -> Spent:
        """All calls together."""
        costs = [each.usd for each in self.spent]
        return Spent(
            sum((each.usage for each in self.spent), Usage()),
            None if None in costs else sum(cost for cost in costs if cost is not None),
            any(each.estimated for each in self.spent),
        )

    @property
    def estimated_usd(self) -> float:
        """The part of the cost that is a guess."""
        return sum(each.usd or 0.0 for each in self.spent if each.estimated)

    def visible(self, usage: Usage) -> Usage:
        """What the caller sees of a usage: no more than all calls took, of which a part may be a guess."""
        taken = self.taken.usage
        return Usage(
            min(usage.input_tokens, taken.input_tokens),
            min(usage.output_tokens, taken.output_tokens),
            min(usage.cached_input_tokens, taken.cached_input_tokens),
            min(usage.reasoning_tokens, taken.reasoning_tokens),
            min(usage.cache_written_tokens, taken.cache_written_tokens),
            min(usage.cache_hour_tokens, taken.cache_hour_tokens),
        )

    def body(self, reply: ChatReply | None, now: float, visible: Usage | None = None) -> dict[str, Any]:
        """The trace as JSON values; `reply` is None where no answer was completed, `visible` the part of the tokens
        that the caller sees (those of the reply). Cost and total are of all calls."""
        choice = self.choice
        dropped = (*self.dropped, *(reply.dropped if reply else ()))
        body: dict[str, Any] = {
            "request_id": self.request_id,
            "worker": self.record.worker,
            "source": choice.source if choice else None,
            "role": choice.role if choice else None,
            "domain": choice.domain if choice else None,
            "probabilities": dict(choice.probabilities) if choice else {},
            "attempts": [_attempt(attempt) for attempt in self.record.attempts],
            "timings": {
                "decision_s": round(choice.seconds, 6) if choice else None,
                "queued_s": round(reply.timing.queued_s, 6) if reply else None,
                "first_byte_s": self.first_byte(),
                "total_s": round(now - self.started, 6),
            },
            "dropped": list(dropped),
            "warnings": [*(choice.warnings if choice else ()), *_warn(dropped, self.record.worker)],
        }
        if self.turns is not None:
            body["turns"] = self.turns
        if self.workflow is not None:
            body |= self.workflow
        taken = self.taken
        if reply is not None:
            seen = self.visible(reply.usage if visible is None else visible)
            body |= {"upstream_calls": reply.attempts, "cached": reply.cached}
            body |= {"usage": tokens_body(seen, taken.usage), "cost_usd": taken.usd}
            body |= {"estimated": True} if taken.estimated else {}
        elif self.spent:
            body |= {"usage": usage_body(taken.usage), "cost_usd": taken.usd, "estimated": taken.estimated}
        return body

    def seen_first(self, now: float) -> float | None:
        """When the caller saw the first of the answer: a stream's first piece; of a session or a workflow that was not
        streamed its end."""
        if self.first_piece_s is not None:
            return self.first_piece_s
        if self.turns is None and self.workflow is None:
            return self.first_byte()
        return None if self.ended is None else now - self.started

    def first_byte(self) -> float | None:
        """Since the request began: decision, failed attempts, and the answering worker's own first byte."""
        last = self.record.attempts[-1] if self.record.attempts else None
        if last is None or last.first_byte_s is None:
            return None
        return round((self.choice.seconds if self.choice else 0.0) + last.started_s + last.first_byte_s, 6)


def _attempt(attempt: Attempt) -> dict[str, Any]:
    body: dict[str, Any] = {
        "worker": attempt.worker,
        "ok": attempt.error is None,
        "started_s": round(attempt.started_s, 6),
        "seconds": round(attempt.seconds, 6),
    }
    if attempt.error is not None:
        body |= {"code": attempt.error.code, "reason": attempt.error.message}
    return body


def _warn(dropped: Iterable[str], worker: str | None) -> list[str]:
    return [f"{name}: not accepted by {worker or 'this server'}, left out" for name in dropped]
