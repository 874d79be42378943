"""What a configuration says, as pydantic models. Unknown keys are errors, secrets are `SecretStr`.

    workers:   [WorkerSpec]      who can answer
    router:    RouterConfig      who decides
    conductor: ConductorConfig   who writes workflows, for fugu-ultra
    serve:     ServeConfig       how it is offered
    placement: PlacementConfig   on which nodes of a cluster
    telemetry: TelemetryConfig   where traces go; without it nothing is traced

`actors.config_file` reads it from YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from actors.telemetry import TelemetryConfig

Provider = Literal["openai", "anthropic", "gemini", "local", "vllm", "replay"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Pin = Annotated[str, Field(pattern=r"^[0-9]{8}[a-z0-9.-]{0,16}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PositiveInt = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]

DEFAULT_BASE_URL: Mapping[str, str] = {
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
    "gemini": "https://generativelanguage.googleapis.com/v1beta",
}


class Strict(BaseModel):
    """Frozen, and a key we do not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Strict):
    """What the provider grants, per sliding minute, and how many calls may run at once. `None` is no limit.
    `max_wait` bounds the seconds a call may queue for its turn before it fails with 429."""

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    concurrency: PositiveInt = 32
    max_wait: Seconds = 60.0


class Price(Strict):
    """USD per million tokens. `cached_input` is for what is read from the provider's prompt cache, `cache_write` for
    what is written to it; both default to `input`. `cache_hour` is for what is written to be kept for an hour where the
    provider tells it apart, as Anthropic does; it defaults to Anthropic's price, twice `input`."""

    input: Usd
    output: Usd
    cached_input: Usd | None = None
    cache_write: Usd | None = None
    cache_hour: Usd | None = None


class Timeout(Strict):
    """Seconds, per phase of one call: connecting, until the first byte, between two bytes (a provider's signs of life
    count), and in all. Of an answer that is not streamed nothing comes before all of it is written: `whole` takes the
    place of `first_byte` there, and is five times that where it is not set."""

    connect: Seconds = 5.0
    first_byte: Seconds = 120.0
    whole: Seconds | None = None
    idle: Seconds = 120.0
    total: Seconds = 7200.0

    @property
    def until_whole(self) -> float:
        return 5 * self.first_byte if self.whole is None else self.whole


class Retry(Strict):
    """Attempts in all before the first byte; waits grow exponentially with full jitter between the bounds, and never
    fall below the provider's `retry-after`."""

    attempts: PositiveInt = 3
    min_wait: Seconds = 0.5
    max_wait: Seconds = 30.0


class Breaker(Strict):
    """After `failures` in a row the worker rests `cooldown` seconds, then one call may try."""

    failures: PositiveInt = 5
    cooldown: Seconds = 30.0


class Cache(Strict):
    """Response cache in the provider actor: whole replies, keyed by the full request and its sample index."""

    entries: PositiveInt = 4096
    ttl: Seconds = 3600.0


