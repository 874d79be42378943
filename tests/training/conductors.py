"""A pool of perfect specialists and texts for conductors, for tests of rollouts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actors.errors import WorkerUnavailableError
from actors.messages import ChatReply, ChatRequest, Chunk, Usage
from orchestrator.placeholders import fill
from training.composite_families import Composition
from training.conductor_rollouts import Played, Written

GROUNDS = ("arithmetic", "words", "counting", "logic")


def known(composition: Composition) -> dict[str, dict[str, str]]:
    """Ground → question → answer of every part, as it is asked when all went well."""
    answers: dict[int, str] = {}
    found: dict[str, dict[str, str]] = {ground: {} for ground in GROUNDS}
    for number, part in enumerate(composition.parts):
        found[part.ground][fill(part.question, answers)] = part.answer
        answers[number] = part.answer
    return found


@dataclass
class Specialist:
    """Answers what it knows, anything else wrongly; `fails` as often as asked to."""

    name: str
    knows: Mapping[str, str]
    fails: int = 0
    asked: list[ChatRequest] = field(default_factory=list)

    async def complete(self, request: ChatRequest) -> ChatReply:
        self.asked.append(request)
        if self.fails:
            self.fails -= 1
            raise WorkerUnavailableError("it is down", worker=self.name)
        text = self.knows.get(request.messages[-1].text, "Pumpernickel.")
        return ChatReply(self.name, text, usage=Usage(10, 2), cost_usd=0.001)

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        yield Chunk(final=await self.complete(request))


def specialists(composition: Composition) -> dict[str, Specialist]:
    return {name: Specialist(name, questions) for name, questions in known(composition).items()}


class Vowels:
    """Rewards texts by their share of vowels: something that a model with random weights can learn."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def play(self, written: Sequence[Written]) -> list[Played]:
        self.texts += [one.text for one in written]
        return [_vowels(one.text) for one in written]


def _vowels(text: str) -> Played:
    share = sum(letter in "aeiou" for letter in text) / max(1, len(text))
    return Played(share, share, answer=text, topology="single", workers=("words",), calls=1, cost_usd=0.0)


def pool_file(folder: Path, model: Path) -> Path:
    """A configuration of four local workers on one model."""
    workers = [
        {"name": ground, "provider": "local", "model": str(model), "system": "Short answer.", "device": "cpu",
         "price": {"input": 1, "output": 2}, "defaults": {"max_tokens": 4}}
        for ground in GROUNDS
    ]  # fmt: skip
    path = folder / "pool.yaml"
    path.write_text(json.dumps({"workers": workers}))
    return path
