"""The Ray of this node: `python -m serve.node unchanged ARGUMENTS…` ends with 0 if the Ray that runs here was started
with these arguments, this code and these secrets, and its head knows it: then it may go on. `python -m serve.node note
ARGUMENTS…` writes down what one has been started with. cluster/node.sh asks and notes.

Ray's launcher starts a node's Ray anew whenever it has not heard of the node lately. To a head that has just come back
that is true of every node, and each of them would lose its replicas and actors. It also does so on every `ray up`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

CODE = Path(__file__).resolve().parents[1]
FOLDERS = ("actors", "orchestrator", "serve", "training", "cluster")
_HEAD_PORT = 6379
_ANSWER_SECONDS = 10.0
# Of a head, beside its raylet; the last is the autoscaler.
_OF_A_HEAD = ("gcs_server", "dashboard/dashboard.py", "/monitor.py")

logger = logging.getLogger(__name__)


def fingerprint(arguments: Sequence[str], code: Path = CODE) -> str:
    """Of what a Ray on this node is started with: `arguments`, the Python and shell files below `code`, the installed
    environment (`FUGU_VENV/.fugu`, written by node.sh) and the node's secrets (`FUGU_ENV`)."""
    venv = Path(os.environ.get("FUGU_VENV", Path.home() / "venv"))
    files = [code / "fugu.py", venv / ".fugu", Path(os.environ.get("FUGU_ENV", "/etc/fugu/env"))]
    for folder in FOLDERS:
        files += sorted(path for path in (code / folder).rglob("*") if path.suffix in (".py", ".sh"))
    told = hashlib.sha256(repr(list(arguments)).encode())
    for path in files:
        content = path.read_bytes() if path.is_file() else b""
        told.update(f"\0{path.name}\0{len(content)}\0".encode())
        told.update(content)
    return told.hexdigest()


def unchanged(arguments: Sequence[str], stamp: Path) -> bool:
    """Whether the Ray that runs here, if one does, is what `ray ARGUMENTS…` would start now."""
    if not stamp.is_file() or stamp.read_text() != fingerprint(arguments):
        return False
    running = [" ".join(command) for command in _commands()]
    if "--head" in arguments and not all(any(part in command for command in running) for part in _OF_A_HEAD):
        return False
    mine = raylet_nodes()
    return bool(mine) and mine <= known_nodes(head_address(arguments))


def note(arguments: Sequence[str], stamp: Path) -> None:
    """What was started, for `unchanged`. Only this user can read it: it is a digest of secrets, too."""
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    handle = os.open(stamp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(fingerprint(arguments))


def head_address(arguments: Sequence[str]) -> str:
    """Where `ray start` with these finds the head: its own machine's, where it is one."""
    given = [word.partition("=")[2] for word in arguments if word.startswith("--address=")]
    return given[0] if given else f"127.0.0.1:{_HEAD_PORT}"


def raylet_nodes() -> set[str]:
    """The ids of the nodes whose raylets run on this machine."""
    found = set()
    for command in _commands():
        if command and Path(command[0]).name == "raylet":
            found |= {word.partition("=")[2] for word in command if word.startswith("--node_id=")}
    return found


def known_nodes(address: str) -> set[str]:
    """The ids of the nodes that the head at `address` counts as alive; none where it does not answer."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import gcs_pb2
    from ray.exceptions import RpcError

    alive = gcs_pb2.GcsNodeInfo.ALIVE  # type: ignore[attr-defined]
    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=_ANSWER_SECONDS)
    except RpcError as error:
        logger.warning("the head at %s does not answer: %s", address, error)
        return set()
    return {info.node_id.hex() for info in nodes.values() if info.state == alive}


def _commands() -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        try:
            found.append(process.cmdline())
        except psutil.Error:  # it has ended, or is none of ours
            continue
    return found


def main(action: str, arguments: Sequence[str], stamp: Path) -> int:
    if action == "note":
        note(arguments, stamp)
        return 0
    return 0 if unchanged(arguments, stamp) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:], Path.home() / ".fugu" / "started"))
