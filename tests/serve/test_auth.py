"""Which addresses are public, and that a public one is refused without keys."""

from __future__ import annotations

import pytest

from actors.config import ServeConfig
from actors.errors import AuthenticationError, ConfigError
from serve.auth import Keys, check_bind, is_loopback


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("no-such-host.invalid", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_public_address_needs_keys_or_a_clear_word() -> None:
    with pytest.raises(ConfigError, match=r"serve\.api_keys is empty"):
        check_bind(ServeConfig(host="0.0.0.0"))
    check_bind(ServeConfig(host="127.0.0.1"))
    check_bind(ServeConfig(host="0.0.0.0", api_keys=("long-enough",)))
    check_bind(ServeConfig(host="0.0.0.0", allow_public_without_keys=True))


async def test_keys() -> None:
    keys = Keys(ServeConfig(api_keys=("first-key-1", "second-key-2")))
    await keys.enter(b"Bearer first-key-1")
    await keys.enter(b"bearer  second-key-2 ")
    for wrong in (None, b"", b"Bearer", b"Bearer first-key", b"Basic first-key-1", "Bearer ключ".encode()):
        with pytest.raises(AuthenticationError) as caught:
            await keys.enter(wrong)
        assert "first" not in caught.value.message
    assert "first-key-1" not in repr(vars(keys))
    await Keys(ServeConfig()).enter(None)
