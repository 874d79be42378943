"""What an agent's program says beside tool results, in one turn of Messages: the workflow goes on, and who asked for
the tool reads it. Real adapters on a loopback provider. No Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from actors.config import FuguConfig
from orchestrator.workflow import Step, Workflow, render_workflow
from tests.loopback import Behaviour, LoopbackProvider, Recorded, ToolCall
from tests.serve.linked import serving

NAMES = ("a", "b", "c")
LOOK = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
PLAN = render_workflow(Workflow((Step("a", "look up the weather", ()), Step("b", "say it in verse", (0,)))), NAMES)
REMINDER = "<system-reminder>a.py was changed</system-reminder>"


def behaves(request: Recorded) -> Behaviour:
    model, said = request.body["model"], request.raw.decode()
    if model == "c":
        return Behaviour(text=PLAN)
    if model == "a" and "calm" not in said:
        return Behaviour(text="", tool_calls=(ToolCall("c1", "look", "{}"),))
    return Behaviour(text="the sea is calm" if model == "a" else "a verse")


class Talk:
    def __init__(self, http: httpx.AsyncClient, provider: LoopbackProvider) -> None:
        self.http, self.provider = http, provider
        self.turns: list[dict[str, Any]] = [{"role": "user", "content": "the weather in verse, please"}]

    async def ask(self) -> Any:
        body = {"model": "fugu-ultra", "max_tokens": 99, "tools": [LOOK], "messages": self.turns}
        answer = await self.http.post("/v1/messages", json=body, headers={"x-fugu-trace": "1"})
        return answer.json()

    async def call(self) -> str:
        content = (await self.ask())["content"]
        self.turns.append({"role": "assistant", "content": content})
        return str(next(block["id"] for block in content if block["type"] == "tool_use"))

    def asked(self) -> list[str]:
        return [request.body["model"] for request in self.provider.requests]


@pytest.fixture
async def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Talk]:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))
    with LoopbackProvider() as provider:
        provider.chooses = behaves
        known = {"provider": "openai", "base_url": provider.url_for("openai")}
        workers = [{"name": name, "model": name, **known} for name in NAMES]
        config = FuguConfig.model_validate({"workers": workers, "conductor": {"worker": "c"}})
        async with serving(tmp_path, config) as served, served.client() as http:
            yield Talk(http, provider)


def result(id: str, *texts: str) -> dict[str, Any]:
    blocks = [{"type": "tool_result", "tool_use_id": id, "content": "calm"}]
    return {"role": "user", "content": [*blocks, *({"type": "text", "text": text} for text in texts)]}


async def test_the_step_that_asked_goes_on_and_reads_it(talk: Talk) -> None:
    talk.turns.append(result(await talk.call(), REMINDER))
    answer = await talk.ask()
    assert talk.asked() == ["c", "a", "a", "b"], "nothing is planned anew"
    assert answer["fugu"]["rounds"][0]["resumed"]
    *_, tool, note = talk.provider.requests[2].body["messages"]
    assert (tool["role"], note) == ("tool", {"role": "user", "content": REMINDER})
    assert REMINDER.encode() not in orjson.dumps(talk.provider.requests[3].body), "it is the asking step's"


@pytest.mark.parametrize(
    "said", [(REMINDER, "[Request interrupted by user for tool use]", "tell a joke"), ()], ids=["interrupted", "apart"]
)
async def test_a_user_who_begins_anew_is_planned_for(talk: Talk, said: tuple[str, ...]) -> None:
    talk.turns.append(result(await talk.call(), *said))
    if not said:
        talk.turns.append({"role": "user", "content": "tell a joke"})
    await talk.ask()
    assert talk.asked()[2] == "c"


async def test_where_the_workflow_is_gone_it_is_planned_anew(talk: Talk) -> None:
    """The way out that the error names: clients put the user's next words beside the results."""
    id = await talk.call()
    talk.turns[-1]["content"][-1]["id"] = gone = id.replace(id.split("_")[1], "a" * 16)
    talk.turns.append(result(gone))
    assert (await talk.ask())["error"]["code"] == "workflow_not_found"
    talk.turns[-1] = result(gone, "go on")
    assert (await talk.ask())["type"] == "message"
    assert talk.asked()[2] == "c"
