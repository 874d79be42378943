"""Options that several of the training commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from actors.errors import ConfigError
from actors.storage import local_copy, local_folder

EMBEDDED = Path(__file__).resolve().parents[1] / "configs" / "embedded.yaml"

Device = Literal["auto", "cpu", "cuda"]
PromptFormat = Literal["chat", "raw"]

# The files of an outcomes folder that are read.
RECORDED = ("tasks.parquet", "outcomes.parquet")


def recorded(given: str) -> Path:
    """A folder of outcomes: a path, or an address such as s3://, whose files are fetched."""
    return _fetched(lambda: local_folder(given, RECORDED))


def fetched(given: str) -> Path:
    """A file: a path, or an address such as s3://, whose content is fetched."""
    return _fetched(lambda: local_copy(given))


def _fetched(fetch: Callable[[], Path]) -> Path:
    try:
        return fetch()
    except ConfigError as error:
        raise typer.BadParameter(error.message) from None


# Training reads and writes where all machines of a cluster reach it.
Recorded = Annotated[
    Path,
    typer.Option(
        "--outcomes", parser=recorded, help="The folder of recorded outcomes; a path or s3://, gs://.", metavar="DIR"
    ),
]
Out = Annotated[
    str, typer.Option("--out", "-o", help="The checkpoint to write; a path or s3://, gs://.", metavar="FILE")
]
Folder = Annotated[
    str, typer.Option("--out", "-o", help="The folder of the adapter to write; a path or s3://, gs://.", metavar="DIR")
]
Workers = Annotated[str, typer.Option("--workers", help="Only these, in this order (commas between).", metavar="A,B,C")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON, too.", metavar="FILE")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="Join the Ray at this address instead of starting one.", metavar="RAY", envvar="FUGU_RAY"
    ),
]
BudgetUsd = Annotated[float | None, typer.Option("--budget-usd", min=0, help="Stop before more is spent.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Length of an answer.", show_default="the worker's own")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", min=0, max=2, help="Of the answers.", show_default="the worker's own")
]
Reads = Annotated[
    list[str],
    typer.Option(
        "--read",
        help="A place of the backbone to read; several are joined.",
        metavar="POSITION[@LAYER]",
        show_default="the middle layer's body; from zeros the last layer's penultimate",
    ),
]
