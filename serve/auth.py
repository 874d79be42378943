"""Who may call: bearer keys, and the rule for public addresses."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from dataclasses import dataclass

from actors.config import ServeConfig
from actors.errors import AuthenticationError, ConfigError, PermissionDeniedError
from serve.keys import Key, KeyBook


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is: a stable id of the key ("" where none is needed), under which what it keeps is found, and
    the key, where it was created with limits of its own (`serve.keys`)."""

    id: str = ""
    key: Key | None = None

    def check_model(self, model: str) -> None:
        """Raises:
        PermissionDeniedError: the key may not use this model.
        """
        if self.key is not None and self.key.models is not None and model not in self.key.models:
            allowed = ", ".join(sorted(self.key.models))
            raise PermissionDeniedError(f"model: this key may use {allowed or 'none'}", param="model")


ANYONE = Caller()


class Keys:
    """The keys of the configuration, kept as digests, and those of the book. Without any, every request may pass."""

    def __init__(self, config: ServeConfig, book: KeyBook | None = None) -> None:
        self._digests = tuple(_digest(key.get_secret_value().encode()) for key in config.api_keys)
        self.book = book

    @property
    def needed(self) -> bool:
        """Whether a request without a key is refused, as far as is known since the last one."""
        return bool(self._digests) or (self.book is not None and self.book.any)

    async def enter(self, authorization: bytes | None) -> Caller:
        """Let a request with one of the keys pass, those of the book as they are now; whose it is.

        Raises:
            AuthenticationError: no `Authorization: Bearer` header, or a key that is not ours.
        """
        if self.book is not None:
            await self.book.refresh()
        if not self.needed:
            return ANYONE
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise AuthenticationError("an API key is required: send it as `Authorization: Bearer <key>`")
        given = _digest(key.strip())
        # Every key is compared, so that the time taken does not tell which one came close.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if any(matches):
            return Caller(given.hex()[:32])
        found = await self.book.look_for(key.strip()) if self.book is not None else None
        if found is None:
            raise AuthenticationError("the API key is not one of this server's keys")
        return Caller(found.id, found)


def check_bind(config: ServeConfig) -> None:
    """Refuse to offer the pool to a network without keys.

    Raises:
        ConfigError: `host` can be reached from other machines, there are no keys, and the configuration does not
            say that this is meant.
    """
    if config.api_keys or config.allow_public_without_keys or is_loopback(config.host):
        return
    if any(key.revoked is None for key, _ in KeyBook().list()):
        return
    raise ConfigError(
        f"serve.host {config.host} can be reached from other machines, but serve.api_keys is empty: whoever finds "
        "the port would use your providers. Run `fugu keys create`, set serve.api_keys, bind 127.0.0.1, or set "
        "serve.allow_public_without_keys: true if that is what you want"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name counts if every address it has is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
