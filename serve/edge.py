"""What happens to a request before Serve looks at it, in the proxy or in the replica's own HTTP server.

Named to Serve by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`. Serve echoes `x-request-id` as it is, and takes orders
from two headers (a timeout of its own, and to ignore disconnects) that a caller must not give.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.http import request_id

_TAKEN_AWAY = frozenset(
    (
        b"x-request-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
    )
)


class Edge:
    """Gives each request one sane `x-request-id` and removes Serve's control headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            id = request_id(dict(headers)).encode()
            kept = [header for header in headers if header[0] not in _TAKEN_AWAY]
            scope = {**scope, "headers": [*kept, (b"x-request-id", id)]}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    return [Middleware(Edge)]
