from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from actors.errors import DataError, WorkerUnavailableError
from actors.messages import ChatReply, ChatRequest, Usage
from training.label import JOURNAL, label
from training.outcomes import Task, read_outcomes

TASKS = [Task(f"t{n}", f"What is {n} + 1?", str(n + 1), "maths", "sums", "train", "number") for n in range(5)]


@dataclass
class Scripted:
    """A worker whose answer depends on the request alone; remembers what it was asked."""

    name: str
    plus: int = 1
    fails: frozenset[str] = frozenset()
    asked: list[tuple[str, int, int | None]] = field(default_factory=list)
    most: int = 0
    running: int = 0

    async def complete(self, request: ChatRequest) -> ChatReply:
        text = request.messages[0].text
        self.asked.append((text, request.sample_index, request.seed))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        if text in self.fails:
            raise WorkerUnavailableError("down", worker=self.name)
        number = int(text.split()[2])
        return ChatReply(self.name, f"It is {number + self.plus}", usage=Usage(5, 3), cost_usd=0.01)


async def test_every_worker_is_asked_for_every_sample_of_every_task(tmp_path: Path) -> None:
    right, wrong = Scripted("right"), Scripted("wrong", plus=2)
    found = await label([right, wrong], TASKS, tmp_path, samples=3, concurrency=4)
    assert found == read_outcomes(tmp_path)
    assert len(right.asked) == len(wrong.asked) == 15
    assert len({(text, seed) for text, _, seed in right.asked}) == 15  # every sample has a seed of its own
    assert right.most + wrong.most <= 8
    assert max(right.most, wrong.most) <= 4
    table = found.scores(("right", "wrong"))
    assert table.tolist() == [[1.0, 0.0]] * 5
    first = found.outcomes[0]
    assert (first.task_id, first.worker, first.samples, first.response) == ("t0", "right", (1.0, 1.0, 1.0), "It is 1")
    assert (first.input_tokens, first.output_tokens, first.cost_usd) == (5, 3, pytest.approx(0.01))


async def test_a_run_that_was_killed_pays_for_nothing_twice(tmp_path: Path) -> None:
    whole = Scripted("a")
    expected = await label([whole], TASKS, tmp_path / "whole", samples=2, concurrency=1)
    await label([Scripted("a")], TASKS, tmp_path / "cut", samples=2, concurrency=1)
    journal = tmp_path / "cut" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 20  # asked and answered, ten times
    journal.write_text("".join(lines[:9]) + lines[9][:25])  # killed while the fifth answer was written
    again = Scripted("a")
    found = await label([again], TASKS, tmp_path / "cut", samples=2, concurrency=1)
    assert again.asked == whole.asked[4:]
    strip = lambda outcome: (outcome.task_id, outcome.worker, outcome.samples, outcome.answers)  # noqa: E731
    assert [strip(outcome) for outcome in found.outcomes] == [strip(outcome) for outcome in expected.outcomes]
    idle = Scripted("a")
    await label([idle], TASKS, tmp_path / "cut", samples=2, concurrency=1)
    assert idle.asked == []


async def test_a_failed_call_is_left_out_and_asked_again(tmp_path: Path) -> None:
    flaky = Scripted("flaky", fails=frozenset({TASKS[2].prompt}))
    found = await label([flaky], TASKS, tmp_path, samples=1, concurrency=1)
    assert [outcome.task_id for outcome in found.outcomes] == ["t0", "t1", "t3", "t4"]
    healed = Scripted("flaky")
    found = await label([healed], TASKS, tmp_path, samples=1, concurrency=1)
    assert [text for text, _, _ in healed.asked] == [TASKS[2].prompt]
    assert len(found.outcomes) == 5


async def test_a_worker_that_always_fails_stops_the_run(tmp_path: Path) -> None:
    dead = Scripted("dead", fails=frozenset(task.prompt for task in TASKS))
    with pytest.raises(DataError, match="worker dead failed 5 times in a row: down"):
        await label([dead, Scripted("well")], TASKS, tmp_path, samples=4, concurrency=2)
    assert len(dead.asked) <= 7
    # What the others did is kept.
    records = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert {record["worker"] for record in records if "score" in record} <= {"well"}


async def test_tasks_that_cannot_be_graded_are_found_before_anything_is_asked(tmp_path: Path) -> None:
    worker = Scripted("a")
    bad = [*TASKS, Task("odd", "What is 8 + 1?", "9", "d", "s", "train", "magic")]
    with pytest.raises(DataError, match="task odd: unknown grader magic"):
        await label([worker], bad, tmp_path, samples=1, concurrency=1)
    twice = [*TASKS, Task("again", "what is  3 + 1?", "4", "d", "s", "test", "number")]
    with pytest.raises(DataError, match="t3 and again have the same prompt, but one is in train and one in test"):
        await label([worker], twice, tmp_path, samples=1, concurrency=1)
    assert worker.asked == []


async def test_bad_journals_and_empty_calls(tmp_path: Path) -> None:
    await label([Scripted("a")], TASKS, tmp_path, samples=1, concurrency=1)
    changed = [Task("t0", "What is 9 + 1?", "10", "maths", "sums", "train", "number")]
    with pytest.raises(DataError, match="task t0 was labelled with another text"):
        await label([Scripted("a")], changed, tmp_path, samples=1, concurrency=1)
    (tmp_path / JOURNAL).write_text('{"task_id": "t0"}\n')
    with pytest.raises(DataError, match="line 1 is not a labelling record"):
        await label([Scripted("a")], TASKS, tmp_path, samples=1, concurrency=1)
    with pytest.raises(DataError, match="at least one worker"):
        await label([], TASKS, tmp_path, samples=1, concurrency=1)


async def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    class Nested(Scripted):
        async def complete(self, request: ChatRequest) -> ChatReply:
            with pytest.raises(DataError, match="written by another process"):
                await label([Scripted("a")], TASKS, tmp_path, samples=1, concurrency=1)
            return await super().complete(request)

    found = await label([Nested("a")], TASKS[:1], tmp_path, samples=1, concurrency=1)
    assert len(found.outcomes) == 1
