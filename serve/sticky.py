"""Inside a tool loop the worker that asked for a tool gets its result: its name is in the id of the call
(`actors.marks`), so nothing has to be remembered. Between user turns see `serve.last_answers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from actors.marks import mark, unmark, worker_tag
from actors.messages import ChatReply, ChatRequest, Chunk, Message, ToolCall


class Marks:
    """Reads and writes the marks of the given workers."""

    def __init__(self, workers: Iterable[str]) -> None:
        self._names = {worker_tag(worker): worker for worker in workers}

    def restore(self, request: ChatRequest) -> tuple[ChatRequest, str | None]:
        """The request with the ids as their workers gave them, and who asked for the tools whose results end the
        conversation; None outside a tool loop, and where a call bears no mark of ours. Where two workers gave the same
        id, the later call keeps its mark, so that ids stay distinct."""
        if not any(message.tool_calls for message in request.messages):
            return request, None
        bare: dict[str, str] = {}
        taken: set[str] = set()
        for message in request.messages:
            for call in message.tool_calls:
                id, tag = unmark(call.id)
                if tag in self._names and call.id not in bare:
                    bare[call.id] = call.id if id in taken else id
                taken.add(bare.get(call.id, call.id))
        asker = self._asker(request.messages)
        if not bare:
            return request, asker
        return request.with_(messages=tuple(_renamed(message, bare) for message in request.messages)), asker

    def _asker(self, messages: Sequence[Message]) -> str | None:
        last = next((message for message in reversed(messages) if message.role == "assistant"), None)
        if last is None or not last.tool_calls or messages[-1] is last:
            return None
        tags = (unmark(call.id)[1] for call in last.tool_calls)
        return next((self._names[tag] for tag in tags if tag in self._names), None)


def _renamed(message: Message, ids: Mapping[str, str]) -> Message:
    if message.tool_calls:
        calls = tuple(replace(call, id=ids.get(call.id, call.id)) for call in message.tool_calls)
        return replace(message, tool_calls=calls)
    if message.tool_call_id is not None and message.tool_call_id in ids:
        return replace(message, tool_call_id=ids[message.tool_call_id])
    return message


def marked_chunk(chunk: Chunk, worker: str) -> Chunk:
    """The piece with the worker's mark on the calls that begin in it."""
    if not chunk.tool_calls:
        return chunk
    calls = tuple(call if call.id is None else replace(call, id=mark(call.id, worker)) for call in chunk.tool_calls)
    return replace(chunk, tool_calls=calls)


def marked_reply(reply: ChatReply, worker: str) -> ChatReply:
    """The reply with the worker's mark on its calls."""
    if not reply.tool_calls:
        return reply
    calls: tuple[ToolCall, ...] = tuple(replace(call, id=mark(call.id, worker)) for call in reply.tool_calls)
    return replace(reply, tool_calls=calls)
