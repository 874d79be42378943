"""Workers of simulated latency for the executor: they answer from a function of their request, and keep count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from actors.errors import FuguError, StreamBrokenError, WorkerUnavailableError
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ToolCall, Usage
from orchestrator.workflow import Step, Workflow

QUERY = ChatRequest((Message("user", "How many letters has the longest river's name?"),))


@dataclass
class Player:
    """Answers after `delay` seconds. The answer `FAIL` raises, `TOOL` calls a tool, `BREAK` breaks a stream after its
    first word. `inside` counts the calls in flight, `cancelled` those that were ended from outside."""

    name: str
    answer: Callable[[ChatRequest], str] = lambda _request: "fine"
    delay: float = 0.0
    usage: Usage = field(default_factory=lambda: Usage(10, 5))
    cost_usd: float | None = 0.25
    seen: list[ChatRequest] = field(default_factory=list)
    inside: int = 0
    most: int = 0
    cancelled: int = 0

    async def complete(self, request: ChatRequest) -> ChatReply:
        await self._play(request)
        text = self.answer(request)
        if text == "FAIL":
            raise WorkerUnavailableError("is down", worker=self.name)
        return self._reply(text)

    async def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        text = self.answer(request)
        if text == "FAIL":
            await self._play(request)
            raise WorkerUnavailableError("is down", worker=self.name)
        for number, word in enumerate(text.split()):
            await self._play(request, first=number == 0)
            yield Chunk(word if number == 0 else f" {word}")
            if text.startswith("BREAK"):
                raise StreamBrokenError("broke off", worker=self.name)
        yield Chunk(final=self._reply(text))

    async def _play(self, request: ChatRequest, *, first: bool = True) -> None:
        if first:
            self.seen.append(request)
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1

    def _reply(self, text: str) -> ChatReply:
        calls = (ToolCall("call_1", "look", "{}"),) if text == "TOOL" else ()
        return ChatReply(self.name, text, tool_calls=calls, usage=self.usage, cost_usd=self.cost_usd)


def saying(text: str) -> Callable[[ChatRequest], str]:
    return lambda _request: text


def failing(error: FuguError) -> Callable[[ChatRequest], str]:
    def answer(_request: ChatRequest) -> str:
        raise error

    return answer


def pool(*players: Player) -> dict[str, Player]:
    return {player.name: player for player in players}


def plan(*steps: tuple[str, tuple[int, ...]]) -> Workflow:
    """Steps as (worker, access), each with a subtask of its own."""
    return Workflow(tuple(Step(worker, f"Do part {i}.", access) for i, (worker, access) in enumerate(steps)))
