"""Codex, Claude Code and OpenCode, as their makers ship them, mend a repository through the running server.

`make test-clients` installs them with npm into `build/clients`; `FUGU_CLIENTS` names another folder with
`node_modules` in it. Where one is missing its test is skipped and says so. What each said to the server when it was
last recorded (with `FUGU_RECORD=1`) lies in `recorded/` and is said again in every run: same requests in order, same
events, same end.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors.messages import ToolCall
from orchestrator.workflow import Step, Workflow, render_workflow
from tests.clients import coding
from tests.clients.server import KEY, WORKERS, ClientServer
from tests.clients.tape import load, replay, save
from tests.loopback import Behaviour, LoopbackProvider, Recorded

pytestmark = pytest.mark.timeout(240)

REPOSITORY = Path(__file__).resolve().parents[2]
CLIENTS = Path(os.environ.get("FUGU_CLIENTS", REPOSITORY / "build" / "clients")) / "node_modules" / ".bin"
RECORDED = Path(__file__).resolve().parent / "recorded"
SECONDS = 180.0


@dataclass(frozen=True)
class Agent:
    """`prepare` writes its settings and gives command and environment: (server address, model, home, repository)."""

    program: str
    prepare: Callable[[str, str, Path, Path], tuple[list[str], dict[str, str]]]
    calls: Callable[[Path], list[tuple[ToolCall, ...]]]


def codex(url: str, model: str, home: Path, repository: Path) -> tuple[list[str], dict[str, str]]:
    settings = home / ".codex"
    settings.mkdir()
    (settings / "config.toml").write_text(
        f'model = "{model}"\n'
        'model_provider = "fugu"\n'
        'web_search = "disabled"\n'
        "[model_providers.fugu]\n"
        'name = "fugu"\n'
        f'base_url = "{url}/v1"\n'
        'env_key = "FUGU_API_KEY"\n'
        'wire_api = "responses"\n'
        "stream_idle_timeout_ms = 7200000\n"
    )
    options = ["--json", "--dangerously-bypass-approvals-and-sandbox"]
    return ["codex", "exec", *options, coding.QUESTION], {"FUGU_API_KEY": KEY}


def codex_calls(repository: Path) -> list[tuple[ToolCall, ...]]:
    def run(id: str, command: str) -> ToolCall:
        return ToolCall(id, "exec_command", json.dumps({"cmd": command}))

    return [
        (run("call_read0", "cat add.py"), run("call_read1", "cat check.py")),
        (run("call_write", f"cat > add.py <<'EOF'\n{coding.MENDED}EOF"),),
        (run("call_run", "python3 check.py"),),
    ]


def claude(url: str, model: str, home: Path, repository: Path) -> tuple[list[str], dict[str, str]]:
    environment = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": KEY,
        "ANTHROPIC_MODEL": model,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    options = ["--output-format", "json", "--allowedTools", "Read,Edit,Bash"]
    return ["claude", "-p", coding.QUESTION, *options], environment


def claude_calls(repository: Path) -> list[tuple[ToolCall, ...]]:
    def read(id: str, name: str) -> ToolCall:
        return ToolCall(id, "Read", json.dumps({"file_path": str(repository / name)}))

    edit = {"file_path": str(repository / "add.py"), "old_string": "a - b", "new_string": "a + b"}
    return [
        (read("call_read0", "add.py"), read("call_read1", "check.py")),
        (ToolCall("call_write", "Edit", json.dumps(edit)),),
        (ToolCall("call_run", "Bash", json.dumps({"command": "python3 check.py", "description": "Run it"})),),
    ]


def opencode(url: str, model: str, home: Path, repository: Path) -> tuple[list[str], dict[str, str]]:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "fugu",
        "options": {"baseURL": f"{url}/v1", "apiKey": "{env:FUGU_API_KEY}"},
        "models": {model: {"name": model}},
    }
    settings = {"provider": {"fugu": provider}, "model": f"fugu/{model}", "small_model": f"fugu/{model}"}
    (repository / "opencode.json").write_text(json.dumps(settings))
    return ["opencode", "run", coding.QUESTION], {"FUGU_API_KEY": KEY}


def opencode_calls(repository: Path) -> list[tuple[ToolCall, ...]]:
    def read(id: str, name: str) -> ToolCall:
        return ToolCall(id, "read", json.dumps({"filePath": str(repository / name)}))

    edit = {"filePath": str(repository / "add.py"), "oldString": "a - b", "newString": "a + b"}
    return [
        (read("call_read0", "add.py"), read("call_read1", "check.py")),
        (ToolCall("call_write", "edit", json.dumps(edit)),),
        (ToolCall("call_run", "bash", json.dumps({"command": "python3 check.py", "description": "Run it"})),),
    ]


AGENTS = {
    "codex": Agent("codex", codex, codex_calls),
    "claude-code": Agent("claude", claude, claude_calls),
    "opencode": Agent("opencode", opencode, opencode_calls),
}


PLAN = render_workflow(Workflow((Step("chatty", "mend the file"), Step("claudine", "tell of it", (0,)))), WORKERS)


def results_in(request: Recorded) -> int:
    return sum(message["role"] == "tool" for message in request.body["messages"])


def playing(calls: list[tuple[ToolCall, ...]]) -> Callable[[Recorded], Behaviour]:
    """The script as a function of how far the conversation is: agents ask for other things beside, such as a title. As
    the conductor the worker plans that it mends the file itself, and that the other one tells of it."""
    steps = {0: 0, len(calls[0]): 1, len(calls[0]) + 1: 2}

    def choose(request: Recorded) -> Behaviour:
        if request.dialect == "anthropic":
            return Behaviour(text=coding.ANSWER)
        if "<question>" in json.dumps(request.body["messages"][-1]):
            return Behaviour(text=PLAN)
        if not request.body.get("tools"):
            return Behaviour(text="Mending add.py")
        step = steps.get(results_in(request))
        return Behaviour(text=coding.ANSWER) if step is None else Behaviour(text="", tool_calls=calls[step])

    return choose


@pytest.mark.parametrize("model", ["fugu", "fugu-ultra"])
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_mends_a_repository(
    server: ClientServer, provider: LoopbackProvider, repository: Path, tmp_path_factory: Any, name: str, model: str
) -> None:
    agent = AGENTS[name]
    if not (CLIENTS / agent.program).exists():
        pytest.skip(f"{name} is not installed (`make test-clients` does it): only its recorded conversation is tried")
    server.tape.exchanges.clear()
    provider.chooses = playing(agent.calls(repository))
    home = tmp_path_factory.mktemp("home")
    subprocess.run(["git", "init", "-q"], cwd=repository, check=True)
    command, environment = agent.prepare(server.url, model, home, repository)
    done = subprocess.run(
        [str(CLIENTS / command[0]), *command[1:]],
        cwd=repository,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert coding.ANSWER in done.stdout
    assert coding.is_mended(repository)
    check_turns(provider, model)
    if os.environ.get("FUGU_RECORD"):
        places = {str(repository): "repository", str(home): "home", server.url: "url", KEY: "key"}
        places |= {str(CLIENTS.parents[1]): "clients", socket.gethostname(): "host"}
        kept = (coding.QUESTION, coding.ANSWER)
        save(RECORDED / f"{name}-{model}.json", list(server.tape.exchanges), places, kept)


@pytest.mark.parametrize("model", ["fugu", "fugu-ultra"])
@pytest.mark.parametrize("name", AGENTS)
def test_what_an_agent_said_once_is_answered_as_then(
    server: ClientServer, provider: LoopbackProvider, repository: Path, name: str, model: str
) -> None:
    provider.chooses = playing(AGENTS[name].calls(repository))
    places = {"repository": str(repository), "home": str(repository), "url": server.url, "key": KEY}
    entries = load(RECORDED / f"{name}-{model}.json", {**places, "clients": str(CLIENTS), "host": "localhost"})
    answers = replay(entries, server.url, KEY)
    for entry, (recorded, heard) in zip(entries, answers, strict=True):
        where = f"{entry['method']} {entry['path']}"
        assert heard.status == recorded["status"], where
        assert list(heard.kinds) == recorded["kinds"], where
        assert len(heard.calls) == len(recorded["calls"]), where
    assert any(coding.ANSWER in heard.text for _, heard in answers), "it ends with the answer"
    check_turns(provider, model)


def test_recordings_are_nobodys() -> None:
    for path in RECORDED.iterdir():
        text = path.read_text()
        assert KEY not in text, path
        assert not re.search(r"/(home|root|tmp|work|Users)/", text), path
        assert len(text) < 100_000, path


def check_turns(provider: LoopbackProvider, model: str) -> None:
    """What the worker that mends was asked: three turns with tools, its own calls in them, then the answer."""
    turns = [each for each in provider.requests if each.body.get("tools") and each.dialect == "openai"]
    assert [results_in(request) for request in turns] == [0, 2, 3, 4], "three turns with tools, then the answer"
    last = json.dumps(turns[-1].body)
    for id in ("call_read0", "call_read1", "call_write", "call_run") if model == "fugu" else ():
        assert f'"{id}"' in last, "the worker sees its calls as it made them"
    assert "the test passed" in last
