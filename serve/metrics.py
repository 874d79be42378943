"""What the gateway tells Prometheus, through Ray's metrics endpoint. Names only, never a prompt or a key.

fugu_requests_total{path, model, outcome}      outcome is ok, cancelled or an error's code
fugu_request_seconds{path, model}              from the request's head to the answer's end
fugu_first_byte_seconds{model, worker}         to the answer's first byte: of a stream, to the first piece of its text
fugu_decision_seconds{source}                  of each of the router's decisions, also of a session's turns and of the
                                               steps that it gives out
fugu_queued_seconds{worker}                    waiting for the worker's limits, of every call, also in vain
fugu_answers_total{model, worker, source, domain}  who answered, how that was decided, and what kind of training tasks
                                               the question is like ("" where the head does not know)
fugu_calls_total{model, worker, role, domain}  calls that were answered; role is answer, or of a session thinker, worker
                                               or verifier, or of a workflow plan or step
fugu_failures_total{worker, code}              calls that failed; circuit_open is the breaker's
fugu_fallbacks_total{model, worker}            calls that failed where others answered in their place
fugu_tokens_total{model, kind}                 kind is input, cached, output or reasoning
fugu_cost_usd_total{model}                     of the calls whose price is known; like the tokens, of those that were
                                               broken off, too, as far as it can be told

How each worker is, its provider actors tell: `actors.gauges`.
"""

from __future__ import annotations

from typing import Protocol

from ray.util.metrics import Counter, Histogram

from serve.trace import Spent, Trace

# Seconds: from a cached answer to a workflow of minutes.
_LONG = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600]
_SHORT = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]


class Meter(Protocol):
    def request(self, path: str, model: str, outcome: str, trace: Trace, now: float) -> None:
        """Note a request that is over. `model` is "" where it was not known or not served; `now` on the trace's
        clock."""


class NoMeter:
    """Notes nothing."""

    def request(self, path: str, model: str, outcome: str, trace: Trace, now: float) -> None:
        return


class RayMeter:
    """See the module docstring. Needs a Ray process."""

    def __init__(self) -> None:
        self._requests = Counter("fugu_requests", "Requests", ("path", "model", "outcome"))
        self._seconds = Histogram("fugu_request_seconds", "Seconds in all", _LONG, ("path", "model"))
        self._first = Histogram("fugu_first_byte_seconds", "Seconds to the first byte", _LONG, ("model", "worker"))
        self._decision = Histogram("fugu_decision_seconds", "Seconds to decide", _SHORT, ("source",))
        self._queued = Histogram("fugu_queued_seconds", "Seconds of waiting for limits", _LONG, ("worker",))
        self._answers = Counter("fugu_answers", "Answers by worker", ("model", "worker", "source", "domain"))
        self._calls = Counter("fugu_calls", "Calls that were answered", ("model", "worker", "role", "domain"))
        self._failures = Counter("fugu_failures", "Failed calls", ("worker", "code"))
        self._fallbacks = Counter("fugu_fallbacks", "Failed calls that others stood in for", ("model", "worker"))
        self._tokens = Counter("fugu_tokens", "Tokens", ("model", "kind"))
        self._cost = Counter("fugu_cost_usd", "USD", ("model",))

    def request(self, path: str, model: str, outcome: str, trace: Trace, now: float) -> None:
        self._requests.inc(1, {"path": path, "model": model, "outcome": outcome})
        if not model:
            return
        self._seconds.observe(now - trace.started, {"path": path, "model": model})
        choice, worker = trace.choice, trace.record.worker
        for decision in trace.decisions:
            self._decision.observe(decision.seconds, {"source": decision.source})
        for call in trace.calls:
            told = {"worker": call.worker, "role": call.role, "domain": call.domain or ""}
            self._calls.inc(1, {"model": model, **told})
        for failed, code in trace.failures:
            self._failures.inc(1, {"worker": failed, "code": code})
            if trace.ended is not None:
                self._fallbacks.inc(1, {"model": model, "worker": failed})
        if worker is not None:
            how = {"source": choice.source, "domain": choice.domain or ""} if choice else {"source": "", "domain": ""}
            self._answers.inc(1, {"model": model, "worker": worker, **how})
            first = trace.seen_first(now)
            if first is not None:
                self._first.observe(first, {"model": model, "worker": worker})
        for asked, seconds in trace.waits:
            self._queued.observe(seconds, {"worker": asked})
        self._spent(model, trace.taken)

    def _spent(self, model: str, taken: Spent) -> None:
        usage = taken.usage
        kinds = {
            "input": usage.input_tokens,
            "cached": usage.cached_input_tokens,
            "output": usage.output_tokens,
            "reasoning": usage.reasoning_tokens,
        }
        for kind, tokens in kinds.items():
            if tokens:
                self._tokens.inc(tokens, {"model": model, "kind": kind})
        if taken.usd:
            self._cost.inc(taken.usd, {"model": model})
