"""The gateway: the ASGI application of the ingress deployment. It never imports torch.

Conversations go straight from ASGI to their endpoint; the other paths are FastAPI's, which also writes `/docs`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from actors.config import FuguConfig, RouterConfig
from actors.errors import ConfigError, FuguError, MethodNotAllowedError, NotFoundError, OverloadedError, RequestError
from actors.journal import state_dir
from actors.messages import Worker
from actors.pool import WorkerPool
from actors.telemetry import open_telemetry
from serve.api.background import Background
from serve.api.chat import ChatDialect
from serve.api.compaction import CompactDialect
from serve.api.conversations import Conversations
from serve.api.endpoint import CountEndpoint, Dialect, Endpoint
from serve.api.fugu import FuguEngine
from serve.api.health import Readiness
from serve.api.http import headers_of, send_error
from serve.api.job import Deciding, Engine
from serve.api.messages import MessagesDialect, count_tokens
from serve.api.models import MODEL, Served, models_body, one_model_body
from serve.api.openapi import ASKING, COUNTING, LOOKING, describe, streams, told, wishes
from serve.api.responses import ResponsesDialect
from serve.api.responses_routes import add_routes
from serve.api.session import TRINITY, TrinityEngine
from serve.api.ultra import ULTRA, UltraEngine
from serve.api.wishes import WishReader
from serve.auth import Keys
from serve.checkpoint import digest, why_no_roles
from serve.conductor import WEIGHTS, Conducting, conducting, pinned_conductors, why_no_conductor
from serve.keys import KeyBook
from serve.memory import ActorStore
from serve.metrics import Meter, NoMeter, RayMeter
from serve.router import Decider, OrderDecider, RouterClient
from serve.schema import ChatBody
from serve.schema_answers import (
    ChatCompletionBody,
    CompactedBody,
    HealthBody,
    InputTokensAnswerBody,
    MessageAnswerBody,
    MessagesErrorBody,
    ModelBody,
    ModelsBody,
    ReadyBody,
    ResponseBody,
    TokensBody,
)
from serve.schema_messages import CountBody, MessagesBody
from serve.schema_responses import CompactBody, InputTokensBody, ResponsesBody
from serve.store import SqliteStore, Store
from serve.translate import dumps

if TYPE_CHECKING:
    from actors.otel import Telemetry

log = logging.getLogger("fugu.gateway")

COUNT_PATH = f"{MessagesDialect.path}/count_tokens"
INPUT_PATH = f"{ResponsesDialect.path}/input_tokens"
DAY = 86400.0


class Gateway:
    """The ASGI application. At most `serve.max_ongoing_requests` answers are made at once; more are told to come again.
    `no_roles` says why `fugu-trinity` is not served; None: it is. `ultra` is who conducts `fugu-ultra`, and where its
    paused workflows are kept; or why it is not served; `ultra_pins` who conducts it for each date."""

    def __init__(
        self,
        config: FuguConfig,
        workers: Sequence[Worker],
        decider: Decider,
        readiness: Readiness,
        *,
        no_roles: str | None = "no router with roles is deployed",
        ultra: tuple[Conducting, Store] | str = "the configuration has no conductor",
        ultra_pins: Mapping[str, Conducting] | None = None,
        meter: Meter | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        deciding = Deciding(config, workers, decider)
        self.prices = deciding.prices
        engines: dict[str, Engine] = {MODEL: FuguEngine(deciding)}
        absent = {} if no_roles is None else {TRINITY: no_roles}
        if no_roles is None:
            engines[TRINITY] = TrinityEngine(deciding)
        if isinstance(ultra, str):
            absent[ULTRA] = ultra
        else:
            engines[ULTRA] = UltraEngine(deciding, *ultra)
        pinned, digests = _pinned(config.router, deciding)
        engines |= pinned
        if not isinstance(ultra, str):
            for pin, conductor in (ultra_pins or {}).items():
                decides = deciding.pinned(pin) if pin in config.router.pins else deciding
                engines[f"{ULTRA}-{pin}"] = UltraEngine(decides, conductor, ultra[1])
                digests |= _digest_of(conductor, config.router.pins.get(pin), f"{ULTRA}-{pin}")
        served = Served(tuple(engines), absent, digests)
        keys = Keys(config.serve, KeyBook(longest=config.serve.request_timeout))
        wishes = WishReader(config, self.prices)
        store = SqliteStore(state_dir() / "conversations.sqlite") if config.serve.store else None
        conversations = Conversations(store, config.serve.store_days * DAY)
        meter = meter or NoMeter()
        background = Background(conversations, config.serve.request_timeout, meter)
        responses = ResponsesDialect(conversations)
        dialects: tuple[Dialect, ...] = (ChatDialect(), responses, MessagesDialect(), CompactDialect(conversations))
        self._endpoints: dict[str, Endpoint | CountEndpoint] = {
            dialect.path: Endpoint(
                dialect, deciding, engines, keys, wishes, background, meter, served=served, telemetry=telemetry
            )
            for dialect in dialects
        }
        self._endpoints[COUNT_PATH] = CountEndpoint(MessagesDialect(), keys, config.serve, count_tokens)
        self._endpoints[INPUT_PATH] = CountEndpoint(responses, keys, config.serve, responses.count_tokens)
        self._rest = _rest(config, readiness, served, conversations, keys)
        self._limit = config.serve.max_ongoing_requests
        self._ongoing = 0
        # Serve names its metrics after the route that matches; the busiest first.
        self.routes: list[BaseRoute] = [
            *(Route(path, _never, methods=["POST"]) for path in self._endpoints),
            *self._rest.routes,
        ]
        self.router = self._rest.router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope.get("path", ""))
        if endpoint is None or scope["type"] != "http":
            await self._rest(scope, receive, send)
            return
        if scope["method"] != "POST":
            # Not FastAPI's: it would take the end of some of these paths for the id of a response.
            await send_error(send, _wrong_method(scope["method"], scope["path"]), extra=((b"allow", b"POST"),))
            return
        if self._ongoing >= self._limit:
            error = OverloadedError(f"{self._limit} requests are being answered", retry_after=1)
            await endpoint.refuse(scope, send, error)
            return
        self._ongoing += 1
        try:
            await endpoint(scope, receive, send)
        finally:
            self._ongoing -= 1


class GatewayReplica:
    """The Serve side: finds the pool and the router, and gives Serve the ASGI application."""

    _telemetry: Telemetry | None = None

    def __init__(self, config: FuguConfig, router: Any | None, no_roles: str | None) -> None:
        self._config = config
        self._telemetry = open_telemetry(config.telemetry, "gateway")
        self._no_roles = no_roles
        names = [spec.name for spec in config.active]
        self._no_conductor = why_no_conductor(config)
        self._pool = WorkerPool.connect(config, with_conductor=self._no_conductor is None)
        # Those of the configuration that was deployed before.
        self._pool.retire_others()
        self._starting: asyncio.Task[None] | None = None
        self._decider: Decider = (
            OrderDecider(names) if router is None else RouterClient(router, names, config.router.timeout)
        )

    def __serve_build_asgi_app__(self) -> Gateway:
        workers = [self._pool.workers[spec.name] for spec in self._config.active]
        readiness = Readiness({"workers": self._workers, "router": self._router})
        ultra: tuple[Conducting, Store] | str = self._no_conductor or ""
        pins: Mapping[str, Conducting] = {}
        if self._config.conductor is not None and self._no_conductor is None:
            store = ActorStore(self._config.conductor.memory)
            ultra = conducting(self._config, self._pool.workers), store
            pins = pinned_conductors(self._config, self._pool.workers)
        gateway = Gateway(
            self._config,
            workers,
            self._decider,
            readiness,
            no_roles=self._no_roles,
            ultra=ultra,
            ultra_pins=pins,
            meter=RayMeter(),
            telemetry=self._telemetry,
        )
        gateway.prices.load()
        return gateway

    def __del__(self) -> None:
        # Serve calls it when the replica stops.
        if self._telemetry is not None:
            self._telemetry.close()

    async def _workers(self) -> str | None:
        """Also gets workers going: an actor loads its models when it is first asked for them, restarted ones too."""
        down = [f"{each.name}: {each.reason}" for each in await self._pool.status() if each.state == "down"]
        if not down:
            return None
        if self._starting is not None and self._starting.done():
            failure = self._starting.exception()
            self._starting = None
            if isinstance(failure, ConfigError):
                return f"failed: {failure.message}"
        if self._starting is None:
            self._starting = asyncio.create_task(self._pool.ready())
        return "; ".join(down)

    async def _router(self) -> str | None:
        failure = await self._decider.status()
        return None if failure is None else f"failed: {failure.message}"


def _pinned(router: RouterConfig, deciding: Deciding) -> tuple[dict[str, Engine], dict[str, str]]:
    """The models of pinned checkpoints, `fugu-20261123`, and `fugu-trinity-20261123` where it has roles; and of each
    the SHA-256 of its checkpoint, where it can be read."""
    engines: dict[str, Engine] = {}
    digests: dict[str, str] = {}
    for pin, checkpoint in router.pins.items():
        pinned = deciding.pinned(pin)
        made: dict[str, Engine] = {f"{MODEL}-{pin}": FuguEngine(pinned)}
        if why_no_roles(router.model_copy(update={"checkpoint": checkpoint})) is None:
            made[f"{TRINITY}-{pin}"] = TrinityEngine(pinned)
        engines |= made
        if (found := digest(checkpoint)) is not None:
            digests |= dict.fromkeys(made, found)
    return engines, digests


def _digest_of(conductor: Conducting, checkpoint: Path | None, model: str) -> dict[str, str]:
    """The SHA-256 of what makes a pinned `fugu-ultra` that of its date: its adapter's weights; without an adapter the
    router's checkpoint."""
    adapter = conductor.config.adapter
    file = checkpoint if adapter is None else adapter / WEIGHTS
    found = None if file is None else digest(file)
    return {} if found is None else {model: found}


