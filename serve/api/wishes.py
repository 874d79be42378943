"""What a caller wants of the pool, from the body's `fugu` field and the `x-fugu-*` headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.config import FuguConfig
from actors.errors import NoWorkerAllowedError, RequestError
from serve.api.job import Wishes
from serve.api.ultra import ULTRA
from serve.auth import ANYONE, Caller
from serve.conductor import Knobs
from serve.keys import Key
from serve.prices import Prices
from serve.schema import FuguBody


class WishReader:
    """Knows the names and tags that constraints may use."""

    def __init__(self, config: FuguConfig, prices: Prices | None = None) -> None:
        self._names = tuple(spec.name for spec in config.active)
        self._tags = {spec.name: frozenset(spec.tags) for spec in config.active}
        self._prices = prices or Prices(config)
        self._disabled = config.disabled
        self._choose = config.router.choose
        self._writer = None if config.conductor is None else config.conductor.worker

    def read(self, body: FuguBody, headers: Mapping[bytes, bytes], caller: Caller = ANYONE) -> Wishes:
        """Key, body and headers narrow the pool together: none can be widened by another. A key with a budget can use
        workers whose price is known.

        Raises:
            RequestError: an unknown worker or a malformed header; `param` names it.
            NoWorkerAllowedError: nobody is left.
        """
        asks = (
            ("fugu.", body.allow, body.deny, body.tags),
            ("x-fugu-", _listed(headers, b"x-fugu-allow"), _listed(headers, b"x-fugu-deny") or (),
             _listed(headers, b"x-fugu-tags") or ()),
        )  # fmt: skip
        allowed = self._of_key(caller.key) if caller.key is not None else list(self._names)
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
                f"fugu: the constraints leave no worker; there are {', '.join(self._names)}", param="fugu"
            )
        return Wishes(
            tuple(allowed),
            _seed(headers) if body.seed is None else body.seed,
            body.choose or self._choose,
            body.trace or _flag(headers, b"x-fugu-trace"),
            body.show_turns,
            Knobs(
                body.max_rounds,
                body.max_recursion,
                body.max_steps,
                body.deadline_s,
                body.budget_usd,
                body.budget_tokens,
                body.max_calls,
            ),
        )

    def _of_key(self, key: Key) -> list[str]:
        allowed = [name for name in self._names if key.workers is None or name in key.workers]
        if not allowed:
            raise NoWorkerAllowedError("fugu: this key may use none of the workers here", param="fugu")
        if key.monthly_usd is not None:
            allowed = [name for name in allowed if self._prices.known(name)]
            if not allowed:
                raise NoWorkerAllowedError(
                    "fugu: this key has a budget, and no worker that it may use has a known price; set `price` in the "
                    "configuration",
                    param="fugu",
                )
        return allowed

    def check_writer(self, model: str, key: Key | None) -> None:
        """A key's constraints hold for who writes the plans of `fugu-ultra`, too, who reads all that the caller says.
        What a request itself allows or denies is about who answers.

        Raises:
            NoWorkerAllowedError: the plans are written by a worker that the key may not use.
        """
        if key is None or self._writer is None or not model.startswith(ULTRA) or self._writer in self._of_key(key):
            return
        raise NoWorkerAllowedError(
            f"model: the plans of {ULTRA} are written by {self._writer}, which this key may not use", param="model"
        )

    def _check_known(self, names: Sequence[str], param: str) -> None:
        for name in names:
            if name in self._tags or (name in self._disabled and param.endswith("deny")):
                continue
            if name in self._disabled:
                why = f"{name} is disabled ({self._disabled[name]})"
            else:
                why = f"there is no worker {name[:64]!r}"
            raise RequestError(f"{param}: {why}; there are {', '.join(self._names)}", param=param)


def _listed(headers: Mapping[bytes, bytes], header: bytes) -> tuple[str, ...] | None:
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
