"""Whether a node's Ray may go on (serve/node.py). That a head's restart leaves it: tests.cluster.head_restart."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from serve import node

START = ["start", "--address=10.0.0.2:6379"]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout, an environment and a file of secrets."""
    folder = tmp_path / "code"
    for name in node.FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "a.py").write_text(f"# {name}")
    (folder / "fugu.py").write_text("# fugu")
    (folder / "cluster" / "node.sh").write_text("# node")
    (folder / "serve" / "notes.md").write_text("notes")
    (tmp_path / "env").write_text("KEY=one\n")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".fugu").write_text("1 2")
    monkeypatch.setenv("FUGU_ENV", str(tmp_path / "env"))
    monkeypatch.setenv("FUGU_VENV", str(tmp_path / "venv"))
    return folder


@pytest.mark.parametrize(
    "changed",
    ["code/fugu.py", "code/actors/a.py", "code/training/new.py", "code/cluster/node.sh", "env", "venv/.fugu"],
)
def test_what_a_ray_was_started_with(tmp_path: Path, code: Path, changed: str) -> None:
    before = node.fingerprint(START, code)
    assert node.fingerprint(START, code) == before
    (code / "serve" / "notes.md").write_text("other notes")
    assert node.fingerprint(START, code) == before, "no program reads it"
    (tmp_path / changed).write_text("something else")
    assert node.fingerprint(START, code) != before


def test_arguments_count(code: Path) -> None:
    assert node.fingerprint(START, code) != node.fingerprint([*START, "--num-cpus=2"], code)


def test_the_heads_address() -> None:
    assert node.head_address(START) == "10.0.0.2:6379"
    assert node.head_address(["start", "--head", "--port=6379"]) == "127.0.0.1:6379"


def test_a_note_is_for_this_user_alone(tmp_path: Path, code: Path) -> None:
    stamp = tmp_path / "home" / "started"
    node.note(START, stamp)
    assert stat.S_IMODE(stamp.stat().st_mode) == 0o600
    assert "one" not in stamp.read_text()


def test_nothing_was_started(tmp_path: Path, code: Path) -> None:
    assert not node.unchanged(START, tmp_path / "none")


@pytest.mark.ray
def test_this_ray_goes_on_unless_something_changed(ray_session: None, tmp_path: Path, code: Path) -> None:
    import ray

    gcs = ray.get_runtime_context().gcs_address
    mine = ray.get_runtime_context().get_node_id()
    assert mine in node.raylet_nodes()
    assert mine in node.known_nodes(gcs)
    start = ["start", f"--address={gcs}"]
    stamp = tmp_path / "started"
    node.note(start, stamp)
    # Other programs' Rays, which this head does not know, can run on a developer's machine.
    alone = node.raylet_nodes() <= node.known_nodes(gcs)
    assert node.unchanged(start, stamp) == alone
    (tmp_path / "env").write_text("KEY=another\n")
    assert not node.unchanged(start, stamp)


@pytest.mark.ray
def test_a_head_without_its_autoscaler_is_started_anew(ray_session: None, tmp_path: Path, code: Path) -> None:
    """The test session's Ray has no dashboard and no monitor."""
    stamp = tmp_path / "started"
    start = ["start", "--head"]
    node.note(start, stamp)
    assert not node.unchanged(start, stamp)
