"""Responses that were kept: what `previous_response_id` goes on from, and what can be retrieved, listed, deleted and
cancelled by its id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from actors.errors import NotFoundError, RequestError
from serve.api.kept_events import KeptEvents
from serve.auth import Caller
from serve.schema_responses import InputBody
from serve.store import Kept, Store

RESPONSE, ITEM, BEAT = "response", "item", "beat"
# A chain of turns is read one by one; beyond this the client should send the conversation itself.
LONGEST_CHAIN = 2000
_MOST_LISTED = 100
_BEAT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Record:
    """A response as it is kept: its body, what was new in its input, its output with all that the next turn needs, and
    the id of the response before."""

    body: dict[str, Any]
    input: list[dict[str, Any]]
    output: list[dict[str, Any]]
    previous: str | None


class Conversations:
    """`store` is None where nothing is kept (`serve.store: false`)."""

    def __init__(self, store: Store | None, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self.events = KeptEvents(store, seconds)

    @property
    def keeps(self) -> bool:
        return self._store is not None

    async def keep(self, record: Record, caller: Caller) -> None:
        if self._store is None:
            return
        id = record.body["id"]
        input = [numbered(item, id, at) for at, item in enumerate(record.input)]
        packed = orjson.dumps([record.body, input, record.output, record.previous])
        items = [Kept(ITEM, item["id"], orjson.dumps(item)) for item in record.output]
        await self._store.put([Kept(RESPONSE, id, packed), *items], caller.id, seconds=self._seconds)

    async def get(self, id: str, caller: Caller) -> Record:
        """Raises:
        NotFoundError: there is none of this id that is the caller's, or it is not kept any more.
        """
        packed = None if self._store is None else await self._store.get(RESPONSE, id, caller.id)
        if packed is None:
            why = "" if self.keeps else " (this server keeps none: serve.store is off)"
            raise NotFoundError(f"there is no response {id[:80]!r}{why}", param="response_id")
        return Record(*orjson.loads(packed))

    async def beat(self, id: str, caller: Caller) -> None:
        """Tell that a response is still being made."""
        if self._store is not None:
            await self._store.put([Kept(BEAT, id, b"")], caller.id, seconds=_BEAT_SECONDS)

    async def shown(self, id: str, caller: Caller, *, sealed: bool = False) -> dict[str, Any]:
        """A response's body; one that nobody makes any more has failed. `sealed`: with the reasoning that was signed,
        for the caller to carry.

        Raises:
            NotFoundError: as `get`.
        """
        record = await self.get(id, caller)
        body = record.body | ({"output": record.output} if sealed and record.output else {})
        assert self._store is not None
        if body["status"] == "in_progress" and await self._store.get(BEAT, id, caller.id) is None:
            # It may have been finished between the two looks.
            body = (await self.get(id, caller)).body
            if body["status"] == "in_progress":
                error = {"code": "server_error", "message": "the gateway that made it ended"}
                body |= {"status": "failed", "error": error}
        return body

    async def status(self, id: str, caller: Caller) -> str | None:
        """None where it is gone."""
        try:
            return str((await self.get(id, caller)).body["status"])
        except NotFoundError:
            return None

    async def delete(self, id: str, caller: Caller) -> None:
        """Raises:
        NotFoundError: as `get`.
        """
        record = await self.get(id, caller)
        assert self._store is not None
        await self._store.delete(RESPONSE, id, caller.id)
        for item in record.output:
            await self._store.delete(ITEM, item["id"], caller.id)
        await self.events.forget(id, caller)

    async def cancel(self, id: str, caller: Caller) -> dict[str, Any]:
        """Mark a response that is still being made as cancelled; whoever makes it sees that within a second.

        Raises:
            NotFoundError: as `get`.
            RequestError: it is not made in the background, or complete.
        """
        record = await self.get(id, caller)
        status = record.body["status"]
        if not record.body["background"]:
            raise RequestError("only a response made with background: true can be cancelled", param="response_id")
        if status not in ("queued", "in_progress", "cancelled"):
            raise RequestError(f"the response is {status} already", param="response_id")
        body = record.body | {"status": "cancelled"}
        await self.keep(Record(body, record.input, record.output, record.previous), caller)
        return body

    async def items(self, id: str, caller: Caller) -> list[dict[str, Any]]:
        """All items of a conversation up to and with a response, the oldest first.

        Raises:
            NotFoundError: the response, or one before it, is not there.
            RequestError: it has no answer to go on from.
        """
        turns: list[list[dict[str, Any]]] = []
        next: str | None = id
        while next is not None:
            if len(turns) >= LONGEST_CHAIN:
                raise RequestError(
                    f"previous_response_id: the conversation has more than {LONGEST_CHAIN} turns; send it as input",
                    param="previous_response_id",
                )
            try:
                record = await self.get(next, caller)
            except NotFoundError as error:
                raise NotFoundError(f"previous_response_id: {error.message}", param="previous_response_id") from None
            if record.body["status"] not in ("completed", "incomplete"):
                raise RequestError(
                    f"previous_response_id: that response is {record.body['status']}", param="previous_response_id"
                )
            turns.append([*record.input, *record.output])
            next = record.previous
        return [item for turn in reversed(turns) for item in turn]

    async def input_items(
        self, id: str, caller: Caller, *, limit: int, order: str, after: str | None
    ) -> dict[str, Any]:
        """One page of what a response was made from.

        Raises:
            NotFoundError: as `get`.
            RequestError: a wrong `limit`, `order` or `after`.
        """
        if not 1 <= limit <= _MOST_LISTED:
            raise RequestError(f"limit: must be from 1 to {_MOST_LISTED}", param="limit")
        if order not in ("asc", "desc"):
            raise RequestError("order: must be asc or desc", param="order")
        record = await self.get(id, caller)
        earlier = await self.items(record.previous, caller) if record.previous else []
        items = [*earlier, *record.input]
        if order == "desc":
            items.reverse()
        if after is not None:
            at = next((at for at, item in enumerate(items) if item["id"] == after), None)
            if at is None:
                raise RequestError(f"after: there is no item {after[:80]!r}", param="after")
            items = items[at + 1 :]
        page = [listed(item) for item in items[:limit]]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }

    async def earlier(self, body: InputBody, caller: Caller) -> list[dict[str, Any]]:
        """The items that a request goes on from, its own references replaced by what they refer to.

        Raises:
            NotFoundError, RequestError: as `items` and `resolved`.
        """
        if isinstance(body.input, list):
            body.input = await self.resolved(body.input, caller)
        return [] if body.previous_response_id is None else await self.items(body.previous_response_id, caller)

    async def resolved(self, items: Sequence[dict[str, Any]], caller: Caller) -> list[dict[str, Any]]:
        """The items with references to kept ones replaced by what they refer to.

        Raises:
            NotFoundError: there is no such item of the caller's.
        """
        return [
            await self._item(item, f"input[{at}]", caller) if item.get("type") == "item_reference" else item
            for at, item in enumerate(items)
        ]

    async def _item(self, reference: dict[str, Any], where: str, caller: Caller) -> dict[str, Any]:
        id = reference.get("id")
        packed = None
        if self._store is not None and isinstance(id, str):
            packed = await self._store.get(ITEM, id, caller.id)
        if packed is None:
            raise NotFoundError(f"{where}: there is no item {str(id)[:80]!r}; send it whole", param=where)
        item: dict[str, Any] = orjson.loads(packed)
        return item


def numbered(item: dict[str, Any], response: str, at: int) -> dict[str, Any]:
    """An item of the input with an id, where it has none."""
    if isinstance(item.get("id"), str) and item["id"]:
        return item
    return item | {"id": f"in_{response.removeprefix('resp_')}{at:04x}"}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    """An item as the reference lists it: a message's text in parts."""
    if item.get("type", "message") != "message" or not isinstance(item.get("content"), str):
        return {key: value for key, value in item.items() if key != "encrypted_content"}
    kind = "output_text" if item["role"] == "assistant" else "input_text"
    part = {"type": kind, "text": item["content"]} | ({"annotations": []} if kind == "output_text" else {})
    return item | {"type": "message", "status": "completed", "content": [part]}
