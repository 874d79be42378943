"""One batch of GRPO for a conductor: write, play, reward, and where it plans again, a second time (Conductor §3.2).

Rewards of a later round reach the earlier one: a plan whose result was planned upon again earns (1 - γ) of its own
reward and γ of the later one's (the paper's code; γ 0.25 there). The rounds of a question are groups of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from training.grpo import Group, GrpoLearner, advantages  # first: it sets up OpenMP

import torch  # isort: skip

from orchestrator.conductor_prompt import PromptSettings, Round
from training.conductor_questions import Question
from training.conductor_rollouts import Played, Rollouts, Written


@dataclass(frozen=True)
class Recursion:
    """`share` of a question's completions are planned upon once more (0: none, as without recursion); `discount` is
    γ."""

    share: float = 0.0
    discount: float = 0.25


@dataclass(frozen=True)
class Batch:
    """Groups to learn from, and all that was played, with the tokens that were written."""

    groups: tuple[Group, ...]
    played: tuple[Played, ...]
    tokens: tuple[int, ...]


class Sampler(Protocol):
    """Who writes completions: the learner itself, or engines that follow it."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        copies: int,
        generator: torch.Generator,
        temperature: float | None = None,
    ) -> list[list[list[int]]]: ...


def make_batch(
    learner: GrpoLearner,
    sampler: Sampler,
    questions: Sequence[Question],
    rollouts: Rollouts,
    *,
    pool: Sequence[str],
    prompt: PromptSettings,
    recursion: Recursion,
    generator: torch.Generator,
) -> Batch:
    """Sample a group for each question, play all, and turn rewards into advantages."""
    size, scale = learner.settings.group, learner.settings.scale
    prompts = [learner.encode(question.messages(pool, prompt)) for question in questions]
    written = sampler.sample(prompts, copies=size, generator=generator)
    texts = [[learner.decode(tokens) for tokens in copies] for copies in written]
    first = [
        Written(question.task, text, question.allowed)
        for question, copies in zip(questions, texts, strict=True)
        for text in copies
    ]
    played = rollouts.play(first)
    rewards = [one.reward for one in played]
    again = [
        place
        for place, one in enumerate(played)
        if place % size < round(recursion.share * size) and one.score is not None and one.answer is not None
    ]
    later = (
        _again(learner, sampler, questions, rollouts, first, played, again, pool, prompt, generator) if again else None
    )
    if later is not None:
        for place, one in zip(again, later.played, strict=True):
            own = rewards[place]
            if own is not None and one.reward is not None:
                rewards[place] = (1 - recursion.discount) * own + recursion.discount * one.reward
    groups = [
        Group(prompts[row], written[row], advantages(rewards[row * size : (row + 1) * size], scale=scale))
        for row in range(len(questions))
    ]
    tokens = [len(one) for copies in written for one in copies]
    if later is None:
        return Batch(tuple(groups), tuple(played), tuple(tokens))
    for row in range(len(questions)):
        mine = [n for n, place in enumerate(again) if place // size == row]
        shares = advantages([later.played[n].reward for n in mine], scale=scale)
        groups += [Group(later.prompts[n], [later.written[n]], [share]) for n, share in zip(mine, shares, strict=True)]
    tokens += [len(one) for one in later.written]
    return Batch(tuple(groups), (*played, *later.played), tuple(tokens))


@dataclass(frozen=True)
class _Later:
    prompts: list[list[int]]
    written: list[list[int]]
    played: list[Played]


def _again(
    learner: GrpoLearner,
    sampler: Sampler,
    questions: Sequence[Question],
    rollouts: Rollouts,
    first: Sequence[Written],
    played: Sequence[Played],
    again: Sequence[int],
    pool: Sequence[str],
    prompt: PromptSettings,
    generator: torch.Generator,
) -> _Later:
    """The second round of these places: its own plan and what it came to are in each prompt."""
    size = learner.settings.group
    prompts, answers = [], []
    for place in again:
        answer = played[place].answer or ""
        said = (Round(first[place].text, answer),)
        prompts.append(learner.encode(questions[place // size].messages(pool, prompt, said)))
        answers.append(answer)
    written = [copies[0] for copies in sampler.sample(prompts, copies=1, generator=generator)]
    second = [
        Written(first[place].task, learner.decode(tokens), first[place].allowed, before=answer)
        for place, tokens, answer in zip(again, written, answers, strict=True)
    ]
    return _Later(prompts, written, rollouts.play(second))


def summary(played: Sequence[Played], tokens: Sequence[int], pool: Sequence[str]) -> dict[str, Any]:
    """What is shown of a batch: means over what is known, shares over plans that parse. Of nothing, None."""
    known = [one for one in played if one.reward is not None]
    plans = [one for one in played if one.topology]
    ran = [one for one in plans if one.workers]
    workers = Counter(name for one in plans for name in one.workers)
    shapes = Counter(one.topology for one in plans)
    costs = [one.cost_usd for one in played if one.cost_usd is not None]
    return {
        "reward": _mean([one.reward for one in known if one.reward is not None]),
        "right": _mean([one.score for one in known if one.score is not None]),
        "parsed": _mean([float(not one.failure) for one in played]),
        "steps": _mean([float(len(one.workers)) for one in ran]),
        "length": _mean([float(count) for count in tokens]),
        "calls": sum(one.calls for one in played),
        "usd": sum(costs) if len(costs) == len(played) else None,
        "excluded": len(played) - len(known),
        "worker": {name: workers[name] / max(1, workers.total()) for name in pool},
        "topology": _shares(shapes),
        "failure": _shares(Counter(one.failure for one in played if one.failure)),
    }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _shares(counts: Counter[str]) -> Mapping[str, float]:
    return {name: count / counts.total() for name, count in sorted(counts.items())}
