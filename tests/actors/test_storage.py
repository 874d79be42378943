"""Checkpoints that lie elsewhere."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest

from actors import storage
from actors.errors import ConfigError
from actors.storage import local_copy, local_folder, written


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_CACHE", str(tmp_path / "cache"))


def test_a_path_is_itself(tmp_path: Path) -> None:
    assert local_copy("a/b.safetensors") == Path("a/b.safetensors")
    assert local_copy("a/b.safetensors", tmp_path) == tmp_path / "a" / "b.safetensors"
    assert local_copy(str(tmp_path / "x"), Path("/elsewhere")) == tmp_path / "x"


def test_an_address_is_copied_once_and_again_when_it_changes(tmp_path: Path) -> None:
    there = tmp_path / "head.safetensors"
    there.write_bytes(b"one")
    first = local_copy(f"file://{there}")
    assert (first.read_bytes(), first.suffix) == (b"one", ".safetensors")
    assert first != there
    assert local_copy(f"file://{there}") == first
    there.write_bytes(b"another")
    second = local_copy(f"file://{there}")
    assert (second.read_bytes(), first.read_bytes()) == (b"another", b"one")
    assert sorted(path.name for path in first.parent.iterdir()) == sorted([first.name, second.name])


@pytest.mark.parametrize("address", ["file:///none/at/all.safetensors", "nothing://bucket/x"])
def test_what_is_not_there(address: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(address)):
        local_copy(address)


def test_a_folder_is_copied_with_the_files_that_are_asked_for(tmp_path: Path) -> None:
    there = tmp_path / "outcomes"
    there.mkdir()
    (there / "a").write_text("one")
    (there / "b").write_text("two")
    assert local_folder(str(there), ("a", "b")) == there
    first = local_folder(f"file://{there}", ("a", "b"))
    assert {path.name: path.read_text() for path in first.iterdir()} == {"a": "one", "b": "two"}
    (there / "b").write_text("other")
    second = local_folder(f"file://{there}/", ("a", "b"))
    assert second != first
    assert ((second / "b").read_text(), (first / "b").read_text()) == ("other", "two")
    with pytest.raises(ConfigError, match="there is no file"):
        local_folder(f"file://{there}", ("a", "c"))


def test_a_file_is_sent_when_it_is_whole(tmp_path: Path) -> None:
    with written(str(tmp_path / "x")) as here:
        assert here == tmp_path / "x"
    address = f"file://{tmp_path}/new/folder/head.safetensors"
    with contextlib.suppress(RuntimeError), written(address) as here:
        here.write_text("half")
        raise RuntimeError
    there = tmp_path / "new" / "folder" / "head.safetensors"
    assert not there.exists()
    with written(address) as again:
        # Where a run that is resumed finds what it kept beside it.
        assert again == here
        again.write_text("whole")
    assert there.read_text() == "whole"


def test_a_file_that_is_replaced_is_whole_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "head.safetensors"
    there.write_text("before")

    def dies(source: object, target: Any) -> None:
        target.write(b"ha")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.shutil, "copyfileobj", dies)
    with pytest.raises(KeyboardInterrupt), written(f"file://{there}") as here:
        here.write_text("after")
    assert there.read_text() == "before"


def test_where_nothing_can_be_written_is_found_out_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    address = f"file://{tmp_path}/file/head.safetensors"
    with pytest.raises(ConfigError, match=re.escape(f"cannot write to {address}")), written(address):
        pytest.fail("the work has begun")
