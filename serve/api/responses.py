"""`POST /v1/responses`: OpenAI's Responses dialect."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from actors.errors import FuguError, RequestError
from actors.estimate import estimate_tokens
from actors.messages import ChatReply, ChatRequest, Chunk
from serve.api.conversations import Conversations, Record
from serve.api.job import Done
from serve.api.responses_output import EventWriter, Output, error_body, usage_body
from serve.auth import Caller
from serve.blocks import Block, Blocks, Step, blocks_of
from serve.schema import parse_body
from serve.schema_responses import InputTokensBody, ResponsesBody
from serve.translate import dumps
from serve.translate_responses import read_tools, to_request

# The two ways to end that are not whole, and why.
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter", "refusal": "content_filter"}


class ResponsesDialect:
    """See `serve.api.endpoint.Dialect`."""

    path = "/v1/responses"
    schema_field = "text.format"

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations

    def credential(self, headers: Mapping[bytes, bytes]) -> bytes | None:
        return headers.get(b"authorization")

    async def read(self, raw: bytes, id: str, caller: Caller) -> ResponsesExchange:
        body = parse_body(raw, ResponsesBody)
        if body.background and (body.store is False or not self._conversations.keeps):
            raise RequestError("background: the response has to be kept, so store must not be off", param="background")
        earlier = await self._conversations.earlier(body, caller)
        return ResponsesExchange(body, earlier, caller, self._conversations)

    async def count_tokens(self, raw: bytes, caller: Caller) -> bytes:
        """The body of `POST /v1/responses/input_tokens`: an estimate, since which worker will read it is not known yet.

        Raises:
            RequestError: as for a response.
        """
        body = parse_body(raw, InputTokensBody)
        earlier = await self._conversations.earlier(body, caller)
        request, _ = to_request(body, earlier, read_tools(body.tools))
        return dumps({"object": "response.input_tokens", "input_tokens": estimate_tokens(request).input})

    def error(self, error: FuguError, trace: Mapping[str, Any] | None, id: str) -> None:
        return None


class ResponsesExchange:
    """See `serve.api.endpoint.Exchange`."""

    def __init__(
        self,
        body: ResponsesBody,
        earlier: Sequence[Mapping[str, Any]],
        caller: Caller,
        conversations: Conversations,
    ) -> None:
        self._body = body
        self._earlier = earlier
        self.caller = caller
        self._conversations = conversations
        self._tools = read_tools(body.tools)
        self._keeps = body.store is not False and conversations.keeps
        self._secret = secrets.token_hex(16)
        self._created = int(time.time())
        self._writer = EventWriter()
        self._blocks = Blocks()
        self._last: bytes | None = None
        self.id = f"resp_{self._secret}"
        self.model = body.model
        self.stream = bool(body.stream)
        self.background = bool(body.background)
        self.fugu = body.fugu
        sealed = "reasoning.encrypted_content" in (body.include or ())
        self._summary = (body.reasoning.summary or body.reasoning.generate_summary) if body.reasoning else None
        summary = bool(self._summary)
        self._output = Output(self._secret, self._tools, summary=summary, sealed=sealed)

    def request(self) -> tuple[ChatRequest, tuple[str, ...]]:
        return to_request(self._body, self._earlier, self._tools)

    def whole(self, done: Done) -> bytes:
        body = self._finished(done)
        return dumps(body if done.told is None else body | {"fugu": done.told})

    async def keep(self, done: Done) -> None:
        if self._keeps:
            items = self._output.kept(self._blocks_of(done))
            await self._conversations.keep(self._record(self._finished(done), items), self.caller)

    async def keep_as(self, status: str, error: FuguError | None = None) -> bytes:
        """Keep, and return, the response as it is before or without its end."""
        body = self._response(status, [], None)
        if error is not None:
            body["error"] = error_body(error)
        await self._conversations.keep(self._record(body, []), self.caller)
        return dumps(body)

    async def was_cancelled(self) -> bool:
        """Whether the caller has cancelled it meanwhile, or deleted it."""
        return await self._conversations.status(self.id, self.caller) in (None, "cancelled")

    def opening(self) -> bytes:
        """The first events, before anything is known of the answer."""
        return self._begin()

    def chunk(self, chunk: Chunk) -> bytes:
        return self._told(self._blocks.take(chunk))

    def end(self, done: Done) -> bytes:
        last = self._closed(done)
        body = self._finished(done)
        if done.told is not None:
            body["fugu"] = done.told
        return last + self._writer.event(f"response.{body['status']}", response=body)

    def broken(self, error: FuguError, trace: Mapping[str, Any] | None) -> bytes:
        body = self._response("failed", self._output.shown(self._blocks.done), None) | {"error": error_body(error)}
        if trace is not None:
            body["fugu"] = trace
        return self._begin() + self._writer.event("response.failed", response=body)

    def alive(self) -> bytes:
        return self._begin() or b": keep-alive\n\n"

    def _begin(self) -> bytes:
        if self._writer.number:
            return b""
        body = self._response("in_progress", [], None)
        created = self._writer.event("response.created", response=body)
        return created + self._writer.event("response.in_progress", response=body)

    def _told(self, steps: Iterator[Step]) -> bytes:
        events = [self._begin()]
        for step in steps:
            events += self._output.step(self._writer, step)
        return b"".join(events)

    def _closed(self, done: Done) -> bytes:
        """The last events of the items."""
        if self._last is None:
            self._output.cut = self._blocks.last if _unfinished(done.reply) else None
            self._last = self._told(self._blocks.end())
        return self._last

    def _blocks_of(self, done: Done) -> Sequence[Block]:
        """What the answer consists of: of a stream what was streamed, which may be more than the reply (plan and steps
        of a workflow), so that the items at its end are those that were told of."""
        if self.stream:
            self._closed(done)
            return self._blocks.done
        blocks = blocks_of(done.reply)
        if _unfinished(done.reply) and blocks and blocks[-1].thought is None:
            self._output.cut = blocks[-1].number
        return blocks

    def _finished(self, done: Done) -> dict[str, Any]:
        reason = _unfinished(done.reply)
        output = self._output.shown(self._blocks_of(done))
        body = self._response(
            "completed" if reason is None else "incomplete", output, usage_body(done.visible, done.total)
        )
        if reason is not None:
            body["incomplete_details"] = {"reason": reason}
        return body

    def _record(self, body: dict[str, Any], output: list[dict[str, Any]]) -> Record:
        given = self._body.input
        items = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
        return Record(body, list(items), output, self._body.previous_response_id)

    def _response(
        self, status: str, output: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        body, extra = self._body, self._body.model_extra or {}
        choice = body.tool_choice
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": self.background,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "model": body.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": extra.get("prompt_cache_key"),
            "reasoning": {
                "effort": body.reasoning.effort if body.reasoning else None,
                "summary": self._summary,
            },
            "safety_identifier": extra.get("safety_identifier"),
            "service_tier": "default",
            "store": self._keeps,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": choice.model_dump(exclude_none=True) if isinstance(choice, BaseModel) else choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
            "metadata": body.metadata or {},
        }


def _unfinished(reply: ChatReply) -> str | None:
    """Why an answer is not whole. A refusal in words is."""
    return None if reply.refusal else _INCOMPLETE.get(reply.finish_reason)
