"""The running server, over HTTP, as OpenAI's own client sees it: behind HAProxy and without it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from actors.marks import mark
from actors.messages import ToolCall
from tests.loopback import Behaviour, LoopbackProvider
from tests.serve.conftest import KEY, UPSTREAM_KEY, WORKERS
from tests.serve.running import RunningServer, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

MESSAGES = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def post(server: RunningServer, **options: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    headers |= options.pop("headers", {})  # type: ignore[arg-type]
    with httpx.Client(trust_env=False, timeout=30) as http:
        return http.post(f"{server.url}/v1/chat/completions", headers=headers, **options)  # type: ignore[arg-type]


def body(**fields: object) -> dict[str, object]:
    return {"model": "fugu", "messages": MESSAGES, **fields}


def test_a_plain_answer(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="forty-two")
    answer = client.chat.completions.create(model="fugu", messages=MESSAGES, temperature=0.5, seed=3)
    assert answer.choices[0].message.content == "forty-two"
    assert (answer.model, answer.choices[0].finish_reason) == ("fugu", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0
    sent = provider.requests[-1]
    assert sent.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert (sent.body["temperature"], sent.body["seed"]) == (0.5, 3)


def test_a_streamed_answer(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="one two three four", chunk_delay=0.05)
    stream = client.chat.completions.create(
        model="fugu",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"fugu": {"trace": True}},
    )
    arrivals, text, trace, usage, finish = [], "", None, None, None
    for chunk in stream:
        arrivals.append(time.monotonic())
        usage = chunk.usage or usage
        trace = (chunk.model_extra or {}).get("fugu", trace)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert (text, finish) == ("one two three four", "stop")
    assert usage is not None
    assert usage.completion_tokens > 0
    assert trace is not None
    assert trace["worker"] in WORKERS
    assert arrivals[-1] - arrivals[0] > 0.1, "pieces come as they are made, not all at the end"


def test_the_decision_is_the_heads(with_haproxy: RunningServer, provider: LoopbackProvider) -> None:
    traces = []
    for text in ("hello", "zebra crossing", "17 + 25", "hello"):
        messages = [{"role": "user", "content": text}]
        traces.append(post(with_haproxy, json=body(messages=messages, fugu={"trace": True})).json()["fugu"])
    assert {trace["source"] for trace in traces} == {"head"}
    for trace in traces:
        assert set(trace["probabilities"]) == set(WORKERS)
        assert sum(trace["probabilities"].values()) == pytest.approx(1.0)
        assert trace["worker"] == max(trace["probabilities"], key=trace["probabilities"].__getitem__)
    assert traces[0]["probabilities"] == traces[3]["probabilities"], "the same question, the same decision"
    assert len({str(trace["probabilities"]) for trace in traces}) == 3


def test_decisions_are_batched_across_requests(with_haproxy: RunningServer, provider: LoopbackProvider) -> None:
    with concurrent.futures.ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(lambda _: post(with_haproxy, json=body(fugu={"trace": True})), range(48)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["fugu"]["source"] for answer in answers} == {"head"}


def test_without_a_checkpoint_the_order_decides(without_haproxy: RunningServer, provider: LoopbackProvider) -> None:
    trace = post(without_haproxy, json=body(fugu={"trace": True})).json()["fugu"]
    assert (trace["source"], trace["worker"]) == ("order", "first")


def test_constraints_by_field_and_header(server: RunningServer, provider: LoopbackProvider) -> None:
    by_field = post(server, json=body(fugu={"allow": ["second"], "trace": True})).json()["fugu"]
    by_header = post(server, json=body(), headers={"x-fugu-deny": "first", "x-fugu-trace": "1"}).json()["fugu"]
    assert (by_field["worker"], by_header["worker"]) == ("second", "second")
    assert by_field["source"] == "single"


def test_tools_pass_through(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="", tool_calls=(ToolCall("call_1", "look", '{"at":"sky"}'),))
    answer = client.chat.completions.create(model="fugu", messages=MESSAGES, tools=TOOLS, tool_choice="required")
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert (calls[0].function.name, calls[0].function.arguments) == ("look", '{"at":"sky"}')
    assert calls[0].id in {mark("call_1", worker) for worker in WORKERS}
    assert answer.choices[0].finish_reason == "tool_calls"
    assert provider.requests[-1].body["tools"][0]["function"]["name"] == "look"
    provider.default = Behaviour(text="blue")
    messages = [
        *MESSAGES,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": "call_1", "content": "the sky is blue"},
    ]
    assert client.chat.completions.create(model="fugu", messages=messages).choices[0].message.content == "blue"
    assert provider.requests[-1].body["messages"][-1]["tool_call_id"] == "call_1"


def test_a_worker_that_fails_is_followed_by_the_next(server: RunningServer, provider: LoopbackProvider) -> None:
    provider.by_model["first"] = Behaviour(status=500, error="out of order")
    provider.by_model["second"] = Behaviour(text="I can")
    for stream in (False, True):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            if stream:
                chunks = client.chat.completions.create(model="fugu", messages=MESSAGES, stream=True)
                text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            else:
                text = client.chat.completions.create(model="fugu", messages=MESSAGES).choices[0].message.content or ""
        assert text == "I can"


def test_all_failed(client: openai.OpenAI, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(status=429, headers={"retry-after": "3"}, error="slow down")
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="fugu", messages=MESSAGES)
    assert int(caught.value.response.headers["retry-after"]) in (1, 2, 3)
    failures = caught.value.response.json()["error"]["failures"]
    assert set(failures) == set(WORKERS)
    assert {failure["code"] for failure in failures.values()} == {"rate_limit_exceeded"}
    time.sleep(3)


def test_a_stream_that_breaks_says_so(server: RunningServer, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="one two three four five", chunk_delay=0.05, break_after=3)
    response = post(server, json=body(stream=True))
    assert response.status_code == 200
    *_, error, done, end = response.text.split("\n\n")
    assert '"code":"stream_broken"' in error
    assert (done, end) == ("data: [DONE]", "")
    assert response.text.count("one") == 1


def test_keep_alives_reach_the_client(server: RunningServer, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="late", delay=1.3)
    response = post(server, json=body(stream=True))
    assert response.text.startswith(": keep-alive\n\n")
    assert '"content":"late"' in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_goes_away_cancels_the_upstream(
    server: RunningServer, provider: LoopbackProvider, stream: bool, begun: bool
) -> None:
    if begun and not stream:
        pytest.skip("a plain answer has no beginning")
    provider.default = Behaviour(text="word " * 500, delay=0 if begun else 30, chunk_delay=0.05 if begun else 0)
    headers = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    payload = httpx.Request("POST", "http://x", json=body(stream=stream)).content
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{headers}Content-Length: {len(payload)}\r\n\r\n"
        raw.sendall(head.encode() + payload)
        wait_until(lambda: provider.in_flight == 1)
        received = b""
        while begun and b"data: " not in received:
            received += raw.recv(65536)
        time.sleep(0.1)
    left = time.monotonic()
    wait_until(lambda: provider.disconnects, timeout=3)
    assert provider.disconnects[0].time - left < 1.0
    wait_until(lambda: provider.in_flight == 0)


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        (b"{", 400, None),
        (b"", 400, None),
        (b'{"model": "fugu", "messages": []}', 400, "messages"),
        (b'{"model": "gpt-5", "messages": [{"role": "user", "content": "x"}]}', 404, "model"),
        (b'{"model": "fugu", "messages": [{"role": "user", "content": "x"}], "top_p": NaN}', 400, "top_p"),
        (b'{"model": "fugu", "messages": [{"role": "user", "content": 7}]}', 400, "messages[0].content"),
        (
            b'{"model": "fugu", "messages": [{"role": "user", "content": "x"}], "fugu": {"allow": ["nobody"]}}',
            400,
            "fugu.allow",
        ),
        (
            b'{"model": "fugu", "messages": [{"role": "user", "content": "x"}], "fugu": {"deny": ["first", "second"]}}',
            400,
            "fugu",
        ),
        (b" " * 1_000_001, 413, None),
    ],
)
def test_bad_input(
    server: RunningServer, provider: LoopbackProvider, content: bytes, status: int, param: str | None
) -> None:
    response = post(server, content=content)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert "Traceback" not in response.text
    assert provider.requests == []


def test_a_huge_body_is_refused_before_it_has_come(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer " + KEY.encode() + b"\r\nContent-Length: 100000000\r\n\r\n" + b" " * 1000
        )
        assert b" 413 " in raw.recv(1000)


def test_a_huge_chunked_body_is_refused(server: RunningServer) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000_000

    with contextlib.suppress(httpx.TransportError):  # the server may close while we still send
        assert post(server, content=pieces()).status_code == 413
    assert post(server, json=body()).status_code == 200


def test_errors_as_the_client_knows_them(server: RunningServer, provider: LoopbackProvider) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong-key-entirely", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="fugu", messages=MESSAGES)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        assert "fugu" in {model.id for model in client.models.list()}
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-5", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="fugu", messages=MESSAGES, temperature=3)
        assert caught.value.param == "temperature"


def test_request_ids(server: RunningServer, provider: LoopbackProvider) -> None:
    given = post(server, json=body(), headers={"x-request-id": "mine-1"})
    assert given.headers.get_list("x-request-id") == ["mine-1"]
    assert given.json()["id"] == "chatcmpl-mine-1"
    silly = post(server, json=body(), headers={"x-request-id": 'a b "c'})
    [made] = silly.headers.get_list("x-request-id")
    assert len(made) == 32
    assert silly.json()["id"] == f"chatcmpl-{made}"


def test_a_caller_cannot_give_serve_orders(server: RunningServer, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="slow", delay=0.5)
    assert post(server, json=body(), headers={"x-request-timeout-seconds": "0.1"}).status_code == 200


def test_health_and_wrong_doors(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["parts"]) == (200, {"workers": "ready", "router": "ready"})
        assert http.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"
        assert http.get("/nowhere").status_code == 404


def test_nothing_listens_for_the_network(server: RunningServer) -> None:
    """HTTP is on the loopback interface only: gateway, proxy, replicas, statistics."""
    named = ("haproxy", "ray::ServeReplica", "ray::ProxyActor", "ray::HAProxy")
    open_http = []
    for process in server.tree():
        if not " ".join(process.cmdline()).startswith(named) and process.name() != "haproxy":
            continue
        for connection in process.net_connections(kind="inet"):
            if connection.status == "LISTEN" and connection.laddr.ip in ("0.0.0.0", "::"):
                with contextlib.suppress(httpx.TransportError), httpx.Client(trust_env=False, timeout=2) as http:
                    http.get(f"http://127.0.0.1:{connection.laddr.port}/")
                    open_http.append((process.name(), connection.laddr.port))
    assert open_http == []


def test_two_gateways_share_the_work(with_haproxy: RunningServer, provider: LoopbackProvider) -> None:
    assert len(with_haproxy.find("ray::ServeReplica:fugu:Gateway")) == 2


def test_a_router_that_dies_fails_no_request(with_haproxy: RunningServer, provider: LoopbackProvider) -> None:
    provider.default = Behaviour(text="fine")
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(post(with_haproxy, json=body(fugu={"trace": True})))

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(answers) > 8)
        [victim] = with_haproxy.find("ray::ServeReplica:fugu:Router")
        victim.kill()
        before = len(answers)
        wait_until(lambda: len(answers) > before + 20, timeout=40)
        # It comes back by itself, and decides again.
        wait_until(lambda: answers[-1].json()["fugu"]["source"] == "head", timeout=60)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        trace = answer.json()["fugu"]
        assert trace["source"] == "head" or trace["warnings"], "an undecided request says so"


def test_a_provider_actor_that_dies_is_a_retry_or_a_typed_error(
    server: RunningServer, provider: LoopbackProvider
) -> None:
    provider.default = Behaviour(text="one two three four five six", chunk_delay=0.4)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        streamed = threads.submit(post, server, json=body(stream=True, fugu={"allow": ["first"]}))
        wait_until(lambda: provider.in_flight == 1)
        time.sleep(0.6)
        for actor in server.find("ray::ProviderActor"):
            actor.kill()
        broken = streamed.result(timeout=30)
        assert broken.status_code == 200
        assert '"code":"stream_broken"' in broken.text
        assert broken.text.endswith("data: [DONE]\n\n")
    provider.default = Behaviour(text="back again")
    answer = post(server, json=body())
    assert (answer.status_code, answer.json()["choices"][0]["message"]["content"]) == (200, "back again")


def _status(server: RunningServer) -> int:
    """The status of one answer; 0 where the connection was closed without one."""
    try:
        return post(server, json=body()).status_code
    except httpx.RemoteProtocolError:
        return 0


def test_a_gateway_that_dies_is_replaced(with_haproxy: RunningServer, provider: LoopbackProvider) -> None:
    # Longer than the server would take to stop (`drain`): a change of replicas is no reason to end a stream.
    provider.enqueue(*[Behaviour(text="word " * 30 + "end", chunk_delay=0.5)] * 4)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        streams = [threads.submit(_text_streamed, with_haproxy) for _ in range(4)]
        wait_until(lambda: provider.in_flight == 4)
        victim, _ = with_haproxy.find("ray::ServeReplica:fugu:Gateway")
        victim.kill()
        codes = [_status(with_haproxy) for _ in range(20)]
        # One request may meet the dying gateway, and one connection HAProxy's change to its new configuration.
        assert codes.count(200) >= 18, codes
        wait_until(lambda: len(with_haproxy.find("ray::ServeReplica:fugu:Gateway")) == 2, timeout=60)
        wait_until(lambda: {post(with_haproxy, json=body()).status_code for _ in range(5)} == {200}, timeout=30)
        texts = [stream.result(60) for stream in streams]
    # Those of the other gateway; what a gateway had begun to write breaks with it.
    whole = [text.count("word") == 30 and text.endswith("data: [DONE]\n\n") for text in texts]
    assert any(whole), [text[-200:] for text in texts]


def _text_streamed(server: RunningServer) -> str:
    """What came of a stream before it ended, or broke."""
    text = ""
    headers = {"authorization": f"Bearer {KEY}"}
    with (
        contextlib.suppress(httpx.TransportError),
        httpx.Client(trust_env=False, timeout=60) as http,
        http.stream("POST", f"{server.url}/v1/chat/completions", headers=headers, json=body(stream=True)) as reply,
    ):
        for part in reply.iter_text():
            text += part
    return text


def test_no_secret_and_no_prompt_in_any_log(server: RunningServer, provider: LoopbackProvider) -> None:
    """Last in the file: by now every path above has been taken, the failing ones included."""
    prompt = "the-prompt-that-nobody-may-log"
    messages = [{"role": "user", "content": prompt}]
    provider.enqueue(Behaviour(status=401, error=f"bad key {UPSTREAM_KEY}"), Behaviour(status=400, error="bad"))
    refused = post(server, json=body(messages=messages))
    assert refused.status_code >= 400
    assert UPSTREAM_KEY not in refused.text
    assert post(server, json=body(messages=messages, temperature="hot")).status_code == 400
    time.sleep(1)
    scanned = 0
    for file in [server.output, *server.session_folder().rglob("*"), *server.folder.glob("state/**/*")]:
        if not file.is_file() or file.is_symlink():
            continue
        text = file.read_bytes()
        scanned += 1
        for secret in (KEY, UPSTREAM_KEY, prompt):
            assert secret.encode() not in text, f"{file.name} holds {secret}"
    assert scanned > 10
