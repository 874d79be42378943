"""The pool: finds or starts the provider actors of a configuration and calls its workers through them.

Actors are named after a hash of what they were configured with, so that every process with the same configuration
finds the same actors, and a changed worker gets a new one. Nothing here imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from actors.chat_span import begin_chat, tell_reply
from actors.config import FuguConfig, WorkerSpec
from actors.errors import FuguError, StreamBrokenError, WorkerRejectedError, WorkerUnavailableError
from actors.link import Endpoint
from actors.link_client import Link, LinkLostError
from actors.messages import ChatReply, ChatRequest, Chunk, Message
from actors.placement import provider_resources
from actors.provider import LimitWindow, ProviderActor
from actors.spans import Span, current, running
from actors.status import CheckResult, WorkerStatus
from actors.telemetry import TelemetryConfig

logger = logging.getLogger(__name__)

# How the actors' names begin.
PREFIX = "fugu-provider:"
# Part of them: raise it when actor and pool no longer understand those of an earlier version.
_PROTOCOL = 7
_START_SECONDS = 300.0
_STATUS_SECONDS = 5.0
_KILL_SECONDS = 10.0
# Longer than a gateway that starts, or a training run between two rounds, has no connection.
_UNUSED_SECONDS = 120.0
_FLUSH_SECONDS = 5.0


class WorkerPool:
    """The workers of a configuration. Make one with `connect`; it may be used from any event loop of its process."""

    def __init__(self, specs: Sequence[WorkerSpec], shards: Mapping[str, Sequence[Shard]]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._shards = {name: tuple(group) for name, group in shards.items()}
        self.workers: Mapping[str, PoolWorker] = {
            spec.name: PoolWorker(spec, self._shards[spec.name]) for spec in specs
        }

    @classmethod
    def connect(
        cls,
        config: FuguConfig,
        *,
        namespace: str = "fugu",
        limits: LimitWindow | None = None,
        with_conductor: bool = False,
    ) -> WorkerPool:
        """Find the actors of the workers in use, or start them. Safe from several processes at once: whoever comes
        first starts an actor, the others find it. Returns before the actors are ready; see `ready`.

        `limits` shortens the limiters' windows for tests. `with_conductor` adds the conductor's own model, where it has
        one, as one more worker under its name, and one for each pin of it.
        """
        limits = limits or LimitWindow()
        conductors = config.conductor.specs() if with_conductor and config.conductor is not None else ()
        specs = (*config.active, *conductors)
        shards: dict[str, list[Shard]] = {}
        for group in grouped(specs):
            where = provider_resources(group, config.placement)
            actors = [
                Shard(group, shard, namespace, limits, where, config.telemetry) for shard in range(group[0].shards)
            ]
            for spec in group:
                shards[spec.name] = actors
        for shard in _distinct(shards.values()):
            shard.find_or_start()
        return cls(specs, shards)

    async def ready(self, timeout: float = _START_SECONDS) -> None:
        """Wait until every worker can be called.

        Raises:
            ConfigError: a worker cannot start as configured.
            WorkerUnavailableError: not all were ready in time.
        """
        await asyncio.gather(*(shard.link(timeout) for shard in _distinct(self._shards.values())))

    async def status(self) -> list[WorkerStatus]:
        """Every worker's state, its shards together, in the order of the configuration. Takes seconds at most: a
        worker whose actor does not answer is `down`."""
        shards = _distinct(self._shards.values())
        answers = await asyncio.gather(*(shard.status() for shard in shards))
        merged: dict[str, WorkerStatus] = {}
        for status in (status for answer in answers for status in answer):
            if status.name in merged:
                merged[status.name].add(status)
            else:
                merged[status.name] = status
        return [merged[name] for name in self._specs]

    async def check(self, name: str) -> CheckResult:
        """One tiny real call, past the response cache."""
        request = ChatRequest(
            messages=(Message("user", "Reply with the word: ready"),),
            max_tokens=16,
            sample_index=secrets.randbits(31),
        )
        begin = time.monotonic()
        try:
            reply = await self.workers[name].complete(request)
        except FuguError as error:
            # A replay worker that turns away a prompt it never saw does what it should.
            recorded = self._specs[name].provider == "replay" and isinstance(error, WorkerRejectedError)
            return CheckResult(name, time.monotonic() - begin, error=None if recorded else error)
        return CheckResult(name, time.monotonic() - begin, reply=reply)

    def retire_others(self, after: float = _UNUSED_SECONDS) -> None:
        """Tell the actors of other configurations in this namespace to end once nobody has been connected to them for
        `after` seconds. What runs on them runs to its end, and who wants one of them later starts it again."""
        ours = {(shard.namespace, shard.name) for shard in _distinct(self._shards.values())}
        namespaces = {namespace for namespace, _ in ours}
        for each in ray.util.list_named_actors(all_namespaces=True):
            name, namespace = each["name"], each["namespace"]
            if not name.startswith(PREFIX) or namespace not in namespaces or (namespace, name) in ours:
                continue
            with contextlib.suppress(ValueError):  # it has ended by now
                ray.get_actor(name, namespace=namespace).retire.remote(after)

    def release(self, after: float = _UNUSED_SECONDS) -> None:
        """Tell this configuration's actors to end once nobody has been connected to them for `after` seconds: for who
        has started them and cannot know who else has come to use them."""
        for shard in _distinct(self._shards.values()):
            with contextlib.suppress(ValueError):  # it has ended by now
                ray.get_actor(shard.name, namespace=shard.namespace).retire.remote(after)

    def shutdown(self) -> None:
        """Kill this configuration's actors, whoever started them, and no others. Those that trace may send what they
        have before, for a few seconds."""
        shards = _distinct(self._shards.values())
        closing = [shard.close_telemetry() for shard in shards if shard.traces]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_FLUSH_SECONDS)
        for shard in shards:
            shard.kill()


class PoolWorker:
    """A worker as the orchestrator sees it (`actors.messages.Worker`)."""

    def __init__(self, spec: WorkerSpec, shards: Sequence[Shard]) -> None:
        self.spec = spec
        self._shards = shards

    @property
    def name(self) -> str:
        return self.spec.name

    async def complete(self, request: ChatRequest) -> ChatReply:
        around = current()
        if around is None:
            return await self._complete(request, None)
        with running(begin_chat(around, self.spec, request, streamed=False)) as chat:
            reply = await self._complete(request, chat)
            tell_reply(chat, reply)
        return reply

    def stream(self, request: ChatRequest) -> AsyncIterator[Chunk]:
        around = current()
        return self._stream(request, None) if around is None else self._traced(request, around)

    async def _traced(self, request: ChatRequest, around: Span) -> AsyncIterator[Chunk]:
        """The stream, whose span ends when it ends or breaks."""
        began, first = time.monotonic(), True
        chat = begin_chat(around, self.spec, request, streamed=True)
        try:
            async with contextlib.aclosing(self._stream(request, chat)) as chunks:
                async for chunk in chunks:
                    if first:
                        first = False
                        chat.set({"gen_ai.response.time_to_first_chunk": round(time.monotonic() - began, 6)})
                    if chunk.final is not None:
                        tell_reply(chat, chunk.final)
                        chat.end()  # nobody has to read on from here
                    yield chunk
        except BaseException as error:
            chat.fail(error)
            raise
        finally:
            chat.end()

    async def _complete(self, request: ChatRequest, chat: Span | None) -> ChatReply:
        headers = None if chat is None else chat.headers()
        try:
            return await (await self._link()).complete(self.name, request, headers)
        except LinkLostError:
            if request.max_attempts == 1:
                raise self._died() from None
            self._say_again(chat)
        try:
            return await (await self._link()).complete(self.name, request, headers)
        except LinkLostError:
            raise self._died_twice() from None

    async def _stream(self, request: ChatRequest, chat: Span | None) -> AsyncGenerator[Chunk, None]:
        headers = None if chat is None else chat.headers()
        begun, again = False, True
        while True:
            try:
                async with contextlib.aclosing((await self._link()).stream(self.name, request, headers)) as chunks:
                    async for chunk in chunks:
                        begun = True
                        yield chunk
                return
            except LinkLostError:
                if begun:
                    raise StreamBrokenError("its actor died in the middle of the answer", worker=self.name) from None
                if not again:
                    raise self._died_twice() from None
                if request.max_attempts == 1:
                    raise self._died() from None
                again = False
                self._say_again(chat)

    async def _link(self) -> Link:
        shard = self._shards[0]
        if len(self._shards) > 1:
            shard = min(self._shards, key=lambda shard: (shard.running, random.random()))
        return shard.current or await shard.link(self.spec.timeout.connect + self.spec.timeout.first_byte)

    def _say_again(self, chat: Span | None) -> None:
        # Ray restarts an actor that died; a call that nothing was heard of is made once more, and not oftener.
        logger.warning("worker %s: its actor died during a call; trying once more", self.name)
        if chat is not None:
            chat.event("its actor died; asked again")

    def _died(self) -> WorkerUnavailableError:
        return WorkerUnavailableError("its actor died during the call", worker=self.name)

    def _died_twice(self) -> WorkerUnavailableError:
        return WorkerUnavailableError("its actor died twice during the call", worker=self.name)


class Shard:
    """One provider actor, which hosts the workers `group`: its handle, and this process's connections to it."""

    def __init__(
        self,
        group: Sequence[WorkerSpec],
        shard: int,
        namespace: str,
        limits: LimitWindow,
        resources: Mapping[str, float],
        telemetry: TelemetryConfig | None = None,
    ) -> None:
        self._group = tuple(group)
        self._telemetry = telemetry
        self._resources = dict(resources)
        self._number = shard
        self.namespace = namespace
        self._limits = limits
        self.name = actor_name(group, shard, limits, telemetry)
        self._actor: ActorHandle[Any] | None = None
        self._connections: dict[asyncio.AbstractEventLoop, _Connection] = {}
        self._last_failure = ""

    def find_or_start(self) -> ActorHandle[Any]:
        """The actor of this name, started if there is none. Ray makes sure that there is never a second."""
        first = self._group[0]
        self._actor = ProviderActor.options(  # type: ignore[attr-defined]
            name=self.name,
            namespace=self.namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            num_gpus=first.gpus,
            resources=self._resources,
            max_restarts=-1,
            max_task_retries=0,
        ).remote(self._group, self._number, self._limits, self._telemetry)
        return self._actor

    @property
    def traces(self) -> bool:
        return self._telemetry is not None and self._actor is not None

    def close_telemetry(self) -> ray.ObjectRef:
        """Have the actor send what it has noted for traces; it notes nothing more."""
        assert self._actor is not None
        return self._actor.close_telemetry.remote()

    @property
    def running(self) -> int:
        """Calls that this process has running on it."""
        link = self.current
        return 0 if link is None else link.running

    @property
    def current(self) -> Link | None:
        """The running event loop's connection, if it stands."""
        connection = self._connections.get(asyncio.get_running_loop())
        if connection is None or connection.link is None or connection.link.lost:
            return None
        return connection.link

    async def link(self, timeout: float) -> Link:
        """The running event loop's connection; made, after waiting for the actor to be up, if there is none.

        Raises:
            ConfigError: the actor cannot start as configured.
            WorkerUnavailableError: it was not up within `timeout` seconds.
        """
        for loop in [loop for loop in self._connections if loop.is_closed()]:
            del self._connections[loop]
        connection = self._connections.setdefault(asyncio.get_running_loop(), _Connection())
        try:
            async with asyncio.timeout(timeout), connection.lock:
                if connection.link is None or connection.link.lost:
                    connection.link = await self._connect()
                return connection.link
        except TimeoutError:
            names = ", ".join(spec.name for spec in self._group)
            raise WorkerUnavailableError(
                f"the actor of {names} was not ready within {timeout:g} s{self._last_failure}"
            ) from None

    async def _connect(self) -> Link:
        wait = 0.05
        actor = self._actor or self.find_or_start()
        while True:
            try:
                endpoint: Endpoint | FuguError = await actor.endpoint.remote()
                if isinstance(endpoint, FuguError):
                    raise endpoint
                return await Link.connect(endpoint)
            except RayActorError as error:
                self._last_failure = f" ({type(error).__name__}; the logs of Ray say more)"
                # Being restarted, or gone for good, for example with a shutdown by another process.
                actor = await asyncio.to_thread(self.find_or_start)
            except (OSError, TimeoutError) as error:
                logger.debug("cannot connect to actor %s: %s", self.name, error)
            await asyncio.sleep(wait)
            wait = min(1.0, 2 * wait)

    async def status(self) -> list[WorkerStatus]:
        """The actor's part of its workers' status."""
        try:
            async with asyncio.timeout(_STATUS_SECONDS):
                answer = await (self._actor or self.find_or_start()).status.remote()
        except (RayError, TimeoutError) as error:
            answer = WorkerUnavailableError(f"its actor does not answer ({type(error).__name__})")
        if not isinstance(answer, FuguError):
            return list(answer)
        return [
            WorkerStatus(spec.name, spec.provider, spec.model, state="down", reason=answer.message)
            for spec in self._group
        ]

    def kill(self) -> None:
        """Kill the actor for good, and wait until its name is free."""
        deadline = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < deadline:
            try:
                ray.kill(ray.get_actor(self.name, namespace=self.namespace), no_restart=True)
            except ValueError:
                return
            time.sleep(0.02)
        logger.warning("actor %s was told to end and has not yet", self.name)


