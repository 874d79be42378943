"""A conversation stays with the worker of its last answer, whichever gateway is asked. Real adapters on a loopback
provider, two gateways on one state folder. No Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.adapters.anthropic import AnthropicAdapter
from actors.adapters.openai import OpenAIAdapter
from actors.config import FuguConfig
from actors.messages import ChatReply, ChatRequest, Message, Usage
from actors.transport import make_transport
from actors.worker import WorkerRuntime
from serve.api.health import Readiness
from serve.gateway import Gateway
from serve.last_answers import LastAnswers, held_part, stay
from serve.store import Kept, SqliteStore
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.linked import Direct
from tests.serve.test_gateway import Fixed, post

DIALECTS = {"gpt": "openai", "other": "openai", "claude": "anthropic"}
LONG = "word " * 2000
TRINITY = "fugu-trinity"


@pytest.fixture(scope="module")
def shared() -> Iterator[LoopbackProvider]:
    with LoopbackProvider() as provider:
        yield provider


class Town:
    """Gateways of one machine; `decider` decides for all of them."""

    def __init__(self, provider: LoopbackProvider) -> None:
        provider.clear()
        provider.default = Behaviour(text="yes", usage=Usage(2000, 1))
        self.provider = provider
        self.decider = Fixed("gpt", {})
        self._adapters: list[Any] = []

    def gateway(self, margin: float) -> Gateway:
        workers = [
            {"name": name, "provider": dialect, "model": name, "base_url": self.provider.url_for(dialect)}  # type: ignore[arg-type]
            for name, dialect in DIALECTS.items()
        ]
        config = FuguConfig.model_validate({"workers": workers, "router": {"stay_margin": margin}})
        kinds = {"openai": OpenAIAdapter, "anthropic": AnthropicAdapter}
        adapters = [kinds[spec.provider](spec, make_transport(spec)) for spec in config.active]
        self._adapters += adapters
        workers_ = [Direct(WorkerRuntime(spec, each)) for spec, each in zip(config.active, adapters, strict=True)]
        return Gateway(config, workers_, self.decider, Readiness({}), no_roles=None)

    async def close(self) -> None:
        for adapter in self._adapters:
            await adapter.close()

    async def turn(self, app: Gateway, messages: list[dict[str, Any]], best: str, **fields: Any) -> dict[str, Any]:
        """The trace of a turn; it is added to the conversation. The best is better by a fifth."""
        self.decider.worker = best
        self.decider.probabilities = {name: 0.5 if name == best else 0.3 for name in DIALECTS}
        body = (await post(app, messages=messages, fugu={"trace": True}, **fields)).json()
        messages += [body["choices"][0]["message"], {"role": "user", "content": "and?"}]
        told: dict[str, Any] = body["fugu"]
        return told


@pytest.fixture
async def town(shared: LoopbackProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Town]:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    town = Town(shared)
    yield town
    await town.close()


@pytest.mark.parametrize(
    ("margin", "stays"), [(0.0, False), (0.1, False), (0.3, True)], ids=["none", "too little", "enough"]
)
async def test_another_gateway_keeps_the_conversation(town: Town, tmp_path: Path, margin: float, stays: bool) -> None:
    talk = [{"role": "user", "content": LONG}]
    await town.turn(town.gateway(margin), talk, "gpt")
    told = await town.turn(town.gateway(margin), talk, "other")
    assert (told["worker"], told["source"]) == (("gpt", "stay") if stays else ("other", "head"))
    assert (tmp_path / "answers.sqlite").exists() == (margin > 0), "no cost where the margin is 0"


async def test_a_session_stays_with_who_answered_and_then_tries_another(town: Town) -> None:
    """The first Worker has the prompt cache; a second is there for what the first could not do."""
    talk = [{"role": "user", "content": LONG}]
    town.provider.by_model = {"other": Behaviour(text="REVISE", usage=Usage(2000, 1))}
    one, two = town.gateway(0.3), town.gateway(0.3)
    await town.turn(one, talk, "gpt")
    town.decider.worker, town.decider.probabilities = "other", {"gpt": 0.3, "other": 0.5}
    body = (await post(two, model=TRINITY, messages=talk, fugu={"trace": True})).json()
    first, *rest = body["fugu"]["turns"]
    assert (first["worker"], first["role"], first["source"]) == ("gpt", "worker", "stay")
    assert {(turn["worker"], turn["source"]) for turn in rest} == {("other", "head")}
    talk += [body["choices"][0]["message"], {"role": "user", "content": "and then?"}]
    last = body["fugu"]["worker"]
    assert (await town.turn(one, talk, "claude", model="fugu"))["worker"] == last, "fugu goes on where a session was"


async def test_a_short_conversation_has_nothing_to_lose(town: Town) -> None:
    town.provider.default = Behaviour(text="yes", usage=Usage(300, 1))
    talk = [{"role": "user", "content": "hello"}]
    await town.turn(town.gateway(1.0), talk, "gpt")
    assert (await town.turn(town.gateway(1.0), talk, "other"))["worker"] == "other"


async def test_the_margin_counts_for_the_part_of_the_prompt_that_is_in_the_cache(town: Town) -> None:
    """A fifth is more than a tenth of the margin: what is new in this turn is ten times what was there."""
    talk = [{"role": "user", "content": LONG}]
    app = town.gateway(0.3)
    await town.turn(app, talk, "gpt")
    talk[-1]["content"] = LONG * 10
    assert (await town.turn(app, talk, "other"))["worker"] == "other"


@pytest.mark.parametrize(
    ("usage", "stays"),
    [(Usage(2000, 1), False), (Usage(2000, 1, 0, 0, 1900), True), (Usage(2000, 1, 1900), True)],
    ids=["kept nothing", "written", "read"],
)
async def test_a_provider_that_tells_what_it_keeps_is_believed(town: Town, usage: Usage, stays: bool) -> None:
    talk = [{"role": "user", "content": LONG}]
    town.provider.default = Behaviour(text="yes", usage=usage)
    app = town.gateway(0.3)
    await town.turn(app, talk, "claude")
    assert (await town.turn(app, talk, "gpt"))["worker"] == ("claude" if stays else "gpt")


async def test_callers_do_not_hear_of_each_other(tmp_path: Path) -> None:
    now = 0.0
    config = FuguConfig.model_validate(
        {"workers": [{"name": "a", "provider": "openai", "model": "m"}], "router": {"stay_margin": 0.2}}
    )
    answers = LastAnswers(config, lambda: SqliteStore(tmp_path / "answers.sqlite", clock=lambda: now))
    asked = ChatRequest((Message("user", LONG),))
    await answers.remember(asked, ChatReply("a", "hi \n", usage=Usage(2000, 1)), "a", "one")
    talk = asked.with_(messages=(*asked.messages, Message("assistant", "hi"), Message("user", "and?")))
    before = await answers.before(talk, "one")
    assert before is not None
    assert before.worker == "a"
    assert 0.19 < before.margin < 0.2
    assert await answers.before(talk, "two") is None
    assert await answers.before(asked, "one") is None
    now = config.router.stay_seconds + 0.1
    assert await answers.before(talk, "one") is None, "the provider's cache is gone, and with it the reason to stay"


async def test_a_store_forgets_what_is_too_much(tmp_path: Path) -> None:
    now = 0.0
    store = SqliteStore(tmp_path / "kept.sqlite", clock=lambda: now, most=10)
    for number in range(300):
        now += 1
        await store.put([Kept("answer", str(number), b"")], "", seconds=1000)
    assert await store.get("answer", "200", "") is None
    assert await store.get("answer", "299", "") == b""


async def test_a_file_that_cannot_be_read_costs_no_answer(town: Town, tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_bytes(b"no database" * 1000)
    talk = [{"role": "user", "content": LONG}]
    app = town.gateway(0.3)
    assert (await town.turn(app, talk, "gpt"))["worker"] == "gpt"
    assert (await town.turn(app, talk, "other"))["worker"] == "other"


def test_what_a_provider_keeps() -> None:
    assert held_part(Usage(1023, 1), told=False) == 0
    assert held_part(Usage(1024, 1), told=False) == 1
    assert held_part(Usage(2000, 1), told=True) == 0
    assert held_part(Usage(2000, 1, 500, 0, 1000), told=True) == 0.75


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_staying(one: float, other: float, margin: float) -> None:
    chosen = stay("a", "b", {"a": one, "b": other}, margin)
    assert (chosen == "a") == (one - other > margin)
    assert stay("a", None, {"a": one}, margin) == "a"
    assert stay("a", "gone", {"a": one}, margin) == "a"
