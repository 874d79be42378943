"""A run of a workflow: what runs at the same time, what happens when a step fails, and when the budget runs out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import (
    AllWorkersFailedError,
    BudgetError,
    ContextLengthError,
    DeadlineError,
    StreamBrokenError,
    WorkerRejectedError,
)
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ResponseFormat, ToolSpec, Usage
from orchestrator.budget import Account, Budget
from orchestrator.events import MOST_UNREAD
from orchestrator.executor import (
    ExecutorSettings,
    Run,
    RunEnded,
    StepChunk,
    StepEnded,
    StepEvent,
    StepResult,
    StepStarted,
    execute,
    stream,
)
from orchestrator.workflow import SELF, Step, Workflow
from tests.orchestrator.playing import QUERY, Player, failing, plan, pool, saying

FAN = plan(("a", ()), ("b", ()), ("c", (0, 1)))
CHAIN = plan(("a", ()), ("b", (0,)), ("c", (0, 1)))


def others() -> int:
    """Tasks beside the test's own."""
    return len(asyncio.all_tasks()) - 1


async def test_independent_steps_run_at_the_same_time() -> None:
    workers = pool(*(Player(name, delay=0.1) for name in "abc"))
    run = await execute(QUERY, FAN, workers)
    assert run.complete
    assert run.answered().worker == "c"
    assert run.critical_path_s == pytest.approx(0.2, abs=0.05)
    # Two waves of a tenth of a second, not three; both leaves began before either ended.
    assert run.steps[1].started_s is not None
    assert run.steps[0].ended_s is not None
    assert run.steps[1].started_s < run.steps[0].ended_s
    assert run.usage == Usage(30, 15)
    assert run.cost_usd == 0.75
    assert run.calls == 3
    assert (run.out_of, run.error, run.waiting) == (None, None, ())


@given(st.data())
async def test_every_step_waits_for_what_it_reads_and_for_nothing_else(data: st.DataObject) -> None:
    steps = []
    for index in range(data.draw(st.integers(1, 5))):
        reads = data.draw(st.sets(st.integers(0, index - 1))) if index else set()
        steps.append(Step(f"w{index}", f"{index}", tuple(sorted(reads))))
    workflow = Workflow(tuple(steps))
    order: list[str] = []

    def hear(event: StepEvent) -> None:
        if isinstance(event, StepStarted):
            order.append(f"+{event.index}")
            for i in workflow.steps[event.index].access:
                assert f"-{i}" in order
        elif isinstance(event, StepEnded):
            order.append(f"-{event.result.index}")

    delays = data.draw(st.lists(st.sampled_from([0.0, 0.001]), min_size=len(steps), max_size=len(steps)))
    workers = pool(*(Player(f"w{index}", delay=delays[index]) for index in range(len(steps))))
    run = await execute(QUERY, workflow, workers, on_event=hear)
    assert run.complete
    assert sorted(order) == sorted(f"{sign}{index}" for sign in "+-" for index in workflow.needed)
    # What could begin at once did so before anything ended.
    first_end = next(i for i, word in enumerate(order) if word[0] == "-")
    assert {int(word[1:]) for word in order[:first_end]} == {i for i in workflow.needed if not steps[i].access}
    assert others() == 0


async def test_the_answer_s_settings_are_for_the_answer() -> None:
    request = QUERY.with_(
        tools=(ToolSpec("look"),),
        response_format=ResponseFormat("json_object"),
        stop=("END",),
        max_tokens=50,
        temperature=0.3,
        seed=7,
    )
    workers = pool(Player("a"), Player("c"))
    again = Workflow((Step("a", "Try."), Step("a", "Try."), Step("c", "Join.", (0, 1))))
    await execute(request, again, workers)
    first, second, last = workers["a"].seen[0], workers["a"].seen[1], workers["c"].seen[0]
    assert (first.tools, first.response_format, first.stop) == ((), None, ())
    assert (last.tools, last.response_format, last.stop) == (request.tools, request.response_format, ("END",))
    assert {(one.max_tokens, one.temperature) for one in (first, second, last)} == {(50, 0.3)}
    # The same question to the same worker twice is meant to be answered twice.
    assert first.messages == second.messages
    assert ((first.seed, first.sample_index), (second.seed, second.sample_index)) == ((7, 0), (8, 1))
    assert first.fingerprint() != second.fingerprint()


