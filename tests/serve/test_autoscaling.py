"""More requests than one replica is to have: Serve starts another one, and nobody notices."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.conftest import KEY, UPSTREAM_KEY, WORKERS, tiny_checkpoint, worker
from tests.serve.running import RunningServer

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

GATEWAY, ROUTER = "ray::ServeReplica:fugu:Gateway", "ray::ServeReplica:fugu:Router"
SECONDS = 120.0
CALLERS = 8


def test_gateways_grow_with_the_requests_that_run(tmp_path: Path) -> None:
    """Eight at once, where a gateway is to have two, and a router, which has them for a moment only, sixteen."""
    ended: Counter[int] = Counter()
    over = threading.Event()

    def keep_asking(url: str) -> None:
        body = {"model": "fugu", "messages": [{"role": "user", "content": "x"}]}
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(timeout=60, trust_env=False) as http:
            while not over.is_set():
                ended[http.post(f"{url}/v1/chat/completions", json=body, headers=headers).status_code] += 1

    with LoopbackProvider() as provider:
        provider.default = Behaviour(delay=2.0)
        model, checkpoint = tiny_checkpoint(tmp_path, WORKERS)
        config = {
            "workers": [worker(name, provider) for name in WORKERS],
            "router": {"backbone": str(model), "checkpoint": str(checkpoint), "max_tokens": 64},
            "serve": {
                "api_keys": ["${SERVE_KEY}"],
                "gateway_replicas": {"min": 1, "max": 2, "target_ongoing": 2},
                "router_replicas": {"min": 1, "max": 2, "target_ongoing": 16},
            },
        }
        keys = {"SERVE_KEY": KEY, "UPSTREAM_KEY": UPSTREAM_KEY}
        with RunningServer(tmp_path, config, environ=keys) as server:
            assert len(server.find(GATEWAY)) == 1
            callers = [threading.Thread(target=keep_asking, args=(server.url,)) for _ in range(CALLERS)]
            for caller in callers:
                caller.start()
            try:
                began = time.monotonic()
                while len(server.find(GATEWAY)) < 2:
                    assert time.monotonic() - began < SECONDS, "still one gateway"
                    time.sleep(0.5)
                seen = ended.total()
                while ended.total() < seen + 3 * CALLERS:
                    assert time.monotonic() - began < SECONDS, "nobody is answered any more"
                    time.sleep(0.5)
            finally:
                over.set()
                for caller in callers:
                    caller.join()
            assert set(ended) == {200}
            assert len(server.find(GATEWAY)) == 2, "never more than the configuration allows"
            assert len(server.find(ROUTER)) == 1
