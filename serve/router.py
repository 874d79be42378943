"""The router as a Serve deployment: decisions of many requests in one forward pass; and the gateway's side of it.

Only plain values cross (tuples, dicts, our errors), so that the gateway never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ray import serve

from actors.config import RouterConfig
from actors.errors import FuguError, NoWorkerAllowedError
from actors.messages import ImagePart, Message
from actors.telemetry import TelemetryConfig, open_telemetry
from serve.checkpoint import check_digest, workers_of
from serve.trace import Choice

if TYPE_CHECKING:
    from actors.otel import Telemetry

log = logging.getLogger("fugu.router")

CODE = Path(__file__).resolve().parents[1]

Choose = Literal["argmax", "sample"]


@dataclass(frozen=True, slots=True)
class Question:
    """What the router is asked: which of `allowed` should answer this conversation, and (`roles`) as what. `pin` names
    the pinned checkpoint that is to decide; None is the rolling one. `headers` are those of the trace that it is part
    of, None where it is not traced."""

    messages: tuple[Message, ...]
    allowed: frozenset[str]
    seed: int | None
    choose: Choose
    roles: bool = False
    pin: str | None = None
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The router's `Decision`, without its torch module."""

    worker: str
    probabilities: dict[str, float]
    role: str | None
    source: str
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """Which checkpoints decide: `canary` for a `share` (0..1) of the conversations. As `json` it is the deployment's
    `user_config`, so that another checkpoint is an update of running replicas."""

    checkpoint: str
    canary: str | None = None
    share: float = 0.0

    @classmethod
    def of(cls, config: RouterConfig) -> Served:
        assert config.checkpoint is not None
        if config.canary is None:
            return cls(str(config.checkpoint))
        return cls(str(config.checkpoint), str(config.canary.checkpoint), config.canary.share)

    def json(self) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint, "canary": self.canary, "share": self.share}


class RouterReplica:
    """One copy of backbone and head, and of the canary's. A checkpoint that does not fit does not crash the replica
    over and over: the reason is kept, told by `status`, and returned for every question; one that comes as an update
    is refused, and the old one goes on deciding."""

    _telemetry: Telemetry | None = None

    def __init__(self, config: RouterConfig, workers: Sequence[str], telemetry: TelemetryConfig | None = None) -> None:
        self._config = config
        self._workers = tuple(workers)
        self._telemetry = open_telemetry(telemetry, "router")
        self._failure: FuguError | None = None
        self._routers: tuple[Any, Any | None] | None = None
        self._pinned: dict[str, Any] = {}
        self._served: Served | None = None
        self._refused: str | None = None
        decide: Any = self.decide
        decide.set_max_batch_size(config.max_batch)
        decide.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)

    async def reconfigure(self, served: dict[str, Any]) -> None:
        """Take these checkpoints (`Served.json`); questions are answered with the old ones until the new are loaded."""
        new = Served(**served)
        try:
            loaded = await asyncio.to_thread(self._load, new)
        except FuguError as error:
            log.error("the router cannot take %s: %s", new.checkpoint, error.message)
            self._refused = error.message
            if self._routers is None:
                self._failure = error
            return
        self._routers, self._served, self._failure, self._refused = loaded, new, None, None

    def _load(self, new: Served) -> tuple[Any, Any | None]:
        for pin, checkpoint in self._config.pins.items():
            if pin not in self._pinned:
                check_digest(self._config, pin)
                self._pinned[pin] = _load(self._config, str(checkpoint), self._known(checkpoint))
        canary = None if new.canary is None else _load(self._config, new.canary, self._workers)
        return _load(self._config, new.checkpoint, self._workers), canary

    def _known(self, checkpoint: Path) -> tuple[str, ...]:
        """The workers that a pin is loaded for: of the pool those that it was trained for, since others may have come
        after it, and it goes on deciding among its own. One that has left the pool is still an error."""
        known = workers_of(checkpoint)
        return tuple(name for name in self._workers if name in known) or self._workers

    async def status(self) -> FuguError | None:
        """None once the model is loaded, else why it is not."""
        return self._failure

    async def serving(self) -> dict[str, Any]:
        """Which checkpoints decide (`Served.json`), and `refused`: why the newest do not, if they do not."""
        return {**({} if self._served is None else self._served.json()), "refused": self._refused}

    @serve.batch
    async def decide(self, questions: list[Question]) -> list[Answer | FuguError]:
        """One answer per question, in one forward pass per way of choosing (nearly always one in all)."""
        if self._routers is None or self._served is None:
            return [self._failure or FuguError("the router has no checkpoint yet")] * len(questions)
        began = time.time_ns()
        # An update may come while this batch is decided.
        answers = await asyncio.to_thread(self._decide, questions, self._routers, self._served.share, self._pinned)
        if self._telemetry is not None:
            _tell_batch(self._telemetry, questions, answers, began)
        return answers

    def __del__(self) -> None:
        # Serve calls it when the replica stops.
        if self._telemetry is not None:
            self._telemetry.close()

    @staticmethod
    def _decide(
        questions: list[Question], routers: tuple[Any, Any | None], share: float, pinned: Mapping[str, Any]
    ) -> list[Answer | FuguError]:
        stable, canary = routers
        groups: dict[tuple[str, bool, str | None], list[int]] = {}
        for index, question in enumerate(questions):
            tried = question.pin is None and canary is not None and place_of(question.messages) < share
            groups.setdefault((question.choose, tried, question.pin), []).append(index)
        answers: dict[int, Answer | FuguError] = {}
        for (choose, tried, pin), chosen in groups.items():
            router = pinned[pin] if pin is not None else canary if tried else stable
            decided = _decide_alike(router, [questions[i] for i in chosen], choose)
            answers.update(zip(chosen, map(_by_canary, decided) if tried else decided, strict=True))
        return [answers[index] for index in range(len(questions))]


