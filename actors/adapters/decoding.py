"""From logits to text: sampling, tokens to characters, stop strings. No model, no threads, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

LIKELY = 256


def sample(logits: torch.Tensor, temperature: float, top_p: float, uniform: float) -> int:
    """One token for one row: the most probable at temperature 0; otherwise the nucleus `top_p` (Holtzman et al.
    2020, §3.1) of the softmax at that temperature, sampled by inverting its distribution function at `uniform`, a
    number in [0, 1).

    Args:
        logits: float tensor [vocabulary].
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / temperature, dim=-1).double()
    tokens = None
    if top_p < 1:
        # The nucleus nearly always lies in the few most probable tokens, and sorting all is slow on a CPU.
        ranked, tokens = probabilities.topk(min(LIKELY, len(probabilities)))
        if ranked.sum() < top_p:
            ranked, tokens = probabilities.sort(descending=True)
        before = ranked.cumsum(0) - ranked
        probabilities = ranked[: max(1, int((before < top_p).sum()))]
    reached = probabilities.cumsum(0)
    index = int(torch.searchsorted(reached, reached[-1] * uniform, right=True))
    # Rounding can put the point on the very end, which belongs to the last token that has any probability.
    index = min(index, int((reached < reached[-1]).sum()))
    return index if tokens is None else int(tokens[index])


class Detokenizer:
    """Tokens in, text out, as soon as it is certain: a character whose bytes are spread over several tokens comes
    out whole. The concatenation of all output is the decoding of all tokens.

    Decoding starts a few tokens back, since a token's text can depend on the one before it (a leading space), and
    only what that adds is put out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._context = 0  # where decoding starts
        self._done = 0  # tokens before this one are put out

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left: the replacement characters of an unfinished one."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        old = self._decode(self._tokens[self._context : self._done])
        new = self._decode(self._tokens[self._context :])
        if len(new) <= len(old) or (new.endswith("\ufffd") and not final):
            return ""
        self._context, self._done = self._done, len(self._tokens)
        return new[len(old) :]


class StopFilter:
    """Lets text through up to the first stop string. Whatever could be the beginning of one is held back until it
    is known, so no part of a stop string ever gets out. `by` is the one that ended the text, "" so far."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.by = ""

    @property
    def stopped(self) -> bool:
        return bool(self.by)

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        hits = [(at, stop) for stop in self._stop if (at := held.find(stop)) >= 0]
        if hits:
            at, self.by = min(hits, key=lambda hit: hit[0])
            self._held = ""
            return held[:at]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
