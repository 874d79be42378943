"""The gateway as an ASGI application, over workers whose behaviour each test scripts. No Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from actors.config import FuguConfig
from actors.errors import (
    CircuitOpenError,
    FuguError,
    RateLimitedError,
    StreamBrokenError,
    WorkerRejectedError,
    WorkerUnavailableError,
)
from actors.marks import mark
from actors.messages import ChatReply, ChatRequest, Chunk, Timing, ToolCall, ToolCallDelta, Usage
from serve.api.health import Readiness
from serve.gateway import Gateway
from serve.router import Answer, OrderDecider, Question, RouterClient
from serve.trace import Choice

KEY = "correct-horse-battery"
USAGE = Usage(5, 3, 1, 2)


class Scripted:
    """Says `words`, raising any error among them at its place."""

    def __init__(self, name: str, *words: str | FuguError, calls: tuple[ToolCall, ...] = (), wait: float = 0) -> None:
        self.name = name
        self.words = words
        self.calls = calls
        self.wait = wait
        self.requests: list[ChatRequest] = []
        self.cancelled = 0
        self.asked = asyncio.Event()

    async def complete(self, request: ChatRequest) -> ChatReply:
        final: ChatReply | None = None
        async for chunk in self.stream(request):
            final = chunk.final
        assert final is not None
        return final

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        self.asked.set()
        said = ""
        try:
            await asyncio.sleep(self.wait)
            for word in self.words:
                if isinstance(word, FuguError):
                    raise word
                said += word
                yield Chunk(text=word)
            for index, call in enumerate(self.calls):
                yield Chunk(tool_calls=(ToolCallDelta(index, call.id, call.name, call.arguments),))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        yield Chunk(
            final=ChatReply(
                self.name,
                said,
                tool_calls=self.calls,
                finish_reason="tool_calls" if self.calls else "stop",
                usage=USAGE,
                cost_usd=0.25,
                timing=Timing(0.0, 0.0, 0.3),
                dropped=("top_k",) if "top_k" in request.extra else (),
            )
        )


class Fixed:
    """Decides as it was told."""

    def __init__(self, worker: str, probabilities: dict[str, float]) -> None:
        self.worker = worker
        self.probabilities = probabilities
        self.questions: list[Question] = []

    async def choose(self, question: Question) -> Choice:
        self.questions.append(question)
        allowed = {name: p for name, p in self.probabilities.items() if name in question.allowed}
        return Choice(self.worker if self.worker in allowed else max(allowed, key=allowed.__getitem__), allowed, "head")

    async def status(self) -> FuguError | None:
        return None


def gateway(*workers: Scripted, decider: Any = None, serve: dict[str, Any] | None = None, **router: Any) -> Gateway:
    tags = {"a": ["closed", "us"], "b": ["open"], "c": ["open", "us"]}
    specs = [
        {"name": worker.name, "provider": "openai", "model": "m", "tags": tags.get(worker.name, [])}
        for worker in workers
    ]
    config = FuguConfig.model_validate(
        {
            "workers": [*specs, {"name": "off", "provider": "openai", "model": "m"}],
            "router": router,
            "serve": serve or {},
            "disabled": {"off": "OFF_KEY is not set"},
        }
    )
    return Gateway(config, workers, decider or OrderDecider([worker.name for worker in workers]), Readiness({}))


async def post(
    app: Gateway, headers: dict[str, str] | None = None, content: bytes | None = None, **fields: Any
) -> httpx.Response:
    body = {"model": "fugu", "messages": [{"role": "user", "content": "hello"}], **fields}
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(
            "/v1/chat/completions",
            content=json.dumps(body).encode() if content is None else content,
            headers={"content-type": "application/json", **(headers or {})},
        )


async def get(app: Gateway, path: str, method: str = "GET", **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **options)


def events(response: httpx.Response) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith(("data: ", ": ")) for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines if line.startswith("data: ")]


async def test_a_whole_answer() -> None:
    response = await post(gateway(Scripted("a", "hi ", "there")), headers={"x-request-id": "abc-1"})
    assert response.status_code == 200
    body = response.json()
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "id": "chatcmpl-abc-1",
        "object": "chat.completion",
        "model": "fugu",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi there", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {
                "cached_tokens": 1,
                "orchestration_input_tokens": 0,
                "orchestration_input_cached_tokens": 0,
            },
            "completion_tokens_details": {"reasoning_tokens": 2, "orchestration_output_tokens": 0},
        },
    }


async def test_a_stream() -> None:
    response = await post(gateway(Scripted("a", "hi ", "there")), stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert [c["choices"][0]["delta"] for c in chunks[:-1]] == [
        {"role": "assistant", "content": "hi "},
        {"content": "there"},
        {},
    ]
    assert chunks[2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert {chunk["model"] for chunk in chunks} == {"fugu"}


async def test_tool_calls_both_ways() -> None:
    call = ToolCall("c1", "look", '{"a":1}')
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    worker = Scripted("a", calls=(call,))
    message = (await post(gateway(worker), tools=tools)).json()["choices"][0]["message"]
    expected = {"id": mark("c1", "a"), "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}}
    assert (message["content"], message["tool_calls"]) == (None, [expected])
    assert worker.requests[0].tools[0].name == "look"
    streamed = events(await post(gateway(Scripted("a", calls=(call,))), tools=tools, stream=True))
    assert streamed[0]["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **expected}]
    assert streamed[1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_trace_tells_all(stream: bool) -> None:
    first, second = Scripted("a", WorkerUnavailableError("a is down", worker="a")), Scripted("b", "yes")
    app = gateway(first, second, decider=Fixed("a", {"a": 0.75, "b": 0.25}))
    response = await post(app, fugu={"trace": True}, stream=stream, top_k=3)
    if stream:
        *_, last, done = events(response)
        assert done == "[DONE]"
        assert last["choices"] == []
        trace = last["fugu"]
    else:
        trace = response.json()["fugu"]
    assert (trace["worker"], trace["source"]) == ("b", "head")
    assert trace["probabilities"] == {"a": 0.75, "b": 0.25}
    assert [(x["worker"], x["ok"], x.get("code")) for x in trace["attempts"]] == [
        ("a", False, "worker_unavailable"),
        ("b", True, None),
    ]
    assert trace["attempts"][0]["reason"] == "a is down"
    assert trace["cost_usd"] == 0.25
    assert trace["usage"]["total_tokens"] == 8
    assert trace["dropped"] == ["top_k"]
    assert trace["warnings"] == ["top_k: not accepted by b, left out"]
    assert 0 <= trace["timings"]["decision_s"] <= trace["timings"]["first_byte_s"] <= trace["timings"]["total_s"]
    assert trace["timings"]["queued_s"] == 0.0


async def test_no_trace_unless_asked() -> None:
    assert "fugu" not in (await post(gateway(Scripted("a", "x")))).json()
    assert "fugu" in (await post(gateway(Scripted("a", "x")), headers={"x-fugu-trace": "1"})).json()


CONSTRAINTS: list[tuple[dict[str, Any], dict[str, str], set[str]]] = [
    ({}, {}, {"a", "b", "c"}),
    ({"allow": ["b"]}, {}, {"b"}),
    ({"deny": ["a"]}, {}, {"b", "c"}),
    ({"tags": ["us"]}, {}, {"a", "c"}),
    ({"tags": ["us", "open"]}, {}, {"c"}),
    ({}, {"x-fugu-allow": "b, c"}, {"b", "c"}),
    ({}, {"x-fugu-deny": "a"}, {"b", "c"}),
    ({}, {"x-fugu-tags": "open"}, {"b", "c"}),
    ({"allow": ["a", "b"]}, {"x-fugu-allow": "b,c"}, {"b"}),
    ({"deny": ["off", "a"]}, {}, {"b", "c"}),
]


@pytest.mark.parametrize(("wishes", "headers", "allowed"), CONSTRAINTS)
async def test_constraints_narrow_the_pool(wishes: dict[str, Any], headers: dict[str, str], allowed: set[str]) -> None:
    decider = Fixed("a", {"a": 0.5, "b": 0.3, "c": 0.2})
    app = gateway(*(Scripted(name, "x") for name in "abc"), decider=decider)
    response = await post(app, headers=headers, fugu={**wishes, "seed": 7})
    assert response.status_code == 200
    assert decider.questions[0].allowed == allowed
    assert decider.questions[0].seed == 7


@pytest.mark.parametrize(
    ("wishes", "headers", "param", "code"),
    [
        ({"allow": ["nobody"]}, {}, "fugu.allow", "invalid_request"),
        ({"deny": ["nobody"]}, {}, "fugu.deny", "invalid_request"),
        ({"allow": ["off"]}, {}, "fugu.allow", "invalid_request"),
        ({}, {"x-fugu-allow": "nobody"}, "x-fugu-allow", "invalid_request"),
        ({}, {"x-fugu-seed": "-1"}, "x-fugu-seed", "invalid_request"),
        ({}, {"x-fugu-seed": "9" * 5000}, "x-fugu-seed", "invalid_request"),
        ({"allow": []}, {}, "fugu", "no_worker_allowed"),
        ({"deny": ["a", "b"]}, {}, "fugu", "no_worker_allowed"),
        ({"tags": ["martian"]}, {}, "fugu", "no_worker_allowed"),
        ({"allow": ["a"]}, {"x-fugu-deny": "a"}, "fugu", "no_worker_allowed"),
    ],
)
async def test_constraints_that_cannot_be_met(
    wishes: dict[str, Any], headers: dict[str, str], param: str, code: str
) -> None:
    response = await post(gateway(Scripted("a", "x"), Scripted("b", "x")), headers=headers, fugu=wishes)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


async def test_all_failed_says_why_and_when_to_come_again() -> None:
    app = gateway(
        Scripted("a", RateLimitedError("a is busy", worker="a", retry_after=6.2)),
        Scripted("b", CircuitOpenError("b rests", worker="b", retry_after=20)),
    )
    for stream in (False, True):
        response = await post(app, stream=stream, fugu={"trace": True})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "7"
        error = response.json()["error"]
        assert error["failures"]["a"] == {"code": "rate_limit_exceeded", "message": "a is busy"}
        assert len(response.json()["fugu"]["attempts"]) == 2


async def test_fallbacks_are_bounded() -> None:
    workers = [Scripted(name, WorkerUnavailableError("down", worker=name)) for name in "abc"]
    assert (await post(gateway(*workers, fallbacks=1))).status_code == 502
    assert [len(worker.requests) for worker in workers] == [1, 1, 0]


async def test_a_resting_worker_is_not_asked_first_again() -> None:
    decider = Fixed("a", {"a": 0.9, "b": 0.1})
    resting = Scripted("a", CircuitOpenError("rests", worker="a", retry_after=60))
    app = gateway(resting, Scripted("b", "x"), decider=decider)
    for _ in range(2):
        assert (await post(app)).status_code == 200
    assert [question.allowed for question in decider.questions] == [{"a", "b"}, {"b"}]
    assert len(resting.requests) == 1


async def test_a_single_worker_keeps_its_own_status() -> None:
    response = await post(gateway(Scripted("a", WorkerRejectedError("a takes no images", worker="a"))))
    assert response.status_code == 400
    assert response.json()["error"]["failures"]["a"]["code"] == "worker_rejected_request"


async def test_a_break_after_the_first_byte_is_an_event() -> None:
    second = Scripted("b", "never")
    app = gateway(Scripted("a", "half", StreamBrokenError("reset", worker="a")), second)
    response = await post(app, stream=True, fugu={"trace": True})
    assert response.status_code == 200
    chunk, error, done = events(response)
    assert chunk["choices"][0]["delta"]["content"] == "half"
    assert error["error"]["code"] == "stream_broken"
    assert error["fugu"]["attempts"][0]["code"] == "stream_broken"
    assert done == "[DONE]"
    assert second.requests == []


async def test_keep_alives_while_nothing_comes() -> None:
    response = await post(gateway(Scripted("a", "x", wait=0.35), serve={"keep_alive": 0.1}), stream=True)
    assert 1 <= response.text.count(": keep-alive\n\n") <= 3
    assert response.text.startswith(": keep-alive\n\n")
    assert events(response)[0]["choices"][0]["delta"]["content"] == "x"


async def test_a_failure_after_a_keep_alive_is_an_event() -> None:
    app = gateway(Scripted("a", WorkerUnavailableError("down", worker="a"), wait=0.15), serve={"keep_alive": 0.1})
    response = await post(app, stream=True)
    assert response.status_code == 200
    error, done = events(response)
    assert (error["error"]["code"], done) == ("all_workers_failed", "[DONE]")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_whole_request_is_bounded(stream: bool) -> None:
    worker = Scripted("a", "x", wait=30)
    response = await post(gateway(worker, serve={"request_timeout": 0.1}), stream=stream)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert worker.cancelled == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cancelled_request_cancels_the_worker(stream: bool) -> None:
    worker = Scripted("a", "x", wait=30)
    task = asyncio.create_task(post(gateway(worker), stream=stream))
    await asyncio.wait_for(worker.asked.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.cancelled == 1


async def test_keys() -> None:
    app = gateway(Scripted("a", "x"), serve={"api_keys": [KEY, "another-key-here"]})
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer "}):
        response = await post(app, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert (await get(app, "/v1/models", headers=headers)).status_code == 401
    for key in (KEY, "another-key-here"):
        assert (await post(app, headers={"authorization": f"bearer {key}"})).status_code == 200
        assert (await get(app, "/v1/models", headers={"authorization": f"Bearer {key}"})).status_code == 200
    assert (await get(app, "/healthz")).status_code == 200


async def test_body_limit_by_its_own_account_and_in_fact() -> None:
    app = gateway(Scripted("a", "x"), serve={"max_body_bytes": 200})
    response = await post(app, content=b"x" * 201)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")

    sent: list[Any] = []
    pieces = iter([{"type": "http.request", "body": b"x" * 150, "more_body": True}] * 2)

    async def receive() -> Any:
        return next(pieces)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "path": "/v1/chat/completions",
        "method": "POST",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded"])
async def test_only_json_is_read(kind: str) -> None:
    response = await post(gateway(Scripted("a", "x")), headers={"content-type": kind})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "content-type")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("GET", "/v1/models/gpt-5", 404, "model_not_found"),
    ],
)
async def test_wrong_doors(method: str, path: str, status: int, code: str) -> None:
    response = await get(gateway(Scripted("a", "x")), path, method)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_an_unknown_model() -> None:
    response = await post(gateway(Scripted("a", "x")), model="gpt-5")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


async def test_models() -> None:
    app = gateway(Scripted("a", "x"), Scripted("b", "x"))
    listed = (await get(app, "/v1/models")).json()
    assert [(m["id"], m["object"]) for m in listed["data"]] == [("fugu", "model")]
    assert listed["data"][0]["workers"] == [{"name": "a", "tags": ["closed", "us"]}, {"name": "b", "tags": ["open"]}]
    assert (await get(app, "/v1/models/fugu")).json() == listed["data"][0]


async def test_docs_describe_the_endpoint() -> None:
    schema = (await get(gateway(Scripted("a", "x")), "/openapi.json")).json()
    assert "post" in schema["paths"]["/v1/chat/completions"]


async def test_a_fault_of_ours_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        async def choose(self, question: Question) -> Choice:
            raise ZeroDivisionError(question.messages[0].text)

        async def status(self) -> None:
            return None

    response = await post(gateway(Scripted("a", "x"), decider=Broken()))
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error; the server's log has more"
    assert "ZeroDivisionError at" in caplog.text
    assert "hello" not in caplog.text + response.text


async def test_too_many_at_once() -> None:
    worker = Scripted("a", "x", wait=0.3)
    app = gateway(worker, serve={"max_ongoing_requests": 2})
    responses = await asyncio.gather(*(post(app) for _ in range(4)))
    assert sorted(r.status_code for r in responses) == [200, 200, 503, 503]
    refused = next(r for r in responses if r.status_code == 503)
    assert (refused.headers["retry-after"], refused.json()["error"]["code"]) == ("1", "overloaded")
    assert (await post(app)).status_code == 200


async def test_readiness_names_the_part() -> None:
    state: dict[str, str | None] = {"router": "loading"}

    async def workers() -> str | None:
        return None

    async def router() -> str | None:
        return state["router"]

    async def hangs() -> str | None:
        await asyncio.sleep(60)
        return None

    readiness = Readiness({"workers": workers, "router": router})
    assert await readiness.body() == (
        503,
        {"status": "not ready", "parts": {"workers": "ready", "router": "loading"}},
    )
    state["router"] = None
    status, _ = await readiness.body()
    assert status == 503, "an answer is reused for a second"
    await asyncio.sleep(1.1)
    assert (await readiness.body())[0] == 200
    status, body = await Readiness({"x": hangs}).body()
    assert (status, body["parts"]["x"]) == (503, "starting (no answer yet)")


class Handle:
    """Stands for a deployment handle: `decide.remote(question)` gives or raises what the test says."""

    def __init__(self, *results: Any) -> None:
        self.results = list(results)
        self.asked: list[Question] = []
        self.decide = self

    async def remote(self, question: Question) -> Any:
        self.asked.append(question)
        result = self.results.pop(0)
        if isinstance(result, float):
            await asyncio.sleep(result)
        if isinstance(result, Exception) and not isinstance(result, FuguError):
            raise result
        return result


QUESTION = Question((), frozenset("ab"), None, "argmax")
ANSWER = Answer("b", {"a": 0.2, "b": 0.8}, None, "head")


@pytest.mark.parametrize(
    ("results", "worker", "source", "warned"),
    [
        ((ANSWER,), "b", "head", ""),
        ((ConnectionError("replica died"), ANSWER), "b", "head", ""),
        ((ConnectionError("x"), ConnectionError("x")), "a", "order", "(ConnectionError)"),
        ((5.0,), "a", "order", "(no answer within 0.1 s)"),
        ((FuguError("the checkpoint does not fit"),), "a", "order", "(the checkpoint does not fit)"),
    ],
)
async def test_the_router_never_fails_a_request(results: Sequence[Any], worker: str, source: str, warned: str) -> None:
    choice = await RouterClient(Handle(*results), ["a", "b"], 0.1).choose(QUESTION)
    assert (choice.worker, choice.source) == (worker, source)
    assert all(warned in warning for warning in choice.warnings)
    assert bool(choice.warnings) == bool(warned)


async def test_one_allowed_worker_needs_no_router() -> None:
    handle = Handle()
    choice = await RouterClient(handle, ["a", "b"], 1).choose(Question((), frozenset("b"), None, "argmax"))
    assert (choice.worker, choice.source, choice.probabilities, handle.asked) == ("b", "single", {"b": 1.0}, [])
