"""What is kept between requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from serve import store as stores
from serve.store import Database, Kept, SqliteStore, file_system


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "kept.sqlite"


async def test_values_are_found_after_a_restart_by_their_owner_only(path: Path) -> None:
    await SqliteStore(path).put([Kept("response", "1", b"one"), Kept("item", "1", b"two")], "me", seconds=60)
    store = SqliteStore(path)
    assert await store.get("response", "1", "me") == b"one"
    assert await store.get("item", "1", "me") == b"two"
    assert await store.get("response", "1", "you") is None
    assert not await store.delete("response", "1", "you")
    assert await store.delete("response", "1", "me")
    assert await store.get("response", "1", "me") is None


async def test_a_value_is_replaced_by_its_owner_only(path: Path) -> None:
    store = SqliteStore(path)
    for owner, value in (("me", b"old"), ("you", b"stolen"), ("me", b"new")):
        await store.put([Kept("response", "1", value)], owner, seconds=60)
    assert await store.get("response", "1", "me") == b"new"
    assert await store.get("response", "1", "you") is None


async def test_values_expire(path: Path) -> None:
    clock = Clock()
    store = SqliteStore(path, clock=clock)
    await store.put([Kept("response", "1", b"x")], "", seconds=10)
    clock.now += 9.9
    assert await store.get("response", "1", "") == b"x"
    clock.now += 0.2
    assert await store.get("response", "1", "") is None
    await SqliteStore(path, clock=clock).put([Kept("response", "2", b"y")], "", seconds=10)
    rows = Database(path, "").run_here(lambda connection: connection.execute("SELECT id FROM kept").fetchall())
    assert rows == [("2",)], "what has expired is gone from the disk, too"


async def test_several_gateways_write_at_once(path: Path) -> None:
    stores = [SqliteStore(path) for _ in range(4)]
    await asyncio.gather(
        *(
            store.put([Kept("response", f"{number}-{at}", b"x")], "", seconds=60)
            for number, store in enumerate(stores)
            for at in range(25)
        )
    )
    found = await asyncio.gather(*(stores[0].get("response", f"{n}-{at}", "") for n in range(4) for at in range(25)))
    assert found == [b"x"] * 100


async def test_a_failed_action_leaves_nothing(path: Path) -> None:
    database = Database(path, "CREATE TABLE IF NOT EXISTS t (n INTEGER)")

    def half(connection: object) -> None:
        connection.execute("INSERT INTO t VALUES (1)")  # type: ignore[attr-defined]
        raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        await database.run(half)
    assert await database.run(lambda connection: connection.execute("SELECT count(*) FROM t").fetchone()[0]) == 0


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    rows = ["/dev/sda / ext4 rw 0 0", "fs.example:/ /mnt/fugu nfs4 rw,hard 0 0", "tmpfs /mnt/fugu/a\\040b tmpfs rw 0 0"]
    mounts.write_text("\n".join(rows) + "\n")
    assert file_system(Path("/mnt/fugu/state/keys.sqlite"), mounts) == "nfs4"
    assert file_system(Path("/mnt/fugu/a b/keys.sqlite"), mounts) == "tmpfs"
    assert file_system(Path("/mnt/fugu-other/keys.sqlite"), mounts) == "ext4"
    assert file_system(Path("/x"), tmp_path / "none") == ""


def test_without_a_shared_log_on_storage_that_machines_share(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two connections, as two machines' gateways have: the second was opened while the first goes on writing."""
    monkeypatch.setattr(stores, "NETWORKED", {file_system(path)})
    schema = "CREATE TABLE IF NOT EXISTS counted (n INTEGER)"
    both = Database(path, schema), Database(path, schema)
    for number in range(20):
        both[number % 2].run_here(
            lambda connection, n=number: connection.execute("INSERT INTO counted VALUES (?)", (n,))
        )
    for each in both:
        assert each.run_here(lambda c: c.execute("SELECT count(*) FROM counted").fetchone()) == (20,)
        assert each.run_here(lambda c: c.execute("PRAGMA journal_mode").fetchone()) == ("delete",)
    assert not path.with_name(f"{path.name}-wal").exists()
