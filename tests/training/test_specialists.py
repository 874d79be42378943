from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.adapters.local_engine import LocalEngine
from actors.adapters.text_worker import render
from actors.errors import CheckpointError, ConfigError
from actors.messages import ChatRequest, Message
from tests.actors.tiny_chat import tiny_chat_folder
from training.lora import Learner, LoraSettings, Talk
from training.specialists import Measure, SpecialistRun, main, measure, run

SMALL = LoraSettings(steps=12, batch=4, rank=4, alpha=8, learning_rate=0.02, window=2, seed=3)
NO_MEASURE = Measure(tasks=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("tiny"))


def talk(index: int) -> Talk:
    question = Message("user", f"What is {index % 7} + {index % 5}" + "?" * (index % 4))
    return Talk((question,), str(index % 7 + index % 5))


def learner(folder: Path, settings: LoraSettings = SMALL, **more: object) -> Learner:
    return Learner(folder, settings, talk, device="cpu", precision="float32", **more)  # type: ignore[arg-type]


def specialist(folder: Path, tmp_path: Path, **more: object) -> SpecialistRun:
    given = {"out": tmp_path / "adapter", "state": tmp_path / "state", "measure": NO_MEASURE, "settings": SMALL} | more
    return SpecialistRun(
        "logic",
        model=str(folder),
        validation=8,
        device="cpu",
        precision="float32",
        progress=False,
        **given,  # type: ignore[arg-type]
    )


