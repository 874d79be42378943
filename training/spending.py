"""What a labelling may spend, and the most that a call can cost before it is made."""

from __future__ import annotations

from dataclasses import dataclass

from actors.config import WorkerSpec
from actors.errors import (
    CircuitOpenError,
    ConfigError,
    FuguError,
    LimitReachedError,
    RateLimitedError,
    RequestError,
    WorkerAuthError,
    WorkerRejectedError,
    WorkerTimeoutError,
)
from actors.messages import ChatRequest, Usage
from actors.prices import price_of
from actors.worker import prepare

# What a chat template adds to a message, in tokens, generously.
_TOKENS_PER_MESSAGE = 32


@dataclass
class Budget:
    """Limits (None: none) on USD and upstream requests. What is in flight is held at the most it can cost, so the
    limits are never passed."""

    usd: float | None = None
    requests: int | None = None
    spent_usd: float = 0.0
    spent_requests: int = 0
    held_usd: float = 0.0
    held_requests: int = 0

    def hold(self, usd: float, requests: int) -> bool:
        """Set aside the most that a call can cost; False where that does not fit."""
        if self.usd is not None and self.spent_usd + self.held_usd + usd > self.usd * (1 + 1e-12):
            return False
        if self.requests is not None and self.spent_requests + self.held_requests + requests > self.requests:
            return False
        self.held_usd += usd
        self.held_requests += requests
        return True

    def settle(self, held: tuple[float, int], usd: float, requests: int) -> None:
        self.held_usd = max(0.0, self.held_usd - held[0])
        self.held_requests -= held[1]
        self.spent_usd += usd
        self.spent_requests += requests

    def describe(self) -> str:
        parts = []
        if self.usd is not None:
            parts.append(f"${self.spent_usd:.4f} of ${self.usd:g}")
        if self.requests is not None:
            parts.append(f"{self.spent_requests} of {self.requests} requests")
        return ", ".join(parts)


def most_usd(request: ChatRequest, spec: WorkerSpec) -> float:
    """USD that one call cannot exceed: a token is at least one byte of UTF-8, an answer at most `max_tokens`.

    Raises:
        ConfigError: that cannot be said of this worker: it has no price, or nothing bounds its answers.
    """
    if spec.price is None:
        raise ConfigError(f"worker {spec.name} has no price, so a budget in USD cannot be kept; give it a `price`")
    request = prepare(request, spec)
    if request.max_tokens is None:
        raise ConfigError(
            f"nothing bounds the answers of worker {spec.name}, so a budget in USD cannot be kept; give --max-tokens, "
            "or the worker defaults.max_tokens"
        )
    read = sum(len(message.text.encode("utf-8", "replace")) + _TOKENS_PER_MESSAGE for message in request.messages)
    return price_of(Usage(read, request.max_tokens), spec.price)


def after_failure(error: FuguError, most: float) -> tuple[float, int]:
    """USD and upstream requests that a failed call may have used."""
    if isinstance(error, (LimitReachedError, CircuitOpenError)):
        return 0.0, 0
    refused = isinstance(error, (RateLimitedError, WorkerAuthError, WorkerRejectedError, RequestError))
    if refused or (isinstance(error, WorkerTimeoutError) and error.phase == "connect"):
        return 0.0, 1
    return most, 1
