"""schemathesis against what `/openapi.json` says, over real sockets with a provider behind: no 5xx, and no status, type
or body that is not described there.

`FUGU_SCHEMATHESIS` is how many examples of each path's requests are made beside the systematic ones (10).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients.server import KEY, ClientServer
from tests.loopback import LoopbackProvider

EXAMPLES = int(os.environ.get("FUGU_SCHEMATHESIS", "10"))
# Not `positive_data_acceptance`: what only the conversation as a whole can be judged by (a tool choice without tools,
# a name that is not served) is a 4xx that no schema tells.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "missing_required_header",
    "use_after_free",
)


@pytest.fixture(scope="module")
def server(state_dir: Path) -> Iterator[ClientServer]:
    with LoopbackProvider(record=False) as provider, ClientServer(provider) as server:
        yield server


@pytest.mark.timeout(600)
def test_the_server_is_as_it_describes_itself(server: ClientServer, tmp_path: Path) -> None:
    options = ["--checks", ",".join(CHECKS), "--max-examples", str(EXAMPLES), "--continue-on-failure", "--no-shrink"]
    options += ["--header", f"authorization: Bearer {KEY}", "--request-timeout", "60"]
    options += ["--warnings", "off", "--no-color"]
    options += ["--generation-deterministic"] if os.environ.get("CI") else ["--generation-database", "none"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *options]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=580)
    assert ran.returncode == 0, ran.stdout[-20000:] + ran.stderr[-2000:]
    print(ran.stdout[-1500:])


def test_every_path_that_says_so_wants_a_key(server: ClientServer) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    headers = [{}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"x-api-key": "wrong"}]
    open_paths = set()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            wanted = operation.get("security", described["security"])
            if not wanted:
                open_paths.add(path)
                continue
            for header in headers:
                answer = httpx.request(method, server.url + path, headers=header)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (method, path)
            for scheme in wanted:
                right = {"x-api-key": KEY} if "x-api-key" in scheme else {"authorization": f"Bearer {KEY}"}
                assert httpx.request(method, server.url + path, headers=right).status_code in (200, 400, 404), path
    assert open_paths == {"/healthz", "/readyz"}


def test_requests_are_described_to_the_bottom(server: ClientServer) -> None:
    schemas = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]
    assert schemas["ChatBody"]["properties"]["model"]["enum"] == ["fugu", "fugu-ultra"]
    blocks = next(each for each in schemas["TurnBody"]["properties"]["content"]["anyOf"] if each["type"] == "array")
    kinds = {each["allOf"][1]["properties"]["type"]["const"] for each in blocks["items"]["anyOf"]}
    assert kinds >= {"text", "image", "tool_use", "tool_result", "thinking"}
