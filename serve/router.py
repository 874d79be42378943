"""The router as a Serve deployment: decisions of many requests in one forward pass; and the gateway's side of it.

Only plain values cross (tuples, dicts, our errors), so that the gateway never imports torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from ray import serve

from actors.config import RouterConfig
from actors.errors import FuguError, NoWorkerAllowedError
from actors.messages import ImagePart, Message
from serve.trace import Choice

log = logging.getLogger("fugu.router")

Choose = Literal["argmax", "sample"]


@dataclass(frozen=True, slots=True)
class Question:
    """What the router is asked: which of `allowed` should answer this conversation, and (`roles`) as what."""

    messages: tuple[Message, ...]
    allowed: frozenset[str]
    seed: int | None
    choose: Choose
    roles: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """The router's `Decision`, without its torch module."""

    worker: str
    probabilities: dict[str, float]
    role: str | None
    source: str


class RouterReplica:
    """One copy of backbone and head. A checkpoint that does not fit does not crash the replica over and over: the
    reason is kept, told by `status`, and returned for every question."""

    def __init__(self, config: RouterConfig, workers: Sequence[str]) -> None:
        self._failure: FuguError | None = None
        decide: Any = self.decide
        decide.set_max_batch_size(config.max_batch)
        decide.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)
        try:
            self._router = _load(config, workers)
        except FuguError as error:
            log.error("the router cannot start: %s", error.message)
            self._failure = error

    async def status(self) -> FuguError | None:
        """None once the model is loaded, else why it is not."""
        return self._failure

    @serve.batch
    async def decide(self, questions: list[Question]) -> list[Answer | FuguError]:
        """One answer per question, in one forward pass per way of choosing (nearly always one in all)."""
        if self._failure is not None:
            return [self._failure] * len(questions)
        return await asyncio.to_thread(self._decide, questions)

    def _decide(self, questions: list[Question]) -> list[Answer | FuguError]:
        answers: dict[int, Answer | FuguError] = {}
        for choose in ("argmax", "sample"):
            chosen = [index for index, question in enumerate(questions) if question.choose == choose]
            answers.update(zip(chosen, self._decide_alike([questions[i] for i in chosen], choose), strict=True))
        return [answers[index] for index in range(len(questions))]

    def _decide_alike(self, questions: Sequence[Question], choose: Any) -> list[Answer | FuguError]:
        try:
            decisions = self._router.decide(
                [question.messages for question in questions],
                [question.allowed for question in questions],
                [question.seed for question in questions],
                choose,
            )
        except FuguError as error:
            if len(questions) == 1:
                return [error]
            # One bad question must not fail the others of its batch.
            return [answer for question in questions for answer in self._decide_alike([question], choose)]
        return [Answer(each.worker, each.probabilities, each.role, each.source) for each in decisions]


def _load(config: RouterConfig, workers: Sequence[str]) -> Any:
    import torch

    from actors.model_files import resolve_model
    from orchestrator.router import Router

    # Ray sets OMP_NUM_THREADS from `num_cpus`, which is 0 here: one thread would decide at a fraction of the speed.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    assert config.checkpoint is not None
    files = resolve_model(config.backbone, progress=False)
    return Router.load(
        files.folder,
        config.checkpoint,
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
                return Choice(answer.worker, answer.probabilities, answer.source, answer.role, seconds)
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
