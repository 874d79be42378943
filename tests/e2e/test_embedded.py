"""The real thing: `fugu serve` with the pool that ships, a real model's answer, and an end that leaves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml

from tests.serve.running import REPOSITORY, RunningServer, wait_until

pytestmark = [pytest.mark.model, pytest.mark.ray, pytest.mark.timeout(400)]

WORKERS = {"arithmetic", "words", "counting", "logic", "general"}
COMPOSITE = 'Repeat "oak" two times without a space. What is the number of its letters plus 11?'
# What the whole server may hold in memory, in bytes of proportional set size.
MEMORY = 4 * 2**30


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = yaml.safe_load((REPOSITORY / "configs" / "embedded.yaml").read_text())
    config["router"]["checkpoint"] = str(REPOSITORY / "checkpoints" / "embedded.safetensors")
    for worker in config["workers"]:
        if "adapter" in worker:
            worker["adapter"] = str(REPOSITORY / "configs" / worker["adapter"])
    config["conductor"]["adapter"] = str(REPOSITORY / "configs" / config["conductor"]["adapter"])
    with RunningServer(tmp_path_factory.mktemp("embedded"), config) as server:
        yield server


def test_a_real_model_answers_and_the_trained_head_decides(embedded: RunningServer) -> None:
    with openai.OpenAI(base_url=f"{embedded.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        answer = client.chat.completions.create(
            model="fugu",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_completion_tokens=40,
            temperature=0,
            extra_body={"fugu": {"allow": ["general"], "trace": True}},
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0

        stream = client.chat.completions.create(
            model="fugu",
            messages=[{"role": "user", "content": "What is 17 + 25?"}],
            max_completion_tokens=24,
            stream=True,
            extra_body={"fugu": {"trace": True}},
        )
        text, trace = "", {}
        for chunk in stream:
            trace = (chunk.model_extra or {}).get("fugu", trace)
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text.strip()
    assert trace["source"] == "head"
    assert sum(trace["probabilities"].values()) == pytest.approx(1.0)
    assert set(trace["probabilities"]) == WORKERS
    assert trace["worker"] == max(trace["probabilities"], key=trace["probabilities"].__getitem__)


def test_each_question_goes_to_who_can_answer_it(embedded: RunningServer) -> None:
    answered = {}
    for question in (
        "What is 17 + 25?",
        'Write "lantern" in capital letters.',
        "What is the largest of 31, 88, 64?",
        "Rosa is taller than Finn. Finn is taller than Leo. Who is the tallest?",
        "What is the capital of Italy?",
    ):
        body = {
            "model": "fugu",
            "messages": [{"role": "user", "content": question}],
            "max_completion_tokens": 16,
            "temperature": 0,
            "fugu": {"trace": True},
        }
        reply = httpx.post(f"{embedded.url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
        answered[reply["fugu"]["worker"]] = reply["choices"][0]["message"]["content"].strip()
    assert set(answered) == WORKERS
    assert answered["words"] == "LANTERN"
    assert answered["counting"] == "88"
    assert answered["logic"] == "Rosa"


def test_the_trained_conductor_plans_and_its_workflow_answers(embedded: RunningServer) -> None:
    body = {
        "model": "fugu-ultra",
        "messages": [{"role": "user", "content": COMPOSITE}],
        "seed": 1,
        "fugu": {"trace": True},
    }
    reply = httpx.post(f"{embedded.url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json()
    trace = reply["fugu"]
    [planned] = trace["rounds"]
    assert planned["plan"]["topology"] in ("chain", "parallel", "tree", "graph"), planned
    assert len(planned["steps"]) >= 2
    assert {step["worker"] for step in planned["steps"]} <= WORKERS
    assert trace["conductor"] == "conductor"
    assert trace["cost_usd"] == 0
    assert reply["choices"][0]["message"]["content"].strip()


def test_ask_shows_the_answer_and_a_bar_per_worker(embedded: RunningServer) -> None:
    command = [sys.executable, str(REPOSITORY / "fugu.py"), "ask", "Say hello.", "--trace", "--max-tokens", "12"]
    result = subprocess.run(
        [*command, "--url", embedded.url], capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY
    )
    assert result.returncode == 0, result.stderr
    for word in (*WORKERS, "%", "decided by head", "tokens"):
        assert word in result.stdout


def test_it_fits_in_memory(embedded: RunningServer) -> None:
    total = 0
    for process in [embedded.process, *embedded.tree()]:
        rollup = Path(f"/proc/{process.pid}/smaps_rollup")
        if not rollup.exists():
            pytest.skip("this system does not tell the proportional set size")
        lines = rollup.read_text().splitlines()
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    assert total < MEMORY, f"{total / 2**30:.2f} GiB"


def test_the_end_leaves_nothing_behind(embedded: RunningServer) -> None:
    """Last: the server ends here. A request that runs may finish; then no process and no folder is left."""
    before = embedded.tree()
    folder = _haproxy_folder(before)
    with httpx.Client(base_url=embedded.url, trust_env=False, timeout=60) as client:
        body = {
            "model": "fugu",
            "messages": [{"role": "user", "content": "Count from one to twenty."}],
            "max_completion_tokens": 60,
            "stream": True,
        }
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            embedded.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]" or rest[-1] == "data: [DONE]"
        assert not any('"error"' in line for line in rest)
    assert embedded.process.wait(timeout=60) == 0
    _, alive = psutil.wait_procs(before, timeout=10)
    assert alive == []
    assert not folder.exists()
    wait_until(lambda: not _answers(embedded.url))


def test_a_second_signal_forces_the_end(tmp_path: Path) -> None:
    config = {"workers": [{"name": "a", "provider": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}]}
    with RunningServer(tmp_path, config) as server:
        tree = server.tree()
        folder = _haproxy_folder(tree)
        server.process.send_signal(signal.SIGINT)
        time.sleep(1)
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=10) in (0, 128 + signal.SIGINT)
        _, alive = psutil.wait_procs(tree, timeout=10)
        assert alive == []
        assert not folder.exists()


def test_a_supervisor_that_signals_every_process_at_once(tmp_path: Path) -> None:
    config = {"workers": [{"name": "a", "provider": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}]}
    with RunningServer(tmp_path, config) as server:
        everything = [server.process, *server.tree()]
        folder = _haproxy_folder(everything)
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=30) == 0
        wait_until(lambda: not any(_runs(process) for process in everything), timeout=10)
        assert not folder.exists()


def test_ask_without_a_server_says_how_to_start_one() -> None:
    environ = {**os.environ, "FUGU_URL": "http://127.0.0.1:9"}
    command = [sys.executable, str(REPOSITORY / "fugu.py"), "ask", "hello"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environ, cwd=REPOSITORY
    )
    assert result.returncode == 1
    assert "fugu serve" in result.stderr


def _haproxy_folder(processes: Sequence[psutil.Process]) -> Path:
    """The folder that the server made for HAProxy's files."""
    arguments = [argument for process in processes for argument in process.cmdline()]
    [folder] = {Path(argument).parents[1] for argument in arguments if argument.endswith("haproxy.cfg")}
    assert folder.name.startswith("fugu-")
    return folder


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _answers(url: str) -> bool:
    try:
        httpx.get(f"{url}/healthz", trust_env=False, timeout=1)
    except httpx.TransportError:
        return False
    return True
