"""What can be done with a response after it was made: retrieve, list its input, cancel, delete."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from actors.errors import RequestError
from serve import sse
from serve.api.conversations import Conversations
from serve.api.http import headers_of
from serve.api.openapi import LOOKING, listing, told
from serve.auth import Caller, Keys
from serve.schema_answers import DeletedBody, ItemsBody, ResponseBody
from serve.translate import dumps


def add_routes(app: FastAPI, conversations: Conversations, keys: Keys, keep_alive: float) -> None:
    """`keep_alive`: seconds after which a silent stream says that it is still there."""

    def answer(body: Any) -> Response:
        return Response(dumps(body), media_type="application/json")

    async def caller(request: Request) -> Caller:
        return await keys.enter(headers_of(request.scope).get(b"authorization"))

    async def streamed(id: str, whose: Caller, after: str) -> Response:
        """The events of a response again, those that are still to come as they do."""
        if not re.fullmatch(r"-1|\d{1,9}", after, re.ASCII):
            raise RequestError("starting_after: must be a whole number", param="starting_after")
        await conversations.get(id, whose)
        if await conversations.events.page(id, 0, whose) is None:
            raise RequestError(
                "stream: only a response made with background and stream can be streamed again", param="stream"
            )
        events = conversations.events.read(id, whose, conversations, int(after))
        headers = {name.decode(): value.decode() for name, value in sse.HEADERS}
        return StreamingResponse(sse.with_keep_alive(events, keep_alive), headers=headers)

    @app.get("/v1/responses/{id}", summary="A response that was kept", responses=told(ResponseBody, LOOKING))
    async def retrieve(id: str, request: Request) -> Response:
        whose = await caller(request)
        query = request.query_params
        if query.get("stream") == "true":
            return await streamed(id, whose, query.get("starting_after", "-1"))
        included = [*query.getlist("include"), *query.getlist("include[]")]
        return answer(await conversations.shown(id, whose, sealed="reasoning.encrypted_content" in included))

    @app.delete("/v1/responses/{id}", summary="Forget a response", responses=told(DeletedBody, LOOKING))
    async def delete(id: str, request: Request) -> Response:
        await conversations.delete(id, await caller(request))
        return answer({"id": id, "object": "response", "deleted": True})

    @app.post(
        "/v1/responses/{id}/cancel",
        summary="Stop a response that is made in the background",
        responses=told(ResponseBody, LOOKING),
    )
    async def cancel(id: str, request: Request) -> Response:
        return answer(await conversations.cancel(id, await caller(request)))

    @app.get(
        "/v1/responses/{id}/input_items",
        summary="What a response was made from",
        responses=told(ItemsBody, LOOKING),
        openapi_extra=listing(),
    )
    async def input_items(id: str, request: Request) -> Response:
        whose, query = await caller(request), request.query_params
        limit = query.get("limit", "20")
        if not limit.isdigit() or len(limit) > 9:
            raise RequestError("limit: must be a whole number", param="limit")
        order, after = query.get("order", "desc"), query.get("after")
        return answer(await conversations.input_items(id, whose, limit=int(limit), order=order, after=after))
