"""The error tree. Every failure a caller can see is one of these, with its HTTP status and OpenAI error type.

    FuguError                             500
    ├── ConfigError                       500   configuration or checkpoint does not fit; says where
    │   ├── CheckpointError               500   a checkpoint that does not belong to this pool or backbone
    │   └── DataError                     500   tasks or outcomes that cannot be used; names file, row or worker
    │       └── GradingError              500   an answer that cannot be graded, which says nothing about its score
    ├── RequestError                      400   the caller's request is wrong; `param` names the field
    │   ├── AuthenticationError           401
    │   ├── PermissionDeniedError         403
    │   ├── UnknownModelError             404
    │   ├── NotFoundError                 404   no such path
    │   ├── MethodNotAllowedError         405
    │   ├── RequestTimeoutError           408   the request's body did not arrive in time
    │   ├── PayloadTooLargeError          413
    │   ├── KeyLimitError                 429   the caller's key has used its minute; `retry_after` in seconds
    │   ├── BudgetSpentError              429   the caller's key has spent its month
    │   ├── NoWorkerAllowedError          400   constraints leave no worker
    │   ├── WorkflowGoneError             404   tool results for a workflow that is not known (any more)
    │   ├── BudgetError                   400   the request's own budget was used up before there was an answer
    │   └── ContextLengthError            400   longer than the worker's context
    ├── PlanError                         422   a workflow that a model wrote cannot be used; `kind` says why
    │   ├── PlanMissingError              422   no three lists
    │   ├── PlanSyntaxError               422   a list that cannot be read
    │   ├── PlanLengthsError              422   lists of unequal length
    │   ├── PlanEmptyError                422   no steps
    │   ├── PlanTooLongError              422   too many steps, or a subtask that is too long
    │   ├── PlanWorkerError               422   a worker that is not in the pool
    │   ├── PlanWorkerNotAllowedError     422   a worker of the pool that this request may not use
    │   ├── PlanSubtaskError              422   an empty subtask
    │   └── PlanAccessError               422   access to something that is not an earlier step
    ├── ClusterError                      500   a command on a cluster failed; says which
    ├── OverloadedError                   503   too many requests at once
    ├── DeadlineError                     504   the request as a whole took too long
    ├── WorkerError                       502   one worker could not answer; `worker` names it
    │   ├── WorkerRejectedError           400   the provider called the request itself invalid
    │   ├── WorkerAuthError               502   the provider refused our key
    │   ├── RateLimitedError              429   the provider's limit or ours; `retry_after` in seconds
    │   │   └── LimitReachedError         429   our own limit for the worker, before anything was sent
    │   ├── CircuitOpenError              503   the worker failed too often and rests
    │   ├── WorkerTimeoutError            504   `phase` is connect, first_byte, idle or total
    │   ├── WorkerUnavailableError        502   5xx, connection refused or reset, actor died
    │   ├── ProtocolError                 502   the provider sent something that is not its wire format
    │   ├── ShapeError                    502   the answer is not the JSON that was asked for, after one repair
    │   └── StreamBrokenError             502   failed after the first byte; what was sent stands
    └── AllWorkersFailedError             502/503/429  every worker tried failed; `failures` says why each

Messages are safe to show: they never hold keys, prompts or upstream bodies beyond the provider's own error message,
which adapters pass through `scrub`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from actors.messages import Usage


class FuguError(Exception):
    """Base of all. `code` is a stable machine-readable word; `param` the offending field, if one is to blame.

    Of a call to a worker: `usage` is what it took all the same, where there was a whole answer that nobody gets to see;
    `may_cost` whether the provider may charge for the attempt that failed, `queued_s` how long the worker's limits were
    waited for; None where that is not known."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    usage: Usage | None = None
    may_cost: bool | None = None
    queued_s: float | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        worker: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.worker = worker
        self.retry_after = retry_after

    @property
    def http_status(self) -> int:
        return self.status

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by positional arguments only; ours cross processes with their keywords.
        return _rebuild, (type(self), self.message, self.__dict__.copy())

    def envelope(self) -> dict[str, Any]:
        """The OpenAI error envelope: `{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def _rebuild(cls: type[FuguError], message: str, state: dict[str, Any]) -> FuguError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigError(FuguError):
    type = "configuration_error"
    code = "invalid_configuration"


class CheckpointError(ConfigError):
    code = "invalid_checkpoint"


class DataError(ConfigError):
    code = "invalid_data"


class GradingError(DataError):
    code = "grading_failed"


class RequestError(FuguError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class AuthenticationError(RequestError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDeniedError(RequestError):
    status = 403
    type = "permission_error"
    code = "permission_denied"


class UnknownModelError(RequestError):
    status = 404
    code = "model_not_found"


class NotFoundError(RequestError):
    status = 404
    code = "not_found"


class MethodNotAllowedError(RequestError):
    status = 405
    code = "method_not_allowed"


class RequestTimeoutError(RequestError):
    status = 408
    code = "request_timeout"


class PayloadTooLargeError(RequestError):
    status = 413
    code = "payload_too_large"


class KeyLimitError(RequestError):
    status = 429
    type = "rate_limit_error"
    code = "key_limit_exceeded"


class BudgetSpentError(RequestError):
    """Coming again soon does not help."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"


