from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from actors.errors import CheckpointError, ConfigError, DataError
from actors.messages import Usage
from orchestrator.conductor_card import ConductorCard, read_card
from tests.actors.tiny_chat import tiny_chat_folder
from tests.loopback import Behaviour, LoopbackProvider, Recorded
from tests.training.conductors import GROUNDS, Vowels, known, pool_file
from training.cli import app
from training.composite import make_composite
from training.composite_families import FAMILIES
from training.conductor_questions import Question, Subsets, endless, question_at
from training.conductor_rollouts import Played, RolloutSettings, Written
from training.grpo import GrpoLearner, GrpoSettings, LoraShape
from training.grpo_file import dry_run, with_changes
from training.grpo_rounds import Recursion, make_batch, summary
from training.grpo_train import COMPACT, GrpoRun, run
from training.plans import short_plan

SMALL = GrpoSettings(
    steps=6,
    questions=2,
    group=4,
    learning_rate=0.03,
    max_tokens=12,
    lora=LoraShape(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj")),
    seed=7,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("tiny"))


def grpo_run(folder: Path, tmp_path: Path, **more: Any) -> GrpoRun:
    tmp_path.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "grpo": SMALL,
        "validation": 2,
        "validate_every": 3,
        "checkpoint_every": 2,
        "state": tmp_path / "state",
    }
    return GrpoRun(
        tmp_path / "adapter",
        pool_file(tmp_path, folder),
        model=str(folder),
        device="cpu",
        precision="float32",
        progress=False,
        **{**given, **more},
    )


