"""The journal of a labelling, `label.jsonl` in its outcomes folder: what was asked, what came back, what it cost.

One JSON object per line, appended as it happens; a last line that a kill cut off is removed at the next start.

    {"event": "worker", worker, digest}                      what answers under this name; a change is an error
    {"event": "asked", task_id, worker, sample, usd, requests}    before a call may leave, with the most it can cost
    {"event": "failed", task_id, worker, sample, usd, requests, code}     it brought nothing
    {task_id, worker, sample, score, response, ...}          a `Sample`

A call that was asked and has no end was in flight when the run was killed: it counts with the most it can cost.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from actors.errors import DataError
from training.outcomes import Outcome, Outcomes, Task, read_outcomes, read_tasks, write_outcomes

JOURNAL = "label.jsonl"

Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. `score` is None where the grader could not run, `error` then says why; the answer is paid for and is
    graded again by the next run. `task_digest` ties it to the task's text. `requests` counts upstream calls;
    `grading_usd` and `grading_requests` are a judge's part."""

    task_id: str
    worker: str
    sample: int
    score: float | None
    response: str
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    latency_s: float
    task_digest: str
    error: str = ""
    requests: int = 1
    grading_usd: float = 0.0
    grading_requests: int = 0

    @property
    def key(self) -> Key:
        return self.task_id, self.worker, self.sample


@dataclass
class Journal:
    """An open journal: what it holds, and where to append."""

    path: Path
    file: IO[str]
    samples: dict[Key, Sample] = field(default_factory=dict)
    workers: dict[str, str] = field(default_factory=dict)
    usd: float = 0.0
    requests: int = 0
    _open: dict[Key, tuple[float, int]] = field(default_factory=dict)

    def worker(self, name: str, digest: str) -> None:
        """Note what answers under a name.

        Raises:
            DataError: the journal holds answers of something else under this name.
        """
        before = self.workers.get(name)
        if before is None:
            self.workers[name] = digest
            self._write({"event": "worker", "worker": name, "digest": digest})
        elif before != digest:
            raise DataError(
                f"{self.path}: worker {name} was labelled with another model, instructions or sampling; use a new "
                "folder or another name"
            )

    def asked(self, key: Key, usd: float, requests: int) -> None:
        self._open[key] = (usd, requests)
        self._write({"event": "asked", **_named(key), "usd": usd, "requests": requests})

    def failed(self, key: Key, usd: float, requests: int, code: str) -> None:
        self._ended(key, usd, requests)
        self._write({"event": "failed", **_named(key), "usd": usd, "requests": requests, "code": code})

    def sample(self, sample: Sample, usd: float, requests: int) -> None:
        """`usd` and `requests` are what this run spent on it: nothing where an old answer was only graded again."""
        self._ended(sample.key, usd, requests)
        self.samples[sample.key] = sample
        self._write(asdict(sample))

    def _ended(self, key: Key, usd: float, requests: int) -> None:
        self._open.pop(key, None)
        self.usd += usd
        self.requests += requests

    def _write(self, record: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def _load(self, text: str) -> None:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line:
                continue
            try:
                self._replay(json.loads(line))
            except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
                raise DataError(f"{self.path}: line {number} is not a labelling record: {error}") from error
        self.usd += sum(usd for usd, _ in self._open.values())
        self.requests += sum(requests for _, requests in self._open.values())
        self._open.clear()

    def _replay(self, record: dict[str, Any]) -> None:
        event = record.get("event")
        if event == "worker":
            self.workers[record["worker"]] = record["digest"]
            return
        if event is not None:
            key = record["task_id"], record["worker"], record["sample"]
            if event == "asked":
                self._open[key] = (float(record["usd"]), int(record["requests"]))
            elif event == "failed":
                self._ended(key, float(record["usd"]), int(record["requests"]))
            else:
                raise ValueError(f"unknown event {event}")
            return
        sample = Sample(**record)
        if sample.score is not None and not 0 <= sample.score <= 1:
            raise ValueError(f"the score is {sample.score}")
        before = self.samples.get(sample.key)
        # Graded again: the answer itself was paid for when it first came.
        usd = 0.0 if before else (sample.cost_usd or 0.0)
        requests = 0 if before else sample.requests
        if before is not None:
            usd -= before.grading_usd
            requests -= before.grading_requests
        self._ended(sample.key, usd + sample.grading_usd, requests + sample.grading_requests)
        self.samples[sample.key] = sample


def _named(key: Key) -> dict[str, Any]:
    return {"task_id": key[0], "worker": key[1], "sample": key[2]}


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """The journal of a folder, made where there is none, for this process alone.

    Raises:
        DataError: another process has it, or a line is not a record (names it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JOURNAL
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
        journal = Journal(path, file)
        journal._load(whole)
        file.seek(0, os.SEEK_END)
        yield journal


def task_digest(task: Task) -> str:
    """16 hex digits over everything that decides what is asked and how it is graded."""
    extra = sorted((key, value) for key, value in task.extra.items() if value is not None)
    parts = [task.task_id, task.prompt, task.reference, task.grader, extra]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def known_outcomes(folder: Path) -> Outcomes | None:
    """What the folder holds already, None if nothing.

    Raises:
        DataError: it holds something that cannot be used.
    """
    if (folder / "outcomes.parquet").exists():
        return read_outcomes(folder)
    if (folder / "tasks.parquet").exists():
        return Outcomes(read_tasks(folder), ())
    return None


def fold(folder: Path, tasks: Sequence[Task], samples: Iterable[Sample], known: Outcomes | None) -> Outcomes:
    """Write the folder's two files: the samples, and what was `known` of other tasks and workers."""
    found = collect(tasks, samples)
    if known is not None:
        ids = {task.task_id for task in tasks}
        fresh = {(outcome.task_id, outcome.worker) for outcome in found.outcomes}
        others = [outcome for outcome in known.outcomes if (outcome.task_id, outcome.worker) not in fresh]
        kept = [task for task in known.tasks if task.task_id not in ids]
        found = Outcomes((*kept, *tasks), (*others, *found.outcomes))
    write_outcomes(folder, found)
    return found


def collect(tasks: Sequence[Task], samples: Iterable[Sample]) -> Outcomes:
    """Samples → one outcome per (task, worker), tasks and workers in order. Samples of other tasks and those that could
    not be graded are left out."""
    by_pair: dict[tuple[str, str], list[Sample]] = {}
    order = {task.task_id: index for index, task in enumerate(tasks)}
    for sample in samples:
        if sample.task_id in order and sample.score is not None:
            by_pair.setdefault((sample.task_id, sample.worker), []).append(sample)
    outcomes = []
    for (task_id, worker), group in sorted(by_pair.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        group.sort(key=lambda sample: sample.sample)
        costs = [sample.cost_usd for sample in group if sample.cost_usd is not None]
        scores = tuple(sample.score for sample in group if sample.score is not None)
        outcomes.append(
            Outcome(
                task_id=task_id,
                worker=worker,
                score=_mean(scores),
                samples=scores,
                answers=tuple(sample.response for sample in group),
                response=group[0].response,
                input_tokens=_mean([sample.input_tokens for sample in group]),
                output_tokens=_mean([sample.output_tokens for sample in group]),
                cost_usd=_mean(costs) if len(costs) == len(group) else None,
                latency_s=_mean([sample.latency_s for sample in group]),
            )
        )
    return Outcomes(tuple(tasks), tuple(outcomes))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