async def test_memory_may_give_a_step_tools_and_a_call_stops_who_reads_it() -> None:
    workers = pool(Player("a", saying("TOOL")), Player("b", delay=0.02), Player("c"), Player("d"))
    flow = plan(("a", ()), ("b", ()), ("c", (0,)), ("d", (1, 2)))
    tools = (ToolSpec("look"),)

    def prepare(index: int, request: ChatRequest) -> ChatRequest:
        return request.with_(tools=tools) if index == 0 else request

    run = await execute(QUERY, flow, workers, prepare=prepare)
    assert workers["a"].seen[0].tools == tools
    assert run.waiting == (0,)
    assert run.answer is None
    assert [step.skipped for step in run.steps] == [None, None, "waiting", "waiting"]
    assert run.steps[1].reply is not None  # what did not depend on the tool was finished

    # The caller has run the tool; the step that asked goes on, and what was done stays done.
    def history(index: int, request: ChatRequest) -> ChatRequest:
        more = (Message("tool", "It is the Nile.", tool_call_id="call_1"),) if index == 0 else ()
        return request.with_(messages=(*request.messages, *more))

    workers["a"].answer = saying("The Nile.")
    resumed = await execute(QUERY, flow, workers, done={1: run.steps[1]}, prepare=history)
    assert resumed.complete
    assert workers["a"].seen[1].messages[-1].text == "It is the Nile."
    assert len(workers["b"].seen) == 1
    assert "The Nile." in workers["c"].seen[0].messages[-1].text


async def test_a_call_of_the_last_step_is_the_answer() -> None:
    run = await execute(QUERY, plan(("a", ())), pool(Player("a", saying("TOOL"))))
    assert run.answered().tool_calls[0].name == "look"
    assert run.waiting == (0,)


async def test_a_failed_step_goes_to_the_next_best() -> None:
    workers = pool(Player("a", saying("FAIL")), Player("b", saying("FAIL")), Player("c"), Player("d"))
    events: list[StepEvent] = []
    run = await execute(QUERY, plan(("a", ())), workers, ranking=("gone", "a", "b", "c", "d"), on_event=events.append)
    assert run.steps[0].worker == "c"
    assert [(name, error.code) for name, error in run.steps[0].failures] == [
        ("a", "worker_unavailable"),
        ("b", "worker_unavailable"),
    ]
    started = [(event.worker, event.attempt) for event in events if isinstance(event, StepStarted)]
    assert started == [("a", 1), ("b", 2), ("c", 3)]
    assert workers["d"].seen == []
    assert run.calls == 3
    only = await execute(QUERY, plan(("a", ())), workers, ranking="bcd", settings=ExecutorSettings(fallbacks=1))
    assert only.answer is None
    with pytest.raises(AllWorkersFailedError, match="is down"):
        only.answered()


async def test_a_worker_that_left_the_pool_and_one_that_is_too_small() -> None:
    long = ContextLengthError("is too long", worker="b")
    workers = pool(Player("b", failing(long)), Player("c"))
    run = await execute(QUERY, plan(("a", ())), workers, ranking=("b", "c"))
    assert run.answered().worker == "c"
    assert [error.code for _, error in run.steps[0].failures] == ["worker_unavailable", "context_length_exceeded"]


async def test_a_step_that_nobody_can_do_is_left_out_or_ends_the_run() -> None:
    workers = pool(Player("a", saying("FAIL")), Player("b", delay=0.05), Player("c"))
    run = await execute(QUERY, FAN, workers)
    assert run.complete
    assert run.steps[0].skipped == "failed"
    assert "could not answer. Do without it" in workers["c"].seen[0].messages[-1].text
    strict = await execute(QUERY, FAN, workers, settings=ExecutorSettings("fail"))
    assert strict.answer is None
    assert isinstance(strict.error, AllWorkersFailedError)
    assert [step.skipped for step in strict.steps] == ["failed", "cut", "cut"]
    assert workers["b"].cancelled == 1
    assert others() == 0


async def test_when_the_last_step_fails_the_best_so_far_is_the_answer() -> None:
    workers = pool(Player("a"), Player("b"), Player("c", saying("FAIL")))
    run = await execute(QUERY, FAN, workers, ranking=("b", "a"), settings=ExecutorSettings(fallbacks=0))
    assert run.answered().worker == "b"  # of two leaves, the better worker's
    assert not run.complete
    assert isinstance(run.error, AllWorkersFailedError)
    deep = await execute(QUERY, CHAIN, workers, ranking=("a", "b"), settings=ExecutorSettings(fallbacks=0))
    assert deep.answered().worker == "b"  # it builds on the other
    strict = await execute(QUERY, FAN, workers, settings=ExecutorSettings("fail", fallbacks=0))
    assert strict.answer is None