def test_reward_rises_and_everything_is_kept(folder: Path, tmp_path: Path) -> None:
    grpo = replace(SMALL, steps=30, questions=4, group=8)
    report = run(grpo_run(folder, tmp_path, grpo=grpo, validate_every=15), Vowels())
    assert report.steps == 30
    assert report.last["reward"] > report.first["reward"] + 0.15
    assert [step for step, _, _ in report.validation] == [0, 15, 30]
    assert report.validation[-1][1] > report.validation[0][1]
    assert report.calls == 30 * 4 * 8
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    about = json.loads((tmp_path / "adapter" / "grpo.json").read_text())
    assert about["workers"] == list(GROUNDS)
    assert read_card(tmp_path / "adapter") == ConductorCard(tuple(GROUNDS), "compact", steps="full")
    assert about["settings"]["grpo"]["group"] == 8
    # Nothing of the machine goes with the adapter.
    assert str(tmp_path) not in (tmp_path / "adapter" / "grpo.json").read_text()
    assert (tmp_path / "state" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    rows = [json.loads(line) for line in (tmp_path / "state" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert "reward" in str(report.table().columns[0]._cells)


def test_tensorboard_holds_what_happened(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    run(grpo_run(folder, tmp_path), Vowels())
    events = accumulator.EventAccumulator(str(tmp_path / "state" / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"reward", "parsed", "steps", "length", "calls", "usd", "entropy", "loss", "rate"} <= names
    assert {"worker/words", "topology/single", "validation/right", "seconds/update"} <= names
    rows = [json.loads(line) for line in (tmp_path / "state" / "curve.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("reward")] == pytest.approx([row["reward"] for row in rows])
    assert [event.step for event in events.Scalars("validation/right")] == [3, 6]


@pytest.mark.timeout(300)  # one more process imports torch
def test_a_killed_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    run(grpo_run(folder, tmp_path / "straight"), Vowels())
    # Killed, without any warning, after a checkpoint and one more step.
    script = f"""
import os
from pathlib import Path
from tests.training.conductors import Vowels
from tests.training.test_grpo_train import grpo_run
from training.grpo import GrpoLearner
from training.grpo_train import run
step = GrpoLearner.step
def dies(self, groups):
    if self.done == 5:
        os._exit(9)
    return step(self, groups)
GrpoLearner.step = dies
run(grpo_run(Path({str(folder)!r}), Path({str(tmp_path / "killed")!r})), Vowels())
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False, env=os.environ, capture_output=True)
    assert ended.returncode == 9, ended.stderr.decode()[-2000:]
    with pytest.raises(ConfigError, match="holds the state of a run"):
        run(grpo_run(folder, tmp_path / "killed"), Vowels())
    other = grpo_run(folder, tmp_path / "killed", resume=True, rollouts=RolloutSettings(right=1.5))
    with pytest.raises(CheckpointError, match="another run: rollouts differ"):
        run(other, Vowels())
    run(grpo_run(folder, tmp_path / "killed", resume=True), Vowels())
    straight, killed = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("straight", "killed")
    )
    assert straight.keys() == killed.keys()
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    curves = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (tmp_path / name / "state/curve.jsonl").read_text().splitlines()
        ]
        for name in ("straight", "killed")
    ]
    assert curves[0] == curves[1]


def test_a_pool_on_one_local_model_answers_in_this_process(folder: Path, tmp_path: Path) -> None:
    """A model with random weights writes no plan: the reward of nothing, and not a single call."""
    report = run(grpo_run(folder, tmp_path, grpo=replace(SMALL, steps=2)))
    assert report.first == {"reward": 0.0, "right": 0.0, "parsed": 0.0}
    assert report.calls == 0
    rows = [json.loads(line) for line in (tmp_path / "state" / "curve.jsonl").read_text().splitlines()]
    assert all(sum(row["failure"].values()) == pytest.approx(1) for row in rows)
    assert all(row["gradient"] == 0 for row in rows)


# Rounds ---------------------------------------------------------------------------------------------------------


class Scores:
    """Rewards in the order of what was written, whatever it is."""

    def __init__(self, *rewards: list[float | None]) -> None:
        self.rewards = list(rewards)
        self.written: list[list[Written]] = []

    def play(self, written: list[Written]) -> list[Played]:  # type: ignore[override]
        self.written.append(list(written))
        rewards = self.rewards.pop(0)
        return [
            Played(reward, None if reward is None else reward, answer=f"answer {n}", topology="single")
            for n, reward in zip(range(len(written)), rewards, strict=True)
        ]


def batch(folder: Path, rollouts: Any, recursion: Recursion) -> Any:
    learner = GrpoLearner(folder, SMALL, device="cpu", precision="float32")
    tasks = endless(0, "train", 0.0)
    questions = [question_at(number, tasks, GROUNDS, Subsets(), 0) for number in range(2)]
    generator = torch.Generator().manual_seed(1)
    found = make_batch(
        learner, learner, questions, rollouts, pool=GROUNDS, prompt=COMPACT, recursion=recursion, generator=generator
    )
    return found, learner, questions


def test_groups_hold_the_question_the_completions_and_their_advantages(folder: Path) -> None:
    found, learner, questions = batch(folder, Scores([1.0, 0.5, 0.5, 0.0, 0.5, 0.5, 0.5, 0.5]), Recursion())
    assert len(found.groups) == 2
    for group, question in zip(found.groups, questions, strict=True):
        assert group.prompt == learner.encode(question.messages(GROUNDS, COMPACT))
        assert len(group.completions) == 4
    one, none = (group.advantages for group in found.groups)
    assert one[0] > 0 > one[3]
    assert one[1] == one[2] == pytest.approx(0)
    assert none == [0.0] * 4


def test_a_second_round_sees_plan_and_result_and_pays_the_first_back(folder: Path) -> None:
    scores = Scores([0.5, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5, None], [1.0, 0.5, 0.0, 0.5])
    found, learner, _ = batch(folder, scores, Recursion(share=0.5, discount=0.25))
    second = scores.written[1]
    assert [one.before for one in second] == ["answer 0", "answer 1", "answer 4", "answer 5"]
    assert len(found.played) == 12
    assert len(found.groups) == 2 + 4
    # Rewards of the first question: 0.75·0.5 + 0.25·1, 0.75·0.5 + 0.25·0.5, 0.5, 0.5.
    first = found.groups[0].advantages
    assert first[0] == max(first)
    assert first[1] == first[2] == first[3] < 0
    # The second round's plans are compared with those of the same question only.
    later = [group.advantages[0] for group in found.groups[2:]]
    assert later == pytest.approx([later[0], -later[0], -later[3], later[3]])
    assert later[0] > 0.7
    prompt = learner.decode(found.groups[2].prompt)
    assert "Result: answer 0" in prompt
    assert scores.written[0][0].text.strip() in prompt or not scores.written[0][0].text.strip()


def test_a_summary_of_nothing_known_says_so() -> None:
    found = summary([Played(None, None, excluded="WorkerUnavailableError")], [4], GROUNDS)
    assert (found["reward"], found["right"], found["excluded"]) == (None, None, 1)
    found = summary(
        [
            Played(1.0, 1.0, topology="chain", workers=("words", "logic"), calls=2, cost_usd=0.1),
            Played(0.0, 0.0, failure="missing"),
        ],
        [10, 20],
        GROUNDS,
    )
    assert (found["reward"], found["right"], found["parsed"], found["steps"], found["length"]) == (0.5, 0.5, 0.5, 2, 15)
    assert found["worker"] == {"arithmetic": 0.0, "words": 0.5, "counting": 0.0, "logic": 0.5}
    assert (found["topology"], found["failure"], found["calls"]) == ({"chain": 1.0}, {"missing": 1.0}, 2)


# Over Ray -------------------------------------------------------------------------------------------------------

ONE = make_composite("both_ends", random.Random(3))
ANSWERS = known(ONE.composition)


def speaks(request: Recorded) -> str:
    return ANSWERS.get(request.model, {}).get(request.body["messages"][-1]["content"], "Pumpernickel.")


@pytest.fixture
def upstream() -> Iterator[LoopbackProvider]:
    with LoopbackProvider(Behaviour(text=speaks, usage=Usage(10, 20))) as provider:
        yield provider


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_rollouts_over_the_cluster_come_back_in_order(
    ray_session: None, upstream: LoopbackProvider, tmp_path: Path
) -> None:
    from actors.config_file import load_config
    from training.conductor_fanout import RayRollouts

    workers = [
        {"name": ground, "provider": "openai", "model": ground, "base_url": upstream.url_for("openai"),
         "api_key": "sk-test-0123456789abcdef", "price": {"input": 1.0, "output": 10.0}, "retry": {"attempts": 1}}
        for ground in GROUNDS
    ]  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"workers": workers}))
    rollouts = RayRollouts(load_config(path), GROUNDS, RolloutSettings(steps="bare"), lanes=2, seconds=120)
    plan = tuple((step.ground, step.subtask, step.access) for step in ONE.plan)
    from orchestrator.workflow import Step, Workflow

    right = short_plan(Workflow(tuple(Step(*step) for step in plan)), GROUNDS)
    wrong = short_plan(Workflow((Step("logic", "What?"),)), GROUNDS)
    texts = [right, "no plan", wrong, right, wrong]
    found = rollouts.play([Written(ONE.task("it"), text, GROUNDS) for text in texts])
    assert [one.reward for one in found] == [1.0, 0.0, 0.5, 1.0, 0.5]
    assert [one.calls for one in found] == [3, 0, 1, 3, 1]
    assert found[0].cost_usd == pytest.approx(3 * (10 * 1.0 + 20 * 10.0) / 1e6)
    short = RayRollouts(load_config(path), GROUNDS, RolloutSettings(steps="bare"), lanes=1, seconds=0.001)
    with pytest.raises(DataError, match=re.escape("took longer than 0.001 s")):
        short.play([Written(ONE.task("it"), right, GROUNDS)])


# Files and commands ---------------------------------------------------------------------------------------------


def test_a_file_describes_a_run_and_options_stand_over_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = {"out": "x", "config": "pool.yaml", "grpo": {"steps": 3, "lora": {"rank": 2}}, "sources": ["a", "b"]}
    path.write_text(yaml.safe_dump(text))
    found = with_changes(path, {"single": 0.5}, {"grpo": {"steps": 9}, "rollouts": {}})
    assert (found.grpo.steps, found.grpo.lora, found.single) == (9, LoraShape(rank=2), 0.5)
    assert (found.config, found.out, found.sources) == (tmp_path / "pool.yaml", Path("x"), ("a", "b"))
    assert with_changes(path, {}, {}, full=True).grpo.lora is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("out: [", "is not YAML"),
        ("- a", "keys and values"),
        ("{out: x, config: c, grpo: {steps: 3}, gorup: 4}", "no setting gorup"),
        ("{out: x, config: c, grpo: {steps: 3, gruop: 4}}", "grpo: no setting gruop"),
        ("{out: x, config: c, grpo: {steps: many}}", "steps: 'many' does not fit"),
        ("{out: x, config: c, grpo: {steps: 3, group: 1}}", "a group at least 2"),
        ("{out: x, config: c, grpo: {}}", "steps is missing"),
        ("{out: x, config: c, grpo: {steps: 3}, rollouts: {steps: loud}}", "'loud' does not fit"),
        ("{out: 's3://b/x', config: c, grpo: {steps: 3}}", "out: s3://b/x is no path; give --out"),
        ("{out: x, grpo: {steps: 3}}", "config is missing"),
    ],
)
def test_a_wrong_file_is_told_in_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        with_changes(path, {}, {})


def test_the_shipped_7b_run_is_the_papers(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "conductor-7b.yaml"
    found = with_changes(path, {"sources": ("composite",)}, {})
    grpo = found.grpo
    assert (grpo.steps, grpo.questions, grpo.group, grpo.beta, grpo.clip) == (200, 4, 64, 0.0, 0.2)
    assert (grpo.max_tokens, grpo.temperature, grpo.warmup, grpo.scale) == (1024, 1.0, 0.03, "std")
    told = dry_run(replace(found, sources=()))
    assert 7.6e9 < told.numbers < 7.7e9
    assert told.completions == 256
    assert told.calls == 256 * 5 * 200
    full = dry_run(replace(found, sources=(), grpo=replace(grpo, lora=None)))
    assert full.learnt == full.numbers
    assert full.training_bytes > 80 * 2**30


def test_the_shipped_run_of_choices_leaves_them_to_the_conductor() -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "conductor-choice.yaml"
    found = with_changes(path, {}, {})
    assert found.config == path.parent / "embedded.yaml"
    assert found.config.is_file()
    assert (found.single, found.assign) == (1.0, "conductor")
    assert (found.grpo.questions, found.grpo.group, found.grpo.beta) == (16, 8, 0.1)


def test_the_command_trains_and_tells(folder: Path, tmp_path: Path) -> None:
    pool = pool_file(tmp_path, folder)
    arguments = ["--out", str(tmp_path / "adapter"), "--config", str(pool), "--model", str(folder), "--steps", "1"]
    small = ["--questions", "1", "--group", "2", "--validation", "0", "--state", str(tmp_path / "state"), "--quiet"]
    done = CliRunner().invoke(app, ["train", "grpo", *arguments, *small, "--json", str(tmp_path / "report.json")])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 1
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    again = CliRunner().invoke(app, ["train", "grpo", *arguments, *small])
    assert again.exit_code == 2
    dry = CliRunner().invoke(app, ["train", "grpo", *arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "completions a step" in dry.output


def test_the_warm_start_command_learns_and_tells_how_many_plans_parse(folder: Path, tmp_path: Path) -> None:
    arguments = ["--warm-start", "--out", str(tmp_path / "warm"), "--steps", "2", "--batch", "2", "--rank", "2"]
    more = ["--model", str(folder), "--checks", "2", "--validate-every", "2", "--state", str(tmp_path / "state"), "-q"]
    done = CliRunner().invoke(app, ["train", "conductor", *arguments, *more])
    assert done.exit_code == 0, done.output
    about = json.loads((tmp_path / "warm" / "warm_start.json").read_text())
    assert about["parsed"] == 0.0  # random weights
    assert sum(about["failures"].values()) == 2
    assert about["steps"] == 2
    # What it wrote is a start for the second stage.
    report = run(
        grpo_run(folder, tmp_path, grpo=replace(SMALL, steps=1), start=tmp_path / "warm", state=tmp_path / "s"),
        Vowels(),
    )
    assert report.steps == 1


def test_every_family_has_questions(folder: Path) -> None:
    tasks = endless(0, "val", 0.0)
    assert {tasks(index).dataset for index in range(300)} == set(FAMILIES)
    assert isinstance(question_at(0, tasks, GROUNDS, Subsets(), 0), Question)
