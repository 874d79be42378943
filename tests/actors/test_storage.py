"""Checkpoints that lie elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from actors.errors import ConfigError
from actors.storage import local_copy


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
