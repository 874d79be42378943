"""What every command prints alike."""

from __future__ import annotations

from actors.errors import FuguError


def error_line(error: FuguError) -> str:
    """The error as one line of rich markup."""
    from rich.markup import escape

    return f"[bold red]error:[/] {escape(error.message)}"
