"""Group relative policy optimisation (GRPO; Shao et al. 2024, §4.1) of a causal language model. No Ray.

For each question a group of completions is sampled and rewarded. A completion's advantage is its reward less the
group's mean, over the group's standard deviation; all of its tokens share it. The loss is PPO's clipped surrogate per
token, averaged over all completion tokens of the batch ("token-level", TRL's `bnpo`, as the Conductor uses it), plus
`beta` times an estimate of the KL divergence from the weights that training started with (Schulman's k3). One update
per batch by default, with the policy that sampled it.

A question's completions stand behind one copy of its prompt in a single sequence, each seeing the prompt and itself:
the same log-probabilities as one row each, for a fraction of the tokens.
"""

from __future__ import annotations

import os

# As in the local engine: spinning threads would starve whoever else wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from actors.adapters.local_model import load_model
from actors.adapters.text_worker import render
from actors.errors import ConfigError
from actors.messages import Message
from training.lora import Precision, attention_on, end_token, merged, restore_state, write_adapter, write_state
from training.sampling import sample

Vector = Sequence[float]


@dataclass(frozen=True)
class LoraShape:
    """Over which layers an adapter is learnt; `alpha / rank` scales it."""

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")


@dataclass(frozen=True)
class GrpoSettings:
    """`steps` batches of `questions` groups of `group` completions. `lora` None learns all weights.

    `iterations` is how often a batch is used, `pack` how many completions go through the model at once. `scale` "std"
    divides advantages by the group's standard deviation, "none" leaves them (Liu et al. 2025). The learning rate rises
    over the share `warmup` of the steps, then falls along a cosine to the share `floor`.
    """

    steps: int
    questions: int = 4
    group: int = 8
    learning_rate: float = 3e-4
    warmup: float = 0.03
    floor: float = 0.0
    clip: float = 0.2
    beta: float = 0.0
    iterations: int = 1
    scale: Literal["std", "none"] = "std"
    grad_clip: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 160
    pack: int = 16
    lora: LoraShape | None = LoraShape()
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.questions, self.iterations, self.max_tokens, self.pack) < 1 or self.group < 2:
            raise ConfigError("steps, questions, iterations, tokens and pack must be at least 1, a group at least 2")
        if not (0 < self.learning_rate < 1 and 0 < self.clip < 1 and self.beta >= 0 and self.temperature > 0):
            raise ConfigError("learning rate and clip lie between 0 and 1, beta is not negative, temperature positive")

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - rise)
        return self.learning_rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Group:
    """Completions of one prompt, as token ids, with an advantage each; an end token belongs to its completion."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    advantages: Vector


@dataclass(frozen=True)
class Update:
    """One step: the loss before it, the mean per token of KL from the start (None where it was not asked for) and of
    entropy, the share of clipped tokens (all over tokens that teach), the gradient's norm before clipping, and the
    learning rate."""

    loss: float
    kl: float | None
    entropy: float
    clipped: float
    gradient: float
    rate: float


def advantages(rewards: Sequence[float | None], *, scale: Literal["std", "none"] = "std") -> list[float]:
    """Rewards of one group → advantages. None (nothing is known) takes no part and gets 0.

    Shao et al. 2024, eq. 3 with outcome supervision; the small number in the denominator is the Conductor's and TRL's.
    """
    known = torch.tensor([reward for reward in rewards if reward is not None], dtype=torch.float64)
    if len(known) < 2:
        return [0.0] * len(rewards)
    spread = float(known.std()) + 1e-4 if scale == "std" else 1.0
    mean = float(known.mean())
    return [0.0 if reward is None else (reward - mean) / spread for reward in rewards]


def token_losses(
    now: Tensor, before: Tensor, advantage: Tensor, *, clip: float, beta: float = 0.0, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate and KL of each token. All tensors `[tokens]`: log-probabilities under the weights that learn,
    under those that sampled and, with `beta`, under those that training started with.

    Returns:
        loss, KL from the start (zeros without `start`), and whether the ratio was clipped; each `[tokens]`.
    """
    ratio = torch.exp(now - before)
    bounded = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.min(ratio * advantage, bounded * advantage)  # Schulman et al. 2017, eq. 7
    cut = ((ratio < 1 - clip) & (advantage < 0)) | ((ratio > 1 + clip) & (advantage > 0))
    if start is None:
        return loss, torch.zeros_like(now), cut
    kl = torch.exp(start - now) - (start - now) - 1  # Shao et al. 2024, eq. 4
    # With the ratio before it, its gradient is that of the divergence itself (DeepSeek-V3.2; TRL's default).
    return loss + beta * ratio * kl, kl, cut


