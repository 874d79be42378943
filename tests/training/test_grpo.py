from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.errors import CheckpointError, ConfigError
from actors.messages import Message
from tests.actors.tiny_chat import random_adapter, tiny_chat_folder
from training.grpo import (
    Group,
    GrpoLearner,
    GrpoSettings,
    LoraShape,
    advantages,
    log_probabilities,
    token_losses,
)
from training.lora import Precision
from training.sampling import sample

SHAPE = LoraShape(rank=4, alpha=8, targets=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(folder, tmp_path_factory.mktemp("adapter"), seed=3, scale=0.1)


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def learner(folder: Path, start: Path | None = None, **more: Any) -> GrpoLearner:
    given = {"steps": 6, "questions": 2, "group": 3, "lora": SHAPE, "max_tokens": 8} | more
    return GrpoLearner(folder, GrpoSettings(**given), start=start, device="cpu", precision="float32")


def groups(seed: int = 0, *, spread: float = 1.0) -> list[Group]:
    """Two groups of three completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 250, (count,), generator=generator).tolist()

    return [
        Group(tokens(7), [tokens(5), tokens(2), tokens(9)], [spread, -0.4, -0.6]),
        Group(tokens(4), [tokens(3), tokens(6), tokens(1)], [0.9, 0.3, -1.2]),
    ]


def padded_log_probabilities(model: Any, prompt: list[int], completions: list[list[int]]) -> list[torch.Tensor]:
    """One row for each completion, without any trick."""
    found = []
    for completion in completions:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].float()
        spread = torch.log_softmax(logits, -1)
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        found.append(torch.stack([spread[at, token] for at, token in zip(places, completion, strict=True)]))
    return found


def test_one_sequence_for_a_group_gives_the_log_probabilities_of_a_row_each(model: Any) -> None:
    for group in groups():
        wanted = torch.cat(padded_log_probabilities(model, list(group.prompt), [list(c) for c in group.completions]))
        found, entropy = log_probabilities(model, group.prompt, group.completions)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert ((entropy > 0) & (entropy < math.log(model.config.vocab_size))).all()


@pytest.mark.parametrize("beta", [0.0, 0.07])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.timeout(300)
def test_loss_and_gradients_are_those_of_trl(
    folder: Path, adapter: Path, tmp_path: Path, beta: float, temperature: float
) -> None:
    """The whole way: TRL's own trainer, model, padding and masks on the same batch, with LoRA."""
    import datasets
    import trl
    from peft import PeftModel

    ours = learner(folder, adapter, beta=beta, temperature=temperature)
    if beta:  # away from the start, where KL and its gradient are not zero
        with torch.no_grad():
            for number, weight in enumerate(ours._learnt):
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = trl.GRPOTrainer(
        model=theirs,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=3,
            num_generations=3,
            loss_type="bnpo",
            epsilon=0.2,
            beta=beta,
            temperature=temperature,
            bf16=False,
            use_cpu=True,
            report_to=[],
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a", "b", "c"]}),
        processing_class=tokenizer,
    )
    trainable = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight, value in zip(trainable, ours._learnt, strict=True):
            weight.copy_(value)
    batch = groups()
    inputs = trl_batch(batch, tokenizer.pad_token_id)
    if beta:
        with ours._starting_weights():
            start = [log_probabilities(ours.model, g.prompt, g.completions, temperature=temperature)[0] for g in batch]
        inputs["ref_per_token_logps"] = scattered(torch.cat(start).detach(), inputs["completion_mask"])
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    found, gradients = ours.gradients(batch)
    assert found == pytest.approx(float(loss.detach()), abs=1e-5)
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in gradients)
    for weight, gradient in zip(trainable, gradients, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(gradient, weight.grad, atol=1e-5, rtol=1e-4)


def trl_batch(batch: list[Group], pad: int) -> dict[str, torch.Tensor]:
    """Prompts padded on the left and completions on the right, as TRL's collator does."""
    rows = [
        (list(group.prompt), list(completion), advantage)
        for group in batch
        for completion, advantage in zip(group.completions, group.advantages, strict=True)
    ]
    before, after = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return {
        "prompt_ids": torch.tensor([[pad] * (before - len(p)) + p for p, _, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (before - len(p)) + [1] * len(p) for p, _, _ in rows]),
        "completion_ids": torch.tensor([c + [pad] * (after - len(c)) for _, c, _ in rows]),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (after - len(c)) for _, c, _ in rows]),
        "advantages": torch.tensor([advantage for _, _, advantage in rows]),
    }


