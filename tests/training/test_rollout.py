"""Live sessions without Ray: what is a reward, what is excluded, and that calls are paid once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from actors.errors import WorkerUnavailableError
from actors.messages import ChatReply, ChatRequest, Chunk, Message
from training.calls import CallStore, PaidOnce, call_cache
from training.outcomes import Task
from training.rollout import Choice, Episode, SessionSettings, decider, play_session

TASK = Task("t1", "What is 1 + 1?", "2", "d", "s", "train", "exact")
ROLES = SessionSettings("fugu-trinity", max_turns=4)


@dataclass
class Scripted:
    """A worker that answers by a function of the request and how often it was asked."""

    name: str
    script: Callable[[ChatRequest, int], str]
    asked: list[ChatRequest] = field(default_factory=list)

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.asked.append(request)
        await asyncio.sleep(0)
        text = self.script(request, len(self.asked))
        if text == "fail":
            raise WorkerUnavailableError("it is down")
        return ChatReply(self.name, text, cost_usd=0.25)

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        yield Chunk(final=await self.complete(request))


def turns(*choices: tuple[str, str | None]) -> Callable[[tuple[Message, ...]], object]:
    left = list(choices)

    async def decide(_transcript: tuple[Message, ...]) -> Choice:
        name, role = left.pop(0)
        return Choice((name,), role)

    return decide


async def play(decide, script, settings=ROLES, *, task=TASK, reward=None) -> Episode:  # type: ignore[no-untyped-def]
    workers = {name: Scripted(name, script) for name in ("a", "b")}
    return await play_session(task, 0, decide, workers, settings, reward=reward)


async def test_one_worker_answers_and_is_graded() -> None:
    right = await play(turns(("b", None)), lambda _request, _n: "2", SessionSettings())
    assert right == Episode("t1", 1.0, 1, 0.25, ("b",), ("worker",))
    assert (await play(turns(("b", None)), lambda _request, _n: "3", SessionSettings())).reward == 0.0


async def test_a_session_with_roles_counts_every_turn() -> None:
    def script(request: ChatRequest, _n: int) -> str:
        return "ACCEPT" if "ACCEPT" in request.messages[-1].text else "2"

    episode = await play(turns(("a", "worker"), ("b", "verifier")), script)
    assert episode == Episode("t1", 1.0, 2, 0.5, ("a", "b"), ("worker", "verifier"))


async def test_a_failure_is_excluded_with_its_reason_also_in_a_later_turn() -> None:
    first = await play(turns(("a", None)), lambda _request, _n: "fail", SessionSettings())
    assert (first.reward, first.excluded) == (None, "worker a: it is down")

    def later(request: ChatRequest, _n: int) -> str:
        return "fail" if "ACCEPT" in request.messages[-1].text else "2"

    # The coordinator would return the response it has: right for a user, a wrong reward here.
    second = await play(turns(("a", "worker"), ("b", "verifier")), later)
    assert (second.reward, second.excluded, second.workers) == (None, "worker b: it is down", ("a",))


async def test_no_answer_is_worth_nothing_and_no_error() -> None:
    unguarded = SessionSettings("fugu-trinity", guard=False)
    episode = await play(turns(("a", "verifier")), lambda _request, _n: "ACCEPT", unguarded)
    assert (episode.reward, episode.excluded) == (0.0, "")
    thinking = await play(turns(*[("a", "thinker")] * 4), lambda _request, _n: "I advise nothing.")
    assert (thinking.reward, thinking.turns) == (0.0, 4)


async def test_a_grader_that_cannot_run_is_excluded() -> None:
    unknown = Task("t2", "p", "r", "d", "s", "train", "nonsense")
    episode = await play(turns(("a", None)), lambda _request, _n: "2", SessionSettings(), task=unknown)
    assert episode.reward is None
    assert "t2: unknown grader nonsense" in episode.excluded


@pytest.mark.parametrize(
    ("value", "reason"), [(2.0, "returned 2.0"), (float("nan"), "returned nan"), ("good", "raised ValueError")]
)
async def test_a_reward_that_is_none_is_excluded(value: object, reason: str) -> None:
    episode = await play(
        turns(("a", None)), lambda _request, _n: "2", SessionSettings(), reward=lambda _task, _response: value
    )
    assert episode.reward is None
    assert reason in episode.excluded

    async def scored(_task: Task, response: str) -> float:
        return float(response) / 4

    assert (await play(turns(("a", None)), lambda _r, _n: "2", SessionSettings(), reward=scored)).reward == 0.5


async def test_a_candidate_decides_from_the_transcript_with_the_draws_of_its_turn() -> None:
    seen: list[tuple[Message, ...]] = []

    async def states(transcript: tuple[Message, ...]) -> np.ndarray:  # type: ignore[type-arg]
        seen.append(transcript)
        return np.array([1.0, float(len(seen))])

    head = np.array([[5.0, 0.0], [0.0, 3.0], [0.0, 0.0], [0.0, 9.0], [0.0, 0.0]])
    decide = decider(head, ("a", "b"), states, np.zeros((3, 2)), SessionSettings("fugu-trinity"))
    talk = (Message("user", "hello"),)
    first, second = await decide(talk), await decide(talk)
    assert (first.ranking, first.role) == (("a",), "thinker")
    assert second.ranking == ("b",)
    uniforms = np.array([[0.999999, 0.0], [0.0, 0.999999]])
    sampled = decider(np.zeros((5, 2)), ("a", "b"), states, uniforms, SessionSettings("fugu-trinity", choose="sample"))
    assert [(c.ranking[0], c.role) for c in (await sampled(talk), await sampled(talk))] == [
        ("b", "worker"),
        ("a", "verifier"),
    ]


async def test_a_prior_is_added_to_what_a_candidate_says() -> None:
    async def states(_transcript: tuple[Message, ...]) -> np.ndarray:  # type: ignore[type-arg]
        return np.array([1.0])

    head, prior = np.array([[1.0], [0.0]]), np.array([0.0, 1.5])
    for given, worker in ((None, "a"), (prior, "b")):
        decide = decider(head, ("a", "b"), states, np.zeros((1, 2)), SessionSettings(), given)
        assert (await decide((Message("user", "hello"),))).ranking == (worker,)


async def test_a_call_is_paid_once_and_kept(tmp_path: Path) -> None:
    worker = Scripted("a", lambda _request, n: f"answer {n}")
    store = CallStore(tmp_path / "calls.sqlite")
    kept: list[tuple[str, str, ChatReply]] = []
    request = SessionSettings().request(TASK, 0)
    once = PaidOnce(worker, "v1", call_cache({}), lambda key, reply: kept.append(("t1", key, reply)))
    replies = await asyncio.gather(*(once.complete(request) for _ in range(5)))
    assert {reply.text for reply in replies} == {"answer 1"}
    store.add(kept)
    store.add(kept)
    assert (store.calls, store.usd) == (1, 0.25)
    store.close()
    again = CallStore(tmp_path / "calls.sqlite")
    assert (again.calls, again.usd) == (1, 0.25)
    known = again.of("t1")
    assert again.of("t2") == {}
    later = PaidOnce(worker, "v1", call_cache(known), lambda _key, _reply: None)
    assert (await later.complete(request)).text == "answer 1"
    assert (await later.complete(SessionSettings().request(TASK, 1))).text == "answer 2"
    # The same name, configured otherwise, is somebody else.
    other = PaidOnce(worker, "v2", call_cache(known), lambda _key, _reply: None)
    assert (await other.complete(request)).text == "answer 3"


def test_all_candidates_and_generations_ask_alike() -> None:
    settings = SessionSettings(seed=7)
    assert settings.request(TASK, 0).fingerprint() == settings.request(TASK, 0).fingerprint()
    prints = {
        one.fingerprint()
        for one in (settings.request(TASK, 0), settings.request(TASK, 1), SessionSettings(seed=8).request(TASK, 0))
    }
    assert len(prints) == 3
