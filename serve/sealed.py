"""What a client carries for a worker as one opaque text (`encrypted_content`): what it signed of its reasoning, or its
summary of a conversation."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import orjson

from actors.messages import Thought

_PREFIX = "fugu1."
_SUMMARY = "fugu1s."


def seal(thoughts: Sequence[Thought]) -> str:
    """The thoughts as one line of text; `unseal` gives them back."""
    packed = orjson.dumps([[each.text, each.signature, each.redacted, each.origin] for each in thoughts])
    return _PREFIX + base64.urlsafe_b64encode(packed).decode()


def unseal(sealed: str | None) -> tuple[Thought, ...]:
    """The thoughts; none where the text is not of ours (it came from another server, whose workers are not these)."""
    if sealed is None or not sealed.startswith(_PREFIX):
        return ()
    try:
        packed = orjson.loads(base64.urlsafe_b64decode(sealed[len(_PREFIX) :]))
        return tuple(
            Thought(str(text), str(signature), bool(redacted), str(origin))
            for text, signature, redacted, origin in packed
        )
    except (binascii.Error, ValueError, TypeError):
        return ()


def seal_summary(text: str) -> str:
    """A summary as one line of text; `unseal_summary` gives it back."""
    return _SUMMARY + base64.urlsafe_b64encode(text.encode("utf-8", "surrogatepass")).decode()


def unseal_summary(sealed: str) -> str | None:
    """The summary; None where the text is not of ours."""
    if not sealed.startswith(_SUMMARY):
        return None
    try:
        return base64.urlsafe_b64decode(sealed[len(_SUMMARY) :]).decode("utf-8", "surrogatepass")
    except ValueError:
        return None
