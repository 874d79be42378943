"""A small coding task for agents: a repository with a fault, the tools to mend it, and a worker who knows how."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from actors.messages import ToolCall
from tests.loopback import Behaviour

FAULTY = "def add(a, b):\n    return a - b\n"
MENDED = "def add(a, b):\n    return a + b\n"
CHECK = "from add import add\nassert add(2, 3) == 5, add(2, 3)\nprint('the test passed')\n"
QUESTION = "The test in check.py fails. Mend add.py and run the test again."
ANSWER = "Mended: add.py subtracted where it should add; the test passes now."

TOOLS: dict[str, dict[str, Any]] = {
    "read_file": {"path": {"type": "string"}},
    "write_file": {"path": {"type": "string"}, "text": {"type": "string"}},
    "run_test": {},
}
DESCRIPTIONS = {
    "read_file": "The text of a file of the repository.",
    "write_file": "Replace a file of the repository.",
    "run_test": "Run check.py; what it printed.",
}


def schema(tool: str) -> dict[str, Any]:
    return {"type": "object", "properties": TOOLS[tool], "required": list(TOOLS[tool]), "additionalProperties": False}


def make_repository(folder: Path) -> Path:
    (folder / "add.py").write_text(FAULTY)
    (folder / "check.py").write_text(CHECK)
    return folder


def is_mended(folder: Path) -> bool:
    return "the test passed" in run_test(folder)


def script() -> list[Behaviour]:
    """What the worker does, call by call: two files at once, the edit, the test, the answer."""
    read = tuple(
        ToolCall(f"call_read{at}", "read_file", json.dumps({"path": name}))
        for at, name in enumerate(("add.py", "check.py"))
    )
    write = ToolCall("call_write", "write_file", json.dumps({"path": "add.py", "text": MENDED}))
    return [
        Behaviour(text="I look at both files.", reasoning="Something is wrong in there.", tool_calls=read),
        Behaviour(text="", tool_calls=(write,)),
        Behaviour(text="Now the test.", tool_calls=(ToolCall("call_run", "run_test", "{}"),)),
        Behaviour(text=ANSWER),
    ]


def use_tool(folder: Path, name: str, arguments: dict[str, Any]) -> str:
    """Do what an agent's client does with a call."""
    if name == "read_file":
        return (folder / arguments["path"]).read_text()
    if name == "write_file":
        (folder / arguments["path"]).write_text(arguments["text"])
        return "written"
    assert name == "run_test", name
    return run_test(folder)


def run_test(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "check.py"], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr
