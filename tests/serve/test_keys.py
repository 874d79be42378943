"""Keys with limits: kept hashed, narrowed to models and workers, metered across gateways and restarts."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from actors.config import FuguConfig, ServeConfig
from actors.errors import BudgetSpentError, ConfigError, KeyLimitError, RequestError, StreamBrokenError
from actors.estimate import Estimate
from actors.messages import ChatRequest, Chunk, Message, ResponseFormat, Usage
from serve import keys_cli
from serve.api.health import Readiness
from serve.api.job import Job, Wishes
from serve.auth import check_bind
from serve.conductor import Knobs
from serve.gateway import Gateway
from serve.keys import Key, KeyBook
from serve.metering import Holds
from serve.prices import Prices
from serve.router import OrderDecider
from serve.trace import Trace
from tests.serve.test_gateway import Scripted, gateway
from tests.serve.test_responses import Says
from tests.serve.test_session import THREE, Plan, Player, trinity
from tests.serve.test_ultra import CHAIN, Ultra


class Clock:
    def __init__(self) -> None:
        self.now = 1_780_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUGU_STATE", str(tmp_path))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.sqlite"


def made(path: Path, clock: Clock | None = None, **limits: Any) -> tuple[Key, str]:
    return KeyBook(path, **({"clock": clock} if clock else {})).create(Key("", "test", **limits))


async def test_a_key_is_kept_as_a_hash_and_found_by_its_secret(path: Path) -> None:
    key, secret = made(path, models=frozenset({"fugu"}), workers=frozenset({"a", "b"}), monthly_usd=2.5)
    files = _contents(path.parent)
    assert secret.encode() not in files
    assert secret.removeprefix("fugu-").encode() not in files
    book = KeyBook(path)
    await book.refresh()
    assert book.find(secret.encode()) == key
    assert book.find(secret.encode() + b"x") is None


def test_others_on_the_machine_cannot_read_it(path: Path) -> None:
    made(path)
    assert oct(path.stat().st_mode)[-3:] == "600"


def _contents(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


async def test_a_key_that_one_gateway_knows_is_known_to_its_neighbour(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(path)
    book = KeyBook(path)
    looks = 0
    learn = book._learn

    def counted(rows: Any) -> None:
        nonlocal looks
        looks += 1
        learn(rows)

    monkeypatch.setattr(book, "_learn", counted)
    await book.refresh()
    key, secret = made(path)
    await book.refresh()
    assert book.find(secret.encode()) is None, "it looked less than a second ago"
    guesses = [book.look_for(b"guess %d" % number) for number in range(50)]
    assert await asyncio.gather(book.look_for(secret.encode()), *guesses) == [key] + [None] * 50
    assert looks == 2, "all of them waited for one look"
    began = time.monotonic()
    assert await book.look_for(b"another guess") is None
    assert time.monotonic() - began > 0.05


async def test_revoking_works_once_and_keeps_the_door_shut(path: Path) -> None:
    key, secret = made(path)
    KeyBook(path).revoke(key.id)
    with pytest.raises(ConfigError, match="no key"):
        KeyBook(path).revoke(key.id)
    book = KeyBook(path)
    await book.refresh()
    assert book.find(secret.encode()) is None
    assert book.any, "who revokes the last key does not mean to let everybody in"


async def test_requests_per_minute_across_gateways_and_restarts(path: Path, clock: Clock) -> None:
    key, _ = made(path, clock, requests_per_minute=3)
    one, other = KeyBook(path, clock=clock), KeyBook(path, clock=clock)
    for book in (one, other, one):
        await book.admit(key, 10)
        clock.now += 10
    with pytest.raises(KeyLimitError) as caught:
        await KeyBook(path, clock=clock).admit(key, 10)
    assert caught.value.retry_after == pytest.approx(30.0)
    clock.now += 29.9
    with pytest.raises(KeyLimitError):
        await other.admit(key, 10)
    clock.now += 0.2
    await other.admit(key, 10)


async def test_tokens_are_reserved_then_settled(path: Path, clock: Clock) -> None:
    key, _ = made(path, clock, tokens_per_minute=100)
    book = KeyBook(path, clock=clock)
    first = await book.admit(key, 80)
    with pytest.raises(KeyLimitError):
        await book.admit(key, 30)
    await book.settle(key, first, Usage(30, 10), 0.0)
    clock.now += 20
    await book.admit(key, 60)
    with pytest.raises(KeyLimitError) as caught:
        await book.admit(key, 30)
    assert caught.value.retry_after == pytest.approx(40.0), "when the first of them leaves the minute"
    with pytest.raises(RequestError, match="100 per minute"):
        await book.admit(key, 101)


async def test_a_budget_is_of_a_month(path: Path, clock: Clock) -> None:
    key, _ = made(path, clock, monthly_usd=1.0)
    book = KeyBook(path, clock=clock)
    await book.settle(key, await book.admit(key, 1), Usage(5, 5), 0.75)
    await book.settle(key, await book.admit(key, 1), Usage(5, 5), 0.5)
    with pytest.raises(BudgetSpentError, match="budget"):
        await KeyBook(path, clock=clock).admit(key, 1)
    clock.now += 32 * 86400
    await book.admit(key, 1)


async def test_money_is_held_until_it_is_known_what_was_spent(path: Path, clock: Clock) -> None:
    key, _ = made(path, clock, monthly_usd=1.0)
    book = KeyBook(path, clock=clock, longest=600.0)
    first = await book.admit(key, 1, 0.7)
    with pytest.raises(KeyLimitError, match=r"hold \$0\.7") as caught:
        await KeyBook(path, clock=clock).admit(key, 1, 0.4)
    assert caught.value.retry_after
    second = await book.admit(key, 1, 0.3)
    await book.settle(key, first, Usage(5, 5), 0.1)
    third = await book.admit(key, 1, 0.6)
    for number in (second, third):
        await book.settle(key, number, Usage(5, 5), None)
    with pytest.raises(BudgetSpentError, match=r"\$0\.9 of this key's \$1"):
        await book.admit(key, 1, 0.95)
    await book.admit(key, 1, 0.9)


async def test_what_a_dead_gateway_held_is_spent_in_the_end(path: Path, clock: Clock) -> None:
    key, _ = made(path, clock, monthly_usd=1.0)
    await KeyBook(path, clock=clock, longest=600.0).admit(key, 1, 0.6)
    book = KeyBook(path, clock=clock, longest=600.0)
    with pytest.raises(KeyLimitError):
        await book.admit(key, 1, 0.6)
    clock.now += 601
    with pytest.raises(BudgetSpentError, match=r"\$0\.4"):
        await book.admit(key, 1, 0.6)
    await book.admit(key, 1, 0.4)


@pytest.mark.parametrize("when", ["before it is written", "while it is written"])
async def test_who_leaves_while_a_reservation_is_written_holds_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    key, _ = made(path, requests_per_minute=1, tokens_per_minute=100, monthly_usd=1.0)
    book = KeyBook(path)
    begun, go_on = threading.Event(), threading.Event()
    admit = book._admit

    def slow(*arguments: Any) -> None:
        begun.set()
        assert go_on.wait(10)
        admit(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(book, "_admit", slow)
        if when == "before it is written":
            book._database._thread.submit(go_on.wait, 10)
        leaving = asyncio.create_task(book.admit(key, 100, 1.0))
        await asyncio.sleep(0.05)
        assert begun.is_set() == (when == "while it is written")
        leaving.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
    number = await book.admit(key, 100, 1.0)
    await book.settle(key, number, Usage(1, 1), 0.25)
    assert KeyBook(path).list()[0][1].requests == 1


async def test_a_request_over_midnight_is_of_the_month_it_began_in(path: Path, clock: Clock) -> None:
    key, _ = made(path, clock, monthly_usd=1.0)
    book = KeyBook(path, clock=clock, longest=90 * 86400.0)
    number = await book.admit(key, 1, 0.9)
    clock.now += 32 * 86400
    other = await book.admit(key, 1, 0.9)
    await book.settle(key, number, Usage(1, 1), 0.9)
    await book.settle(key, other, Usage(1, 1), 0.05)
    (_, used), *_ = KeyBook(path, clock=clock).list()
    assert used.usd == pytest.approx(0.05)


async def test_a_long_request_settles_its_own_reservation(path: Path, clock: Clock) -> None:
    key, _ = made(path, clock, tokens_per_minute=100)
    book = KeyBook(path, clock=clock)
    long = await book.admit(key, 90)
    clock.now += 61
    await book.admit(key, 90)  # the row of the long one is gone, and its number must not come again
    await book.settle(key, long, Usage(1, 0), 0.0)
    with pytest.raises(KeyLimitError):
        await book.admit(key, 90)


@settings(max_examples=40)
@given(
    st.floats(0.5, 3.0),
    st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.floats(0, 1.5), st.integers(0, 9)), max_size=25),
)
def test_a_budget_is_passed_by_no_more_than_estimates_were_wrong(
    tmp_path_factory: pytest.TempPathFactory, budget: float, events: list[tuple[bool, float, float, int]]
) -> None:
    """Requests come and end in any order, over two gateways, each with an estimate and what it really costs."""
    path = tmp_path_factory.mktemp("keys") / "keys.sqlite"
    key, _ = made(path, monthly_usd=budget)

    async def live() -> None:
        books = KeyBook(path), KeyBook(path)
        flying: list[tuple[int, float, float]] = []
        spent = excess = 0.0
        for comes, estimate, real, which in events:
            book = books[which % 2]
            if comes:
                try:
                    number = await book.admit(key, 1, estimate)
                except (KeyLimitError, BudgetSpentError):
                    held = sum(each[1] for each in flying)
                    assert spent + held + estimate > budget - 1e-9, "nothing is refused that fits"
                    continue
                flying.append((number, estimate, real))
            elif flying:
                number, estimate, real = flying.pop(which % len(flying))
                await book.settle(key, number, Usage(1, 1), real)
                spent += real
                excess += max(0.0, real - estimate)
            assert spent + sum(each[1] for each in flying) <= budget + excess + 1e-9
        for number, _, real in flying:
            await books[0].settle(key, number, Usage(1, 1), real)
            spent += real
        assert KeyBook(path).list()[0][1].usd == pytest.approx(spent)

    asyncio.run(live())


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 99), st.one_of(st.none(), st.floats(0, 2))), max_size=8))
def test_the_months_usage_is_the_sum_of_its_requests(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[int, int, float | None]]
) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.sqlite"
    key, _ = made(path)

    async def spend() -> None:
        book = KeyBook(path)
        for read, written, usd in requests:
            usage = Usage(read, written, read // 2, written // 2, read // 4)
            await book.settle(key, await book.admit(key, 10), usage, usd)

    asyncio.run(spend())
    (_, used), *_ = KeyBook(path).list()
    assert used.requests == len(requests)
    assert used.usage == sum((Usage(r, w, r // 2, w // 2, r // 4) for r, w, _ in requests), Usage())
    assert used.usd == pytest.approx(sum(usd or 0.0 for _, _, usd in requests))
    assert used.unpriced == sum(usd is None for _, _, usd in requests)


def client(app: Any, secret: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://fugu", headers={"authorization": f"Bearer {secret}"}
    )


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fugu", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 50, **fields}


async def test_a_key_narrows_models_and_workers(path: Path) -> None:
    _, secret = made(path, models=frozenset({"fugu"}), workers=frozenset({"b"}))
    first, second = Says("a", Chunk("a")), Says("b", Chunk("b"))
    http = client(gateway(first, second), secret)
    answer = await http.post("/v1/chat/completions", json=body())
    assert answer.json()["choices"][0]["message"]["content"] == "b"
    assert not first.requests
    forbidden = await http.post("/v1/chat/completions", json=body(fugu={"allow": ["a"]}))
    assert (forbidden.status_code, forbidden.json()["error"]["code"]) == (400, "no_worker_allowed")
    models = (await http.get("/v1/models")).json()["data"]
    assert [(model["id"], [each["name"] for each in model["workers"]]) for model in models] == [("fugu", ["b"])]
    _, other = made(path, models=frozenset({"fugu-ultra"}))
    denied = await client(gateway(first, second), other).post("/v1/chat/completions", json=body())
    assert (denied.status_code, denied.json()["error"]["param"]) == (403, "model")
    stranger = await client(gateway(first), "fugu-nobody").post("/v1/chat/completions", json=body())
    assert stranger.status_code == 401


async def test_the_account_of_an_answer(path: Path) -> None:
    key, secret = made(path)
    worker = Says("a", Chunk("yes"))
    http = client(gateway(worker), secret)
    await http.post("/v1/chat/completions", json=body())
    await http.post("/v1/chat/completions", json=body(stream=True))
    await http.post("/v1/responses", json={"model": "fugu", "input": "?"})
    await http.post("/v1/messages", json=body())
    (_, used), *_ = KeyBook(path).list()
    assert used.requests == 4
    assert used.usage == sum([worker.usage] * 4, Usage())
    assert used.usd == pytest.approx(4 * 0.5)
    await http.post("/v1/chat/completions", json=body(temperature=9))
    assert KeyBook(path).list()[0][1].requests == 4, "bad input costs nothing"
    assert key.id == KeyBook(path).list()[0][0].id


async def test_a_session_is_charged_with_all_its_calls_and_a_broken_one_with_those_it_made(path: Path) -> None:
    _, secret = made(path)
    app = trinity(Player("a"), Player("b"), plan=Plan(*THREE))
    answer = (await client(app, secret).post("/v1/chat/completions", json=body(model="fugu-trinity"))).json()
    (_, used), *_ = KeyBook(path).list()
    assert used.usage.total_tokens == answer["usage"]["total_tokens"] == 198
    assert used.usd == pytest.approx(3 * 0.25)
    broken = client(gateway(Scripted("a", "half", StreamBrokenError("cut", worker="a"))), secret)
    await broken.post("/v1/chat/completions", json=body(stream=True))
    (_, used), *_ = KeyBook(path).list()
    assert (used.requests, used.unpriced) == (2, 1)
    assert used.usage.total_tokens > 198, "what it read is charged"


async def test_nobody_passes_before_the_first_look(path: Path) -> None:
    made(path)
    worker = Says("a", Chunk("x"))
    http = client(gateway(worker), "fugu-nobody")
    answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=body()) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {401}
    assert not worker.requests


async def test_limits_in_http(path: Path) -> None:
    _, secret = made(path, requests_per_minute=1)
    http = client(gateway(Says("a", Chunk("x"))), secret)
    assert (await http.post("/v1/chat/completions", json=body())).status_code == 200
    limited = await http.post("/v1/messages", json=body())
    assert (limited.status_code, limited.json()["error"]["type"]) == (429, "rate_limit_error")
    assert 1 <= int(limited.headers["retry-after"]) <= 60


async def test_a_budget_needs_prices_and_ends(path: Path) -> None:
    _, secret = made(path, monthly_usd=0.4)
    workers = {name: Says(name, Chunk("x")) for name in ("listed", "unlisted")}
    models = {"listed": "gpt-5", "unlisted": "no-such-model"}
    specs = [{"name": name, "provider": "openai", "model": model} for name, model in models.items()]
    config = FuguConfig.model_validate({"workers": specs})
    http = client(Gateway(config, list(workers.values()), OrderDecider(["unlisted", "listed"]), Readiness({})), secret)
    unknown = await http.post("/v1/chat/completions", json=body(fugu={"allow": ["unlisted"]}))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "no_worker_allowed")
    assert (await http.post("/v1/chat/completions", json=body())).status_code == 200, "gpt-5 has a listed price"
    assert [len(worker.requests) for worker in workers.values()] == [1, 0], "what is not priced would cost nothing"
    spent = await http.post("/v1/chat/completions", json=body())
    assert (spent.status_code, spent.json()["error"]["code"]) == (429, "insufficient_quota")
    assert spent.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("limits", [{"workers": frozenset({"a", "b"})}, {"monthly_usd": 1.0}])
async def test_a_keys_constraints_hold_for_who_writes_plans(path: Path, tmp_path: Path, limits: dict[str, Any]) -> None:
    """c conducts, and would read all that the caller says, and cost what nobody knows."""
    _, secret = made(path, **limits)
    ultra = Ultra(tmp_path, CHAIN, priced="abc" if "workers" in limits else "ab")
    http = client(ultra.app, secret)
    refused = await http.post("/v1/chat/completions", json=body(model="fugu-ultra"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_worker_allowed")
    assert ultra.c.requests == []
    _, other = made(path, workers=frozenset({"a", "b", "c"}))
    answered = await client(ultra.app, other).post("/v1/chat/completions", json=body(model="fugu-ultra"))
    assert answered.status_code == 200
    assert [key.workers for key, used in KeyBook(path).list() if used.requests] == [frozenset("abc")]


PRICED = {"price": {"input": 1000.0, "output": 2000.0}}


async def test_requests_at_once_do_not_pass_the_budget(path: Path) -> None:
    """50 tokens of output at 0.002 dollars each: one may cost some 0.11."""
    _, secret = made(path, monthly_usd=0.3)
    worker = Says("a", Chunk("x"))
    worker.wait.clear()
    config = FuguConfig.model_validate(
        {"workers": [{"name": "a", "provider": "openai", "model": "m", "base_url": "http://127.0.0.1:1", **PRICED}]}
    )
    app = Gateway(config, [worker], OrderDecider(["a"]), Readiness({}))
    http = client(app, secret)
    asked = [asyncio.create_task(http.post("/v1/chat/completions", json=body())) for _ in range(10)]
    async with asyncio.timeout(30):
        while sum(task.done() for task in asked) + len(worker.requests) < len(asked):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    worker.wait.set()
    answers = await asyncio.gather(*asked)
    held = [answer for answer in answers if answer.status_code == 429]
    assert (len(answers) - len(held), len(worker.requests)) == (2, 2)
    assert {answer.json()["error"]["code"] for answer in held} == {KeyLimitError.code}
    assert all(answer.headers["retry-after"] for answer in held)


@pytest.mark.parametrize(
    ("model", "knobs", "calls"),
    [
        ("fugu", Knobs(), 1),
        ("fugu-20261123", Knobs(), 1),
        ("fugu-trinity", Knobs(), 5),
        # A plan that may be written three times, and five steps.
        ("fugu-ultra", Knobs(), 3 + 5),
        ("fugu-ultra", Knobs(max_rounds=2, max_steps=3), 2 * (3 + 3)),
        ("fugu-ultra", Knobs(max_steps=2, max_recursion=1), 3 + 2 * (3 + 2)),
        ("fugu-ultra", Knobs(max_steps=1, max_recursion=2, max_rounds=2), 2 * (3 + (3 + (3 + 1)))),
        ("fugu-ultra", Knobs(max_calls=3), 3),
    ],
)
def test_what_a_request_may_cost(model: str, knobs: Knobs, calls: int) -> None:
    specs = [
        {"name": name, "provider": "openai", "model": "m", "price": {"input": price, "output": 10 * price}}
        for name, price in (("a", 1.0), ("b", 3.0), ("cheap", 0.1))
    ]
    config = FuguConfig.model_validate({"workers": specs, "conductor": {"worker": "a"}})

    def usd(allowed: tuple[str, ...], knobs: Knobs) -> float:
        wishes = Wishes(allowed, None, "argmax", False, None, knobs)
        job = Job(model, ChatRequest((Message("user", "?"),)), wishes, Trace("id", 0.0), False)
        return Holds(config, Prices(config)).usd(job, Estimate(1000, 100))

    assert usd(("a", "b"), knobs) == pytest.approx(calls * 0.006)
    assert usd(("a",), knobs) == pytest.approx(calls * 0.002)
    # The plans are a's; what they may cost is held whoever may answer.
    assert usd(("cheap",), knobs) == pytest.approx(calls * (0.002 if model == "fugu-ultra" else 0.0002))
    if model == "fugu-ultra":
        assert usd(("a",), replace(knobs, budget_usd=0.001)) == 0.001


@pytest.mark.parametrize(
    ("model", "knobs", "calls", "repairs"),
    [
        ("fugu", Knobs(), 1, 1),
        ("fugu-trinity", Knobs(), 5, 5),
        ("fugu-ultra", Knobs(max_rounds=2, max_steps=3), 12, 2),
    ],
)
def test_a_repair_is_reckoned_with_where_there_may_be_one(model: str, knobs: Knobs, calls: int, repairs: int) -> None:
    """`a` is held to a schema by its vendor, if that takes it and is asked to; `b` is not."""
    price = {"price": {"input": 1.0, "output": 10.0}}
    specs = [
        {"name": "a", "provider": "openai", "model": "m", "base_url": "https://api.openai.com/v1", **price},
        {"name": "b", "provider": "openai", "model": "m", "base_url": "http://127.0.0.1:1", **price},
    ]
    config = FuguConfig.model_validate({"workers": specs, "conductor": {"worker": "a"}})

    def usd(allowed: tuple[str, ...], wanted: ResponseFormat | None) -> float:
        request = ChatRequest((Message("user", "?"),), response_format=wanted)
        job = Job(model, request, Wishes(allowed, None, "argmax", False, None, knobs), Trace("id", 0.0), False)
        return Holds(config, Prices(config)).usd(job, Estimate(1000, 100))

    shaped = ResponseFormat("json_schema", schema={"type": "object", "additionalProperties": False}, strict=True)
    beyond = replace(shaped, schema={"type": "object", "additionalProperties": False, "minProperties": 1})
    plain = calls * 0.002
    assert usd(("a",), shaped) == pytest.approx(plain)
    assert usd(("a",), beyond) == usd(("a",), replace(shaped, strict=None)) == usd(("b",), shaped)
    assert usd(("b",), None) == usd(("b",), ResponseFormat("text")) == pytest.approx(plain)
    assert (
        usd(("b",), shaped)
        == usd(("a", "b"), ResponseFormat("json_object"))
        == pytest.approx(plain + repairs * (1100 + 10 * 100) / 1e6)
    )


def test_the_commands() -> None:
    run = CliRunner()
    create = run.invoke(keys_cli.app, ["create", "ci", "--model", "fugu", "--rpm", "60", "--budget", "20"])
    assert create.exit_code == 0
    secret = create.stdout.strip().splitlines()[-1]
    assert secret.startswith("fugu-")
    (key, _), *_ = KeyBook().list()
    assert (key.models, key.workers, key.requests_per_minute, key.monthly_usd) == (frozenset({"fugu"}), None, 60, 20)
    listed = run.invoke(keys_cli.app, ["list"])
    assert key.id in listed.stdout
    assert secret not in listed.stdout
    asyncio.run(KeyBook().settle(key, 0, Usage(90, 5, 30, cache_written_tokens=40), 0.5))
    assert keys_cli._tokens(KeyBook().list()[0][1].usage) == "90 + 5 (30 cached; 40 to caches)"
    assert run.invoke(keys_cli.app, ["revoke", key.id]).exit_code == 0
    assert run.invoke(keys_cli.app, ["revoke", key.id]).exit_code == 1


def test_a_public_address_may_rely_on_created_keys(path: Path) -> None:
    with pytest.raises(ConfigError, match="fugu keys create"):
        check_bind(ServeConfig(host="0.0.0.0"))
    made(path)
    check_bind(ServeConfig(host="0.0.0.0"))
