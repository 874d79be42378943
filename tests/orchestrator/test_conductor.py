"""The conductor's loop: plans, mistakes told back, rounds, itself as a worker, fallbacks, budgets, pauses for tools."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import (
    AllWorkersFailedError,
    BudgetError,
    DeadlineError,
    RequestError,
    StreamBrokenError,
    WorkerUnavailableError,
)
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ToolCall, ToolChoice, ToolSpec, Usage
from orchestrator import memory
from orchestrator.budget import Budget
from orchestrator.conducted import ConductEvent, FellBack, Kept, Planned, Rejected, Stepped
from orchestrator.conductor import Conducted, ConductorSettings, Pool, PromptSettings, conduct
from orchestrator.executor import ExecutorSettings
from orchestrator.memory import Paused
from orchestrator.run import StepChunk, StepEnded, StepStarted
from orchestrator.workflow import SELF, Step, Workflow, render_workflow

NAMES = ("a", "b", "c")
QUERY = ChatRequest(messages=(Message("user", "How long is the reverse of lamp, times 7?"),))
KEEP = "model_id: []\nsubtasks: []\naccess_list: []"
WEATHER = ToolSpec("weather", parameters={"type": "object"})

Answer = str | Exception | tuple[ToolCall, ...]


@dataclass
class Scripted:
    """A worker that answers from a function of what it is asked, and remembers it."""

    name: str
    answer: Callable[[ChatRequest], Answer]
    seen: list[ChatRequest] = field(default_factory=list)
    delay: float = 0.0

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.seen.append(request)
        await asyncio.sleep(self.delay)
        answer = self.answer(request)
        if isinstance(answer, Exception):
            raise answer
        calls = answer if isinstance(answer, tuple) else ()
        text = "let me look" if isinstance(answer, tuple) else answer
        return ChatReply(self.name, text, tool_calls=calls, usage=Usage(10, 2), cost_usd=0.5)

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        reply = await self.complete(request)
        yield Chunk(reply.text[:3])
        if reply.text.endswith("BREAK"):
            raise StreamBrokenError("cut off", worker=self.name)
        yield Chunk(reply.text[3:])
        yield Chunk(final=reply)


def plan(*steps: tuple[str, str, tuple[int, ...]]) -> str:
    return "First this, then that.\n" + render_workflow(Workflow(tuple(Step(*step) for step in steps)), NAMES)


CHAIN = plan(("a", "reverse the word", ()), ("b", "count and multiply", (0,)))


def writer(*texts: Answer) -> Scripted:
    """A conductor that writes these, one after the other."""
    left = list(texts)
    return Scripted("writer", lambda _request: left.pop(0))


def pool(**answers: Answer | Callable[[ChatRequest], Answer]) -> Pool:
    workers = {
        name: Scripted(name, answer if callable(answer) else lambda _request, answer=answer: answer)
        for name, answer in answers.items()
    }
    return Pool(NAMES, workers)


def seen(pool: Pool, name: str) -> list[ChatRequest]:
    worker = pool.workers[name]
    assert isinstance(worker, Scripted)
    return worker.seen


async def conducting(
    conductor: Scripted,
    workers: Pool,
    request: ChatRequest = QUERY,
    ranking: Sequence[str] = NAMES,
    **options: Any,
) -> tuple[Conducted, list[ConductEvent]]:
    events: list[ConductEvent] = []
    chosen = options.pop("settings", ConductorSettings())
    result = await conduct(request, conductor, workers, ranking, chosen, on_event=events.append, **options)
    return result, events


async def test_a_plan_is_written_and_run() -> None:
    workers = pool(a="pmal", b="28", c="never")
    conductor = writer(CHAIN)
    result, events = await conducting(conductor, workers)
    assert result.answer is not None
    assert (result.answer.text, result.answer.worker) == ("28", "b")
    assert "reverse the word" in seen(workers, "a")[0].messages[-1].text
    assert "pmal" in seen(workers, "b")[0].messages[-1].text
    assert seen(workers, "c") == []
    # One call to plan, two to work: the first input and the last output are what the caller sees of it.
    assert result.usage == Usage(30, 6)
    assert result.visible == Usage(10, 2)
    assert (result.cost_usd, result.calls) == (1.5, 3)
    assert [type(event) for event in events] == [Planned, *[Stepped] * 4]
    asked = conductor.seen[0]
    assert asked.messages[-1].text.startswith(f"<question>\n{QUERY.messages[0].text}\n")
    assert (asked.temperature, asked.max_tokens, asked.extra) == (0.2, 1024, {})


async def test_a_mistake_is_told_back_once_and_for_the_next_try_only() -> None:
    conductor = writer("I would rather not.", plan(("a", "x", ())).replace("[0]", "[7]"), CHAIN)
    result, events = await conducting(conductor, pool(a="pmal", b="28"))
    assert result.answer is not None
    assert result.answer.text == "28"
    first, second, third = conductor.seen
    assert len(first.messages) == 2
    assert second.messages[2] == Message("assistant", "I would rather not.")
    assert "[7]" in third.messages[2].text
    assert "no worker" in third.messages[3].text
    assert len(third.messages) == 4
    assert (first.temperature, second.temperature, second.sample_index) == (0.2, 0.7, 1)
    rejected = [event for event in events if isinstance(event, Rejected)]
    assert [event.left for event in rejected] == [2, 1]
    assert [writing.error is None for writing in result.rounds[0].writings] == [False, False, True]
    assert result.usage == Usage(50, 10)


async def test_a_compact_conductor_only_tries_again() -> None:
    conductor = writer("no", CHAIN)
    chosen = ConductorSettings(PromptSettings("compact"))
    await conducting(conductor, pool(a="pmal", b="28"), QUERY.with_(seed=5), settings=chosen)
    first, second = conductor.seen
    assert first.messages == second.messages
    assert first.messages[-1].text == f"Workers: 0, 1\nTask: {QUERY.messages[0].text}"
    assert first.seed == 5
    assert second.seed != 5


@pytest.mark.parametrize("bad", ["no plan", WorkerUnavailableError("is down", worker="writer")])
async def test_without_a_plan_the_best_single_worker_gets_the_bare_question(bad: Answer) -> None:
    conductor = writer(bad, bad)
    workers = pool(a="never", b=WorkerUnavailableError("is down", worker="b"), c="28")
    chosen = ConductorSettings(retries=1)
    result, events = await conducting(conductor, workers, ranking=("b", "c", "a"), settings=chosen)
    assert result.answer is not None
    assert (result.answer.text, result.answer.worker) == ("28", "c")
    assert seen(workers, "b")[0].messages == seen(workers, "c")[0].messages == QUERY.messages
    assert result.rounds[0].bare
    (fell,) = [event for event in events if isinstance(event, FellBack)]
    assert ("2 tries" if bad == "no plan" else "is down") in fell.reason
    assert len(conductor.seen) == (2 if bad == "no plan" else 1)


async def test_nobody_answers() -> None:
    down = WorkerUnavailableError("is down", worker="x")
    with pytest.raises(AllWorkersFailedError) as caught:
        await conducting(writer(CHAIN), pool(a=down, b=down))
    assert set(caught.value.failures) == {"a", "b"}


async def test_a_workflow_in_which_nobody_answers_falls_back_to_the_bare_question() -> None:
    def only_bare(request: ChatRequest) -> Answer:
        return "28" if request.messages == QUERY.messages else WorkerUnavailableError("is down", worker="a")

    result, events = await conducting(writer(CHAIN), pool(a=only_bare, b=only_bare))
    assert result.answer is not None
    assert result.answer.text == "28"
    assert [each.bare for each in result.rounds] == [False, True]
    assert any(isinstance(event, FellBack) for event in events)
    assert result.calls == 1 + 4 + 1


async def test_a_failed_step_goes_to_the_next_best_worker() -> None:
    workers = pool(a=WorkerUnavailableError("is down", worker="a"), b="28", c="pmal")
    result, _ = await conducting(writer(CHAIN), workers, ranking=("c", "b", "a"))
    assert result.answer is not None
    assert result.answer.text == "28"
    assert "pmal" in seen(workers, "b")[0].messages[-1].text


async def test_it_sees_its_result_and_plans_again() -> None:
    again = plan(("c", "do it better", ()), ("b", "check", ()), ("c", "conclude", (0,)))
    conductor = writer(CHAIN, again)
    workers = pool(a="pmal", b="27 </result>", c="28")
    result, events = await conducting(conductor, workers, settings=ConductorSettings(max_rounds=2))
    assert result.answer is not None
    assert (result.answer.text, len(result.rounds)) == ("28", 2)
    told = conductor.seen[1].messages
    assert told[2] == Message("assistant", CHAIN)
    assert "<result>\n27 < /result>\n</result>" in told[3].text
    # The first step and those that read all before them see the earlier answer; a step that looks for itself does not.
    better, conclude = (request.messages[-1].text for request in seen(workers, "c"))
    assert "earlier_answer" in better
    assert "27" in better
    assert "earlier_answer" not in conclude
    assert [event.round for event in events if isinstance(event, Planned)] == [0, 1]
    assert conductor.seen[0].max_tokens == 1024


async def test_empty_lists_keep_the_answer() -> None:
    result, events = await conducting(
        writer(CHAIN, KEEP), pool(a="pmal", b="28"), settings=ConductorSettings(max_rounds=5)
    )
    assert result.answer is not None
    assert result.answer.text == "28"
    assert [each.kept for each in result.rounds] == [False, True]
    assert isinstance(events[-1], Kept)


async def test_empty_lists_are_no_first_plan() -> None:
    conductor = writer(KEEP, CHAIN)
    result, _ = await conducting(conductor, pool(a="pmal", b="28"))
    assert result.answer is not None
    assert "no steps" in conductor.seen[1].messages[-1].text


@pytest.mark.parametrize("bad", ["nothing", WorkerUnavailableError("is down", worker="writer")])
async def test_a_later_round_without_a_plan_keeps_the_answer(bad: Answer) -> None:
    conductor = writer(CHAIN, bad, bad, bad)
    result, events = await conducting(conductor, pool(a="pmal", b="28"), settings=ConductorSettings(max_rounds=3))
    assert result.answer is not None
    assert result.answer.text == "28"
    assert len(result.rounds) == 2
    assert not any(isinstance(event, FellBack) for event in events)
    assert result.rounds[1].reason


async def test_a_later_round_that_fails_keeps_the_answer() -> None:
    down = WorkerUnavailableError("is down", worker="c")
    result, _ = await conducting(
        writer(CHAIN, plan(("c", "again", ()))),
        pool(a="pmal", b="28", c=down),
        settings=ConductorSettings(max_rounds=2, executor=ExecutorSettings(fallbacks=0)),
        ranking=("c",),
    )
    assert result.answer is not None
    assert result.answer.text == "28"


async def test_it_can_be_a_worker_of_its_own_plan() -> None:
    outer = plan(("a", "reverse", ()), (SELF, "count, then multiply", (0,)))
    inner = plan(("b", "count", ()), ("c", "multiply", (0,)))
    conductor = writer(outer, inner)
    workers = pool(a="pmal", b="4", c="28")
    result, events = await conducting(conductor, workers, settings=ConductorSettings(max_depth=1))
    assert result.answer is not None
    assert (result.answer.text, result.answer.worker) == ("28", SELF)
    (nested,) = result.rounds[0].nested
    assert (nested.depth, nested.rounds[0].workflow is not None) == (1, True)
    # The inner conductor is told its part, and no longer offered itself.
    assert '"conductor"' in conductor.seen[0].messages[0].text
    assert '"conductor"' not in conductor.seen[1].messages[0].text
    assert "count, then multiply" in conductor.seen[1].messages[1].text
    assert "system:" not in conductor.seen[1].messages[1].text
    # Five calls: two plans, three steps.
    assert (result.usage, result.calls, result.cost_usd) == (Usage(50, 10), 5, 2.5)
    assert {event.depth for event in events} == {0, 1}


async def test_what_it_answers_itself_is_streamed_too() -> None:
    # Even two levels down the pieces of the last step come as they are made, each once, as the outermost step's.
    conductor = writer(plan((SELF, "everything", ())), plan((SELF, "all of that", ())), CHAIN)
    result, events = await conducting(
        conductor, pool(a="pmal", b="twenty-eight"), settings=ConductorSettings(max_depth=2), stream_last=True
    )
    chunks = [each for each in events if isinstance(each, Stepped) and isinstance(each.event, StepChunk)]
    assert {chunk.depth for chunk in chunks} == {0}
    assert [text for chunk in chunks if (text := chunk.event.chunk.text)] == ["twe", "nty-eight"]  # type: ignore[union-attr]
    assert result.answer is not None
    assert result.answer.text == "twenty-eight"


async def test_what_breaks_off_inside_is_not_said_twice() -> None:
    conductor = writer(plan((SELF, "everything", ())), CHAIN)
    chosen = ConductorSettings(max_depth=1)
    with pytest.raises(StreamBrokenError):
        await conducting(conductor, pool(a="28", b="28 BREAK"), settings=chosen, stream_last=True)


async def test_a_nested_workflow_that_fails_goes_to_the_next_worker() -> None:
    def only_the_whole(request: ChatRequest) -> Answer:
        outermost = request.messages[0].role == "system" and "a part" not in request.messages[-1].text
        return "28" if outermost else WorkerUnavailableError("is down", worker="a")

    conductor = writer(plan((SELF, "all of it", ())), plan(("a", "a part", ())))
    chosen = ConductorSettings(max_depth=1, executor=ExecutorSettings(fallbacks=1))
    result, _ = await conducting(conductor, pool(a=only_the_whole), settings=chosen, ranking=("a",))
    assert result.answer is not None
    assert result.answer.text == "28"
    assert result.rounds[0].run is not None
    assert [name for name, _ in result.rounds[0].run.steps[0].failures] == [SELF]
    assert [each.bare for each in result.rounds[0].nested[0].rounds] == [False, True]


@given(
    st.lists(st.text(max_size=200) | st.sampled_from([CHAIN, KEEP, CHAIN.replace("[0]", "[0")]), min_size=3, max_size=3)
)
@settings(max_examples=60)
def test_whatever_is_written_there_is_an_answer(texts: list[str]) -> None:
    conductor = writer(*texts)
    result, _ = asyncio.run(conducting(conductor, pool(a="pmal", b="28")))
    assert result.answer is not None
    assert result.answer.text == ("pmal" if result.rounds[0].bare else "28")
    assert result.rounds[0].bare == (CHAIN not in texts)
    assert len(conductor.seen) <= 3


async def test_itself_is_no_worker_unless_allowed() -> None:
    conductor = writer(plan((SELF, "everything", ())), CHAIN)
    result, _ = await conducting(conductor, pool(a="pmal", b="28"))
    assert result.answer is not None
    assert len(conductor.seen) == 2


async def test_workers_that_may_not_be_used_are_not_offered() -> None:
    conductor = writer(CHAIN, plan(("c", "all of it", ())))
    result, _ = await conducting(conductor, pool(c="28"))
    assert result.answer is not None
    assert "The models you can use: 2\n" in conductor.seen[0].messages[-1].text
    assert "may not be used" in conductor.seen[1].messages[-1].text


async def test_a_grammar_goes_with_the_request() -> None:
    conductor = writer(CHAIN)
    await conducting(conductor, pool(a="pmal", b="28"), settings=ConductorSettings(structured=True))
    grammar = conductor.seen[0].extra["structured_outputs"]["regex"]
    assert "model_id" in grammar
    assert "(0|1)" in grammar


async def test_a_budget_of_calls_bounds_planning_too() -> None:
    workers = pool(a="pmal", b="28")
    result, _ = await conducting(writer(CHAIN), workers, budget=Budget(calls=1))
    assert result.answer is not None
    assert (result.answer.text, result.calls) == ("pmal", 1)  # too little to plan and to work: the best worker
    result, _ = await conducting(writer(CHAIN), pool(a="pmal", b="28"), budget=Budget(calls=2))
    assert result.calls <= 2
    assert result.out_of == "calls"
    result, _ = await conducting(
        writer(CHAIN, CHAIN), pool(a="pmal", b="28"), budget=Budget(calls=3), settings=ConductorSettings(max_rounds=2)
    )
    assert result.answer is not None
    assert (result.answer.text, result.calls, result.out_of) == ("28", 3, "calls")


async def test_time_bounds_planning_too() -> None:
    slow = writer(CHAIN)
    slow.delay = 30.0
    with pytest.raises(DeadlineError):
        await conducting(slow, pool(a="pmal", b="28"), budget=Budget(seconds=0.05))


async def test_a_budget_that_is_too_small_is_an_error() -> None:
    with pytest.raises(BudgetError):
        await conducting(writer(CHAIN), pool(a="pmal", b="28"), budget=Budget(tokens=5))


async def test_pieces_of_the_answer_come_only_when_it_is_certain() -> None:
    def pieces(events: list[ConductEvent]) -> list[str]:
        told = [event.event for event in events if isinstance(event, Stepped)]
        return [event.chunk.text for event in told if isinstance(event, StepChunk) and event.chunk.text]

    _, events = await conducting(writer(CHAIN), pool(a="pmal", b="twenty-eight"), stream_last=True)
    assert pieces(events) == ["twe", "nty-eight"]
    _, events = await conducting(
        writer(CHAIN, KEEP),
        pool(a="pmal", b="28"),
        stream_last=True,
        settings=ConductorSettings(max_rounds=2),
    )
    assert pieces(events) == []
    with pytest.raises(StreamBrokenError):
        await conducting(writer(CHAIN), pool(a="pmal", b="28 BREAK"), stream_last=True)


async def test_cancelling_ends_the_call_in_flight() -> None:
    conductor = writer(CHAIN)
    conductor.delay = 30.0
    task = asyncio.create_task(conducting(conductor, pool(a="x", b="y")))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(conductor.seen) == 1


# Tools ---------------------------------------------------------------------------------------------------------------

ASK = ChatRequest(
    (Message("user", "Coat today?"),), tools=(WEATHER,), tool_choice=ToolChoice("required"), parallel_tool_calls=False
)
TWO_LOOK = plan(("a", "look at the north", ()), ("b", "look at the south", ()), ("c", "conclude", (0, 1)))


def looking(place: str) -> Callable[[ChatRequest], Answer]:
    """A worker that calls the tool twice, each time after it has seen what came of the last call, then answers."""

    def answer(request: ChatRequest) -> Answer:
        results = [message.text for message in request.messages if message.role == "tool"]
        if len(results) < 2:
            return (ToolCall(f"call_{len(results)}", "weather", f'{{"at": "{place}", "n": {len(results)}}}'),)
        return f"{place}: {' '.join(results)}"

    return answer


def with_results(request: ChatRequest, answer: ChatReply, results: Mapping[str, str]) -> ChatRequest:
    """The conversation as a caller sends it back, the tools' results by what the call asked for."""
    said = Message("assistant", answer.text, tool_calls=answer.tool_calls)
    tools = [
        Message("tool", next(text for key, text in results.items() if key in call.arguments), tool_call_id=call.id)
        for call in answer.tool_calls
    ]
    return request.with_(messages=(*request.messages, said, *tools))