async def test_time_runs_out() -> None:
    workers = pool(Player("a"), Player("b", delay=30), Player("c"))
    run = await execute(QUERY, CHAIN, workers, budget=Budget(seconds=0.1))
    assert run.out_of == "seconds"
    assert run.answered().worker == "a"
    assert [step.skipped for step in run.steps] == [None, "cut", "cut"]
    assert isinstance(run.error, DeadlineError)
    assert run.seconds < 5
    assert workers["b"].cancelled == 1
    assert others() == 0
    nothing = await execute(QUERY, plan(("b", ())), workers, budget=Budget(seconds=0.05))
    with pytest.raises(DeadlineError):
        nothing.answered()


async def test_calls_run_out_before_the_answer_is_lost() -> None:
    workers = pool(*(Player(name) for name in "abc"))
    run = await execute(QUERY, FAN, workers, budget=Budget(calls=2))
    assert run.out_of == "calls"
    assert [step.skipped for step in run.steps] == [None, "budget", None]
    assert run.complete
    assert run.answered().worker == "c"
    assert run.error is None
    one = await execute(QUERY, CHAIN, workers, budget=Budget(calls=1))
    assert [step.skipped for step in one.steps] == ["budget", "budget", None]


async def test_tokens_and_money_run_out() -> None:
    workers = pool(Player("a", usage=Usage(3000, 1000)), Player("b"), Player("c"))
    run = await execute(QUERY, CHAIN, workers, budget=Budget(tokens=4000))
    assert run.out_of == "tokens"
    assert run.answered().worker == "a"
    assert isinstance(run.error, BudgetError)
    assert workers["a"].seen[-1].max_tokens is not None
    assert workers["a"].seen[-1].max_tokens < 4000 // 3
    rich = await execute(QUERY, CHAIN, workers, budget=Budget(usd=0.4))
    assert rich.out_of == "usd"
    assert [step.skipped for step in rich.steps] == [None, None, "budget"]
    assert rich.answered().worker == "b"


async def test_rounds_share_an_account_and_the_conductor_counts_for_itself() -> None:
    class Conductor(Player):
        async def complete(self, request: ChatRequest) -> ChatReply:
            inner = await execute(request, plan(("a", ()), ("b", (0,))), pool(a, b), budget=account)
            return inner.answered()

    a, b = Player("a"), Player("b")
    account = Account(Budget(calls=3))
    run = await execute(QUERY, plan((SELF, ()), ("a", (0,))), pool(Conductor(SELF), a), budget=account)
    assert run.complete
    assert account.calls == 3
    again = await execute(QUERY, plan(("a", ())), pool(a), budget=account)
    assert (again.out_of, again.answer) == ("calls", None)


async def test_cancelling_reaches_every_call() -> None:
    workers = pool(*(Player(name, delay=30) for name in "ab"), Player("c"))
    account = Account(Budget(calls=9, tokens=90_000))
    task = asyncio.create_task(execute(QUERY, FAN, workers, budget=account))
    await asyncio.sleep(0.05)
    assert [worker.inside for worker in workers.values()] == [1, 1, 0]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [worker.inside for worker in workers.values()] == [0, 0, 0]
    assert [worker.cancelled for worker in workers.values()] == [1, 1, 0]
    assert others() == 0
    assert account.calls > 0  # they may have been answered all the same


async def test_a_fault_of_this_program_is_not_hidden_and_leaves_nothing_behind() -> None:
    workers = pool(Player("a", failing(WorkerRejectedError("no", worker="a"))), Player("b", delay=30), Player("c"))

    def broken(index: int, request: ChatRequest) -> ChatRequest:
        if index == 2:
            raise ZeroDivisionError
        return request

    flow = plan(("a", ()), ("b", ()), ("c", (0,)), ("c", (1, 2)))
    with pytest.raises(ZeroDivisionError):
        await execute(QUERY, flow, workers, prepare=broken)
    assert workers["b"].cancelled == 1
    assert others() == 0


async def test_an_empty_workflow() -> None:
    run = await execute(QUERY, Workflow(()), {})
    assert (run.steps, run.answer, run.complete, run.critical_path_s) == ((), None, False, 0.0)


async def collect(*args: object, **kwargs: object) -> tuple[list[StepEvent], Run]:
    events: list[StepEvent] = []
    async for event in stream(*args, **kwargs):  # type: ignore[arg-type]
        if isinstance(event, RunEnded):
            return events, event.run
        events.append(event)
    raise AssertionError("no end")


