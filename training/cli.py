"""`fugu label`, `fugu train`, `fugu eval`: from a pool to labels, a trained router and a table.

Each command fills the settings of one function and shows its report. Whatever is heavy is imported by the command that
needs it. Exit codes: 0 done, 1 a gate was not passed, 2 a mistake (told in a line), 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from actors.console import explained
from actors.errors import DataError
from actors.mirror import kept_at
from training.cli_conductor import conductor_commands, ultra_commands
from training.cli_measure import measure
from training.cli_options import EMBEDDED, Address, BudgetUsd, Json, MaxTokens, Quiet, Temperature, Workers
from training.cli_train import train
from training.commands import check_json, names, pairs, tell

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@app.command(
    epilog="Examples:  [bold]fugu label --tasks embedded --out outcomes/[/]   ·   "
    "[bold]fugu label -c pool.yaml --tasks reasoning-gym --tasks mine.jsonl --out outcomes/ --samples 3 "
    "--budget-usd 5[/]   ·   [bold]fugu label --out outcomes/ --resume[/]"
)
def label(
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "--outcomes",
            "-o",
            help="The outcomes folder to write; a path or s3://, gs://, where it is also kept meanwhile.",
            metavar="DIR",
        ),
    ],
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The pool.", show_default="configs/embedded.yaml")
    ] = EMBEDDED,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Which tasks: reasoning-gym[:family,…], embedded[:family,…], a .jsonl or .parquet file, an outcomes "
            "folder, hub:NAME[:SUBSET][@PART]. Without it those that --out holds.",
            metavar="SOURCE",
        ),
    ] = None,
    workers: Workers = "",
    split: Annotated[str | None, typer.Option(help="Only the tasks of this split.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers per worker and task.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="Tasks to make of each family.")] = 20,
    difficulty: Annotated[Literal["easy", "hard"], typer.Option(help="Of the tasks that are made.")] = "easy",
    task_seed: Annotated[int, typer.Option(min=0, help="Of the tasks that are made.")] = 0,
    grader: Annotated[str, typer.Option(help="For rows of a file that name none.")] = "phrase",
    columns: Annotated[
        str,
        typer.Option(help="Which columns of a file stand for ours.", metavar="prompt=question,reference=answer"),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the answers.")] = 0,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    budget_usd: BudgetUsd = None,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Stop before more calls are made.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with what --out holds (always done), and refuse if it holds nothing."),
    ] = False,
    address: Address = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Let every worker try every task, and record how well each did. Stopped at any moment, it goes on where it was."""
    with explained(), kept_at(out) as folder:
        check_json(json)
        from training import label as room
        from training.tasks import Columns, TaskSource

        if resume and not (folder / room.JOURNAL).exists():
            raise DataError(f"{out} holds no labelling that could be resumed")
        source = TaskSource(count, task_seed, difficulty, Columns(grader, names=pairs(columns, "--columns")))
        settings = room.LabelRun(
            config,
            folder,
            tuple(tasks or ()),
            source,
            names(workers),
            split,
            samples,
            seed,
            max_tokens,
            temperature,
            budget_usd,
            max_requests,
            address,
            not quiet,
        )
        tell(room.run(settings), json)


train.add_typer(conductor_commands)
app.add_typer(ultra_commands)
app.add_typer(train, name="train")
app.add_typer(measure)
