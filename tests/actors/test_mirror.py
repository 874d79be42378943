"""Folders of runs that are kept where other machines find them."""

from __future__ import annotations

import re
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from actors import mirror
from actors.errors import ConfigError
from actors.mirror import kept_at


@pytest.fixture(autouse=True)
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    on(monkeypatch, tmp_path / "one")
    return monkeypatch


def on(monkeypatch: pytest.MonkeyPatch, machine: Path) -> None:
    monkeypatch.setenv("FUGU_CACHE", str(machine))


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def until(there: Path, content: str) -> None:
    deadline = time.monotonic() + 10
    while not there.exists() or there.read_text() != content:
        assert time.monotonic() < deadline, f"{there} was not sent"
        time.sleep(0.02)


def test_a_path_is_itself(tmp_path: Path) -> None:
    with kept_at(str(tmp_path / "x"), tmp_path / "y") as here:
        assert here == tmp_path / "x"
    assert not list(tmp_path.iterdir())


def test_another_machine_goes_on(tmp_path: Path, machines: pytest.MonkeyPatch) -> None:
    there = tmp_path / "bucket" / "run"
    with kept_at(f"file://{there}/") as here:
        (here / "state").write_text("1")
        (here / "deep").mkdir()
        (here / "deep" / "curve").write_text("a")
        (here / ".state.1234").write_text("half")
    assert tree(there) == {"state": "1", "deep/curve": "a"}
    on(machines, tmp_path / "two")
    with kept_at(f"file://{there}") as other:
        assert other != here
        assert tree(other) == tree(there)
        (other / "state").write_text("20")
        (other / "deep" / "curve").unlink()
    assert tree(there) == {"state": "20"}
    # Where it began, what the other one did counts.
    on(machines, tmp_path / "one")
    with kept_at(f"file://{there}") as again:
        assert again == here
        assert (again / "state").read_text() == "20"


def test_what_was_not_sent_any_more_is_not_lost_on_its_machine(tmp_path: Path) -> None:
    there = tmp_path / "bucket" / "run"
    with kept_at(f"file://{there}") as here:
        (here / "state").write_text("1")
    # As after a kill: it went on, and nothing of that was sent.
    (here / "state").write_text("200")
    with kept_at(f"file://{there}"):
        assert (here / "state").read_text() == "200"
    assert tree(there) == {"state": "200"}


def test_what_was_removed_there_is_gone_here_too(tmp_path: Path) -> None:
    there = tmp_path / "bucket" / "run"
    with kept_at(f"file://{there}") as here:
        (here / "state").write_text("1")
    (here / "unsent").write_text("2")
    shutil.rmtree(there)
    with kept_at(f"file://{there}"):
        assert tree(here) == {"unsent": "2"}, "a run begins anew"


def test_it_is_sent_while_the_run_goes_on_and_when_it_fails(tmp_path: Path, machines: pytest.MonkeyPatch) -> None:
    machines.setattr(mirror, "EVERY", 0.05)
    there = tmp_path / "bucket" / "run"

    def failing() -> None:
        with kept_at(f"file://{there}") as here:
            (here / "state").write_text("1")
            until(there / "state", "1")
            (here / "state").write_text("two")
            until(there / "state", "two")
            machines.setattr(mirror, "EVERY", 60.0)
            (here / "last").write_text("3")
            raise RuntimeError("the run failed")

    with pytest.raises(RuntimeError, match="the run failed"):
        failing()
    assert tree(there) == {"state": "two", "last": "3"}


def test_a_database_is_sent_as_between_two_transactions(tmp_path: Path, machines: pytest.MonkeyPatch) -> None:
    machines.setattr(mirror, "EVERY", 0.05)
    there = tmp_path / "bucket" / "run"

    def rows(path: Path) -> list[int]:
        with closing(sqlite3.connect(path)) as read:
            return [row for (row,) in read.execute("SELECT a FROM t ORDER BY a")]

    with kept_at(f"file://{there}") as here, closing(sqlite3.connect(here / "calls.sqlite")) as file:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("CREATE TABLE t (a INTEGER)")
        file.execute("INSERT INTO t VALUES (1)")
        file.commit()
        # It is in the log only: the database itself is a header yet.
        file.execute("INSERT INTO t VALUES (2)")
        deadline = time.monotonic() + 10
        while not (there / "calls.sqlite").exists() or not (there / "calls.sqlite").stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        machines.setattr(mirror, "EVERY", 60.0)
        time.sleep(0.3)
        assert rows(there / "calls.sqlite") == [1]
        file.commit()
    assert rows(there / "calls.sqlite") == [1, 2]
    assert sorted(path.name for path in there.iterdir()) == ["calls.sqlite"]
    # A log that a lost run left is not put on top of another machine's database.
    on(machines, tmp_path / "two")
    with kept_at(f"file://{there}") as other, closing(sqlite3.connect(other / "calls.sqlite")) as file:
        file.execute("INSERT INTO t VALUES (3)")
        file.commit()
    on(machines, tmp_path / "one")
    (here / "calls.sqlite-wal").write_bytes(b"what is left")
    with kept_at(f"file://{there}"):
        assert rows(here / "calls.sqlite") == [1, 2, 3]


def test_an_address_that_cannot_be_written_is_found_out_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    address = f"file://{tmp_path}/file/run"
    with pytest.raises(ConfigError, match=re.escape(address)), kept_at(address):
        pytest.fail("the run has begun")


def test_what_cannot_be_sent_at_the_end_is_kept_and_told(
    tmp_path: Path, machines: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machines.setattr(mirror, "EVERY", 0.05)
    there = tmp_path / "bucket" / "run"

    def run() -> None:
        with kept_at(f"file://{there}") as here:
            shutil.rmtree(there.parent)
            there.parent.write_text("no folder any more")
            (here / "state").write_text("1")
            deadline = time.monotonic() + 10
            while "trying again" not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    with pytest.raises(ConfigError, match=r"cannot write to .*; the files are in") as told:
        run()
    (folder,) = re.findall(r"the files are in (.*)$", told.value.message)
    assert (Path(folder) / "state").read_text() == "1"
