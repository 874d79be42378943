"""Streams that last: nothing on their way cuts one that is idle and alive, and one whose upstream died says so. The
times are scaled down: what a provider may be silent is seconds here, and two minutes by default."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from actors.config import ConductorConfig, ServeConfig, Timeout
from actors.config_file import load_config, read_yaml
from tests.faults import MESSAGES, PATHS, Reader, body_of, text_of
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.conftest import IDLE, KEY
from tests.serve.running import RunningServer, wait_until

TWO_HOURS = 7200.0
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def streamed(server: RunningServer, path: str) -> tuple[Reader, bytes, float]:
    """A stream read to its end: what was understood, its bytes, its seconds."""
    headers = {"authorization": f"Bearer {KEY}", "x-api-key": KEY}
    began = time.monotonic()
    with httpx.Client(trust_env=False, timeout=60, headers=headers) as http:
        response = http.post(server.url + path, json=body_of(path, 7, True))
    reader = Reader(path, True)
    reader.read(response.status_code, response.content)
    return reader, response.content, time.monotonic() - began


def in_every_dialect(server: RunningServer) -> dict[str, tuple[Reader, bytes, float]]:
    with ThreadPoolExecutor(len(PATHS)) as threads:
        return dict(zip(PATHS, threads.map(lambda path: streamed(server, path), PATHS), strict=True))


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_an_idle_stream_lasts_while_its_provider_lives(server: RunningServer, provider: LoopbackProvider) -> None:
    pings, every = 18, 0.5
    provider.default = Behaviour(text=text_of(7), pieces=2, pings=pings, chunk_delay=every)
    for path, (reader, content, seconds) in in_every_dialect(server).items():
        assert (reader.whole, reader.error, reader.text) == (True, "", text_of(7)), path
        assert seconds > pings * every > 2 * IDLE, "it was idle for longer than a silent one may be"
        sign = b"event: ping" if path == MESSAGES else b": keep-alive"
        assert content.count(sign) >= pings * every / 2, f"{path}: the caller hears that it lives (every 0.5 s)"
    assert len(provider.requests) == len(PATHS), "nothing was asked twice"
    assert not provider.disconnects


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_stream_whose_upstream_died_says_so(server: RunningServer, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text=text_of(7), pieces=2, stall_after=3)
    for path, (reader, _, seconds) in in_every_dialect(server).items():
        assert not reader.whole, path
        assert reader.error, path
        assert reader.text, path
        assert text_of(7).startswith(reader.text), path
        assert IDLE <= seconds < IDLE + 20, path
    wait_until(lambda: provider.in_flight == 0)


@pytest.mark.ray
def test_the_proxy_is_never_the_first_to_give_up(with_haproxy: RunningServer) -> None:
    [file] = {
        Path(after)
        for process in with_haproxy.tree()
        if process.name() == "haproxy"
        for part, after in zip(process.cmdline(), process.cmdline()[1:], strict=False)
        if part == "-f"
    }
    found = re.findall(r"^ *timeout (client|server|tunnel) (\d+)s", file.read_text(), re.MULTILINE)
    assert {name for name, _ in found} >= {"client", "server"}
    assert all(int(seconds) > TWO_HOURS for _, seconds in found), found


def test_two_hours_are_within_every_default() -> None:
    assert ServeConfig().request_timeout == TWO_HOURS
    assert Timeout().total >= TWO_HOURS
    assert ConductorConfig(worker="any").deadline is None
    keys = {f"{name}_API_KEY": "not-needed-here" for name in ("OPENAI", "ANTHROPIC", "GEMINI", "COMPATIBLE")}
    pools = [path for path in CONFIGS.glob("*.yaml") if "workers" in read_yaml(path)]
    assert pools
    for path in pools:
        config = load_config(path, {**os.environ, **keys})
        assert config.serve.request_timeout >= TWO_HOURS, path.name
        for worker in config.workers:
            assert worker.timeout.total >= TWO_HOURS, f"{path.name}: {worker.name}"
