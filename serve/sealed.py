"""What a worker signed of its reasoning, as one opaque text that a client carries for it (`encrypted_content`)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import orjson

from actors.messages import Thought

_PREFIX = "fugu1."


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
