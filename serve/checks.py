"""`fugu pool check`: one small real call to each worker, and what the configuration says of it."""

from __future__ import annotations

import asyncio

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.config import FuguConfig, Limits, Price
from actors.pool import WorkerPool
from actors.status import CheckResult

READY_SECONDS = 300.0


async def check_all(config: FuguConfig, pool: WorkerPool, *, console: Console) -> int:
    """Check every worker in use at the same time and print a table of all; returns how many failed."""
    await pool.ready(READY_SECONDS)
    results = await asyncio.gather(*(pool.check(spec.name) for spec in config.active))
    by_name = {result.name: result for result in results}
    table = Table()
    for heading in ("worker", "model", "result", "latency", "limits", "USD per million"):
        table.add_column(heading, overflow="fold")
    failed = 0
    for spec in config.workers:
        ok, result, latency = _told(by_name.get(spec.name), config.disabled.get(spec.name, ""))
        failed += not ok
        table.add_row(escape(spec.name), escape(spec.model), result, latency, _limits(spec.limits), _price(spec.price))
    console.print(table)
    return failed


def _told(result: CheckResult | None, disabled: str) -> tuple[bool, str, str]:
    if result is None:
        return True, f"[yellow]not in use:[/] {escape(disabled)}", ""
    if result.error is not None:
        return False, f"[red]{escape(result.error.message)}[/]", f"{result.seconds:.2f} s"
    return True, "[green]ok[/]", f"{result.seconds:.2f} s"


def _limits(limits: Limits) -> str:
    parts = [f"{limits.concurrency} at once"]
    if limits.requests_per_minute is not None:
        parts.append(f"{limits.requests_per_minute}/min")
    if limits.tokens_per_minute is not None:
        parts.append(f"{limits.tokens_per_minute} tokens/min")
    return ", ".join(parts)


def _price(price: Price | None) -> str:
    return "" if price is None else f"{price.input:g} in, {price.output:g} out"
