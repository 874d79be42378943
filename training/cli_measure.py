"""`fugu eval` and `fugu tune`: what a router is worth, and which settings make a better one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer

from actors.console import err_console, explained
from actors.errors import ConfigError
from actors.mirror import kept_at
from actors.storage import local_folder
from training.cli_options import RECORDED, Address, Device, Json, Quiet, Recorded, Workers, fetched
from training.commands import check_json, made, names, pairs, tell

LIVE = "Live: a pool (--config) or an endpoint (--url)"
# So many of the answers without a score are told.
FEW = 10

measure = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")


@measure.command(
    "eval",
    epilog="Examples:  [bold]fugu eval --outcomes outcomes/ --checkpoint router.safetensors[/]   ·   "
    "[bold]fugu eval --outcomes outcomes/ --workers a,b,c --checkpoint sft.safetensors --checkpoint "
    "evolved.safetensors --split val --json result.json --min-gain 0.02[/]   ·   live: [bold]fugu eval -c pool.yaml "
    "--outcomes live/ --tasks reasoning-gym --checkpoint router.safetensors --budget-usd 5[/]   ·   an endpoint: "
    "[bold]fugu eval --url http://127.0.0.1:8000 --model fugu --outcomes live/ --tasks mine.jsonl[/]",
)
def evaluate(
    outcomes: Annotated[
        str,
        typer.Option(
            help="The folder of recorded outcomes; live: kept answers. A path or s3://, gs://.", metavar="DIR"
        ),
    ],
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            help="A router to measure (may be given again); a path or s3://, gs://.", metavar="FILE", parser=fetched
        ),
    ] = None,
    workers: Workers = "",
    split: Annotated[str, typer.Option(help="The tasks to measure on.")] = "test",
    train_split: Annotated[str, typer.Option(help="The tasks that simpler ways of choosing learn from.")] = "train",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Report and plots go here.", metavar="DIR")] = None,
    min_gain: Annotated[
        float | None,
        typer.Option(help="Exit code 1 unless every checkpoint or system gains so much over the best single worker."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the intervals and of the baselines; live: of answers.")] = 0,
    backbone: Annotated[str | None, typer.Option(help="What reads the tasks.", show_default="the checkpoint's")] = None,
    read_tokens: Annotated[
        int | None, typer.Option(min=32, help="How much of a task is read.", show_default="as in training")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="kNN, k-means and MLP on the same hidden states.")
    ] = True,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Live: the pool to measure.", rich_help_panel=LIVE)
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Live: an OpenAI-compatible endpoint; key: FUGU_API_KEY.", rich_help_panel=LIVE)
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model of the endpoint (may be given again).", rich_help_panel=LIVE)
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks as label takes them; without it those of --outcomes.", metavar="SOURCE", rich_help_panel=LIVE
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many tasks.", rich_help_panel=LIVE)] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each task.", rich_help_panel=LIVE)] = 1,
    count: Annotated[int, typer.Option(min=1, help="Tasks to make of each family.", rich_help_panel=LIVE)] = 20,
    difficulty: Annotated[
        Literal["easy", "hard"], typer.Option(help="Of the tasks that are made.", rich_help_panel=LIVE)
    ] = "easy",
    task_seed: Annotated[int, typer.Option(min=0, help="Of the tasks that are made.", rich_help_panel=LIVE)] = 0,
    grader: Annotated[str, typer.Option(help="For rows of a file that name none.", rich_help_panel=LIVE)] = "phrase",
    columns: Annotated[
        str,
        typer.Option(
            help="Which columns of a file stand for ours.",
            metavar="prompt=question,reference=answer",
            rich_help_panel=LIVE,
        ),
    ] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of an answer.", show_default="the worker's own", rich_help_panel=LIVE),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, max=2, help="Of answers.", show_default="the worker's own", rich_help_panel=LIVE),
    ] = None,
    budget_usd: Annotated[
        float | None, typer.Option(min=0, help="Stop before more is spent.", rich_help_panel=LIVE)
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Stop before more calls are made.", rich_help_panel=LIVE)
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Attempts of systems at once.", show_default="by limits", rich_help_panel=LIVE),
    ] = None,
    address: Address = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure routers against every worker and every simpler way of choosing: on recorded outcomes (no server,
    configuration or Ray needed), or live with --config or --url."""
    is_live = config is not None or url is not None
    with explained(), kept_at(outcomes) if is_live else nullcontext(local_folder(outcomes, RECORDED)) as folder:
        check_json(json)
        if is_live:
            from training import evaluate_live
            from training.tasks import Columns, TaskSource

            live = evaluate_live.LiveRun(
                folder,
                config,
                tuple(checkpoint or ()),
                url,
                tuple(model or ()),
                os.environ.get("FUGU_API_KEY"),
                tuple(tasks or ()),
                TaskSource(count, task_seed, difficulty, Columns(grader, names=pairs(columns, "--columns"))),
                names(workers),
                split,
                limit,
                samples,
                seed,
                max_tokens,
                temperature,
                budget_usd,
                max_requests,
                concurrency,
                min_gain,
                out,
                backbone,
                read_tokens,
                device,
                address,
                not quiet,
            )
            found = evaluate_live.run(live)
            tell(found, json)
            for system, task, reason in found.errors[:FEW]:
                err_console.print(f"[dim]{system} on {task}: {reason}[/]", soft_wrap=True)
            gate(found.passed, min_gain, {row.name: row.gain.mean for row in found.systems}, found.stopped)
            return
        live_only = {"--model": model, "--tasks": tasks, "--limit": limit, "--budget-usd": budget_usd}
        live_only |= {"--max-requests": max_requests, "--max-tokens": max_tokens, "--temperature": temperature}
        if given := [option for option, value in live_only.items() if value]:
            raise ConfigError(f"{', '.join(given)}: for a live evaluation; give --config or --url, too")
        if min_gain is not None and not checkpoint:
            raise ConfigError("--min-gain is about checkpoints; give one with --checkpoint")
        from training import evaluate as room

        settings = room.EvalRun(
            folder,
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
        gate(report.passed, min_gain, {row.name: row.gain.mean for row in report.heads})


def gate(passed: bool, asked: float | None, gains: Mapping[str, float], stopped: str = "") -> None:
    """Exit code 1 where a gain was asked for and not reached."""
    if passed:
        return
    told = ", ".join(f"{name} {gain:+.4f}" for name, gain in gains.items())
    why = f" ({stopped})" if stopped else ""
    err_console.print(f"[bold red]gate:[/] a gain of {asked:g} was asked for: {told or 'nothing'}{why}", soft_wrap=True)
    raise typer.Exit(1)


@measure.command(
    epilog="Examples:  [bold]fugu tune --outcomes outcomes/ --out router.safetensors[/]   ·   "
    "[bold]fugu tune --outcomes outcomes/ --out router.safetensors --over tau=0.1..1 --over decay=0.3,1,3 "
    "--trials 40 --hold-out datasets[/]   ·   [bold]fugu tune --outcomes outcomes/ --method evolve --checkpoint "
    "sft.safetensors --out router.safetensors --over sigma=0.01..0.1 --over population=16[/]   ·   "
    "[bold]fugu tune … --resume[/]"
)
def tune(
    outcomes: Recorded,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="The checkpoint of the best settings, trained on all; a path or s3://, gs://.",
            metavar="FILE",
        ),
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
    with explained(), made(out, "tune") as file:
        check_json(json)
        from training import tune as room

        settings = room.TuneRun(
            outcomes,
            file,
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
