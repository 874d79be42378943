"""Ways of answering that can be measured beside the workers: a name, and a function from a request to a reply.

A system gets the request and the pool's workers, and may call them as it likes; what it calls is metered outside
(`training.metering`), so that every system is counted and charged alike.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.config import FuguConfig, RouterConfig
from actors.errors import ConfigError
from actors.messages import ChatReply, ChatRequest, Worker
from actors.model_files import resolve_model
from orchestrator import coordinator, dispatch
from orchestrator.backbone import Device
from orchestrator.head import load_checkpoint
from orchestrator.router import Decision, Router
from training.deciding import Conversation, Decider

Ask = Callable[[ChatRequest, Mapping[str, Worker]], Awaitable[ChatReply]]


@dataclass(frozen=True)
class System:
    """`ask` answers a request with the pool's workers, and raises a FuguError where it cannot. `note` says in a word
    what it is."""

    name: str
    ask: Ask
    note: str = ""


def pool_router(config: FuguConfig) -> Router:
    """The router of a configuration, in this process.

    Raises:
        ConfigError: it has no checkpoint.
        CheckpointError: the checkpoint is of another pool.
    """
    if config.router.checkpoint is None:
        raise ConfigError("router.checkpoint: a router assigns steps, and the configuration has no trained head")
    names = [spec.name for spec in config.active]
    return _loaded(config.router.checkpoint, names, config.router.max_tokens, None, "auto")


def _loaded(checkpoint: Path, pool: Sequence[str], max_tokens: int, backbone: str | None, device: Device) -> Router:
    head = load_checkpoint(checkpoint)
    files = resolve_model(backbone or head.info.backbone, revision=head.info.revision)
    return Router.load(
        files.folder,
        checkpoint,
        pool,
        max_tokens=max_tokens,
        device=device,
        backbone=files.id,
        revision=files.revision,
    )


def router_systems(
    checkpoint: Path,
    pool: Sequence[str],
    allowed: Sequence[str],
    config: RouterConfig,
    *,
    suffix: str = "",
    backbone: str | None = None,
    max_tokens: int | None = None,
    device: Device = "auto",
) -> list[System]:
    """`fugu`, and `fugu-trinity` where the head has roles, as they are served with this head: greedily, with the
    next worker after a failure. `pool` are all workers of the configuration, `allowed` those that may answer.

    Raises:
        CheckpointError, ConfigError: as `orchestrator.router.Router.load`.
    """
    router = _loaded(checkpoint, pool, max_tokens or config.max_tokens, backbone, device)
    return systems_of(Decider(router), allowed, config, suffix=suffix)


def systems_of(decider: Decider, allowed: Sequence[str], config: RouterConfig, *, suffix: str = "") -> list[System]:
    """As `router_systems`, with a router that is there already."""
    names = frozenset(allowed)
    info = decider.router.checkpoint.info
    method = str(info.trained.get("method", ""))

    async def decide(conversation: Conversation) -> Decision:
        return await decider(conversation, names)

    async def fugu(request: ChatRequest, workers: Mapping[str, Worker]) -> ChatReply:
        decision = await decide(request.messages)
        ranking = dispatch.rank(decision.worker, decision.probabilities, allowed, config.fallbacks)
        tried = [workers[name] for name in ranking]
        return await dispatch.complete(tried, request, record=dispatch.Record(), clock=time.monotonic)

    async def trinity(request: ChatRequest, workers: Mapping[str, Worker]) -> ChatReply:
        session = await coordinator.play(
            request, decide, workers, max_turns=config.max_turns, fallbacks=config.fallbacks, guard=config.guard
        )
        # Without the guard a session may end without an answer, which is worth nothing.
        return session.response or ChatReply("")

    systems = [System(f"fugu{suffix}", fugu, method)]
    if info.roles:
        systems.append(System(f"fugu-trinity{suffix}", trinity, method))
    return systems


def worker_system(name: str) -> System:
    """A system that is one worker: a model of a running endpoint, for example."""

    async def ask(request: ChatRequest, workers: Mapping[str, Worker]) -> ChatReply:
        return await workers[name].complete(request)

    return System(name, ask, "endpoint")
