"""`POST /v1/chat/completions`: the hot path, straight on ASGI."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from starlette.types import Receive, Scope, Send

from actors.config import FuguConfig
from actors.errors import DeadlineError, FuguError, NoWorkerAllowedError, RequestError
from actors.messages import ChatReply, ChatRequest, Message, Worker
from orchestrator import dispatch
from orchestrator.dispatch import Resting, rank
from serve import sse
from serve.api.http import headers_of, read_body, request_id, send_error, send_json
from serve.api.models import MODEL, check_served
from serve.api.session import TRINITY, Playing
from serve.auth import Keys
from serve.router import Choose, Decider, Question
from serve.schema import ChatBody, FuguBody, parse_chat
from serve.trace import Choice, Trace
from serve.translate import ChunkWriter, error_event, reply_body, to_request, usage_body

log = logging.getLogger("fugu.gateway")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller wants of the pool: from the body's `fugu` field and the `x-fugu-*` headers, together."""

    allowed: tuple[str, ...]
    seed: int | None
    choose: Choose
    trace: bool
    show_turns: bool


class ChatEndpoint:
    """Answers chat completions. `workers` are those in use, in the order of the configuration. `no_roles` says why
    `fugu-trinity` is not served; None: it is."""

    def __init__(
        self, config: FuguConfig, workers: Sequence[Worker], decider: Decider, *, no_roles: str | None
    ) -> None:
        self._config = config
        self._keys = Keys(config.serve)
        self._workers = {worker.name: worker for worker in workers}
        self._tags = {spec.name: frozenset(spec.tags) for spec in config.active}
        self._decider = decider
        self._resting = Resting(time.monotonic)
        self._no_roles = no_roles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        trace = Trace(request_id(headers), time.perf_counter())
        answer = _Answer(send)
        traced = False
        try:
            self._keys.check(headers.get(b"authorization"))
            _check_content_type(headers)
            body = parse_chat(await read_body(headers, receive, self._config.serve.max_body_bytes))
            check_served(body.model, self._no_roles)
            wishes = self._wishes(body.fugu or FuguBody(), headers)
            traced = wishes.trace
            request, trace.dropped = to_request(body)
            limit = self._config.serve.request_timeout
            try:
                async with asyncio.timeout(limit):
                    await self._answer(request, body, wishes, trace, answer)
            except TimeoutError:
                raise DeadlineError(f"no complete answer within {limit:g} s") from None
        except FuguError as error:
            await answer.fail(error, trace if traced else None)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # A fault of ours: the caller learns that it happened, the log learns where, neither sees the request.
            log.error("request %s failed: %s", trace.request_id, _where(error))
            await answer.fail(FuguError("internal error; the server's log has more"), trace if traced else None)
        finally:
            self._resting.learn(trace.record)

    async def _answer(
        self, request: ChatRequest, body: ChatBody, wishes: Wishes, trace: Trace, answer: _Answer
    ) -> None:
        created = int(time.time())
        id = f"chatcmpl-{trace.request_id}"
        playing = self._playing(request, wishes, trace) if body.model == TRINITY else None
        if not body.stream:
            await answer.whole(
                await self._whole(request, wishes, trace, id=id, created=created)
                if playing is None
                else await _whole_session(playing, wishes, id=id, created=created)
            )
            return
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        writer = ChunkWriter(id=id, created=created, model=body.model, include_usage=include_usage)
        if playing is None:
            events = self._events(request, wishes, trace, writer)
        else:
            events = playing.stream(writer, show_turns=wishes.show_turns, trace=wishes.trace)
        async with aclosing(sse.with_keep_alive(events, self._config.serve.keep_alive)) as lines:
            async for event in lines:
                await answer.event(event)
        await answer.done()

    async def _whole(self, request: ChatRequest, wishes: Wishes, trace: Trace, *, id: str, created: int) -> bytes:
        workers = await self._decide(request, wishes, trace)
        reply = await dispatch.complete(workers, request, record=trace.record, clock=time.perf_counter)
        told = trace.body(reply, time.perf_counter()) if wishes.trace else None
        return reply_body(reply, id=id, created=created, model=MODEL, usage=usage_body(reply.usage), trace=told)

    async def _events(
        self, request: ChatRequest, wishes: Wishes, trace: Trace, writer: ChunkWriter
    ) -> AsyncGenerator[bytes, None]:
        workers = await self._decide(request, wishes, trace)
        final: ChatReply | None = None
        chunks = dispatch.stream(workers, request, record=trace.record, clock=time.perf_counter)
        async with aclosing(chunks):
            async for chunk in chunks:
                final = chunk.final
                yield writer.chunk(chunk)
        assert final is not None
        yield writer.usage(usage_body(final.usage))
        if wishes.trace:
            yield writer.trace(trace.body(final, time.perf_counter()))

    async def _decide(self, request: ChatRequest, wishes: Wishes, trace: Trace) -> tuple[Worker, ...]:
        trace.choice, order = await self._choose(request.messages, wishes, wishes.seed, roles=False)
        return tuple(self._workers[name] for name in order)

    async def _choose(
        self, messages: tuple[Message, ...], wishes: Wishes, seed: int | None, *, roles: bool
    ) -> tuple[Choice, tuple[str, ...]]:
        """The router's choice, and the workers to try in order."""
        awake = self._resting.awake(wishes.allowed)
        choice = await self._decider.choose(Question(messages, frozenset(awake), seed, wishes.choose, roles))
        # Those that rest come last: they may have woken by the time everyone else has failed.
        return choice, rank(choice.worker, choice.probabilities, wishes.allowed, self._config.router.fallbacks)

    def _playing(self, request: ChatRequest, wishes: Wishes, trace: Trace) -> Playing:
        async def ask(transcript: tuple[Message, ...], seed: int | None) -> tuple[Choice, tuple[str, ...]]:
            return await self._choose(transcript, wishes, seed, roles=True)

        return Playing(request, ask, self._workers, self._config.router, wishes.seed, trace)

    def _wishes(self, body: FuguBody, headers: Mapping[bytes, bytes]) -> Wishes:
        """Body and headers narrow the pool together: a proxy's header cannot be widened by the body, nor the reverse.

        Raises:
            RequestError: an unknown worker or a malformed header; `param` names it.
            NoWorkerAllowedError: nobody is left.
        """
        asks = (
            ("fugu.", body.allow, body.deny, body.tags),
            ("x-fugu-", _names(headers, b"x-fugu-allow"), _names(headers, b"x-fugu-deny") or (),
             _names(headers, b"x-fugu-tags") or ()),
        )  # fmt: skip
        allowed = list(self._workers)
        for where, allow, deny, tags in asks:
            if allow is not None:
                self._check_known(allow, f"{where}allow")
                allowed = [name for name in allowed if name in allow]
            if deny:
                self._check_known(deny, f"{where}deny")
                allowed = [name for name in allowed if name not in deny]
            if tags:
                allowed = [name for name in allowed if self._tags[name].issuperset(tags)]
        if not allowed:
            raise NoWorkerAllowedError(
                f"fugu: the constraints leave no worker; there are {', '.join(self._workers)}", param="fugu"
            )
        return Wishes(
            tuple(allowed),
            _seed(headers) if body.seed is None else body.seed,
            body.choose or self._config.router.choose,
            body.trace or _flag(headers, b"x-fugu-trace"),
            body.show_turns,
        )

    def _check_known(self, names: Sequence[str], param: str) -> None:
        for name in names:
            if name in self._workers or (name in self._config.disabled and param.endswith("deny")):
                continue
            if name in self._config.disabled:
                why = f"{name} is disabled ({self._config.disabled[name]})"
            else:
                why = f"there is no worker {name[:64]!r}"
            raise RequestError(f"{param}: {why}; there are {', '.join(self._workers)}", param=param)


