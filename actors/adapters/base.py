"""The seam between a provider actor and a wire format."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from actors.messages import ChatReply, ChatRequest, Chunk


@dataclass(slots=True)
class CallContext:
    """What an adapter tells its caller while a call runs.

    The adapter calls `on_sent` once the whole request has left this process (no later than the response's headers)
    and `on_headers` with the response's headers, names in lower case, whatever the status. The limiter learns from
    both. `headers` go with the request: those of its trace.
    """

    on_sent: Callable[[], None] = field(default=lambda: None)
    on_headers: Callable[[dict[str, str]], None] = field(default=lambda _headers: None)
    headers: Mapping[str, str] = field(default_factory=dict)


class Adapter(Protocol):
    """One upstream call per invocation: no retries, no limits, no cache (the provider actor has those).

    Replies carry text, reasoning, tool calls, finish reason, usage and `dropped`; worker name, cost and timing are
    filled in by the provider. Both methods raise `actors.errors.WorkerError`s. `stream` raises
    `StreamBrokenError` for anything that goes wrong after it has yielded its first chunk. Cancellation closes the
    upstream connection before it propagates.
    """

    async def complete(self, request: ChatRequest, context: CallContext) -> ChatReply: ...

    def stream(self, request: ChatRequest, context: CallContext) -> AsyncIterator[Chunk]: ...

    async def close(self) -> None: ...
