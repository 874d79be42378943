"""What every command prints alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from actors.errors import FuguError

out_console = Console(highlight=False)
err_console = Console(stderr=True, highlight=False)


def error_line(error: FuguError) -> str:
    """The error as one line of rich markup."""
    return f"[bold red]error:[/] {escape(error.message)}"


@contextmanager
def explained() -> Iterator[None]:
    """A mistake becomes a line and exit code 2."""
    try:
        yield
    except FuguError as error:
        err_console.print(error_line(error), soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