class _Answer:
    """The response as far as it has gone out: whole, or a stream that can still tell of an error."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._streaming = False

    async def whole(self, body: bytes) -> None:
        await send_json(self._send, 200, body)

    async def event(self, event: bytes) -> None:
        if not self._streaming:
            self._streaming = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def done(self) -> None:
        await self._send({"type": "http.response.body", "body": sse.DONE})

    async def fail(self, error: FuguError, trace: Trace | None) -> None:
        told = None if trace is None else trace.body(None, time.perf_counter())
        if not self._streaming:
            await send_error(self._send, error, told)
            return
        await self.event(error_event(error, told))
        await self.done()


async def _whole_session(playing: Playing, wishes: Wishes, *, id: str, created: int) -> bytes:
    reply = await playing.run()
    if wishes.show_turns:
        reply = replace(reply, reasoning=playing.turns_text() + reply.reasoning)
    told = playing.told(reply) if wishes.trace else None
    return reply_body(reply, id=id, created=created, model=TRINITY, usage=playing.usage(), trace=told)


def _check_content_type(headers: Mapping[bytes, bytes]) -> None:
    # Not pedantry: a page in someone's browser can post text/plain to this machine without asking, but not JSON.
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise RequestError("content-type: must be application/json", param="content-type")


def _names(headers: Mapping[bytes, bytes], header: bytes) -> tuple[str, ...] | None:
    value = headers.get(header)
    if value is None:
        return None
    names = (name.strip() for name in value.decode("latin-1").split(","))
    return tuple(name for name in names if name)


def _flag(headers: Mapping[bytes, bytes], header: bytes) -> bool:
    return headers.get(header, b"").strip().lower() in (b"1", b"true", b"yes")


def _seed(headers: Mapping[bytes, bytes]) -> int | None:
    value = headers.get(b"x-fugu-seed")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise RequestError("x-fugu-seed: must be a whole number of at most 18 digits", param="x-fugu-seed")
    return int(value)


def _where(error: BaseException) -> str:
    """Kind and place of an error without its message, which could quote the request."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    place = f" at {step.tb_frame.f_code.co_filename}:{step.tb_lineno}" if step is not None else ""
    return f"{type(error).__name__}{place}"