def stored(paused: Paused | None) -> Paused:
    assert paused is not None
    return memory.from_text(paused.id, memory.to_text(paused))


async def resuming(paused: Paused | None, request: ChatRequest, workers: Pool, conductor: Scripted) -> Conducted:
    assert memory.awaited(request.messages) == stored(paused).id
    resumed = memory.resume(stored(paused), request.messages)
    result, _ = await conducting(conductor, workers, request, resumed=resumed, may_pause=True)
    return result


async def test_tool_results_go_back_to_the_step_that_asked() -> None:
    workers = pool(a=looking("north"), b=looking("south"), c="yes, a coat")
    conductor = writer(TWO_LOOK)
    first, _ = await conducting(conductor, workers, ASK, may_pause=True)
    assert first.answer is not None
    assert first.answer.finish_reason == "tool_calls"
    assert [call.name for call in first.answer.tool_calls] == ["weather", "weather"]
    assert seen(workers, "c") == []
    # Any step may call tools; that one must be called binds the last step only.
    assert seen(workers, "a")[0].tools == (WEATHER,)
    assert seen(workers, "a")[0].tool_choice is None

    request = with_results(ASK, first.answer, {"north": "rain", "south": "sun"})
    second = await resuming(first.paused, request, workers, conductor)
    assert second.answer is not None
    request = with_results(request, second.answer, {"north": "wind", "south": "calm"})
    third = await resuming(second.paused, request, workers, conductor)

    assert third.paused is None
    assert third.answer is not None
    assert third.answer.text == "yes, a coat"
    assert len(conductor.seen) == 1
    # Each agent's own trajectory, in order, and nothing of the other's.
    north = seen(workers, "a")[2].messages
    assert [message.role for message in north] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert [message.text for message in north if message.role == "tool"] == ["rain", "wind"]
    assert not any("south" in message.text + str(message.tool_calls) for message in north)
    concluding = seen(workers, "c")[0]
    assert "north: rain wind" in concluding.messages[-1].text
    assert "south: sun calm" in concluding.messages[-1].text
    assert concluding.tool_choice == ToolChoice("required")
    # What was done before a pause is not paid twice.
    assert third.usage == Usage(30, 6)