def scattered(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    full = torch.zeros(mask.shape)
    full[mask.bool()] = flat
    return full


def test_group_advantages_are_those_of_the_conductor() -> None:
    # By hand: mean 0.5, standard deviation (n - 1) of [1, 0.5, 0] is 0.5.
    assert advantages([1.0, 0.5, 0.0]) == pytest.approx([0.5 / 0.5001, 0.0, -0.5 / 0.5001])
    assert advantages([1.0, 0.5, 0.0], scale="none") == pytest.approx([0.5, 0.0, -0.5])
    assert advantages([0.5, 0.5, 0.5]) == [0.0, 0.0, 0.0]
    # What is not known takes no part: the others as if they were the group.
    assert advantages([1.0, None, 0.5, 0.0]) == pytest.approx([0.5 / 0.5001, 0.0, 0.0, -0.5 / 0.5001])
    assert advantages([1.0, None]) == [0.0, 0.0]


@given(st.lists(st.floats(0, 2), min_size=2, max_size=16), st.floats(-5, 5))
def test_advantages_sum_to_nothing_and_do_not_know_where_zero_is(rewards: list[float], shift: float) -> None:
    found = advantages(rewards)
    assert sum(found) == pytest.approx(0, abs=1e-6)
    assert advantages([reward + shift for reward in rewards]) == pytest.approx(found, abs=1e-4)


@settings(max_examples=60)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-2, 2), st.floats(0.05, 0.5))
def test_the_surrogate_is_never_better_than_unclipped_and_its_gradient_ends_at_the_bound(
    now: float, before: float, advantage: float, clip: float
) -> None:
    at = torch.tensor([now], requires_grad=True)
    loss, kl, cut = token_losses(at, torch.tensor([before]), torch.tensor([advantage]), clip=clip)
    ratio = math.exp(now - before)
    assert float(loss.detach()) >= -ratio * advantage - 1e-4 * (1 + abs(ratio * advantage))
    loss.sum().backward()
    assert at.grad is not None
    if bool(cut):
        assert float(at.grad) == 0
        assert ratio < 1 - clip or ratio > 1 + clip
    assert float(kl) == 0


def test_kl_is_zero_at_the_start_and_positive_elsewhere() -> None:
    now = torch.tensor([-1.0, -2.0, -0.5])
    start = torch.tensor([-1.0, -1.5, -3.0])
    loss, kl, _ = token_losses(now, now, torch.zeros(3), clip=0.2, beta=0.1, start=start)
    assert kl.tolist() == pytest.approx([0.0, math.exp(0.5) - 1.5, math.exp(-2.5) + 1.5])
    assert loss.tolist() == pytest.approx((0.1 * kl).tolist())


def test_training_makes_rewarded_completions_likelier(folder: Path) -> None:
    ours = learner(folder, steps=12, learning_rate=0.02, warmup=0.0, floor=1.0)
    (group, _) = groups()

    def likely() -> list[float]:
        flat = log_probabilities(ours.model, group.prompt, group.completions)[0].detach()
        return [float(part.sum()) for part in flat.split([len(c) for c in group.completions])]

    before = likely()
    for _ in range(12):
        update = ours.step([group])
    after = likely()
    assert after[0] > before[0] + 0.5
    assert after[1] < before[1]
    assert after[2] < before[2]
    assert math.isfinite(update.loss)
    assert update.gradient > 0
    assert ours.done == 12


def test_groups_without_advantage_change_nothing(folder: Path) -> None:
    ours = learner(folder)
    before = [weight.detach().clone() for weight in ours._learnt]
    group = groups()[0]
    update = ours.step([Group(group.prompt, group.completions, [0.0, 0.0, 0.0])])
    assert update.gradient == 0
    assert all(torch.equal(weight, old) for weight, old in zip(ours._learnt, before, strict=True))


def test_packs_of_any_size_give_the_same_gradients(folder: Path) -> None:
    loss, gradients = learner(folder, pack=16).gradients(groups())
    other, others = learner(folder, pack=1).gradients(groups())
    assert other == pytest.approx(loss, abs=1e-6)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_a_batch_used_twice_is_clipped_against_the_policy_that_sampled_it(folder: Path) -> None:
    update = learner(folder, iterations=3, learning_rate=0.2, warmup=0.0).step(groups(spread=3.0))
    assert math.isfinite(update.loss)
    # The sums are of the first pass, where nothing can be clipped yet.
    assert update.clipped == 0


def test_full_fine_tuning_learns_every_weight_and_writes_a_model(folder: Path, tmp_path: Path) -> None:
    ours = learner(folder, lora=None, learning_rate=1e-3)
    assert ours.numbers == sum(weight.numel() for weight in ours.model.parameters())
    before = ours.model.get_input_embeddings().weight.detach().clone()
    ours.step(groups())
    assert not torch.equal(before, ours.model.get_input_embeddings().weight)
    ours.export(tmp_path / "model", base="tiny")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(again.get_input_embeddings().weight, ours.model.get_input_embeddings().weight)
    with pytest.raises(ConfigError, match="needs LoRA"):
        learner(folder, tmp_path, lora=None)