async def test_the_answer_is_streamed_and_nothing_else_is() -> None:
    workers = pool(Player("a", saying("not for you")), Player("b"), Player("c", saying("It is four letters long.")))
    events, run = await collect(QUERY, FAN, workers)
    chunks = [event for event in events if isinstance(event, StepChunk)]
    assert {chunk.index for chunk in chunks} == {2}
    assert "".join(chunk.chunk.text for chunk in chunks) == "It is four letters long." == run.answered().text
    assert chunks[-1].chunk.final == run.answer
    kinds = [(type(event).__name__, getattr(event, "index", None)) for event in events if event not in chunks]
    assert kinds[:2] == [("StepStarted", 0), ("StepStarted", 1)]
    assert [event.result.index for event in events if isinstance(event, StepEnded)] == [0, 1, 2]
    assert events[-1] == StepEnded(run.steps[2])


async def test_a_stream_falls_back_before_its_first_word_and_not_after() -> None:
    workers = pool(Player("a", saying("FAIL")), Player("b", saying("one two")), Player("c", saying("BREAK now")))
    events, run = await collect(QUERY, plan(("a", ())), workers, ranking=("b",))
    assert run.answered().text == "one two"
    assert [event.worker for event in events if isinstance(event, StepStarted)] == ["a", "b"]
    # Half of it was seen: neither the next worker nor what another step said may follow.
    events, run = await collect(QUERY, plan(("b", ()), ("c", (0,))), workers, ranking=("b",))
    assert "".join(event.chunk.text for event in events if isinstance(event, StepChunk)) == "BREAK"
    assert run.answer is None
    assert isinstance(run.error, StreamBrokenError)
    assert len(run.steps[1].failures) == 1


async def test_a_refusal_that_was_seen_in_part_is_followed_by_nothing() -> None:
    class Refusing(Player):
        async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
            yield Chunk(refusal="I would ra")
            raise StreamBrokenError("broke off", worker=self.name)

    workers = pool(Refusing("a"), Player("b", saying("one two")))
    events, run = await collect(QUERY, plan(("b", ()), ("a", (0,))), workers, ranking=("b",))
    assert [event.chunk.refusal for event in events if isinstance(event, StepChunk)] == ["I would ra"]
    assert [event.worker for event in events if isinstance(event, StepStarted)] == ["b", "a"]
    assert run.answer is None
    assert isinstance(run.error, StreamBrokenError)


async def test_what_was_streamed_when_the_time_ran_out_stands() -> None:
    workers = pool(Player("a", saying("one two three four five six"), delay=0.1))
    events, run = await collect(QUERY, plan(("a", ())), workers, budget=Budget(seconds=0.25))
    shown = "".join(event.chunk.text for event in events if isinstance(event, StepChunk))
    assert shown
    assert run.answered().text == shown
    assert run.answered().finish_reason == "length"
    assert run.answered().cost_usd is None
    assert run.out_of == "seconds"
    # Where prices are known, so is what the half of it cost.
    account = Account(Budget(seconds=0.25), price=lambda _worker, read, wrote: read + 1000.0 * wrote)
    _, run = await collect(QUERY, plan(("a", ())), workers, budget=account)
    used = run.answered().usage
    assert used.output_tokens >= 1
    assert run.answered().cost_usd == run.cost_usd == used.input_tokens + 1000.0 * used.output_tokens
    assert not run.complete


async def test_closing_a_stream_ends_every_call() -> None:
    workers = pool(Player("a", delay=30), Player("b", delay=30), Player("c"))
    async with aclosing(stream(QUERY, FAN, workers)) as events:
        async for _ in events:
            break
    assert [worker.inside for worker in workers.values()] == [0, 0, 0]
    assert others() == 0


async def test_a_slow_reader_slows_the_answer_down() -> None:
    made = 0
    closed = False

    class Endless(Player):
        async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
            nonlocal made, closed
            try:
                while True:
                    made += 1
                    yield Chunk("word ")
            finally:
                closed = True

    read = 0
    async with aclosing(stream(QUERY, plan(("a", ())), pool(Endless("a")))) as events:
        async for _ in events:
            read += 1
            await asyncio.sleep(0.002)
            assert made <= read + MOST_UNREAD
            if read == 100:
                break
    assert closed
    assert made >= 100
    assert others() == 0


async def test_results_given_are_taken_as_they_are() -> None:
    workers = pool(Player("c"))
    done = {
        0: StepResult(0, FAN.steps[0], "a", ChatReply("a", "one"), 0.0, 0.0),
        1: StepResult(1, FAN.steps[1], skipped="failed"),
    }
    run = await execute(QUERY, FAN, workers, done=done)
    assert run.complete
    shown = workers["c"].seen[0].messages[-1].text
    assert '<agent number="0">\none\n</agent>' in shown
    assert "could not answer" in shown