class NoWorkerAllowedError(RequestError):
    code = "no_worker_allowed"


class WorkflowGoneError(RequestError):
    status = 404
    code = "workflow_not_found"


class BudgetError(RequestError):
    """`param` names what ran out: `budget.usd`, `budget.tokens` or `budget.calls`. Time is a `DeadlineError`."""

    code = "budget_exhausted"


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class PlanError(FuguError):
    """A model wrote a workflow that cannot be used. It is asked again or another way is found, so that a caller sees
    this only where nobody could answer. Messages quote at most a worker's name, never a subtask."""

    status = 422
    type = "plan_error"
    code = "invalid_plan"
    kind: ClassVar[str] = "plan"


class PlanMissingError(PlanError):
    kind = "missing"


class PlanSyntaxError(PlanError):
    kind = "syntax"


class PlanLengthsError(PlanError):
    kind = "lengths"


class PlanEmptyError(PlanError):
    kind = "empty"


class PlanTooLongError(PlanError):
    kind = "too_long"


class PlanWorkerError(PlanError):
    kind = "worker"


class PlanWorkerNotAllowedError(PlanError):
    kind = "worker_not_allowed"


class PlanSubtaskError(PlanError):
    kind = "subtask"


class PlanAccessError(PlanError):
    kind = "access"


class ClusterError(FuguError):
    code = "cluster_failed"


class OverloadedError(FuguError):
    status = 503
    type = "overloaded_error"
    code = "overloaded"


class DeadlineError(FuguError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class WorkerError(FuguError):
    status = 502
    type = "worker_error"
    code = "worker_failed"


class WorkerRejectedError(WorkerError):
    """The provider says that the request is invalid for it. Another worker may accept it; a retry will not help."""

    status = 400
    type = "invalid_request_error"
    code = "worker_rejected_request"


class WorkerAuthError(WorkerError):
    code = "worker_auth_failed"


class RateLimitedError(WorkerError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retryable = True


class LimitReachedError(RateLimitedError):
    """The caller has waited for its turn already, so nothing is gained by trying the same worker again."""

    retryable = False


class CircuitOpenError(WorkerError):
    status = 503
    type = "overloaded_error"
    code = "circuit_open"


class WorkerTimeoutError(WorkerError):
    """`phase` is one of connect, first_byte, idle, total."""

    status = 504
    type = "timeout_error"
    code = "worker_timeout"
    retryable = True

    def __init__(self, message: str, *, phase: str, worker: str | None = None) -> None:
        super().__init__(message, worker=worker)
        self.phase = phase


class WorkerUnavailableError(WorkerError):
    """`broke`: the connection did, under a request."""

    broke = False
    code = "worker_unavailable"
    retryable = True


class ProtocolError(WorkerError):
    code = "bad_upstream_response"
    retryable = True


class ShapeError(WorkerError):
    """The same worker was asked to put it right once, so it is not asked again; another may do better."""

    code = "schema_not_met"


class StreamBrokenError(WorkerError):
    """After the first byte nothing is retried, so that no text is ever repeated."""

    code = "stream_broken"


class AllWorkersFailedError(FuguError):
    """Every worker that was tried failed. Status: 429 if all were rate limits, 503 if all were limits or open
    circuits, else 502 (a single worker's own 400 or 504 is kept). `retry_after` is the soonest of the parts."""

    type = "worker_error"
    code = "all_workers_failed"

    def __init__(self, failures: Mapping[str, FuguError]) -> None:
        waits = [error.retry_after for error in failures.values() if error.retry_after is not None]
        reasons = "; ".join(f"{worker}: {error.message}" for worker, error in failures.items())
        super().__init__(f"no worker could answer. {reasons}", retry_after=min(waits, default=None))
        self.failures = dict(failures)

    @property
    def http_status(self) -> int:
        statuses = {error.status for error in self.failures.values()}
        if len(statuses) == 1:
            return statuses.pop()
        return 503 if statuses <= {429, 503} else 502

    def envelope(self) -> dict[str, Any]:
        envelope = super().envelope()
        envelope["error"]["failures"] = {
            worker: {"code": error.code, "message": error.message} for worker, error in self.failures.items()
        }
        return envelope


_SECRET = re.compile(
    r"(?i)\b(bearer\s+|x-api-key\W+|key=)\S+|\b((sk|fish|xai|gsk|ant)[-_]|AIza)[-_A-Za-z0-9]{8,}",
)


def scrub(text: str, *secrets: str, limit: int = 300) -> str:
    """`text` with the given secrets, and whatever looks like one, replaced; one line, at most `limit` characters."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    text = _SECRET.sub("***", " ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"
