"""`POST /v1/responses/compact`: a conversation made shorter, for its caller to go on with. What comes back takes the
place of the items before: all messages of the user, and a `compaction` item with a worker's summary of all that
happened.

OpenAI's servers seal the summary; here the client carries it readable to whoever looks (`serve.sealed`), as it was
readable before. Nothing is kept.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from actors.errors import FuguError, WorkerError
from actors.messages import ChatRequest, Chunk, Message
from serve.api.conversations import Conversations, listed, numbered
from serve.api.job import Done
from serve.api.responses_output import usage_body
from serve.auth import Caller
from serve.schema import parse_body
from serve.schema_responses import CompactBody
from serve.sealed import seal_summary
from serve.translate import dumps
from serve.translate_responses import Tools, to_request

_ASKED = (
    "Summarise this conversation for whoever goes on with it; the user's own messages stay, all else will be gone. Say "
    "what was asked, decided and found out, what was done and with what result (names, paths, numbers and errors as "
    "they are), and what is left to do. Write the summary only."
)


class CompactDialect:
    """See `serve.api.endpoint.Dialect`."""

    path = "/v1/responses/compact"
    schema_field = "text.format"

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations

    def credential(self, headers: Mapping[bytes, bytes]) -> bytes | None:
        return headers.get(b"authorization")

    async def read(self, raw: bytes, id: str, caller: Caller) -> CompactExchange:
        body = parse_body(raw, CompactBody)
        return CompactExchange(body, await self._conversations.earlier(body, caller))

    def error(self, error: FuguError, trace: Mapping[str, Any] | None, id: str) -> None:
        return None


class CompactExchange:
    """See `serve.api.endpoint.Exchange`. The answer comes whole."""

    stream = False

    def __init__(self, body: CompactBody, earlier: Sequence[dict[str, Any]]) -> None:
        self._body = body
        self._earlier = earlier
        self._secret = secrets.token_hex(16)
        self.model = body.model
        self.fugu = body.fugu

    def request(self) -> tuple[ChatRequest, tuple[str, ...]]:
        request, dropped = to_request(self._body, self._earlier, Tools())
        if request.response_format is not None and request.response_format.kind != "text":
            # The form of the conversation's answers; a summary has none.
            dropped = (*dropped, "text.format")
        return request.with_(messages=(*request.messages, Message("user", _ASKED)), response_format=None), dropped

    def whole(self, done: Done) -> bytes:
        """Raises:
        WorkerError: there is no whole summary; what it was to replace is still the caller's.
        """
        reply = done.reply
        if reply.finish_reason != "stop" or not reply.text.strip():
            raise WorkerError(f"the summary is not whole ({reply.finish_reason})", worker=reply.worker)
        summary = {
            "id": f"cmp_{self._secret}",
            "type": "compaction",
            "encrypted_content": seal_summary(reply.text.strip()),
        }
        body = {
            "id": f"resp_{self._secret}",
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*self._said_by_user(), summary],
            "usage": usage_body(done.visible, done.total),
        }
        return dumps(body if done.told is None else body | {"fugu": done.told})

    def _said_by_user(self) -> list[dict[str, Any]]:
        given = self._body.input
        new = [{"type": "message", "role": "user", "content": given}] if isinstance(given, str) else given
        items = [item for item in (*self._earlier, *new) if item.get("type", "message") == "message"]
        users = [item for item in items if item.get("role") == "user" and item.get("content")]
        return [listed(numbered(item, self._secret, at)) for at, item in enumerate(users)]

    async def keep(self, done: Done) -> None:
        """Nothing: the caller goes on with it."""

    def chunk(self, chunk: Chunk) -> bytes:
        raise NotImplementedError

    def end(self, done: Done) -> bytes:
        raise NotImplementedError

    def broken(self, error: FuguError, trace: Mapping[str, Any] | None) -> bytes:
        raise NotImplementedError

    def alive(self) -> bytes:
        raise NotImplementedError
