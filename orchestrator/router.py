"""The router: conversations in, one batched forward pass, a `Decision` each."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from actors.errors import CheckpointError, ConfigError, FuguError, NoWorkerAllowedError
from actors.messages import Message
from orchestrator.backbone import Backbone, Device
from orchestrator.head import ROLES, Checkpoint, check_fits, load_checkpoint, masked_softmax, pick
from orchestrator.prompt import MIN_TOKENS, encode

Choose = Literal["argmax", "sample"]
Source = Literal["head", "order", "single"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Who answers. `probabilities` covers the allowed workers only and sums to 1; `role` is one of
    `orchestrator.head.ROLES` where the head has roles. `source`: "head" decided; "order" is the order of the
    configuration (nothing is trained); "single" means that only one worker was allowed, so none was asked.
    `seconds` is the time of the whole batch's decision; `domain` the kind of training tasks that the conversation is
    like, where the head knows such."""

    worker: str
    probabilities: dict[str, float]
    role: str | None = None
    source: Source = "head"
    seconds: float = 0.0
    domain: str | None = None

    @property
    def ranking(self) -> tuple[str, ...]:
        """The workers to try in turn: the chosen one, then the others by falling probability; equals keep the
        order of the pool."""
        others = (name for name in self.probabilities if name != self.worker)
        return self.worker, *sorted(others, key=self.probabilities.__getitem__, reverse=True)

    def among(self, allowed: frozenset[str]) -> Decision:
        """The decision where only these may answer: what the head gives with the others masked.

        Raises:
            NoWorkerAllowedError: it is about none of them.
        """
        left = _allowed(list(self.probabilities), allowed)
        if len(left) == len(self.probabilities):
            return self
        total = math.fsum(self.probabilities[name] for name in left)
        # Beside one that is as good as certain the others can come to nothing in float32.
        shares = {name: self.probabilities[name] / total if total else 1 / len(left) for name in left}
        source: Source = "single" if len(left) == 1 and self.role is None else self.source
        return replace(self, worker=max(shares, key=shares.__getitem__), probabilities=shares, source=source)


