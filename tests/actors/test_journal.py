"""The journal keeps the windows across a kill, at any moment, and gives way when the disk does."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.config import Limits, WorkerSpec
from actors.journal import Journal, journal_path, replay
from actors.limiter import Limiter, Share
from tests.actors.test_limiter import SLACK, WINDOW, worst_window
from tests.actors.virtual import run_virtual

SPAN = WINDOW + SLACK


def open_limiter(path: Path, requests: int, tokens: int, *, full_if_missing: bool = False) -> tuple[Limiter, Journal]:
    """As the provider does it, in virtual time."""
    clock = asyncio.get_running_loop().time
    journal = Journal(path, span=SPAN, wall=clock)
    limiter = Limiter(Share(requests, tokens, 1000, 1000.0), clock=clock, window=WINDOW, slack=SLACK, log=journal)
    missing = not journal.exists
    past = journal.recover()
    if past is None or (missing and full_if_missing):
        limiter.assume_full()
    else:
        limiter.restore(past)
    journal.start(limiter.live)
    return limiter, journal


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plans=st.lists(st.tuples(st.floats(0, 40), st.integers(1, 40), st.sampled_from([0.0, 0.3, 4.0])), max_size=25),
    kills=st.lists(st.floats(0.1, 15), max_size=3),
    requests=st.integers(1, 5),
    tokens=st.integers(40, 90),
)
def test_killed_at_any_moment_the_windows_hold(
    tmp_path_factory: pytest.TempPathFactory,
    plans: list[tuple[float, int, float]],
    kills: list[float],
    requests: int,
    tokens: int,
) -> None:
    path = tmp_path_factory.mktemp("journal") / "0-of-1.log"

    async def main() -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        arrivals: list[tuple[float, int]] = []
        limiter, journal = open_limiter(path, requests, tokens)

        async def call(start: float, need: int, leaves: float) -> None:
            await asyncio.sleep(start)
            grant = await limiter.reserve(need)
            arrivals.append((loop.time(), need))
            await asyncio.sleep(leaves)
            grant.sent()
            await asyncio.sleep(1)
            grant.settle(need)

        waiting = [asyncio.create_task(call(*plan)) for plan in plans]
        for pause in kills:
            await asyncio.sleep(pause)
            now = loop.time() - begin
            for task in waiting:
                task.cancel()
            # What is cancelled after a kill never reports: only what is in the file is left of the process.
            journal.close()
            await asyncio.gather(*waiting, return_exceptions=True)
            limiter, journal = open_limiter(path, requests, tokens)
            waiting = [asyncio.create_task(call(s - now, n, leaves)) for s, n, leaves in plans if s >= now]
        await asyncio.gather(*waiting)
        journal.close()
        assert worst_window([(stamp, 1) for stamp, _ in arrivals]) <= requests
        assert worst_window(arrivals) <= tokens
        assert loop.time() - begin < 1200

    run_virtual(main)


def _use_up(path: Path, requests: int) -> None:
    """Runs in a process of its own, which is then killed."""

    async def main() -> None:
        journal = Journal(path, span=60.0)
        limiter = Limiter(Share(requests=requests), log=journal, window=59.0)
        journal.recover()
        journal.start(limiter.live)
        for _ in range(requests):
            grant = await limiter.reserve(7)
            grant.sent()
        os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())


def test_survives_kill_minus_nine_of_a_real_process(tmp_path: Path) -> None:
    path = tmp_path / "limits" / "0-of-1.log"
    process = multiprocessing.get_context("spawn").Process(target=_use_up, args=(path, 5))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    journal = Journal(path, span=60.0)
    past = journal.recover()
    journal.close()
    assert past is not None
    assert [(requests, tokens) for _, requests, tokens in past] == [(1, 7)] * 5
    assert all(0 <= age < 30 for age, _, _ in past)


def test_rotation_forgets_only_what_is_out_of_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.journal._ROTATE_BYTES", 256)
    path = tmp_path / "0-of-1.log"

    async def main() -> None:
        limiter, journal = open_limiter(path, 1000, 100_000)
        held = await limiter.reserve(11)  # in flight over several rotations
        sizes = []
        for _ in range(60):
            grant = await limiter.reserve(5)
            grant.sent()
            grant.settle(3)
            await asyncio.sleep(1)
            sizes.append(path.stat().st_size)
        assert max(sizes) < 2500  # 60 calls without rotation are 5760 bytes
        journal.close()
        again, journal = open_limiter(path, 1000, 100_000)
        assert (again.requests_used, again.tokens_used) == (11, 11 + 10 * 3)
        journal.close()
        held.refund()

    run_virtual(main)


def test_a_full_disk_warns_once_and_a_restart_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "0-of-1.log"

    async def main() -> None:
        limiter, journal = open_limiter(path, 4, 1000)
        (await limiter.reserve(1)).sent()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))  # as far as it goes: no space left
        try:
            for _ in range(2):
                grant = await limiter.reserve(1)
                grant.sent()
                grant.settle(1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not journal.working
        assert path.stat().st_size == 0
        restarted, second = open_limiter_after(journal)
        assert restarted.requests_used == 4
        second.close()

    def open_limiter_after(journal: Journal) -> tuple[Limiter, Journal]:
        journal.close()
        return open_limiter(path, 4, 1000)

    with caplog.at_level(logging.WARNING):
        run_virtual(main)
    assert len([record for record in caplog.records if "journal" in record.message]) == 1


def test_writing_is_taken_up_again_when_the_disk_recovers(tmp_path: Path) -> None:
    path = tmp_path / "0-of-1.log"

    async def main() -> None:
        limiter, journal = open_limiter(path, 100, 1000)
        journal._fail(OSError(28, "No space left on device"))
        assert not journal.working
        await asyncio.sleep(SPAN + 1)
        for _ in range(3):
            (await limiter.reserve(1)).sent()
        assert journal.working
        journal.close()
        again, second = open_limiter(path, 100, 1000)
        assert again.requests_used == 3
        second.close()

    run_virtual(main)


def test_what_cannot_be_known_counts_as_full(tmp_path: Path) -> None:
    async def main() -> None:
        damaged = tmp_path / "damaged" / "0-of-1.log"
        limiter, journal = open_limiter(damaged, 3, 90)
        (await limiter.reserve(1)).sent()
        journal.close()
        content = bytearray(damaged.read_bytes())
        content[40] ^= 1
        damaged.write_bytes(content)
        limiter, journal = open_limiter(damaged, 3, 90)
        assert (limiter.requests_used, limiter.tokens_used) == (3, 90)
        journal.close()

        limiter, journal = open_limiter(tmp_path / "gone" / "0-of-1.log", 3, 90, full_if_missing=True)
        assert limiter.requests_used == 3
        journal.close()

    run_virtual(main)


def test_another_split_of_the_limit_in_use_counts_as_full(tmp_path: Path) -> None:
    def journal(name: str) -> Journal:
        return Journal(tmp_path / name, span=60.0)

    whole = journal("0-of-1.log")
    assert whole.recover() == []
    whole.start(lambda: iter([(1, 2.0, 1, 5)]))
    whole.close()
    half = journal("0-of-2.log")
    assert half.recover() is None
    half.close()
    long_ago = time.time() - 100
    os.utime(tmp_path / "0-of-1.log", (long_ago, long_ago))
    half = journal("0-of-2.log")
    assert half.recover() == []
    half.close()


def test_two_processes_do_not_write_into_one_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (Journal(tmp_path / "0-of-1.log", span=60.0) for _ in range(2))
    first.recover()
    first.start(lambda: iter(()))
    with caplog.at_level(logging.WARNING):
        assert second.recover() is None  # the other one's use is not known here
    second.start(lambda: iter(()))
    assert first.path != second.path
    assert "another process" in caplog.text
    first.close()
    second.close()


@given(st.binary(max_size=200))
def test_replay_of_anything_is_a_list_or_unknown(content: bytes) -> None:
    assert replay([content], 0.0, 60.0) in (None, [])


def test_the_key_is_not_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))

    def path(**more: object) -> Path:
        fields = {"name": "w", "provider": "openai", "model": "m", "api_key": "sk-very-secret-key"} | more
        return journal_path(WorkerSpec.model_validate(fields), 0)

    assert "secret" not in str(path())
    assert path() == path(limits=Limits(concurrency=3))  # the account's window outlives other changes
    assert path() != path(api_key="sk-another-secret")
    assert path().is_relative_to(tmp_path)
