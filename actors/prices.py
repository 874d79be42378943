"""What a call costs: by the price in the configuration, else by the public price list (`genai-prices`) for models that
it knows at the address they are called at. Elsewhere the cost is unknown, which is not the same as nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import urlsplit

from actors.config import Price, WorkerSpec
from actors.messages import Usage

logger = logging.getLogger(__name__)

Pricing = Callable[[Usage], float | None]

_LISTED = ("openai", "anthropic", "gemini")


def pricing(spec: WorkerSpec) -> Pricing:
    """What a usage of this worker costs, in USD; None where that is unknown."""
    if not has_price(spec):
        return lambda _usage: None
    price = spec.price
    cost = _listed(spec) if price is None else lambda usage: price_of(usage, price)
    return lambda usage: cost(_consistent(usage))


def has_price(spec: WorkerSpec) -> bool:
    """Whether the configuration has its price, or it is at a public address where the list may."""
    host = urlsplit(spec.url).hostname or ""
    public = "." in host and not host.replace(".", "").isdigit()
    return spec.price is not None or (spec.provider in _LISTED and public)


def price_of(usage: Usage, price: Price) -> float:
    """USD. What is read from a cache or written to it is a part of the input, reasoning of the output."""
    cached = price.input if price.cached_input is None else price.cached_input
    write = price.input if price.cache_write is None else price.cache_write
    hour = 2 * price.input if price.cache_hour is None else price.cache_hour
    fresh = usage.input_tokens - usage.cached_input_tokens - usage.cache_written_tokens
    kept = (usage.cache_written_tokens - usage.cache_hour_tokens) * write + usage.cache_hour_tokens * hour
    read = fresh * price.input + usage.cached_input_tokens * cached + kept
    return (read + usage.output_tokens * price.output) / 1e6


def _consistent(usage: Usage) -> Usage:
    """No part is more than its whole, whatever a provider says: else an answer could cost less than nothing."""
    read = min(usage.cached_input_tokens, usage.input_tokens)
    written = min(usage.cache_written_tokens, usage.input_tokens - read)
    hour = min(usage.cache_hour_tokens, written)
    return replace(usage, cached_input_tokens=read, cache_written_tokens=written, cache_hour_tokens=hour)


def _listed(spec: WorkerSpec) -> Pricing:
    # Its data takes most of a second to load, for those who need it.
    import genai_prices

    def cost(usage: Usage) -> float | None:
        tokens = genai_prices.Usage(
            # The list knows the price of five minutes only; an hour costs twice the input.
            input_tokens=usage.input_tokens + usage.cache_hour_tokens,
            cache_read_tokens=usage.cached_input_tokens,
            cache_write_tokens=usage.cache_written_tokens - usage.cache_hour_tokens,
            output_tokens=usage.output_tokens,
        )
        try:
            return float(genai_prices.calc_price(tokens, spec.model, provider_api_url=spec.url).total_price)
        except LookupError:
            return None

    if cost(Usage(1, 1)) is None:
        logger.warning("worker %s: no price is known for %s; set `price` to know what it costs", spec.name, spec.model)
        return lambda _usage: None
    return cost