def log_probabilities(
    model: Any, prompt: Sequence[int], completions: Sequence[Sequence[int]], *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy `[tokens]` of every completion token, the completions one after the other.

    `model` is a transformers model, or a peft one around it; `temperature` is what the completions were sampled at.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = base.device
    first, lengths = len(prompt), [len(one) for one in completions]
    tokens = torch.tensor([*prompt, *(token for one in completions for token in one)], device=device)
    # Which completion a place belongs to; the prompt is 0 and seen by all.
    owner = torch.repeat_interleave(
        torch.arange(len(completions) + 1, device=device), torch.tensor([first, *lengths], device=device)
    )
    seen = ((owner[:, None] == owner[None]) | (owner[None] == 0)).tril()
    places = torch.cat([torch.arange(first), *(first + torch.arange(length) for length in lengths)]).to(device)
    hidden = base.get_decoder()(
        input_ids=tokens[None], attention_mask=seen[None, None], position_ids=places[None], use_cache=False
    ).last_hidden_state[0]
    # A token is predicted where the one before it stands: for a completion's first token, the prompt's end.
    before = torch.arange(len(tokens), device=device) - 1
    before[[first + sum(lengths[:index]) for index in range(len(lengths))]] = first - 1
    logits = base.get_output_embeddings()(hidden[before[first:]]).float()
    spread = torch.log_softmax(logits / temperature, -1)
    with torch.no_grad():
        entropy = -(spread.exp() * spread).sum(-1)
    return spread.gather(-1, tokens[first:, None])[:, 0], entropy


class GrpoLearner:
    """A policy that samples and learns. `done` counts the steps taken."""

    def __init__(
        self,
        folder: Path,
        settings: GrpoSettings,
        *,
        start: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        """`start` is an adapter to begin with (a warm start; its own shape then counts); `identity` is what else a
        state must agree in to go on with it.

        Raises:
            ConfigError: the folder holds no chat model we can load, an adapter does not fit, or no GPU.
        """
        dtype = None if precision == "auto" else getattr(torch, precision)
        if settings.lora is None and precision == "auto":
            dtype = torch.float32  # AdamW's small steps vanish in bfloat16 weights
        loaded = load_model(folder, device=device, adapters={}, dtype=dtype)
        self.settings, self.done, self.tokenizer = settings, 0, loaded.tokenizer
        self.model: Any = _learning(loaded.model, settings, start)
        self.model.train()
        self._base: Any = loaded.model
        self.end = end_token(self._base, self.tokenizer)
        self._learnt = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._start = [weight.detach().clone() for weight in self._learnt] if settings.beta else []
        self._optimiser = torch.optim.AdamW(self._learnt, lr=settings.learning_rate, weight_decay=0.0)
        self._identity = {**asdict(settings), **(identity or {}), "dtype": str(loaded.model.dtype)}

    @property
    def numbers(self) -> int:
        """How many numbers are learnt."""
        return sum(weight.numel() for weight in self._learnt)

    def encode(self, messages: tuple[Message, ...]) -> list[int]:
        return list(self.tokenizer(render(self.tokenizer, messages), add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        copies: int,
        generator: torch.Generator,
        temperature: float | None = None,
    ) -> list[list[list[int]]]:
        """`copies` completions of each prompt, as `training.sampling.sample` gives them; at the settings' temperature
        if none is given."""
        with merged(self.model):
            return sample(
                self.model,
                prompts,
                copies=copies,
                max_tokens=self.settings.max_tokens,
                ends={self.end},
                generator=generator,
                temperature=self.settings.temperature if temperature is None else temperature,
                top_p=self.settings.top_p,
            )

    def step(self, groups: Sequence[Group]) -> Update:
        """Learn from one batch. Groups without any advantage cost no pass unless KL holds them."""
        rate = self.settings.rate(self.done)
        for parameters in self._optimiser.param_groups:
            parameters["lr"] = rate
        total = sum(len(tokens) for group in groups for tokens in group.completions)
        packs = [pack for group in groups for pack in self._packs(group)]
        before: list[Tensor | None] = [None] * len(packs)
        if self.settings.iterations > 1:
            before = [self._no_grad(pack) for pack in packs]
        start: list[Tensor | None] = [None] * len(packs)
        if self.settings.beta:
            with self._starting_weights():
                start = [self._no_grad(pack) for pack in packs]
        measured = sum(len(tokens) for pack in packs for tokens in pack.completions)
        sums = torch.zeros(4, dtype=torch.float64)
        norm = 0.0
        for iteration in range(self.settings.iterations):
            self._optimiser.zero_grad(set_to_none=True)
            for pack, old, first in zip(packs, before, start, strict=True):
                found = self._backward(pack, old, first, total)
                sums += found if iteration == 0 else 0
            norm = float(torch.nn.utils.clip_grad_norm_(self._learnt, self.settings.grad_clip))
            self._optimiser.step()
        self.done += 1
        loss, kl, entropy, clipped = sums.tolist()
        return Update(
            loss / max(1, total),
            kl / max(1, measured) if self.settings.beta else None,
            entropy / max(1, measured),
            clipped / max(1, measured),
            norm,
            rate,
        )

    def gradients(self, groups: Sequence[Group]) -> tuple[float, list[Tensor]]:
        """The loss of a batch and its gradients, without learning from it."""
        self._optimiser.zero_grad(set_to_none=True)
        total = sum(len(tokens) for group in groups for tokens in group.completions)
        loss = 0.0
        for group in groups:
            for pack in self._packs(group):
                start = None
                if self.settings.beta:
                    with self._starting_weights():
                        start = self._no_grad(pack)
                loss += float(self._backward(pack, None, start, total)[0]) / total
        found = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in self._learnt]
        self._optimiser.zero_grad(set_to_none=True)
        return loss, found

    def save(self, folder: Path) -> None:
        """Write the state to go on from, atomically."""
        weights = [weight.detach().cpu() for weight in self._learnt]
        state = {"done": self.done, "weights": weights, "optimiser": self._optimiser.state_dict()}
        write_state(folder, self._identity, state)

    def restore(self, folder: Path) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: there is none, it cannot be read, or it is of another run; names what differs.
        """
        self.done = restore_state(folder, self._identity, self._learnt, self._optimiser)

    def export(self, folder: Path, *, base: str) -> None:
        """Write the adapter in peft's layout, or with full fine-tuning the whole model with its tokenizer."""
        if self.settings.lora is not None:
            write_adapter(self.model, folder, base=base)
        else:
            self.model.save_pretrained(str(folder))
            self.tokenizer.save_pretrained(str(folder))

    def _packs(self, group: Group) -> Iterator[Group]:
        """A group in pieces that go through the model at once. Completions without an advantage teach nothing."""
        chosen = [
            (tokens, advantage)
            for tokens, advantage in zip(group.completions, group.advantages, strict=True)
            if tokens and (advantage or self.settings.beta)
        ]
        for first in range(0, len(chosen), self.settings.pack):
            piece = chosen[first : first + self.settings.pack]
            yield Group(group.prompt, [tokens for tokens, _ in piece], [advantage for _, advantage in piece])

    def _backward(self, pack: Group, before: Tensor | None, start: Tensor | None, total: int) -> Tensor:
        """Add a pack's gradients; returns its sums of loss, KL, entropy and clipped tokens `[4]`."""
        with attention_on(self._base.device):
            now, entropy = self._measured(pack)
            lengths = torch.tensor([len(tokens) for tokens in pack.completions])
            advantage = torch.tensor(pack.advantages, dtype=torch.float32).repeat_interleave(lengths).to(now)
            loss, kl, cut = token_losses(
                now,
                now.detach() if before is None else before,
                advantage,
                clip=self.settings.clip,
                beta=self.settings.beta,
                start=start,
            )
            (loss.sum() / total).backward()
        sums = torch.stack([loss.detach().sum(), kl.detach().sum(), entropy.sum(), cut.sum()])
        return sums.double().cpu()

    @torch.no_grad()
    def _no_grad(self, pack: Group) -> Tensor:
        return self._measured(pack)[0]

    def _measured(self, pack: Group) -> tuple[Tensor, Tensor]:
        return log_probabilities(self.model, pack.prompt, pack.completions, temperature=self.settings.temperature)

    @contextmanager
    def _starting_weights(self) -> Iterator[None]:
        """The weights that training started with, for as long as this is open."""
        learnt = [weight.detach().clone() for weight in self._learnt]
        _put(self._learnt, self._start)
        try:
            yield
        finally:
            _put(self._learnt, learnt)


def _learning(model: Any, settings: GrpoSettings, start: Path | None) -> Any:
    """The model with the weights to learn set free: an adapter's over it, or its own."""
    if settings.lora is None:
        if start is not None:
            raise ConfigError("an adapter to start with needs LoRA; full fine-tuning starts with a model")
        return model.requires_grad_(True)
    from peft import LoraConfig, PeftModel, get_peft_model

    shape = settings.lora
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        try:
            if start is not None:
                return PeftModel.from_pretrained(model, str(start), is_trainable=True)
            config = LoraConfig(
                r=shape.rank, lora_alpha=shape.alpha, target_modules=list(shape.targets), task_type="CAUSAL_LM"
            )
            return get_peft_model(model, config)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(f"no adapter fits the model: {(str(error).splitlines() or [''])[0][:200]}") from error


@torch.no_grad()
def _put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
