"""A worker that answers from recorded outcomes, for training and tests without calling anyone.

The folder holds `tasks.parquet` (task_id, prompt, …) and `outcomes.parquet` (task_id, worker, and optionally answers,
response, input_tokens, output_tokens, latency_s). The row whose `worker` is the spec's `model` and whose task has the
text of the last user message answers: sample 0 with the recorded response where there is one, sample i with the i-th
recorded answer (counted round).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.adapters.base import CallContext
from actors.config import WorkerSpec
from actors.errors import ConfigError, WorkerRejectedError
from actors.estimate import text_tokens
from actors.messages import ChatReply, ChatRequest, Chunk, Usage

_PIECE = 24


@dataclass(frozen=True, slots=True)
class _Recorded:
    response: str | None
    answers: tuple[str, ...]
    input_tokens: int | None
    output_tokens: int | None
    latency_s: float


class ReplayAdapter:
    """See the module's docstring.

    Args:
        latency: wait as long as the recorded call took, where that was recorded.

    Raises:
        ConfigError: the folder is not one of outcomes, or holds nothing of the worker.
    """

    def __init__(self, spec: WorkerSpec, *, latency: bool = False) -> None:
        assert spec.outcomes is not None  # WorkerSpec sees to it
        self._name = spec.name
        self._latency = latency
        self._recorded = _load(spec.outcomes, spec.model)

    async def complete(self, request: ChatRequest, context: CallContext) -> ChatReply:
        context.on_sent()
        recorded = self._find(request)
        if self._latency:
            await asyncio.sleep(recorded.latency_s)
        index = request.sample_index % (len(recorded.answers) or 1)
        text = recorded.answers[index] if recorded.answers else recorded.response or ""
        if index == 0 and recorded.response is not None:
            text = recorded.response
        asked = sum(text_tokens(message.text) for message in request.messages)
        usage = Usage(
            asked if recorded.input_tokens is None else recorded.input_tokens,
            text_tokens(text) if recorded.output_tokens is None else recorded.output_tokens,
        )
        return ChatReply(self._name, text, usage=usage)

    async def stream(self, request: ChatRequest, context: CallContext) -> AsyncIterator[Chunk]:
        reply = await self.complete(request, context)
        for start in range(0, len(reply.text), _PIECE):
            yield Chunk(reply.text[start : start + _PIECE])
        yield Chunk(final=reply)

    async def close(self) -> None:
        self._recorded = {}

    def _find(self, request: ChatRequest) -> _Recorded:
        asked = next((message.text for message in reversed(request.messages) if message.role == "user"), "")
        recorded = self._recorded.get(asked.strip())
        if recorded is None:
            raise WorkerRejectedError("no answer to this prompt is recorded", worker=self._name)
        return recorded


def _load(folder: Path, worker: str) -> dict[str, _Recorded]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        tasks = parquet.read_table(folder / "tasks.parquet", columns=["task_id", "prompt"])
        outcomes = parquet.read_table(folder / "outcomes.parquet", filters=[("worker", "=", worker)])
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{folder} is not a folder of recorded outcomes: {type(error).__name__}") from error
    if outcomes.num_rows == 0:
        names = sorted(set(parquet.read_table(folder / "outcomes.parquet", columns=["worker"])["worker"].to_pylist()))
        raise ConfigError(f"{folder} has no outcomes of {worker!r}; it has those of {', '.join(names)}")
    if not {"answers", "response"} & set(outcomes.column_names):
        raise ConfigError(f"{folder}/outcomes.parquet has scores only: replaying needs a column answers or response")
    prompts = dict(zip(tasks["task_id"].to_pylist(), tasks["prompt"].to_pylist(), strict=True))
    return {
        prompts[row["task_id"]].strip(): _recorded(row)
        for row in outcomes.to_pylist()
        if row["task_id"] in prompts and (row.get("answers") or row.get("response") is not None)
    }


def _recorded(row: dict[str, Any]) -> _Recorded:
    return _Recorded(
        response=row.get("response"),
        answers=tuple(answer or "" for answer in row.get("answers") or ()),
        input_tokens=row.get("input_tokens"),
        output_tokens=row.get("output_tokens"),
        latency_s=row.get("latency_s") or 0.0,
    )
