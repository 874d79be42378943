"""`fugu keys`: create, list and revoke API keys of this machine's servers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.console import error_line
from actors.errors import FuguError
from actors.messages import Usage
from serve.keys import Key, KeyBook, Used

app = typer.Typer(help="API keys with limits and budgets of their own.", no_args_is_help=True)

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@app.command(
    epilog="Examples:  [bold]fugu keys create ci --model fugu --rpm 60 --budget 20[/]   ·   "
    "[bold]fugu keys create laptop --worker gpt --worker claude[/]"
)
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for the list.")],
    model: Annotated[list[str] | None, typer.Option(help="Only this served model (may be given again).")] = None,
    worker: Annotated[list[str] | None, typer.Option(help="Only this worker (may be given again).")] = None,
    rpm: Annotated[int | None, typer.Option(min=1, help="Requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option(min=1, help="Tokens per minute, read and written.")] = None,
    budget: Annotated[float | None, typer.Option(min=0, help="USD per calendar month.")] = None,
) -> None:
    """Create a key and print it, once: only its hash is kept. From then on every request needs a key."""
    key = Key("", name, _set(model), _set(worker), rpm, tpm, budget)
    made, secret = KeyBook().create(key)
    err.print(f"[green]created[/] {made.id} for {escape(name)}; this is shown once:")
    print(secret)


@app.command("list")
def list_keys() -> None:
    """Every key, what it may use, and what it used this month."""
    table = Table()
    table.add_column("id", no_wrap=True)
    for heading in ("name", "models", "workers", "limits", "requests", "tokens", "USD", "created"):
        table.add_column(heading, overflow="fold")
    for key, used in KeyBook().list():
        day = datetime.fromtimestamp(key.created, UTC).strftime("%Y-%m-%d")
        state = "[red]revoked[/]" if key.revoked is not None else _limits(key)
        table.add_row(
            key.id, escape(key.name), _names(key.models), _names(key.workers), state, str(used.requests),
            _tokens(used.usage), _money(key, used), day,
        )  # fmt: skip
    out.print(table)


@app.command()
def revoke(id: Annotated[str, typer.Argument(help="As `fugu keys list` shows it.")]) -> None:
    """Revoke a key: servers on this machine refuse it within a second."""
    try:
        key = KeyBook().revoke(id)
    except FuguError as error:
        err.print(error_line(error))
        raise typer.Exit(1) from None
    out.print(f"revoked {key.id} ({escape(key.name)})")


def _set(names: list[str] | None) -> frozenset[str] | None:
    return frozenset(names) if names else None


def _names(names: frozenset[str] | None) -> str:
    return "all" if names is None else escape(", ".join(sorted(names)))


def _limits(key: Key) -> str:
    parts = []
    if key.requests_per_minute is not None:
        parts.append(f"{key.requests_per_minute}/min")
    if key.tokens_per_minute is not None:
        parts.append(f"{key.tokens_per_minute} tokens/min")
    return ", ".join(parts)


def _tokens(usage: Usage) -> str:
    """Read and written, and what of the input was read from providers' prompt caches and written to them."""
    caches = {"cached": usage.cached_input_tokens, "to caches": usage.cache_written_tokens}
    notes = [f"{tokens} {what}" for what, tokens in caches.items() if tokens]
    both = f"{usage.input_tokens} + {usage.output_tokens}"
    return f"{both} ({'; '.join(notes)})" if notes else both


def _money(key: Key, used: Used) -> str:
    spent = f"{used.usd:.4f}"
    if key.monthly_usd is not None:
        spent += f" of {key.monthly_usd:g}"
    notes = [f"{used.estimated_usd:.4f} of it estimated"] if used.estimated_usd else []
    notes += [f"+ {used.unpriced} of unknown price"] if used.unpriced else []
    return f"{spent} ({'; '.join(notes)})" if notes else spent