def test_the_loss_is_that_of_the_answers_tokens_alone(folder: Path) -> None:
    """Against transformers' own loss, one example at a time, without padding and with labels on the answer."""
    ours = learner(folder)
    talks = [talk(index) for index in range(5)]
    loss, _ = ours.held_out(talks)
    total, count = 0.0, 0
    for one in talks:
        prompt = ours.tokenizer(render(ours.tokenizer, one.messages))["input_ids"]
        answer = [*ours.tokenizer(one.answer)["input_ids"], ours.tokenizer.pad_token_id]
        tokens, labels = torch.tensor([[*prompt, *answer]]), torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += float(ours.model(input_ids=tokens, labels=labels).loss) * len(answer)
        count += len(answer)
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_it_learns_and_what_it_gets_right_is_what_greedy_decoding_says(folder: Path, tmp_path: Path) -> None:
    ours = learner(folder, LoraSettings(steps=60, batch=16, rank=8, alpha=16, learning_rate=0.02, seed=1))
    losses = [ours.step() for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    talks = [talk(index) for index in range(24)]
    _, right = ours.held_out(talks)
    ours.export(tmp_path / "adapter", base="tiny")
    engine = LocalEngine.load(folder, device="cpu", adapters={"it": tmp_path / "adapter"}, dtype=torch.float32)
    requests = [ChatRequest(one.messages, temperature=0.0, max_tokens=6) for one in talks]
    try:
        answers = [reply.text for reply in engine.generate_batch(requests, adapter="it")]
        without = [reply.text for reply in engine.generate_batch(requests)]
    finally:
        engine.close()
    assert answers != without
    greedy = sum(answer == one.answer for answer, one in zip(answers, talks, strict=True)) / len(talks)
    assert greedy == pytest.approx(right, abs=2.5 / len(talks))  # the written adapter is rounded to bfloat16
    assert right > 0.15


def test_the_model_itself_stays_as_it_is(folder: Path) -> None:
    ours = learner(folder)
    before = {name: weight.clone() for name, weight in ours.model.named_parameters() if "lora_" not in name}
    ours.step()
    ours.step()
    after = dict(ours.model.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert ours.numbers == sum(weight.numel() for name, weight in after.items() if "lora_" in name)


def test_batches_hold_every_example_of_their_window_once(folder: Path) -> None:
    ours = learner(folder)
    seen = [one.tokens for step in range(4) for one in ours._batch(step)]
    wanted = [ours.encode(talk(index)).tokens for index in range(16)]
    assert sorted(seen) == sorted(wanted)
    lengths = [[len(one.tokens) for one in ours._batch(step)] for step in range(2)]
    assert max(lengths[0]) <= min(lengths[1]) or max(lengths[1]) <= min(lengths[0])


@pytest.mark.timeout(300)  # two more processes import torch
def test_a_resumed_run_equals_a_straight_one_bit_for_bit_and_needs_no_ray(folder: Path, tmp_path: Path) -> None:
    run(specialist(folder, tmp_path / "straight"))
    # Killed, without any warning, after a checkpoint and one more step.
    script = f"""
import os, sys
from pathlib import Path
from tests.training.test_specialists import specialist
from training import specialists
from training.lora import Learner
step = Learner.step
def dies(self):
    if self.done == 8:
        os._exit(9)
    return step(self)
Learner.step = dies
assert "ray" not in sys.modules
specialists.run(specialist(Path({str(folder)!r}), Path({str(tmp_path / "killed")!r}), checkpoint_every=5))
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    assert subprocess.run([sys.executable, "-c", script], timeout=200, env=env, check=False).returncode == 9
    assert not (tmp_path / "killed" / "adapter").exists()
    resumed = run(specialist(folder, tmp_path / "killed", checkpoint_every=5, resume=True))
    assert resumed.steps == 7
    weights = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "killed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    curves = [
        [json.loads(line) for line in (tmp_path / name / "state" / "curve.jsonl").read_text().splitlines()]
        for name in ("straight", "killed")
    ]
    assert [row["step"] for row in curves[1]] == list(range(1, 13))
    assert [row["loss"] for row in curves[0]] == [row["loss"] for row in curves[1]]


def test_a_state_of_another_run_or_none_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run(specialist(folder, tmp_path, resume=True))
    ours = learner(folder, identity={"ground": "logic"})
    ours.step()
    ours.save(tmp_path)
    other = learner(folder, LoraSettings(steps=12, batch=4, rank=4, alpha=8, seed=4), identity={"ground": "words"})
    with pytest.raises(CheckpointError, match=r"of another run: ground, learning_rate, seed, window differ"):
        other.restore(tmp_path)
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot read"):
        ours.restore(tmp_path)


def test_a_run_never_overwrites_the_state_of_another(folder: Path, tmp_path: Path) -> None:
    run(specialist(folder, tmp_path))
    with pytest.raises(ConfigError, match="resume it, or remove"):
        run(specialist(folder, tmp_path))


def test_a_run_writes_an_adapter_and_what_it_measured(folder: Path, tmp_path: Path) -> None:
    how = Measure(tasks=8, max_tokens=4, samples=2)
    report = run(specialist(folder, tmp_path, measure=how, command="the command"))
    metrics = json.loads((tmp_path / "adapter" / "metrics.json").read_text())
    assert metrics["command"] == "the command"
    assert metrics["settings"]["steps"] == 12
    assert metrics["trained_numbers"] == report.numbers
    assert set(metrics["measured"]["grounds"]) == {"none", "logic"}
    cells = metrics["measured"]["grounds"]["logic"]
    assert list(cells) == ["arithmetic", "words", "counting", "logic"]
    assert all(0 <= low <= mean <= high <= 1 for mean, low, high in cells.values())
    assert measure(folder, {"logic": tmp_path / "adapter"}, how, device="cpu").json() == metrics["measured"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["peft_type"], str(tmp_path) in json.dumps(config)) == (4, "LORA", False)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_the_learning_rate_rises_and_falls() -> None:
    settings = LoraSettings(steps=100, learning_rate=0.01, warmup=0.1, floor=0.1)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[9] == max(rates) == pytest.approx(0.01)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.001, rel=0.02)


def test_bad_settings_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no adapter fits the model"):
        learner(folder, LoraSettings(steps=1, targets=("nothing",)))
    with pytest.raises(ConfigError, match="no ground poems; there are arithmetic"):
        SpecialistRun("poems", tmp_path, SMALL)
    assert main(["--ground", "logic", "--steps", "0", "--out", str(tmp_path)]) == 1
    assert "must be at least 1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot be called none"):
        measure(folder, {"none": tmp_path}, NO_MEASURE)