async def test_a_tool_inside_a_step_of_its_own_finds_its_way_back() -> None:
    outer = plan(("a", "look at the north", ()), (SELF, "judge the south", ()), ("c", "conclude", (0, 1)))
    inner = plan(("b", "look at the south", ()), ("c", "judge it", (0,)))
    workers = pool(a=looking("north"), b=looking("south"), c=lambda request: f"c{len(seen(workers, 'c'))}")
    conductor = writer(outer, inner)
    first, _ = await conducting(conductor, workers, ASK, may_pause=True, settings=ConductorSettings(max_depth=1))
    assert first.answer is not None
    assert first.paused is not None
    refs = [memory.call_ref(call.id) for call in first.answer.tool_calls]
    assert [ref and (ref.pause, ref.path) for ref in refs] == [(first.paused.id, (0,)), (first.paused.id, (1, 0))]
    assert seen(workers, "b")[0].tools == (WEATHER,)
    assert seen(workers, "c") == []
    # A caller that goes on does not have to allow it again.
    request = with_results(ASK, first.answer, {"north": "rain", "south": "sun"})
    second = await resuming(first.paused, request, workers, conductor)
    assert second.answer is not None
    request = with_results(request, second.answer, {"north": "wind", "south": "calm"})
    with pytest.raises(RequestError, match=second.answer.tool_calls[1].id):
        memory.resume(stored(second.paused), request.messages[:-1])
    third = await resuming(second.paused, request, workers, conductor)
    assert third.paused is None
    assert third.answer is not None
    assert third.answer.text == "c2"
    assert len(conductor.seen) == 2, "nothing is planned again"
    south = seen(workers, "b")[2].messages
    assert [message.text for message in south if message.role == "tool"] == ["sun", "calm"]
    assert not any("north" in message.text + str(message.tool_calls) for message in south)
    judging, concluding = seen(workers, "c")
    assert "south: sun calm" in judging.messages[-1].text
    assert "north: rain wind" in concluding.messages[-1].text
    assert "c1" in concluding.messages[-1].text
    assert not any(message.role == "tool" for message in (*judging.messages, *concluding.messages))
    # Three calls of this request alone: b's last, the inner and the outer end, and a's last.
    assert third.calls == 4


