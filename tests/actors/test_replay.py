"""A replay worker answers from recorded outcomes, by prompt and sample."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from actors.adapters.base import CallContext
from actors.adapters.build import build_adapters
from actors.adapters.replay import ReplayAdapter
from actors.config import WorkerSpec
from actors.errors import ConfigError, WorkerRejectedError
from actors.messages import ChatRequest, ImagePart, Message, TextPart, Usage


def spec(folder: Path, model: str = "m") -> WorkerSpec:
    return WorkerSpec.model_validate({"name": "w", "provider": "replay", "model": model, "outcomes": str(folder)})


def ask(*texts: str, sample: int = 0) -> ChatRequest:
    messages = [Message("user", texts[0])]
    for text in texts[1:]:
        messages += [Message("assistant", "hm"), Message("user", text)]
    return ChatRequest(tuple(messages), sample_index=sample)


def record(folder: Path, rows: list[dict[str, Any]]) -> Path:
    tasks = [{"task_id": f"t{i}", "prompt": f"question {i}\n"} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(tasks), folder / "tasks.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "outcomes.parquet")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {
            "task_id": "t0", "worker": "m", "answers": ["A", "B", "C"], "response": "I think it is A",
            "input_tokens": 12, "output_tokens": 34, "latency_s": 0.3,
        },
        {"task_id": "t1", "worker": "m", "answers": ["D", None], "response": None},
        {"task_id": "t0", "worker": "other", "answers": ["X"], "response": None},
    ]  # fmt: skip
    return record(tmp_path, rows)


async def test_answers_by_prompt_and_sample(folder: Path) -> None:
    adapter = (await build_adapters([spec(folder)]))["w"]
    context = CallContext()
    assert (await adapter.complete(ask("question 0"), context)).text == "I think it is A"
    assert [(await adapter.complete(ask("question 0", sample=i), context)).text for i in (1, 2, 4)] == ["B", "C", "B"]
    assert [(await adapter.complete(ask("question 1", sample=i), context)).text for i in (0, 1)] == ["D", ""]
    parts = ChatRequest((Message("user", (TextPart("question 0"), ImagePart("http://x/y.png"))),))
    assert (await adapter.complete(parts, context)).text == "I think it is A"
    assert (await adapter.complete(ask("something else", "question 1"), context)).text == "D"


async def test_recorded_tokens_count_and_others_are_estimated(folder: Path) -> None:
    adapter = ReplayAdapter(spec(folder))
    assert (await adapter.complete(ask("question 0"), CallContext())).usage == Usage(12, 34)
    assert (await adapter.complete(ask("question 1"), CallContext())).usage.output_tokens == 1


async def test_streams_the_same_text(folder: Path) -> None:
    chunks = [chunk async for chunk in ReplayAdapter(spec(folder)).stream(ask("question 0"), CallContext())]
    assert "".join(chunk.text for chunk in chunks) == "I think it is A"
    assert chunks[-1].final is not None


async def test_an_unknown_prompt_is_turned_away(folder: Path) -> None:
    for text in ("question 2", "never asked", ""):
        with pytest.raises(WorkerRejectedError, match="recorded"):
            await ReplayAdapter(spec(folder)).complete(ask(text), CallContext())


async def test_waits_as_long_as_it_took_when_asked_to(folder: Path) -> None:
    begin = time.monotonic()
    await ReplayAdapter(spec(folder), latency=True).complete(ask("question 0"), CallContext())
    assert time.monotonic() - begin >= 0.29


def test_says_what_the_folder_lacks(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has those of m, other"):
        ReplayAdapter(spec(folder, "someone"))
    with pytest.raises(ConfigError, match="not a folder of recorded outcomes"):
        ReplayAdapter(spec(tmp_path / "none"))
    scores = record(tmp_path, [{"task_id": "t0", "worker": "m", "score": 1.0}])
    with pytest.raises(ConfigError, match="scores only"):
        ReplayAdapter(spec(scores))


async def test_replays_real_recorded_outcomes(reasoning_gym_dir: Path) -> None:
    outcomes = parquet.read_table(reasoning_gym_dir / "outcomes.parquet").slice(0, 50).to_pylist()
    prompts = parquet.read_table(reasoning_gym_dir / "tasks.parquet", columns=["task_id", "prompt"]).to_pylist()
    prompt_of = {row["task_id"]: row["prompt"] for row in prompts}
    row = next(row for row in outcomes if row["response"])
    adapter = ReplayAdapter(spec(reasoning_gym_dir, row["worker"]))
    reply = await adapter.complete(ask(prompt_of[row["task_id"]]), CallContext())
    assert reply.text == row["response"]
    sample = await adapter.complete(ask(prompt_of[row["task_id"]], sample=1), CallContext())
    assert sample.text == row["answers"][1]
