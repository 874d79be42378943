"""What a labelling asks of whom, found to be possible before anything is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.config import WorkerSpec
from actors.errors import DataError
from actors.messages import ChatRequest, Message
from training import judge as judging
from training.grading import check_task
from training.journal import Journal, Sample, task_digest
from training.labelling import Call, Lane
from training.outcomes import Outcomes, Task
from training.spending import Budget, most_usd
from training.splits import check_tasks


@dataclass(frozen=True)
class Plan:
    """Who is asked what."""

    tasks: Sequence[Task]
    workers: Sequence[str]
    samples: int
    seed: int
    max_tokens: int | None = None
    temperature: float | None = None
    specs: Mapping[str, WorkerSpec] | None = None

    def check(self, known: Outcomes | None) -> None:
        """Find what is wrong while nothing has been asked.

        Raises:
            DataError: names the task.
        """
        if not self.workers or not self.tasks or self.samples < 1:
            raise DataError("labelling needs at least one worker, one task and one sample")
        check_tasks(self.tasks)
        judges = None if self.specs is None else frozenset(self.specs)
        for task in self.tasks:
            check_task(task, judges)
        digests = {task.task_id: task_digest(task) for task in self.tasks}
        for task in () if known is None else known.tasks:
            if digests.get(task.task_id, task_digest(task)) != task_digest(task):
                raise DataError(f"task {task.task_id} was labelled with another text in this folder; use a new one")

    def fill(self, lanes: Mapping[str, Lane], journal: Journal, budget: Budget) -> None:
        """Queue what the journal lacks: sample by sample over all tasks and workers, so that a run that is stopped has
        covered everything alike.

        Raises:
            DataError: the journal holds a task with another text.
            ConfigError: a budget in USD that cannot be kept with these workers.
        """
        digests = {task.task_id: task_digest(task) for task in self.tasks}
        for old in journal.samples.values():
            if digests.get(old.task_id, old.task_digest) != old.task_digest:
                raise DataError(f"{journal.path}: task {old.task_id} was labelled with another text; use a new folder")
        budget.spent_usd, budget.spent_requests = journal.usd, journal.requests
        place = 0
        for index in range(self.samples):
            for task in self.tasks:
                for worker in self.workers:
                    place += 1
                    paid = journal.samples.get((task.task_id, worker, index))
                    if paid is None or paid.score is None:
                        lanes[worker].queue.append(self._call(task, worker, index, place, paid, budget.usd is not None))

    def _call(self, task: Task, worker: str, index: int, place: int, paid: Sample | None, priced: bool) -> Call:
        request = ChatRequest(
            messages=(Message("user", task.prompt),),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=_seed(self.seed, task.task_id, worker, index),
            sample_index=index,
            max_attempts=1,
        )
        usd, requests = 0.0, 0
        if paid is None:
            usd += most_usd(request, self._spec(worker)) if priced else 0.0
            requests += 1
        grader, _, judge = task.grader.partition(":")
        if grader == "judge":
            # The longest answer that a judge is shown, in characters of up to four bytes.
            question = judging.question(task, "\U0001f600" * judging.MAX_CHARACTERS)
            usd += judging.TRIES * most_usd(question, self._spec(judge)) if priced else 0.0
            requests += judging.TRIES
        return Call(task, worker, index, request, paid, (usd, requests), place)

    def _spec(self, name: str) -> WorkerSpec:
        assert self.specs is not None
        return self.specs[name]


def worker_digest(spec: WorkerSpec, plan: Plan) -> str:
    """16 hex digits over everything that decides how a worker answers."""
    own = spec.model_dump(mode="json", include={"provider", "model", "system", "defaults", "adapter", "outcomes"})
    parts = [own, spec.url, plan.max_tokens, plan.temperature, plan.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _seed(*parts: Any) -> int:
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
