"""Candidates that also change the backbone's singular values: each reads its tasks with a backbone of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from actors.errors import ConfigError
from actors.messages import Message
from orchestrator.backbone import Backbone
from orchestrator.prompt import encode
from orchestrator.singular import Factors, decompose, matrices
from training.outcomes import Task
from training.players import RecordedPlayer, Table
from training.policy import Policy
from training.rollout import Choose, Draw, Rollouts, merged

Vector = NDArray[np.float64]


class AdaptedBackbone:
    """A backbone whose chosen matrices are rebuilt under the offsets of one candidate after another. The factors are
    those of the stored weights in float32, as `Backbone.load` takes them when the result is served."""

    def __init__(self, stored: Backbone, running: Backbone, layer: int, *, embeddings: bool = False) -> None:
        """`stored` in float32 without offsets, `running` in the numbers that serve.

        Raises:
            ConfigError: the backbone has no such layer.
        """
        try:
            self.sizes = matrices(stored.model, layer, embeddings=embeddings)
        except ValueError as error:
            raise ConfigError(f"singular values of {error}") from error
        weights = dict(stored.model.named_parameters())
        self._factors: dict[str, Factors] = {name: decompose(weights[name]) for name in self.sizes}
        self._running = running
        self.tokenizer = running.tokenizer
        self._weights = dict(running.model.named_parameters())

    @torch.no_grad()
    def hidden(self, policy: Policy, theta: Vector, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Hidden states `[N, d]` under one θ."""
        for name, offsets in policy.scales(theta).items():
            weight = self._weights[name]
            weight.copy_(self._factors[name].rebuild(offsets).to(weight))
        found = torch.zeros(len(prompts), self._running.dimension)
        for indices, states in self._running.hidden_all(prompts):
            found[indices] = states
        return found


class AdaptedPlayer(RecordedPlayer):
    """Recorded rollouts that run the backbone for every candidate and task: thousands of times the cost of a head
    alone, which is what TRINITY pays for its 2.6 points (§A, table of ablations). Small `size`s, or a GPU."""

    def __init__(
        self,
        policy: Policy,
        backbone: AdaptedBackbone,
        train: tuple[Sequence[Task], torch.Tensor, Table],
        validation: tuple[Sequence[Task], torch.Tensor, Table],
        *,
        max_tokens: int,
        choose: Choose = "argmax",
        seed: int = 42,
    ) -> None:
        super().__init__(policy, train[1:], validation[1:], choose=choose, seed=seed)
        self._backbone = backbone
        self._prompts, self._held_prompts = (
            encode(
                backbone.tokenizer,
                [(Message("user", task.prompt),) for task in tasks],
                policy.base.info.prompt_format,
                max_tokens,
            )
            for tasks in (train[0], validation[0])
        )

    def play(self, thetas: Vector, drawn: Draw) -> Rollouts:
        prompts = [self._prompts[row] for row in drawn.tasks]
        table, draws = self._table.part(drawn.tasks), self._sampled_draws(drawn)
        return merged(
            [self._played(theta[None], self._features_of(theta, prompts), table, draws) for theta in thetas], axis=0
        )

    def validate(self, theta: Vector) -> Rollouts:
        features = self._features_of(theta, self._held_prompts)
        return self._played(theta[None], features, self._held_table, self._draws if self._sampled else None)

    def _features_of(self, theta: Vector, prompts: Sequence[Sequence[int]]) -> Vector:
        return self._policy.features(self._backbone.hidden(self._policy, theta, prompts))
