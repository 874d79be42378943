"""Labelling: every worker tries every task several times; what comes back is graded and kept as it comes.

The journal `label.jsonl` in the outcomes folder has one line per finished sample. A run that was stopped goes on after
the last whole line and asks for nothing twice; when all is there the folder's parquet files are written.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from actors.errors import DataError, RequestError, WorkerError
from actors.messages import ChatReply, ChatRequest, Message
from training.grading import grade
from training.outcomes import Outcome, Outcomes, Task, write_outcomes

JOURNAL = "label.jsonl"
# A worker that fails this often in a row will not get better by being asked more.
FAILURES_IN_A_ROW = 5


class Answers(Protocol):
    """The part of `actors.messages.Worker` that labelling needs."""

    @property
    def name(self) -> str: ...

    async def complete(self, request: ChatRequest) -> ChatReply: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded answer. `task_digest` ties it to the task's text, so that a changed task is not mixed with it."""

    task_id: str
    worker: str
    sample: int
    score: float
    response: str
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    latency_s: float
    task_digest: str


async def label(
    workers: Sequence[Answers],
    tasks: Sequence[Task],
    folder: Path,
    *,
    samples: int,
    concurrency: int,
    seed: int = 0,
    max_tokens: int | None = None,
    on_sample: Callable[[Sample], None] = lambda _sample: None,
) -> Outcomes:
    """Ask for what the journal lacks, at most `concurrency` calls at once, then write and return the outcomes.

    Answers are cut at `max_tokens`; None leaves each worker its own limit. Each call has its own seed and
    `sample_index`, so repeated samples differ and a repeated run does not. A call that
    fails is left out (and asked again by the next run); a pair of task and worker without any sample has no outcome.

    Raises:
        DataError: no workers, tasks or samples; a journal of other tasks; a grader that cannot run; a worker that
            failed five times in a row, with its last reason; another labelling of the same folder at this moment.
    """
    if not workers or not tasks or samples < 1:
        raise DataError("labelling needs at least one worker, one task and one sample")
    with _journal(folder / JOURNAL) as (journal, done):
        digests = {task.task_id: task_digest(task) for task in tasks}
        for old in done:
            if digests.get(old.task_id, old.task_digest) != old.task_digest:
                raise DataError(
                    f"{folder / JOURNAL}: task {old.task_id} was labelled with another text; use a new folder"
                )
            on_sample(old)
        have = {(old.task_id, old.worker, old.sample) for old in done}
        failures = {worker.name: 0 for worker in workers}
        # Sample by sample over all tasks and workers, so that a run that is stopped has covered everything alike.
        wanted = iter(
            [
                (task, worker, index)
                for index in range(samples)
                for task in tasks
                for worker in workers
                if (task.task_id, worker.name, index) not in have
            ]
        )

        async def ask(task: Task, worker: Answers, index: int) -> None:
            request = ChatRequest(
                messages=(Message("user", task.prompt),),
                max_tokens=max_tokens,
                seed=_seed(seed, task.task_id, worker.name, index),
                sample_index=index,
            )
            try:
                reply = await worker.complete(request)
            except (WorkerError, RequestError) as error:
                failures[worker.name] += 1
                if failures[worker.name] >= FAILURES_IN_A_ROW:
                    raise DataError(
                        f"worker {worker.name} failed {FAILURES_IN_A_ROW} times in a row: {error.message}"
                    ) from error
                return
            failures[worker.name] = 0
            sample = Sample(
                task_id=task.task_id,
                worker=worker.name,
                sample=index,
                score=grade(task, reply.text),
                response=reply.text,
                input_tokens=reply.usage.input_tokens,
                output_tokens=reply.usage.output_tokens,
                cost_usd=reply.cost_usd,
                latency_s=reply.timing.total_s,
                task_digest=digests[task.task_id],
            )
            journal.write(json.dumps(asdict(sample)) + "\n")
            journal.flush()
            done.append(sample)
            on_sample(sample)

        async def worker_loop() -> None:
            for task, worker, index in wanted:
                await ask(task, worker, index)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(worker_loop())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        found = collect(tasks, done)
        write_outcomes(folder, found)
        return found


def collect(tasks: Sequence[Task], done: Iterable[Sample]) -> Outcomes:
    """Samples → one outcome per (task, worker), tasks and workers in order; samples of other tasks are left out."""
    by_pair: dict[tuple[str, str], list[Sample]] = {}
    order = {task.task_id: index for index, task in enumerate(tasks)}
    for sample in done:
        if sample.task_id in order:
            by_pair.setdefault((sample.task_id, sample.worker), []).append(sample)
    outcomes = []
    for (task_id, worker), group in sorted(by_pair.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        group.sort(key=lambda sample: sample.sample)
        costs = [sample.cost_usd for sample in group if sample.cost_usd is not None]
        outcomes.append(
            Outcome(
                task_id=task_id,
                worker=worker,
                score=_mean([sample.score for sample in group]),
                samples=tuple(sample.score for sample in group),
                answers=tuple(sample.response for sample in group),
                response=group[0].response,
                input_tokens=_mean([sample.input_tokens for sample in group]),
                output_tokens=_mean([sample.output_tokens for sample in group]),
                cost_usd=_mean(costs) if len(costs) == len(group) else None,
                latency_s=_mean([sample.latency_s for sample in group]),
            )
        )
    return Outcomes(tuple(tasks), tuple(outcomes))


def task_digest(task: Task) -> str:
    """16 hex digits over everything that decides what is asked and how it is graded."""
    parts = [task.task_id, task.prompt, task.reference, task.grader, sorted(task.extra.items())]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


@contextmanager
def _journal(path: Path) -> Iterator[tuple[IO[str], list[Sample]]]:
    """The journal open for appending, and what it holds. A last line that was cut off by a kill is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{path} is being written by another process") from error
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.ftruncate(file.fileno(), len(whole.encode()))
        done = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                done.append(Sample(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                raise DataError(f"{path}: line {number} is not a labelling record: {error}") from error
        file.seek(0, os.SEEK_END)
        yield file, done


def _seed(*parts: Any) -> int:
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
