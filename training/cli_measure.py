"""`fugu eval` and `fugu tune`: what a router is worth, and which settings make a better one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from actors.errors import ConfigError
from training.cli_options import Address, Device, Json, Outcomes, Quiet, Workers
from training.commands import check_json, err_console, explained, names, tell

measure = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@measure.command(
    "eval",
    epilog="Examples:  [bold]fugu eval --outcomes outcomes/ --checkpoint router.safetensors[/]   ·   "
    "[bold]fugu eval --outcomes outcomes/ --workers a,b,c --checkpoint sft.safetensors --checkpoint "
    "evolved.safetensors --split val --json result.json --min-gain 0.02[/]",
)
def evaluate(
    outcomes: Outcomes,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="A router to measure (may be given again).", metavar="FILE")
    ] = None,
    workers: Workers = "",
    split: Annotated[str, typer.Option(help="The tasks to measure on.")] = "test",
    train_split: Annotated[str, typer.Option(help="The tasks that simpler ways of choosing learn from.")] = "train",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Report and plots go here.", metavar="DIR")] = None,
    min_gain: Annotated[
        float | None,
        typer.Option(help="Exit code 1 unless every checkpoint gains so much over the best single worker."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals and of the baselines.")] = 0,
    backbone: Annotated[str | None, typer.Option(help="What reads the tasks.", show_default="the checkpoint's")] = None,
    read_tokens: Annotated[
        int | None, typer.Option(min=32, help="How much of a task is read.", show_default="as in training")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="kNN, k-means and MLP on the same hidden states.")
    ] = True,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure routers on recorded outcomes against every worker and every simpler way of choosing. Needs no server,
    no configuration and no Ray."""
    with explained():
        check_json(json)
        if min_gain is not None and not checkpoint:
            raise ConfigError("--min-gain is about checkpoints; give one with --checkpoint")
        from training import evaluate as room

        settings = room.EvalRun(
            outcomes,
            tuple(checkpoint or ()),
            names(workers),
            split,
            train_split,
            out,
            seed=seed,
            min_gain=min_gain,
            backbone=backbone,
            max_tokens=read_tokens,
            device=device,
            hidden_baselines=baselines,
            progress=not quiet,
        )
        report = room.run(settings)
        tell(report, json)
        for name, reason in report.left_out.items():
            err_console.print(f"[dim]left out: {name}, {reason}[/]", soft_wrap=True)
        if not report.passed:
            gains = ", ".join(f"{row.name} {row.gain.mean:+.4f}" for row in report.heads)
            err_console.print(f"[bold red]gate:[/] a gain of {min_gain:g} was asked for: {gains}", soft_wrap=True)
            raise typer.Exit(1)


@measure.command(
    epilog="Examples:  [bold]fugu tune --outcomes outcomes/ --out router.safetensors[/]   ·   "
    "[bold]fugu tune --outcomes outcomes/ --out router.safetensors --over tau=0.1..1 --over decay=0.3,1,3 "
    "--trials 40 --hold-out datasets[/]   ·   [bold]fugu tune --outcomes outcomes/ --method evolve --checkpoint "
    "sft.safetensors --out router.safetensors --over sigma=0.01..0.1 --over population=16[/]   ·   "
    "[bold]fugu tune … --resume[/]"
)
def tune(
    outcomes: Outcomes,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The checkpoint of the best settings, trained on all.", metavar="FILE")
    ],
    method: Annotated[
        Literal["sft", "evolve", "sft+evolve"], typer.Option(help="What is tuned; the last evolves what sft found.")
    ] = "sft",
    over: Annotated[
        list[str] | None,
        typer.Option(
            help="What to vary: NAME=LOW..HIGH, NAME=A,B,C, or NAME=A to fix it (may be given again); a wrong name "
            "tells which there are.",
            metavar="NAME=VALUES",
            show_default="tau, decay, gamma; sigma, population, size",
        ),
    ] = None,
    workers: Workers = "",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Where evolutions start.", metavar="FILE", show_default="zeros")
    ] = None,
    split: Annotated[str, typer.Option(help="The tasks to learn from.")] = "train",
    val_split: Annotated[str, typer.Option(help="The tasks to measure the result on.")] = "val",
    objective: Annotated[
        Literal["folds", "val"],
        typer.Option(help="Score trials on held-out folds of --split, or on --val-split itself."),
    ] = "folds",
    hold_out: Annotated[
        Literal["tasks", "datasets"], typer.Option(help="Folds of single tasks, or of whole data sets.")
    ] = "tasks",
    trials: Annotated[int, typer.Option(min=1)] = 24,
    replicates: Annotated[
        int, typer.Option(min=1, help="How often the best trials are trained and scored; most end earlier (ASHA).")
    ] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Trials at once, a CPU each.")] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    backbone: Annotated[
        str | None, typer.Option(help="What reads the tasks.", show_default="the checkpoint's, or the embedded model")
    ] = None,
    read_tokens: Annotated[
        int | None, typer.Option(min=32, help="How much of a task is read.", show_default="as in training")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a tuning that was broken off.")] = False,
    address: Address = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Find settings of SFT or evolution on recorded outcomes (Ray Tune with ASHA), and train with the best."""
    with explained():
        check_json(json)
        from training import tune as room

        settings = room.TuneRun(
            outcomes,
            out,
            method,
            tuple(over or ()),
            names(workers),
            checkpoint,
            split,
            val_split,
            objective,
            hold_out,
            trials,
            replicates,
            concurrency,
            seed,
            backbone,
            read_tokens,
            device,
            address=address,
            resume=resume,
            progress=not quiet,
        )
        tell(room.run(settings), json)