async def test_the_same_results_sent_twice_go_on_from_the_same_place() -> None:
    workers = pool(a=looking("north"), b=looking("south"), c="yes")
    first, _ = await conducting(writer(TWO_LOOK), workers, ASK, may_pause=True)
    assert first.answer is not None
    request = with_results(ASK, first.answer, {"north": "rain", "south": "sun"})
    once = await resuming(first.paused, request, workers, writer())
    twice = await resuming(first.paused, request, workers, writer())
    assert stored(once.paused).id != stored(twice.paused).id
    assert seen(workers, "a")[-1].messages == seen(workers, "a")[-2].messages


async def test_a_missing_result_is_named() -> None:
    workers = pool(a=looking("north"), b=looking("south"), c="yes")
    first, _ = await conducting(writer(TWO_LOOK), workers, ASK, may_pause=True)
    assert first.answer is not None
    whole = with_results(ASK, first.answer, {"north": "rain", "south": "sun"}).messages
    with pytest.raises(RequestError, match=f"{first.answer.tool_calls[1].id} has no result"):
        memory.resume(stored(first.paused), whole[:-1])


async def test_without_a_plan_the_single_worker_may_call_tools_too() -> None:
    workers = pool(a=looking("north"))
    chosen = ConductorSettings(retries=0)
    first, _ = await conducting(writer("no"), workers, ASK, may_pause=True, settings=chosen)
    assert first.answer is not None
    assert seen(workers, "a")[0].messages == ASK.messages
    request = with_results(ASK, first.answer, {"north": "rain"})
    second = await resuming(first.paused, request, workers, writer())
    assert second.answer is not None
    assert [message.role for message in seen(workers, "a")[1].messages] == ["user", "assistant", "tool"]
    request = with_results(request, second.answer, {"north": "wind"})
    third = await resuming(second.paused, request, workers, writer())
    assert third.answer is not None
    assert third.answer.text == "north: rain wind"


