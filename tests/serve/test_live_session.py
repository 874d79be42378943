"""`fugu-trinity` of the running server: the router's decisions, real calls, OpenAI's own client."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

import fugu
from actors.messages import Message
from orchestrator import roles
from orchestrator.router import Router
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.conftest import KEY, WORKERS
from tests.serve.running import RunningServer, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

# Does for every role: an answer with an idea, advice, and a verdict.
SAID = "REVISE <idea>carry</idea> <suggestion>split</suggestion><next>worker</next>"


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "fugu-trinity", "messages": [{"role": "user", "content": text}], **fields}


def post(server: RunningServer, json: Any, timeout: float = 30) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(trust_env=False, timeout=timeout) as http:
        return http.post(f"{server.url}/v1/chat/completions", headers=headers, json=json)


@pytest.fixture(scope="session")
def router(with_haproxy: RunningServer) -> Router:
    folder = Path(with_haproxy.folder)
    return Router.load(folder / "backbone", folder / "head.safetensors", WORKERS, max_tokens=256, device="cpu")


def test_every_turn_is_the_heads(with_haproxy: RunningServer, provider: LoopbackProvider, router: Router) -> None:
    provider.default = Behaviour(text=SAID)
    decided = set()
    for text in ("hello", "zebra crossing", "17 + 25", "why?", "prove it"):
        provider.clear()
        answer = post(with_haproxy, body(text, fugu={"trace": True, "seed": 5, "choose": "sample"}))
        assert answer.status_code == 200
        trace = answer.json()["fugu"]
        assert len(trace["turns"]) == 5, "nobody accepts"
        assert [request.body["model"] for request in provider.requests] == [turn["worker"] for turn in trace["turns"]]
        # The same session by hand: transcripts, decisions, roles.
        thoughts: list[str] = []
        answered = suggested = False
        for number, turn in enumerate(trace["turns"]):
            transcript = roles.transcript((Message("user", text),), thoughts)
            seed = random.Random(f"5/{number}").getrandbits(62) if number else 5
            (decision,) = router.decide([transcript], [None], [seed], "sample")
            role = "worker" if suggested else decision.role
            if not answered and (role == "verifier" or number == 4):
                role = "worker"
            decided.add(decision.role)
            assert (turn["worker"], turn["role"], turn["overridden"]) == (decision.worker, role, suggested)
            assert turn["probabilities"] == pytest.approx(decision.probabilities, abs=1e-4)
            suggested = role == "thinker"
            if role == "worker":
                answered = True
                thoughts.append("carry")
        assert answer.json()["choices"][0]["message"]["content"].startswith("REVISE\n\n<suggestion>")
        usage = answer.json()["usage"]
        assert usage["total_tokens"] == sum(turn["usage"]["total_tokens"] for turn in trace["turns"])
    assert len(decided) > 1, "a head that always takes one role shows little"


def test_openais_client_reads_a_session(with_haproxy: RunningServer, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="ACCEPT, it is 42")
    with openai.OpenAI(base_url=f"{with_haproxy.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        assert {model.id for model in client.models.list()} == {"fugu", "fugu-trinity", "fugu-ultra"}
        stream = client.chat.completions.create(
            model="fugu-trinity",
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"fugu": {"show_turns": True, "seed": 3, "choose": "sample"}},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    thinking = [getattr(chunk.choices[0].delta, "reasoning_content", None) for chunk in chunks if chunk.choices]
    assert text == "ACCEPT, it is 42"
    assert len([said for said in thinking if said]) == len(provider.requests) >= 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens > 0


def test_keep_alives_come_and_a_client_that_leaves_ends_the_call(
    with_haproxy: RunningServer, provider: LoopbackProvider
) -> None:
    provider.default = Behaviour(text="late", delay=30)
    headers = {"authorization": f"Bearer {KEY}"}
    with (
        httpx.Client(trust_env=False, timeout=30) as http,
        http.stream(
            "POST",
            f"{with_haproxy.url}/v1/chat/completions",
            headers=headers,
            json=body("hello", stream=True),
        ) as response,
    ):
        assert next(response.iter_text()).startswith(": keep-alive")
        wait_until(lambda: provider.in_flight == 1)
        left = time.monotonic()
    wait_until(lambda: provider.disconnects, timeout=5)
    assert provider.disconnects[0].time - left < 1.5
    time.sleep(0.3)
    assert len(provider.requests) == 1, "a session that ended asks nobody else"


def test_ask_lists_the_turns(with_haproxy: RunningServer, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="ACCEPT, it is 42")
    command = ["ask", "hello", "--model", "fugu-trinity", "--trace", "--url", with_haproxy.url]
    result = CliRunner().invoke(fugu.app, command, env={"FUGU_API_KEY": KEY})
    assert result.exit_code == 0, result.output
    assert result.output.startswith("ACCEPT, it is 42")
    assert [line.split()[:2] for line in result.output.splitlines() if line.startswith("turn ")] == [
        ["turn", f"{number}:"] for number in range(1, len(provider.requests) + 1)
    ]


def test_without_roles_it_is_not_there(without_haproxy: RunningServer) -> None:
    answer = post(without_haproxy, body("hello"))
    assert answer.status_code == 404
    assert "nothing is trained yet" in answer.json()["error"]["message"]