def test_sampling_draws_what_the_model_says_and_repeats_itself(model: Any) -> None:
    prompts = [[5, 6, 7, 8], [9, 10]]

    def drawn(seed: int, **more: Any) -> list[list[list[int]]]:
        generator = torch.Generator().manual_seed(seed)
        given = {"copies": 3, "max_tokens": 6, "ends": {3}, "generator": generator} | more
        return sample(model, prompts, **given)

    first = drawn(1)
    assert first == drawn(1)
    assert first != drawn(2)
    assert [len(copies) for copies in first] == [3, 3]
    assert all(1 <= len(one) <= 6 for copies in first for one in copies)
    # Greedy decoding is that of the plain model, row by row, padding or not.
    for prompt, copies in zip(prompts, drawn(1, temperature=0.0, ends={-1}), strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        assert copies == [tokens[len(prompt) :]] * 3
    # An end token ends a row, and only its row.
    end = drawn(1, ends={-1})[0][0][2]
    ended = drawn(1, ends={end})
    assert all(end not in one[:-1] for copies in ended for one in copies)
    assert any(one[-1] == end for copies in ended for one in copies)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_learner_samples_with_its_adapter_and_keeps_its_weights(
    folder: Path, adapter: Path, precision: Precision
) -> None:
    with_adapter = GrpoLearner(
        folder, GrpoSettings(steps=1, lora=SHAPE, max_tokens=8), start=adapter, device="cpu", precision=precision
    )
    before = {name: weight.clone() for name, weight in with_adapter.model.named_parameters()}
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    drawn = with_adapter.sample(prompts, copies=4, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(before[name], weight) for name, weight in with_adapter.model.named_parameters())
    if precision == "float32":  # merged weights of fewer digits may draw another token
        plain = {"copies": 4, "max_tokens": 8, "ends": {with_adapter.end}}
        unmerged = sample(with_adapter.model, prompts, generator=torch.Generator().manual_seed(0), **plain)
        assert drawn == unmerged
        with with_adapter.model.disable_adapter():
            bare = sample(with_adapter.model, prompts, generator=torch.Generator().manual_seed(0), **plain)
        assert drawn != bare


def test_sampled_shares_are_the_models_probabilities(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = sample(model, [[5, 6, 7]], copies=4000, max_tokens=1, ends=set(), generator=generator, temperature=0.5)
    shares = torch.bincount(torch.tensor([one[0] for one in drawn[0]]), minlength=model.config.vocab_size) / 4000
    with torch.no_grad():
        wanted = torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5, -1)
    assert float((shares - wanted).abs().max()) < 0.03
    generator = torch.Generator().manual_seed(0)
    few = sample(model, [[5, 6, 7]], copies=500, max_tokens=1, ends=set(), generator=generator, top_p=0.3)
    ordered = wanted_order(model)
    nucleus = ordered[: int((ordered_shares(model).cumsum(0) < 0.3).sum()) + 1]
    assert {one[0] for one in few[0]} <= set(nucleus)


@torch.no_grad()
def ordered_shares(model: Any) -> torch.Tensor:
    return torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1], -1).sort(descending=True).values


@torch.no_grad()
def wanted_order(model: Any) -> list[int]:
    return model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argsort(descending=True).tolist()


def test_a_state_goes_on_bit_for_bit_and_refuses_another_run(folder: Path, adapter: Path, tmp_path: Path) -> None:
    straight = learner(folder, adapter)
    for step in range(4):
        straight.step(groups(step))
    first = learner(folder, adapter)
    for step in range(2):
        first.step(groups(step))
    first.save(tmp_path)
    resumed = learner(folder, adapter)
    resumed.restore(tmp_path)
    assert resumed.done == 2
    for step in range(2, 4):
        resumed.step(groups(step))
    assert all(torch.equal(a, b) for a, b in zip(straight._learnt, resumed._learnt, strict=True))
    with pytest.raises(CheckpointError, match="another run: beta differ"):
        learner(folder, adapter, beta=0.5).restore(tmp_path)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        learner(folder, adapter).restore(tmp_path / "nowhere")


def test_texts_pass_through_the_chat_template(folder: Path) -> None:
    ours = learner(folder)
    tokens = ours.encode((Message("user", "Hi"),))
    assert ours.decode(tokens).startswith("user\nHi")


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 1, "group": 1}, {"steps": 1, "temperature": 0.0}, {"steps": 1, "clip": 1.5}],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GrpoSettings(**wrong)


@pytest.mark.timeout(120)
def test_it_imports_without_ray() -> None:
    code = "import sys; import training.grpo, training.sampling; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