async def test_a_round_goes_on_after_a_pause() -> None:
    single = plan(("a", "look", ()))
    conductor = writer(single, single, KEEP)
    workers = pool(a=looking("north"))
    chosen = ConductorSettings(max_rounds=2)
    first, _ = await conducting(conductor, workers, ASK, may_pause=True, settings=chosen)
    assert first.answer is not None
    request = with_results(ASK, first.answer, {"north": "rain"})
    resumed = memory.resume(stored(first.paused), request.messages)
    second, _ = await conducting(conductor, workers, request, resumed=resumed, may_pause=True, settings=chosen)
    assert second.answer is not None
    request = with_results(request, second.answer, {"north": "wind"})
    resumed = memory.resume(stored(second.paused), request.messages)
    third, events = await conducting(conductor, workers, request, resumed=resumed, may_pause=True, settings=chosen)
    # Its own result stands before it plans again; this time the step looks anew.
    assert "north: rain wind" in conductor.seen[1].messages[-1].text
    assert third.paused is not None
    assert [event.round for event in events if isinstance(event, Planned)] == [1]


async def test_that_no_tool_may_be_called_binds_every_step() -> None:
    workers = pool(a="pmal", b="28")
    await conducting(writer(CHAIN), workers, ASK.with_(tool_choice=ToolChoice("none")), may_pause=True)
    assert [seen(workers, name)[0].tool_choice for name in "ab"] == [ToolChoice("none")] * 2


