"""Schemas and bodies made to do harm, in every dialect: a clear 400, at once, and no worker hears of them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.schema import MOST_NESTED
from tests.serve.test_gateway import Scripted, gateway

SCHEMAS: dict[str, dict[str, Any]] = {
    "loop": {"$ref": "#"},
    "remote": {"properties": {"a": {"$ref": "http://127.0.0.1:9/schema.json"}}},
    "enum": {"enum": list(range(20_000))},
    "pattern": {"pattern": "("},
    "doubling": {
        "$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)} | {"d30": False},
        "$ref": "#/$defs/d0",
    },
}


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))


def bodies(schema: Any) -> list[tuple[str, str, dict[str, Any]]]:
    said = {"messages": [{"role": "user", "content": "?"}]}
    wanted = {"type": "json_schema", "schema": schema}
    return [
        ("/v1/chat/completions", "response_format", {
            **said, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
        ("/v1/responses", "text.format", {"input": "?", "text": {"format": {"name": "x", **wanted}}}),
        ("/v1/messages", "output_config.format", {**said, "max_tokens": 9, "output_config": {"format": wanted}}),
    ]  # fmt: skip


def client(worker: Scripted) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=gateway(worker)), base_url="http://fugu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SCHEMAS)
async def test_a_hostile_schema_is_a_400(name: str) -> None:
    worker = Scripted("a", "{}")
    async with client(worker) as http:
        for path, field, body in bodies(SCHEMAS[name]):
            began = time.process_time()
            answer = await http.post(path, json={"model": "fugu", **body})
            assert time.process_time() - began < 10
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, field, "invalid_request"), path
            assert error["message"].startswith(f"{field}: the schema ")
    assert not worker.requests


@pytest.mark.parametrize("stream", [False, True])
async def test_a_good_schema_passes(stream: bool) -> None:
    worker = Scripted("a", "{}")
    async with client(worker) as http:
        for path, _, body in bodies({"type": "object", "additionalProperties": False}):
            assert (await http.post(path, json={"model": "fugu", "stream": stream, **body})).status_code == 200
    assert len(worker.requests) == 3


@pytest.mark.parametrize("depth", [MOST_NESTED, 1000, 200_000])
async def test_a_body_that_is_nested_too_deeply_is_a_400(depth: int) -> None:
    worker = Scripted("a", "x")
    tool = '{"type": "function", "function": {"name": "t", "parameters": %s}}'
    deep = tool % ('{"a": ' * depth + "1" + "}" * depth)
    content = (
        json.dumps({"model": "fugu", "messages": [{"role": "user", "content": "?"}]})[:-1] + f', "tools": [{deep}]}}'
    )
    async with client(worker) as http:
        answer = await http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert not worker.requests


async def test_the_deepest_tool_that_passes_reaches_the_worker() -> None:
    worker = Scripted("a", "x")
    deep: Any = 1
    for _ in range(MOST_NESTED - 5):
        deep = {"a": deep}
    tools = [{"type": "function", "function": {"name": "t", "parameters": deep}}]
    async with client(worker) as http:
        answer = await http.post(
            "/v1/chat/completions",
            json={"model": "fugu", "messages": [{"role": "user", "content": "?"}], "tools": tools},
        )
    assert answer.status_code == 200, answer.text
    assert worker.requests[0].fingerprint()
