"""Fine-tune a LoRA adapter (Hu et al. 2022) of a small chat model on questions with short answers.

The loss is the cross-entropy of the answer's tokens only. Example `i` is a pure function of `i` and there is no
dropout, so that weights, optimiser and the number of steps done are all the state there is: a resumed run goes on as
if it had never stopped.
"""

from __future__ import annotations

import os

# As in the local engine: spinning threads would starve whoever else wants the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from actors.adapters.local_model import load_model
from actors.adapters.text_worker import render
from actors.errors import CheckpointError, ConfigError
from actors.messages import Message

Precision = Literal["auto", "float32", "bfloat16"]
IGNORED = -100  # what torch's cross-entropy leaves out
STATE = "state.pt"


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation that ends with a question, and the answer to learn."""

    messages: tuple[Message, ...]
    answer: str


@dataclass(frozen=True)
class LoraSettings:
    """`warmup` is the share of the steps in which the learning rate rises, `floor` the share of it that the cosine
    ends at. `window` batches are drawn together and sorted by length, so that little is padded."""

    steps: int
    batch: int = 32
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj")
    learning_rate: float = 2e-3
    warmup: float = 0.05
    floor: float = 0.05
    clip: float = 1.0
    window: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.rank, self.window) < 1 or not 0 < self.learning_rate < 1:
            raise ConfigError("steps, batch, rank and window must be at least 1, the learning rate between 0 and 1")

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0: a linear rise, then a cosine."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - rise)
        return self.learning_rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids; the last `answer` of them are the answer with its end."""

    tokens: tuple[int, ...]
    answer: int

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.tokens[: -self.answer]