async def test_a_resumed_workflow_that_fails_falls_back_with_the_results_in_view() -> None:
    def once(request: ChatRequest) -> Answer:
        if not any(message.role == "tool" for message in request.messages):
            return (ToolCall("call_1", "weather", "{}"),)
        return WorkerUnavailableError("is down", worker="a")

    first, _ = await conducting(writer(plan(("a", "look", ()))), pool(a=once), ASK, may_pause=True)
    assert first.answer is not None
    assert first.paused is not None
    request = with_results(ASK, first.answer, {"": "rain"})
    resumed = memory.resume(stored(first.paused), request.messages)
    others = pool(a=once, b=lambda request: "yes" if request.messages[-1].role == "tool" else Exception("?"))
    chosen = ConductorSettings(executor=ExecutorSettings(fallbacks=0))
    result, _ = await conducting(
        writer(), others, request, ("b", "a"), resumed=resumed, may_pause=True, settings=chosen
    )
    assert result.answer is not None
    assert result.answer.text == "yes"
    assert seen(others, "b")[0].messages == request.messages
    # Who steps in has a history of its own.
    anew = pool(a=once, b=(ToolCall("call_1", "weather", "{}"),))
    result, _ = await conducting(writer(), anew, request, ("b", "a"), resumed=resumed, may_pause=True, settings=chosen)
    assert result.paused is not None
    (waiting,) = result.paused.waiting
    assert (waiting.worker, len(waiting.said), result.paused.earlier) == ("b", 1, ())