def _rest(
    config: FuguConfig, readiness: Readiness, served: Served, conversations: Conversations, keys: Keys
) -> FastAPI:
    """Everything but the hot path."""
    app = FastAPI(title="fugu", version="1", redirect_slashes=False)
    created = int(time.time())

    def answer(body: Any, status: int = 200) -> Response:
        return Response(dumps(body), status, media_type="application/json")

    @app.get("/v1/models", summary="The models that are served and their workers", responses=told(ModelsBody, LOOKING))
    async def models(request: Request) -> Response:
        caller = await keys.enter(_credential(request))
        return answer(models_body(config, created, served, caller))

    @app.get("/v1/models/{name}", summary="One model", responses=told(ModelBody, LOOKING))
    async def model(name: str, request: Request) -> Response:
        caller = await keys.enter(_credential(request))
        return answer(one_model_body(config, created, name, served, caller))

    @app.get("/healthz", summary="Whether this process answers", responses=told(HealthBody, ()))
    async def healthz() -> Response:
        return answer({"status": "ok"})

    ready = told(ReadyBody, ()) | {503: {"model": ReadyBody, "description": "Something is not ready"}}

    @app.get("/readyz", summary="Whether every model is loaded", responses=ready)
    async def readyz() -> Response:
        status, body = await readiness.body()
        return answer(body, status)

    add_routes(app, conversations, keys, config.serve.keep_alive)
    _describe_conversations(app)
    describe(app, served.names, keys)
    app.add_exception_handler(FuguError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(Exception, _on_error)
    return app


def _describe_conversations(app: FastAPI) -> None:
    """For `/docs` only: `Gateway` takes these requests before FastAPI sees them."""

    @app.post(
        ChatDialect.path,
        summary="Answer a conversation",
        response_class=Response,
        responses=streams(ChatCompletionBody),
        openapi_extra=wishes(),
    )
    async def chat_completions(body: ChatBody) -> None:
        raise NotImplementedError

    @app.post(
        ResponsesDialect.path,
        summary="Answer, as OpenAI's Responses",
        response_class=Response,
        responses=streams(ResponseBody),
        openapi_extra=wishes(),
    )
    async def responses(body: ResponsesBody) -> None:
        raise NotImplementedError

    @app.post(
        MessagesDialect.path,
        summary="Answer, as Anthropic's Messages",
        response_class=Response,
        responses=streams(MessageAnswerBody, MessagesErrorBody),
        openapi_extra=wishes(),
    )
    async def messages(body: MessagesBody) -> None:
        raise NotImplementedError

    @app.post(
        COUNT_PATH,
        summary="Estimate the tokens of a message",
        response_class=Response,
        responses=told(TokensBody, COUNTING, MessagesErrorBody),
    )
    async def count(body: CountBody) -> None:
        raise NotImplementedError

    @app.post(
        CompactDialect.path,
        summary="Make a conversation shorter",
        response_class=Response,
        responses=told(CompactedBody, ASKING),
        openapi_extra=wishes(),
    )
    async def compact(body: CompactBody) -> None:
        raise NotImplementedError

    @app.post(
        INPUT_PATH,
        summary="Estimate the tokens of a response's input",
        response_class=Response,
        responses=told(InputTokensAnswerBody, COUNTING),
    )
    async def input_tokens(body: InputTokensBody) -> None:
        raise NotImplementedError


def _credential(request: Request) -> bytes | None:
    """OpenAI's header, or Anthropic's: their clients ask on the same path."""
    headers = headers_of(request.scope)
    return MessagesDialect().credential(headers)


async def _on_error(request: Request, error: Exception) -> Response:
    told = _as_fugu_error(request, error)
    return _ErrorResponse(told, _allowed(request) if isinstance(told, MethodNotAllowedError) else ())


class _ErrorResponse(Response):
    def __init__(self, error: FuguError, extra: tuple[tuple[bytes, bytes], ...]) -> None:
        super().__init__()
        self._error = error
        self._extra = extra

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_error(send, self._error, extra=self._extra)


def _allowed(request: Request) -> tuple[tuple[bytes, bytes], ...]:
    """The `Allow` header of a path. Starlette names the methods of one route, and a path may have several."""
    routes = [each for each in request.app.routes if isinstance(each, Route)]
    here = (each for each in routes if each.matches(request.scope)[0] is not Match.NONE)
    methods = {method for each in here for method in each.methods or ()}
    return ((b"allow", ", ".join(sorted(methods)).encode()),)


def _as_fugu_error(request: Request, error: Exception) -> FuguError:
    if isinstance(error, FuguError):
        return error
    if not isinstance(error, HTTPException):
        log.error("%s %s failed: %s", request.method, request.url.path[:64], type(error).__name__)
        return FuguError("internal error; the server's log has more")
    what = f"{request.method} {request.url.path[:128]}"
    if error.status_code == 405:
        return _wrong_method(request.method, request.url.path)
    if error.status_code == 404:
        return NotFoundError(f"{what}: there is no such path; see /docs")
    return RequestError(f"{what}: {error.detail}")


def _wrong_method(method: str, path: str) -> MethodNotAllowedError:
    return MethodNotAllowedError(f"{method} {path[:128]}: this path does not take {method}")


async def _never(request: Request) -> Response:
    raise NotImplementedError