class Learner:
    """A frozen model, the adapter being learnt over it, and its optimiser. `done` counts the steps taken."""

    def __init__(
        self,
        folder: Path,
        settings: LoraSettings,
        talk: Callable[[int], Talk],
        *,
        identity: Mapping[str, Any] | None = None,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        """`talk(i)` is training example `i`; `identity` is what else a state must agree in to go on with it.

        Raises:
            ConfigError: the folder holds no chat model we can load, none of its layers has these names, or no GPU.
        """
        from peft import LoraConfig, get_peft_model

        dtype = None if precision == "auto" else getattr(torch, precision)
        loaded = load_model(folder, device=device, adapters={}, dtype=dtype)
        self.settings, self.done = settings, 0
        self._talk, self.tokenizer = talk, loaded.tokenizer
        self._identity = {**asdict(settings), **(identity or {}), "dtype": str(loaded.model.dtype)}
        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets), task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            try:
                # peft keeps the adapter in float32 over a bfloat16 model, as AdamW's small steps need.
                self.model: Any = get_peft_model(loaded.model, config)
            except ValueError as error:
                raise ConfigError(f"no adapter fits the model in {folder}: {str(error)[:200]}") from error
        self.model.train()
        self._base: Any = self.model.get_base_model()
        self.end = end_token(self._base, self.tokenizer)
        self._window: tuple[int, list[list[Encoded]]] = (-1, [])
        self._learnt = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._optimiser = torch.optim.AdamW(self._learnt, lr=settings.learning_rate, weight_decay=0.0)

    @property
    def numbers(self) -> int:
        """How many numbers are learnt."""
        return sum(weight.numel() for weight in self._learnt)

    def step(self) -> float:
        """Learn from the next batch; returns its loss before the step, in nats per answer token."""
        batch = self._batch(self.done)
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.rate(self.done)
        self._optimiser.zero_grad(set_to_none=True)
        with attention_on(self._base.device):
            logits, wanted = self._answers(batch)
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self._learnt, self.settings.clip)
        self._optimiser.step()
        self.done += 1
        return float(loss.detach())

    @torch.no_grad()
    def held_out(self, talks: Sequence[Talk]) -> tuple[float, float]:
        """Loss per answer token, and the share of answers that greedy decoding gets right to the last token: it does
        exactly where each answer token is the most probable one after those before it."""
        loss, right, tokens = 0.0, 0, 0
        encoded = sorted(map(self.encode, talks), key=lambda one: len(one.tokens))
        for batch in _pieces(encoded, self.settings.batch):
            logits, wanted = self._answers(batch)
            loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += len(wanted)
            hits = (logits.argmax(-1) == wanted).split([one.answer for one in batch])
            right += sum(bool(hit.all()) for hit in hits)
        return loss / tokens, right / len(encoded)

    def save(self, folder: Path) -> None:
        """Write the state to go on from, atomically."""
        state = {
            "done": self.done,
            "weights": [weight.detach().cpu() for weight in self._learnt],
            "optimiser": self._optimiser.state_dict(),
        }
        write_state(folder, self._identity, state)

    def restore(self, folder: Path) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: there is none, it cannot be read, or it is of another run; names what differs.
        """
        self.done = restore_state(folder, self._identity, self._learnt, self._optimiser)

    def export(self, folder: Path, *, base: str) -> None:
        """Write the adapter in peft's layout, in bfloat16; `base` is the name of the model that it belongs to."""
        write_adapter(self.model, folder, base=base)

    def encode(self, talk: Talk) -> Encoded:
        prompt = self.tokenizer(render(self.tokenizer, talk.messages), add_special_tokens=False)["input_ids"]
        answer = self.tokenizer(talk.answer, add_special_tokens=False)["input_ids"]
        return Encoded((*prompt, *answer, self.end), len(answer) + 1)

    def _batch(self, step: int) -> list[Encoded]:
        """The examples of a step. Which ones they are depends on nothing but the step."""
        size, window = self.settings.batch, self.settings.window
        place, within = divmod(step, window)
        if self._window[0] != place:
            first = place * window * size
            drawn = [self.encode(self._talk(index)) for index in range(first, first + window * size)]
            batches = list(_pieces(sorted(drawn, key=lambda one: len(one.tokens)), size))
            random.Random(f"{self.settings.seed} {place}").shuffle(batches)
            self._window = (place, batches)
        return self._window[1][within]

    def _answers(self, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Logits [answer tokens, vocabulary] where an answer's token is to be predicted, and those tokens.

        Rows are padded on the right, where a causal model cannot see it: no mask is needed. Only the positions that
        count go through the output layer, which is a fifth of a small model's weights.
        """
        width = max(len(one.tokens) for one in batch)
        tokens = torch.zeros(len(batch), width, dtype=torch.long)
        wanted = torch.full((len(batch), width), IGNORED)
        for row, one in enumerate(batch):
            end = len(one.tokens)
            tokens[row, :end] = torch.tensor(one.tokens)
            wanted[row, end - one.answer - 1 : end - 1] = tokens[row, end - one.answer : end]
        counts = wanted != IGNORED
        device = self._base.device
        hidden = self._base.get_decoder()(input_ids=tokens.to(device), use_cache=False).last_hidden_state
        logits = self._base.get_output_embeddings()(hidden[counts.to(device)])
        return logits.float(), wanted[counts].to(device)


def end_token(model: Any, tokenizer: Any) -> int:
    """What ends an answer where the model is served: the first of what the local engine stops at."""
    ends = model.generation_config.eos_token_id
    if isinstance(ends, list):
        return int(ends[0])
    return int(tokenizer.eos_token_id if ends is None else ends)


def attention_on(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU the backward pass of torch's fused attention takes a quarter of a step with questions this short;
    spelt out, it takes next to nothing."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """A peft model's adapter within the weights of the layers it stands beside, for as long as this is open: every
    token then costs one product per layer instead of three. The layers' own weights come back bit by bit. A model
    without an adapter stays as it is."""
    if not hasattr(model, "merge_adapter"):
        yield
        return
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights: list[Tensor] = [layer.get_base_layer().weight for layer in layers]
    kept = [weight.detach().clone() for weight in weights]
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        # What a sum in bfloat16 has rounded away, a difference does not bring back.
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def write_state(folder: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write what a run goes on from, atomically. `identity` is what a run must agree in to go on with it."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{STATE}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            torch.save({"identity": dict(identity), **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / STATE)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def restore_state(
    folder: Path, identity: Mapping[str, Any], learnt: Sequence[Tensor], optimiser: torch.optim.Optimizer
) -> int:
    """Put back weights and optimiser; returns the steps done.

    Raises:
        CheckpointError: there is no state, it cannot be read, or it is of another run; names what differs.
    """
    path = folder / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs = dict(state["identity"])
        names = identity.keys() | theirs.keys()
        if other := sorted(name for name in names if identity.get(name) != theirs.get(name)):
            raise CheckpointError(f"{path} is of another run: {', '.join(other)} differ")
        with torch.no_grad():
            for weight, saved in zip(learnt, state["weights"], strict=True):
                weight.copy_(saved)
        optimiser.load_state_dict(state["optimiser"])
        return int(state["done"])
    except FileNotFoundError as error:
        raise CheckpointError(f"there is nothing to resume: no {path}") from error
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
        raise CheckpointError(f"cannot read {path}: {type(error).__name__}") from error


def write_adapter(model: Any, folder: Path, *, base: str) -> None:
    """Write a peft model's adapter in its layout, in bfloat16; `base` is the name of the model below."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model)
    halves = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}
    temporary = folder / f".adapter.{os.getpid()}"
    save_file(halves, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / "adapter_model.safetensors")
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))


def _pieces(items: Sequence[Encoded], size: int) -> Iterator[list[Encoded]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
