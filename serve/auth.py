"""Who may call: bearer keys, compared in constant time, and the rule for public addresses."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from dataclasses import dataclass

from actors.config import ServeConfig
from actors.errors import AuthenticationError, ConfigError


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is: a stable id of the key ("" where none is needed), under which what it keeps is found."""

    id: str = ""


ANYONE = Caller()


class Keys:
    """The configured API keys, kept as digests. Without any, every request may pass."""

    def __init__(self, config: ServeConfig) -> None:
        self._digests = tuple(_digest(key.get_secret_value().encode()) for key in config.api_keys)

    def check(self, authorization: bytes | None) -> Caller:
        """Let a request with one of the keys pass; whose it is.

        Raises:
            AuthenticationError: no `Authorization: Bearer` header, or a key that is not ours.
        """
        if not self._digests:
            return ANYONE
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise AuthenticationError("an API key is required: send it as `Authorization: Bearer <key>`")
        given = _digest(key.strip())
        # Every key is compared, so that the time taken does not tell which one came close.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            raise AuthenticationError("the API key is not one of this server's keys")
        return Caller(given.hex()[:32])


def check_bind(config: ServeConfig) -> None:
    """Refuse to offer the pool to a network without keys.

    Raises:
        ConfigError: `host` can be reached from other machines, there are no keys, and the configuration does not
            say that this is meant.
    """
    if config.api_keys or config.allow_public_without_keys or is_loopback(config.host):
        return
    raise ConfigError(
        f"serve.host {config.host} can be reached from other machines, but serve.api_keys is empty: whoever finds "
        "the port would use your providers. Set serve.api_keys, bind 127.0.0.1, or set "
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