def _tell_batch(
    telemetry: Telemetry, questions: Sequence[Question], answers: Sequence[Answer | FuguError], began_ns: int
) -> None:
    """The router's part of each decision that is traced: the one pass that decided all of its batch."""
    ended_ns = time.time_ns()
    for question, answer in zip(questions, answers, strict=True):
        if question.headers is None:
            continue
        told = {"fugu.router.batch": len(questions), "fugu.router.pin": question.pin}
        part = telemetry.joined(question.headers).child("router pass", "server", told, began_ns)
        if isinstance(answer, FuguError):
            part.fail(answer)
        else:
            part.set({"fugu.decision.worker": answer.worker, "fugu.decision.source": answer.source})
        part.end(ended_ns)


def _by_canary(answer: Answer | FuguError) -> Answer | FuguError:
    return replace(answer, source="canary") if isinstance(answer, Answer) and answer.source == "head" else answer


def place_of(messages: Sequence[Message]) -> float:
    """A number in [0, 1) that stays the same through a conversation: of what the user said first."""
    first = next((message for message in messages if message.role == "user"), messages[0])
    return zlib.crc32(repr(first.content).encode()) / 2**32


def _decide_alike(router: Any, questions: Sequence[Question], choose: Any) -> list[Answer | FuguError]:
    try:
        decisions = router.decide(
            [question.messages for question in questions],
            [question.allowed for question in questions],
            [question.seed for question in questions],
            choose,
        )
    except FuguError as error:
        if len(questions) == 1:
            return [error]
        # One bad question must not fail the others of its batch.
        return [answer for question in questions for answer in _decide_alike(router, [question], choose)]
    return [Answer(each.worker, each.probabilities, each.role, each.source, each.domain) for each in decisions]


def _load(config: RouterConfig, checkpoint: str, workers: Sequence[str]) -> Any:
    import torch

    from actors.model_files import resolve_model
    from actors.storage import local_copy
    from orchestrator.router import Router

    # Ray sets OMP_NUM_THREADS from `num_cpus`, which is 0 here: one thread would decide at a fraction of the speed.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    files = resolve_model(config.backbone, progress=False)
    return Router.load(
        files.folder,
        local_copy(checkpoint, CODE),
        workers,
        max_tokens=config.max_tokens,
        backbone=files.id,
        revision=files.revision,
    )


class Decider(Protocol):
    """Chooses a worker for one request; never fails where a worker is allowed."""

    async def choose(self, question: Question) -> Choice: ...

    async def status(self) -> FuguError | None: ...


class OrderDecider:
    """Nothing is learned: workers are tried in the order of the file."""

    def __init__(self, workers: Sequence[str]) -> None:
        self._workers = tuple(workers)

    async def choose(self, question: Question) -> Choice:
        names = [name for name in self._workers if name in question.allowed]
        if not names:
            raise NoWorkerAllowedError("the constraints leave no worker that can answer", param="fugu")
        share = 1 / len(names)
        return Choice(names[0], dict.fromkeys(names, share), "single" if len(names) == 1 else "order")

    async def status(self) -> FuguError | None:
        return None


class RouterClient:
    """Asks the router deployment; where that does not answer in time, the order of the file decides, with a warning.
    A request is never failed by the router alone."""

    def __init__(self, handle: Any, workers: Sequence[str], timeout: float) -> None:
        self._handle = handle
        self._order = OrderDecider(workers)
        self._timeout = timeout

    async def choose(self, question: Question) -> Choice:
        started = time.perf_counter()
        if len(question.allowed) == 1 and not question.roles:
            return await self._order.choose(question)
        try:
            async with asyncio.timeout(self._timeout):
                answer = await self._ask(question)
        except TimeoutError:
            why = f"no answer within {self._timeout:g} s"
        # Serve, Ray and gRPC each have errors of their own for a replica that died or cannot be reached.
        except Exception as error:
            why = type(error).__name__
        else:
            if isinstance(answer, Answer):
                seconds = time.perf_counter() - started
                return Choice(
                    answer.worker, answer.probabilities, answer.source, answer.role, seconds, domain=answer.domain
                )
            why = answer.message
        log.warning("the router did not decide (%s); the order of the configuration does", why)
        choice = await self._order.choose(question)
        warning = f"the router did not decide ({why}); the order of the configuration did"
        return replace(choice, seconds=time.perf_counter() - started, warnings=(warning,))

    async def _ask(self, question: Question) -> Answer | FuguError:
        """One retry: the first try may meet a replica that has just died."""
        question = replace(question, messages=tuple(map(_without_image_data, question.messages)))
        try:
            return await self._handle.decide.remote(question)
        except (asyncio.CancelledError, TimeoutError):
            raise
        except Exception as error:
            log.warning("the router failed (%s), asking again", type(error).__name__)
            await asyncio.sleep(0.05)
            return await self._handle.decide.remote(question)

    async def status(self) -> FuguError | None:
        return await self._handle.status.remote()


def _without_image_data(message: Message) -> Message:
    """The router reads that there is an image, not the image."""
    if isinstance(message.content, str) or not message.images:
        return message
    content = tuple(replace(part, url="") if isinstance(part, ImagePart) else part for part in message.content)
    return replace(message, content=content)
