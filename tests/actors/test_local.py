"""The local engine against `model.generate`, one row at a time, as the reference."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.adapters import local_engine
from actors.adapters.base import CallContext
from actors.adapters.local import LocalAdapter
from actors.adapters.local_engine import Event, Generation, LocalEngine
from actors.adapters.text_worker import Finished, render
from actors.config import WorkerSpec
from actors.errors import (
    ConfigError,
    ContextLengthError,
    StreamBrokenError,
    WorkerRejectedError,
    WorkerUnavailableError,
)
from actors.messages import (
    ChatReply,
    ChatRequest,
    Chunk,
    ImagePart,
    Message,
    ResponseFormat,
    ToolChoice,
    ToolSpec,
    Usage,
)
from actors.model_files import resolve_model
from tests.actors.tiny_chat import random_adapter, tiny_chat_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {f"worker.{seed}": random_adapter(folder, home / str(seed), seed) for seed in (1, 2)}


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine.load(folder, device="cpu", max_batch=4, dtype=torch.float32)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def endless(engine: LocalEngine) -> ChatRequest:
    """A question that this model, which never learned to stop, answers for a long time."""
    questions = [ask(str(n), temperature=0, max_tokens=300) for n in range(12)]
    replies = engine.generate_batch(questions)
    chosen = max(
        zip(replies, questions, strict=True), key=lambda pair: len(pair[0].text) * (pair[0].finish_reason == "length")
    )
    assert chosen[0].finish_reason == "length"
    return chosen[1].with_(max_tokens=900)


@pytest.fixture
def worker(engine: LocalEngine) -> LocalAdapter:
    return LocalAdapter(WorkerSpec(name="small", provider="local", model="tiny"), engine)


def ask(text: str, **settings: Any) -> ChatRequest:
    return ChatRequest((Message("user", text),), **settings)


class Running:
    """A generation in the engine and what it has emitted so far."""

    def __init__(self, engine: LocalEngine, request: ChatRequest, adapter: str | None = None) -> None:
        self.events: list[Event] = []
        self.done = threading.Event()
        self.generation: Generation = engine.prepare(request, self._emit, adapter=adapter)
        engine.submit(self.generation)

    def _emit(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, str):
            self.done.set()

    def end(self) -> Finished:
        assert self.done.wait(60), "the engine did not finish in time"
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]


def reference(model: Any, folder: Path, request: ChatRequest) -> list[int]:
    """The tokens that transformers' own greedy decoding gives for this request alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(render(tokenizer, request.messages), add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(**prompt, do_sample=False, max_new_tokens=request.max_tokens)
    return list(out[0, prompt["input_ids"].shape[1] :].tolist())


def test_rows_that_join_and_leave_at_random_equal_generating_alone(folder: Path, engine: LocalEngine) -> None:
    choose = random.Random(5)
    requests = [
        ask("".join(choose.choices("abc é☃", k=choose.choice([1, 20, 120, 330]))), temperature=0, max_tokens=n)
        for n in (1, 2, 30, 60, 5, 41, 17, 80, 3, 25, 9)
    ]
    running = []
    for request in requests:
        running.append(Running(engine, request))
        time.sleep(choose.choice([0, 0, 0.01, 0.05]))
    ends = [row.end() for row in running]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for row, end, request in zip(running, ends, requests, strict=True):
        expected = reference(model, folder, request)
        assert row.generation.tokens == expected
        assert end.usage == Usage(len(row.generation.prompt), len(expected))
        assert end.text == "".join(event for event in row.events if isinstance(event, str))
    assert len({tuple(row.generation.tokens) for row in running}) > 7, "the prompts make no difference"
    assert engine.busy == 0