async def test_where_nothing_can_be_kept_no_step_hears_of_tools() -> None:
    workers = pool(a="pmal", b="28")
    await conducting(writer(CHAIN), workers, ASK)
    assert all(request.tools == () for name in "ab" for request in seen(workers, name))
    assert all(request.tool_choice is None for name in "ab" for request in seen(workers, name))


async def test_a_bare_step_is_told_its_subtask_with_the_answers_it_may_read() -> None:
    steps = plan(("a", "reverse lamp", ()), ("b", "how long is {0}? {1} {9}", (0,)))
    workers = pool(a=" pmal {0}\n", b="4")
    chosen = ConductorSettings(PromptSettings("compact"), executor=ExecutorSettings(steps="bare"))
    await conducting(writer(steps), workers, settings=chosen)
    assert seen(workers, "a")[0].messages == (Message("user", "reverse lamp"),)
    assert seen(workers, "b")[0].messages == (Message("user", "how long is pmal {0}? {1} {9}"),)


async def test_events_name_the_step_and_its_worker() -> None:
    _, events = await conducting(writer(CHAIN), pool(a="pmal", b="28"))
    steps = [event.event for event in events if isinstance(event, Stepped)]
    told = [
        (type(step), step.index if isinstance(step, StepStarted) else step.result.index)
        for step in steps
        if not isinstance(step, StepChunk)
    ]
    assert told == [(StepStarted, 0), (StepEnded, 0), (StepStarted, 1), (StepEnded, 1)]