class Defaults(Strict):
    """Sampling values used where the caller gives none."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: PositiveInt | None = None


class WorkerSpec(Strict):
    """One worker: a model, the provider it is called through, and what it may use.

    `model` is the provider's model id; for `local` and `vllm` a folder, the embedded model's name or a hub id.
    `system` is put before the conversation (after a system message of the caller's own). `adapter` is the folder of a
    LoRA adapter (local, vllm). `outcomes` is the folder that a `replay` worker answers from. `accepts` widens the
    request fields an OpenAI-compatible server takes beyond OpenAI's own (for example `top_k`). `api` is which of
    OpenAI's two an `openai` worker is called by: `responses` carries a model's reasoning through its tool loops, where
    the server has it.
    """

    name: Name
    provider: Provider
    api: Literal["chat", "responses"] = "chat"
    model: str = Field(min_length=1)
    base_url: str | None = None
    api_key: SecretStr | None = None
    headers: dict[str, SecretStr] = {}
    limits: Limits = Limits()
    price: Price | None = None
    timeout: Timeout = Timeout()
    retry: Retry = Retry()
    breaker: Breaker = Breaker()
    cache: Cache | None = None
    tags: tuple[Name, ...] = ()
    context: PositiveInt | None = None
    system: str | None = None
    defaults: Defaults = Defaults()
    accepts: tuple[str, ...] = ()
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_completion_tokens"
    adapter: Path | None = None
    outcomes: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_batch: PositiveInt = 16
    shards: PositiveInt = 1

    @property
    def url(self) -> str:
        """The base address, without a trailing slash."""
        return (self.base_url or DEFAULT_BASE_URL.get(self.provider, "")).rstrip("/")

    @field_validator("base_url")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"https?://[^/\s]+", value):
            raise ValueError("must begin with http:// or https://")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> WorkerSpec:
        for kind in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            limit = getattr(self.limits, kind)
            if limit is not None and limit < self.shards:
                raise ValueError(f"limits.{kind} is {limit}: too small to share among {self.shards} shards")
        if self.provider == "replay" and self.outcomes is None:
            raise ValueError("a replay worker needs `outcomes`, the folder it answers from")
        if self.provider in ("local", "vllm") and self.shards > 1:
            raise ValueError("shards split a remote provider's limit; a local model has one engine")
        if self.api != "chat" and self.provider != "openai":
            raise ValueError("`api` is for openai workers only")
        if self.adapter is not None and self.provider not in ("local", "vllm"):
            raise ValueError("`adapter` is for local and vllm workers only")
        return self


class Replicas(Strict):
    """Bounds for autoscaling; `target_ongoing` requests per replica is what it aims at."""

    min: PositiveInt = 1
    max: PositiveInt = 1
    target_ongoing: PositiveInt = 16

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class Canary(Strict):
    """A second checkpoint that decides a share (0..1) of the conversations, each of them from its first turn to its
    last."""

    checkpoint: Path
    share: Annotated[float, Field(ge=0, le=1)]


class RouterConfig(Strict):
    """The deciding model. Without a `checkpoint` nothing is learned yet: workers are tried in the order of the file.

    `choose` takes the most probable worker or samples. `fallbacks` is how many further workers may be tried after
    the chosen one. `batch_wait_ms` and `max_batch` steer batching across requests; `max_tokens` is how much of a
    conversation the backbone reads (longer ones lose their middle). `max_turns` and `guard` are for `fugu-trinity`,
    where the checkpoint has roles: the most turns of a session, and whether it always ends with an answer.
    `stay_margin` is by how much (in probability) another worker must be better than the one of the turn before to take
    over a conversation within `stay_seconds`, the life of a provider's prompt cache; it counts for the part of the
    prompt that would be read from there. 0 always takes the best.
    `pins` are checkpoints that stay: `20261123: old.safetensors` serves `fugu-20261123` (and, if it has roles,
    `fugu-trinity-20261123`; `fugu-ultra-20261123` where the conductor is pinned, too, or has no adapter) beside the
    rolling names, for who wants to freeze behaviour. Each is a backbone more in the
    router's memory. `pin_sha256` says what the file of a pin must contain, by its SHA-256 in hexadecimal digits.
    """

    backbone: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    checkpoint: Path | None = None
    canary: Canary | None = None
    pins: dict[Pin, Path] = {}
    pin_sha256: dict[Pin, Sha256] = {}
    choose: Literal["argmax", "sample"] = "argmax"
    fallbacks: Annotated[int, Field(ge=0, le=16)] = 2
    max_tokens: PositiveInt = 1024
    max_batch: PositiveInt = 32
    batch_wait_ms: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 2.0
    timeout: Seconds = 30.0
    max_turns: Annotated[int, Field(ge=1, le=32)] = 5
    guard: bool = True
    stay_margin: Annotated[float, Field(ge=0, le=1)] = 0.0
    stay_seconds: Seconds = 300.0


CONDUCTOR = "conductor"
"""What a plan calls the Conductor itself, and the name that its own model is called by; no worker can have it."""


def writer_of(pin: str | None) -> str:
    """The name that the conductor's own model is called by, with the adapter of a pin or the rolling one (None)."""
    return CONDUCTOR if pin is None else f"{CONDUCTOR}-{pin}"


class ConductorConfig(Strict):
    """Who writes the workflows of `fugu-ultra`: a `worker` of the pool as it is, or a `model` of its own (a folder, the
    embedded model's name or a hub id) with an `adapter`, in process. A model that a worker uses too, with the same
    provider, device and gpus, is in memory once.

    `style` and `show_names` are what an adapter was trained with: `compact` is for very small models; with names the
    prompt tells who the workers are, else they are numbers. `examples` can be left out of the paper's style. `steps` is
    how workers are told their parts: with the whole task (`full`), or, for very small ones, the subtask alone (`bare`).
    `assign` says whose word holds on who does a step: the conductor's, or the router's, which needs a checkpoint.
    `max_rounds` is how often it may plan, seeing its last result (1: once), and `max_recursion` how deep a step may
    be handed to the conductor itself. `retries` is how often it may write again what is no workflow; then the best
    single worker answers. `fallbacks` is how many other workers a failed step may go to, `on_failure` what happens
    when they fail too: the workflow goes on without (`skip`), or the request fails. `deadline` (seconds), `budget_usd`,
    `budget_tokens` and `max_calls` bound a request, which then ends with the best answer so far. `memory_ttl` is how
    long a workflow that waits for the caller's tools is kept, `memory` the file that it is kept in.
    `pins` are adapters that stay: `20261123: adapters/old` serves `fugu-ultra-20261123` beside the rolling name, with
    the router's pin of that date. What an adapter was trained with (`style`, `show_names`, `steps`) is read beside it.
    `pin_sha256` says what the weights of a pin's adapter must be, by their SHA-256 in hexadecimal digits.
    """

    worker: Name | None = None
    provider: Literal["local", "vllm"] = "local"
    model: str | None = Field(default=None, min_length=1)
    adapter: Path | None = None
    pins: dict[Pin, Path] = {}
    pin_sha256: dict[Pin, Sha256] = {}
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_batch: PositiveInt = 16
    context: PositiveInt | None = None
    timeout: Timeout = Timeout()
    style: Literal["paper", "compact"] = "paper"
    show_names: bool = False
    examples: bool = True
    steps: Literal["full", "bare"] = "full"
    assign: Literal["conductor", "router"] = "conductor"
    max_steps: Annotated[int, Field(ge=1, le=5)] = 5
    max_rounds: Annotated[int, Field(ge=1, le=8)] = 1
    max_recursion: Annotated[int, Field(ge=0, le=3)] = 0
    retries: Annotated[int, Field(ge=0, le=10)] = 2
    fallbacks: Annotated[int, Field(ge=0, le=16)] = 2
    on_failure: Literal["skip", "fail"] = "skip"
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.2
    max_tokens: PositiveInt = 1024
    deadline: Seconds | None = None
    budget_usd: Usd | None = None
    budget_tokens: PositiveInt | None = None
    max_calls: PositiveInt | None = None
    memory: Path | None = None
    memory_ttl: Seconds = 24 * 3600.0

    @model_validator(mode="after")
    def _one_engine(self) -> ConductorConfig:
        if (self.worker is None) == (self.model is None):
            raise ValueError("needs either `worker`, one of the pool, or `model`, one of its own")
        own = {"provider", "adapter", "pins", "pin_sha256", "device", "gpus", "max_batch", "context", "timeout"}
        own &= self.model_fields_set
        if self.worker is not None and own:
            raise ValueError(f"{', '.join(sorted(own))}: of a `model`, and the conductor is the worker {self.worker}")
        return self

    def specs(self) -> tuple[WorkerSpec, ...]:
        """Its own model as workers, which provider actors host like any other: with its adapter, and with each that is
        pinned. None where it is a worker of the pool."""
        own = self.spec()
        return () if own is None else (own, *(self._spec(writer_of(pin), file) for pin, file in self.pins.items()))

    def spec(self) -> WorkerSpec | None:
        """Its own model with its adapter; None: it is one of the pool."""
        return None if self.model is None else self._spec(CONDUCTOR, self.adapter)

    def _spec(self, name: str, adapter: Path | None) -> WorkerSpec:
        assert self.model is not None
        return WorkerSpec(
            name=name,
            provider=self.provider,
            model=self.model,
            adapter=adapter,
            device=self.device,
            gpus=self.gpus,
            max_batch=self.max_batch,
            context=self.context,
            timeout=self.timeout,
            price=Price(input=0, output=0),
        )


class ServeConfig(Strict):
    """The HTTP side. With `api_keys` every request needs one. A public `host` without keys is refused unless
    `allow_public_without_keys` says that this is meant. `store` keeps responses on this machine for `store_days`,
    unless a request says `store: false`: what `previous_response_id` goes on from."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_keys: tuple[SecretStr, ...] = ()
    allow_public_without_keys: bool = False
    gateway_replicas: Replicas = Replicas(target_ongoing=64)
    router_replicas: Replicas = Replicas()
    gpus_per_router: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.25
    max_body_bytes: PositiveInt = 32 * 1024 * 1024
    max_ongoing_requests: PositiveInt = 1024
    keep_alive: Seconds = 15.0
    request_timeout: Seconds = 7200.0
    drain: Seconds = 30.0
    store: bool = True
    store_days: Annotated[float, Field(gt=0, le=3650)] = 30.0
    ha_proxy: bool = True

    @field_validator("api_keys")
    @classmethod
    def _long_enough(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value()) < 8 for key in keys):
            raise ValueError("an API key needs at least 8 characters")
        return keys


class PlacementConfig(Strict):
    """On which nodes of a cluster what runs, as names of custom resources (see cluster.yaml): provider actors where the
    outside can be reached, gateways, router and conductor, learners with their engines, rollouts. A name that no node
    has counts for nothing, so that one machine needs no resources; with `required` it is asked for all the same, and
    the cluster starts a node that has it."""

    providers: Name = "egress"
    serve: Name = "serve"
    train: Name = "train"
    rollouts: Name = "rollout"
    required: bool = False


class FuguConfig(Strict):
    """The whole file. `disabled` maps a worker to the reason it is not in use; it is filled while loading."""

    workers: tuple[WorkerSpec, ...] = Field(min_length=1)
    router: RouterConfig = RouterConfig()
    conductor: ConductorConfig | None = None
    serve: ServeConfig = ServeConfig()
    placement: PlacementConfig = PlacementConfig()
    telemetry: TelemetryConfig | None = None
    disabled: dict[str, str] = Field(default={}, exclude=True)

    @property
    def active(self) -> tuple[WorkerSpec, ...]:
        """The workers in use, in the order of the file."""
        return tuple(worker for worker in self.workers if worker.name not in self.disabled)

    @model_validator(mode="after")
    def _unique(self) -> FuguConfig:
        names = [worker.name for worker in self.workers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"worker names must be unique; given more than once: {', '.join(twice)}")
        return self

    @model_validator(mode="after")
    def _conductor(self) -> FuguConfig:
        names = [worker.name for worker in self.workers]
        if self.conductor is None:
            return self
        taken = {writer_of(pin) for pin in (None, *self.conductor.pins)}
        for name in taken.intersection(names):
            raise ValueError(f"no worker can be called {name}: that is what a plan calls its writer")
        for pin in self.conductor.pins:
            if self.router.checkpoint is not None and pin not in self.router.pins:
                raise ValueError(f"conductor.pins.{pin}: give router.pins that date, too, or what decides would move")
        if self.conductor.worker is not None and self.conductor.worker not in names:
            raise ValueError(f"conductor.worker: there is no worker {self.conductor.worker}")
        if self.conductor.assign == "router" and self.router.checkpoint is None:
            raise ValueError("conductor.assign: the router can assign steps only with a router.checkpoint")
        return self