class Router:
    """A backbone with a head. Decides for many conversations in one forward pass."""

    def __init__(
        self,
        backbone: Backbone,
        checkpoint: Checkpoint,
        *,
        max_tokens: int,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not MIN_TOKENS <= max_tokens <= backbone.context:
            raise ConfigError(
                f"router.max_tokens is {max_tokens}; this backbone can read {MIN_TOKENS} to {backbone.context}"
            )
        info = checkpoint.info
        if info.reads != backbone.reads:
            wanted, given = ("; ".join(map(str, reads)) for reads in (info.reads, backbone.reads))
            raise CheckpointError(f"the head reads {wanted}, the backbone gives {given}")
        self.backbone = backbone
        self.checkpoint = checkpoint
        # What a head never read in training it cannot use; means over more tokens would even mislead it.
        self.max_tokens = max_tokens if info.max_tokens is None else max(MIN_TOKENS, min(max_tokens, info.max_tokens))
        self._rng = random.Random() if rng is None else rng
        self._clock = clock

    @property
    def workers(self) -> tuple[str, ...]:
        """The names of the head's rows, in order."""
        return self.checkpoint.info.workers

    @classmethod
    def load(
        cls,
        folder: Path | str,
        checkpoint: Path | str,
        workers: Sequence[str],
        *,
        max_tokens: int = 1024,
        device: Device = "auto",
        backbone: str | None = None,
        revision: str | None = None,
        rng: random.Random | None = None,
    ) -> Router:
        """Load the backbone in `folder` and the head in `checkpoint` for the pool `workers` (all configured
        workers, disabled ones too; those that may not answer are masked per decision). `backbone` and
        `revision` are what the folder holds; they are compared with the checkpoint's where given.

        Raises:
            CheckpointError: the checkpoint is broken or of another pool, backbone or revision; says what
            differs. ConfigError: the backbone cannot be loaded or `max_tokens` is outside its context.
        """
        head = load_checkpoint(checkpoint)
        # The pool is compared before the model is loaded: a wrong file should fail in milliseconds.
        fits = {"workers": workers, "backbone": backbone, "revision": revision, "where": str(checkpoint)}
        check_fits(head, dimension=head.dimension, **fits)  # type: ignore[arg-type]
        model = Backbone.load(
            folder,
            reads=head.info.reads,
            device=device,
            singular=head.singular,
        )
        check_fits(head, dimension=model.dimension, **fits)  # type: ignore[arg-type]
        return cls(model, head, max_tokens=max_tokens, rng=rng)

    def decide(
        self,
        conversations: Sequence[Sequence[Message]],
        allowed: Sequence[frozenset[str] | None],
        seeds: Sequence[int | None],
        choose: Choose = "argmax",
    ) -> list[Decision]:
        """One decision per conversation. `allowed` names the workers that may answer (None: all); names that
        the head does not know are ignored. With `choose="sample"` a seed makes the draw repeatable; "argmax"
        needs none.

        Raises:
            NoWorkerAllowedError: a conversation allows no worker of this head (none is then decided).
            RequestError: a conversation is empty.
        """
        if not len(conversations) == len(allowed) == len(seeds):
            raise ValueError("conversations, allowed and seeds must be of equal length")
        if not conversations:
            return []
        began = self._clock()
        choices = [_allowed(self.workers, names) for names in allowed]
        roles = self.checkpoint.info.roles
        # A head without roles has nothing to say where one worker is left; with roles it still picks the
        # role.
        asked = [index for index, names in enumerate(choices) if roles or len(names) > 1]
        worker_rows: dict[int, list[float]] = {}
        role_rows: dict[int, list[float]] = {}
        domains: dict[int, str | None] = {}
        if asked:
            prompts = encode(
                self.backbone.tokenizer,
                [conversations[index] for index in asked],
                self.checkpoint.info.prompt_format,
                self.max_tokens,
            )
            hidden = self.backbone.hidden(prompts)
            logits = self.checkpoint.logits(hidden)
            domains = dict(zip(asked, self.checkpoint.domains(hidden), strict=True))
            mask = torch.tensor([[name in choices[index] for name in self.workers] for index in asked])
            count = len(self.workers)
            try:
                probabilities = masked_softmax(logits[:, :count], mask)
                worker_rows = dict(zip(asked, probabilities.tolist(), strict=True))
                if roles:
                    role_logits = logits[:, count:]
                    all_roles = torch.ones_like(role_logits, dtype=torch.bool)
                    role_rows = dict(zip(asked, masked_softmax(role_logits, all_roles).tolist(), strict=True))
            except ValueError as error:
                raise FuguError(f"the router's backbone gave no usable hidden state: {error}") from error
        decisions = []
        seconds = self._clock() - began
        for index, seed in enumerate(seeds):
            if index not in worker_rows:
                only = choices[index][0]
                decisions.append(Decision(only, {only: 1.0}, source="single", seconds=seconds))
                continue
            rng = self._rng if seed is None else random.Random(seed)
            row = worker_rows[index]
            worker = self.workers[pick(row, rng.random() if choose == "sample" else None)]
            role = None
            if roles:
                role = ROLES[pick(role_rows[index], rng.random() if choose == "sample" else None)]
            by_name = dict(zip(self.workers, row, strict=True))
            shares = {name: by_name[name] for name in choices[index]}
            decisions.append(Decision(worker, shares, role, "head", seconds, domains[index]))
        return decisions


def _allowed(workers: Sequence[str], allowed: frozenset[str] | None) -> list[str]:
    left = [name for name in workers if allowed is None or name in allowed]
    if not left:
        raise NoWorkerAllowedError("the constraints leave no worker that can answer", param="fugu")
    return left