def test_short_prompts_are_read_together_and_a_long_one_in_pieces(
    folder: Path, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask("abc " * n, temperature=0, max_tokens=most) for n, most in ((5, 12), (12, 1), (1, 12), (75, 12))]
    shapes: list[tuple[int, ...]] = []
    forward = engine._forward

    def noted(rows: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return forward(rows, tokens, *rest)

    monkeypatch.setattr(engine, "_forward", noted)
    with engine._changed:  # the engine sees all four at once
        running = [Running(engine, request) for request in requests]
    for row in running:
        row.end()
    lengths = [len(row.generation.prompt) for row in running]
    assert 3 * max(lengths[:3]) <= local_engine.PREFILL_TOKENS < lengths[3]
    read = [shape for shape in shapes if shape[1] > 1]
    assert read == [
        (3, max(lengths[:3])),
        (1, local_engine.PREFILL_TOKENS),
        (1, lengths[3] % local_engine.PREFILL_TOKENS),
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert [row.generation.tokens for row in running] == [reference(model, folder, request) for request in requests]


def test_a_sampled_answer_does_not_depend_on_its_neighbours(engine: LocalEngine) -> None:
    request = ask("tell me", temperature=1.3, top_p=0.9, seed=11, max_tokens=60)
    alone = engine.generate_batch([request])[0]
    others = [ask("x" * n, temperature=1.0, seed=n, max_tokens=10 + n) for n in range(1, 40, 6)]
    crowd = engine.generate_batch([*others[:3], request, *others[3:]])
    assert crowd[3].text == alone.text
    assert engine.generate_batch([request.with_(seed=12)])[0].text != alone.text


def test_adapters_share_a_batch_and_stay_apart(folder: Path, adapters: dict[str, Path]) -> None:
    engine = LocalEngine.load(folder, device="cpu", adapters=adapters, dtype=torch.float32)
    requests = [ask(f"question {n}", temperature=0, max_tokens=20 + 7 * n) for n in range(6)]
    who = [None, "worker.1", "worker.2", "worker.1", None, "worker.2"]
    rows = [Running(engine, request, name) for request, name in zip(requests, who, strict=True)]
    for row in rows:
        row.end()
    engine.close()
    for row, request, name in zip(rows, requests, who, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = reference(model, folder, request)
        if name is None:
            assert row.generation.tokens == plain
            continue
        adapted = reference(PeftModel.from_pretrained(model, adapters[name]), folder, request)
        assert adapted != plain, "the adapter changes nothing, so this test could not fail"
        assert row.generation.tokens == adapted


def test_a_stop_string_ends_the_answer_before_it(engine: LocalEngine) -> None:
    request = ask("go on", temperature=0, max_tokens=80)
    whole = engine.generate_batch([request])[0].text
    stop = whole[20:24]
    row = Running(engine, request.with_(stop=(stop,)))
    end = row.end()
    assert end.text == whole[: whole.index(stop)]
    assert (end.reason, end.stopped_by) == ("stop", stop)
    assert end.usage.output_tokens < 80
    assert stop not in end.text


async def test_a_caller_is_told_which_stop_string_ended_the_answer(engine: LocalEngine, worker: LocalAdapter) -> None:
    request = ask("go on", temperature=0, max_tokens=80)
    whole = engine.generate_batch([request])[0].text
    stopped = await worker.complete(request.with_(stop=("never said", whole[20:24])), CallContext())
    assert stopped.stop_sequence == whole[20:24]
    full = await worker.complete(request.with_(stop=("never said",), max_tokens=3), CallContext())
    assert (full.finish_reason, full.stop_sequence) == ("length", "")


def test_a_small_cache_lets_rows_in_one_by_one(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ask(f"{n}", temperature=0, max_tokens=12) for n in range(5)]
    expected = [reply.text for reply in engine.generate_batch(requests)]
    monkeypatch.setattr(local_engine, "CACHE_BYTES", 1)
    assert [reply.text for reply in engine.generate_batch(requests)] == expected


def test_too_long_a_conversation_says_how_long(engine: LocalEngine) -> None:
    with pytest.raises(
        ContextLengthError, match=r"11[0-9][0-9] tokens long; this worker's context holds 1024"
    ) as caught:
        engine.generate_batch([ask("a" * 1100)])
    assert caught.value.param == "messages"
    with pytest.raises(ContextLengthError, match="at least"):
        engine.generate_batch([ask("a" * 10_000_000)])


def test_an_answer_ends_where_the_context_ends(engine: LocalEngine) -> None:
    (reply,) = engine.generate_batch([ask("a" * 950, temperature=0, max_tokens=500)])
    assert reply.usage.total_tokens <= 1024
    assert reply.finish_reason == "length" or reply.usage.total_tokens < 1024


def wait_until_idle(engine: LocalEngine, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while engine.busy:
        assert time.monotonic() < deadline, f"still busy after {seconds} s"
        time.sleep(0.005)


async def drain(chunks: AsyncIterator[Chunk]) -> tuple[list[str], ChatReply]:
    pieces: list[str] = []
    async for chunk in chunks:
        if chunk.final is not None:
            return pieces, chunk.final
        pieces.append(chunk.text)
    raise AssertionError("the stream has no final chunk")


async def test_a_stream_adds_up_to_the_whole_answer(worker: LocalAdapter) -> None:
    request = ask("hello", temperature=1.0, seed=3, max_tokens=40)
    sent: list[int] = []
    pieces, final = await drain(worker.stream(request, CallContext(on_sent=lambda: sent.append(1))))
    whole = await worker.complete(request, CallContext())
    assert len(pieces) > 5
    assert "".join(pieces) == final.text == whole.text
    assert final == whole
    assert (whole.worker, whole.finish_reason, whole.dropped) == ("small", "length", ())
    assert whole.usage.output_tokens == 40
    assert sent == [1]


async def test_leaving_a_stream_frees_the_engine_at_once(
    engine: LocalEngine, worker: LocalAdapter, endless: ChatRequest
) -> None:
    async with aclosing(worker.stream(endless, CallContext())) as chunks:
        await anext(chunks)
        assert engine.busy == 1
    waiting = asyncio.create_task(worker.complete(endless, CallContext()))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.to_thread(wait_until_idle, engine, 0.5)


async def test_what_a_text_model_cannot_do(worker: LocalAdapter) -> None:
    tools = (ToolSpec("look_up"),)
    reply = await worker.complete(
        ask("hi", max_tokens=1, tools=tools, response_format=ResponseFormat("json_object"), extra={"top_k": 3}),
        CallContext(),
    )
    assert reply.dropped == ("tools", "response_format", "top_k")
    with pytest.raises(WorkerRejectedError, match="cannot call tools") as caught:
        await worker.complete(ask("hi", tools=tools, tool_choice=ToolChoice("required")), CallContext())
    assert (caught.value.param, caught.value.worker) == ("tool_choice", "small")
    image = Message("user", (ImagePart("data:image/png;base64,AAAA"),))
    with pytest.raises(WorkerRejectedError, match="no images"):
        await worker.complete(ChatRequest((image,)), CallContext())
    with pytest.raises(WorkerRejectedError, match="tool calls"):
        await worker.complete(ChatRequest((Message("tool", "4", tool_call_id="a"),)), CallContext())


async def test_a_failing_step_reaches_everyone_and_the_engine_goes_on(
    engine: LocalEngine, worker: LocalAdapter, endless: ChatRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = worker.stream(endless, CallContext())
    await anext(chunks)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine, "_forward", out_of_memory)
        with pytest.raises(StreamBrokenError, match="OutOfMemoryError"):
            await drain(chunks)
        with pytest.raises(WorkerUnavailableError, match="OutOfMemoryError"):
            await worker.complete(ask("hi", max_tokens=3), CallContext())
    assert (await worker.complete(ask("hi", max_tokens=3, seed=2), CallContext())).usage.output_tokens == 3


async def test_closing_ends_what_runs_and_refuses_what_comes(folder: Path, endless: ChatRequest) -> None:
    worker = LocalAdapter(
        WorkerSpec(name="small", provider="local", model="tiny"), LocalEngine.load(folder, device="cpu")
    )
    running = asyncio.create_task(worker.complete(endless, CallContext()))
    await asyncio.sleep(0.05)
    await worker.close()
    with pytest.raises(WorkerUnavailableError, match="closed"):
        await running
    with pytest.raises(WorkerUnavailableError, match="closed"):
        await worker.complete(ask("hi"), CallContext())


def test_what_cannot_be_loaded_is_explained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load a model"):
        LocalEngine.load(tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="special: cannot load the adapter"):
        LocalEngine.load(folder, device="cpu", adapters={"special": tmp_path})
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            LocalEngine.load(folder, device="cuda")


@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_embedded_model_answers_as_transformers_does() -> None:
    files = resolve_model("SmolLM2-135M-Instruct")
    engine = LocalEngine.load(files.folder, device="cpu", dtype=torch.float32)
    requests = [
        ask("What is the capital of France?", temperature=0, max_tokens=12),
        ask("Repeat exactly: naïve café ☕ 日本語", temperature=0, max_tokens=24),
        ask("Count from 1 to 9.", temperature=0, max_tokens=16),
    ]
    rows = [Running(engine, request) for request in requests]
    ends = [row.end() for row in rows]
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    assert [row.generation.tokens for row in rows] == [reference(model, files.folder, request) for request in requests]
    assert "Paris" in ends[0].text
    assert ends[0].reason == "stop"
    engine.close()