@dataclass(slots=True)
class _Connection:
    """One event loop's way to an actor. The lock makes sure that only one is made."""

    link: Link | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


def grouped(specs: Iterable[WorkerSpec]) -> list[tuple[WorkerSpec, ...]]:
    """The workers that share an actor: local ones on the same model and device do, a remote one has its own."""
    groups: dict[tuple[Any, ...], list[WorkerSpec]] = {}
    for spec in specs:
        key: tuple[Any, ...] = (spec.name,)
        if spec.provider in ("local", "vllm"):
            key = (spec.provider, spec.model, spec.device, spec.gpus)
        groups.setdefault(key, []).append(spec)
    return [tuple(group) for group in groups.values()]


def actor_name(
    group: Sequence[WorkerSpec], shard: int, limits: LimitWindow, telemetry: TelemetryConfig | None = None
) -> str:
    """The same for the same configuration, keys included (as a part of a digest, from which they cannot be read)."""
    told = [
        (
            spec.model_dump_json(exclude={"api_key", "headers"}),
            spec.api_key.get_secret_value() if spec.api_key else None,
            sorted((name, value.get_secret_value()) for name, value in spec.headers.items()),
        )
        for spec in group
    ]
    traced = None
    if telemetry is not None:
        sent = sorted((name, value.get_secret_value()) for name, value in telemetry.headers.items())
        traced = (telemetry.model_dump_json(exclude={"headers"}), sent)
    digest = hashlib.sha256(repr((_PROTOCOL, told, limits, traced)).encode()).hexdigest()[:16]
    return f"{PREFIX}{group[0].name}:{digest}:{shard}"


def _distinct(shards: Iterable[Sequence[Shard]]) -> list[Shard]:
    return list(dict.fromkeys(shard for group in shards for shard in group))
