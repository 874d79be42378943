"""The lines of the README for each client: snippets are run as they stand, with the address of the server of the tests,
and settings are those that the agents are tried with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.clients.server import KEY, ClientServer
from tests.clients.test_agents import claude, codex, opencode
from tests.loopback import Behaviour, LoopbackProvider

REPOSITORY = Path(__file__).resolve().parents[2]
ADDRESS = "http://127.0.0.1:8000"
SAID = "Good morning from a worker."


def snippet(client: str, language: str) -> str:
    """The block of this language in the section of this client."""
    readme = (REPOSITORY / "README.md").read_text()
    [section] = re.findall(rf"^### {re.escape(client)}.*?\n(.*?)(?=^##)", readme, re.MULTILINE | re.DOTALL)
    [block] = re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(block)


def run(command: list[str], server: ClientServer) -> str:
    environment = {"PATH": os.environ["PATH"], "FUGU_API_KEY": KEY, "NO_PROXY": "*"}
    text = command[-1].replace(ADDRESS, server.url)
    done = subprocess.run(
        [*command[:-1], text], env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("client", "times"), [("OpenAI's Python SDK", 2), ("Anthropic's Python SDK", 1)])
def test_the_lines_for_an_sdk(server: ClientServer, provider: LoopbackProvider, client: str, times: int) -> None:
    provider.default = Behaviour(text=SAID)
    assert run([sys.executable, "-c", snippet(client, "python")], server).count(SAID) == times
    assert len(provider.requests) == times


def test_the_lines_for_curl(server: ClientServer, provider: LoopbackProvider) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    provider.default = Behaviour(text=SAID)
    output = run(["sh", "-ec", snippet("curl", "sh")], server)
    assert len(provider.requests) == 3
    assert output.count("event: response.completed") == 1
    assert '"object":"chat.completion"' in output
    assert '"type":"message"' in output


@pytest.mark.parametrize("model", ["fugu", "fugu-ultra"])
def test_the_settings_of_codex(tmp_path: Path, model: str) -> None:
    _, environment = codex(ADDRESS, model, tmp_path, tmp_path)
    told = snippet("Codex", "toml").replace('model = "fugu"', f'model = "{model}"')
    tried = (tmp_path / ".codex" / "config.toml").read_text()
    assert tomllib.loads(told) == tomllib.loads(tried)
    assert tomllib.loads(told)["model_providers"]["fugu"]["env_key"] in environment


def test_the_settings_of_claude_code(tmp_path: Path) -> None:
    _, environment = claude(ADDRESS, "fugu", tmp_path, tmp_path)
    *exports, last = snippet("Claude Code", "sh").splitlines()
    told = dict(line.removeprefix("export ").split("=", 1) for line in exports)
    assert {name: value.replace("$FUGU_API_KEY", KEY) for name, value in told.items()} == environment
    assert last == "claude"


def test_the_settings_of_opencode(tmp_path: Path) -> None:
    _, environment = opencode(ADDRESS, "fugu", tmp_path, tmp_path)
    told: dict[str, Any] = json.loads(snippet("OpenCode", "json"))
    assert told == json.loads((tmp_path / "opencode.json").read_text())
    assert environment == {"FUGU_API_KEY": KEY}


def test_every_client_has_its_lines_and_its_version() -> None:
    readme, makefile = (REPOSITORY / "README.md").read_text(), (REPOSITORY / "Makefile").read_text()
    for name, package in (("Codex", "codex"), ("Claude Code", "claude-code"), ("OpenCode", "opencode-ai")):
        [version] = re.findall(rf"{package}@([0-9.]+)", makefile)
        assert f"### {name} ({version})" in readme
    for package in ("openai", "anthropic"):
        major, minor, *_ = pins()[package].split(".")
        assert f"({package} {major}.{minor})" in readme


def pins() -> dict[str, str]:
    """Versions of `constraints.txt`, by normal name (PEP 503)."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if "==" in line)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_that_make_setup_installs_is_pinned() -> None:
    """What is not pinned is another version next week."""
    wanted = {("fugu-ray", "test"), ("fugu-ray", "train"), ("fugu-ray", "")}
    seen: set[tuple[str, str]] = set()
    while wanted:
        name, extra = wanted.pop()
        seen.add((name, extra))
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                wanted |= {(normal(needed.name), each) for each in ("", *needed.extras)} - seen
    assert {name for name, _ in seen} - {"fugu-ray"} <= set(pins())
