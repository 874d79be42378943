"""`fugu train sft | evolve | add-worker`: from outcomes to a trained router."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from actors.console import explained, out_console
from actors.errors import ConfigError
from actors.mirror import kept_at
from actors.storage import written
from training.cli_options import (
    Address,
    BudgetUsd,
    Device,
    Json,
    MaxTokens,
    Out,
    PromptFormat,
    Quiet,
    Reads,
    Recorded,
    Temperature,
    Workers,
    fetched,
    recorded,
)
from training.commands import check_json, made, names, reads, tell

train = typer.Typer(help="Train a router.", no_args_is_help=True, rich_markup_mode="rich")


@train.command(
    epilog="Examples:  [bold]fugu train sft --outcomes outcomes/ --out router.safetensors[/]   ·   "
    "[bold]fugu train sft --outcomes outcomes/ --workers a,b,c --out router.safetensors --tau 0.25 "
    "--decay 0.3[/]"
)
def sft(
    outcomes: Recorded,
    out: Out,
    workers: Workers = "",
    split: Annotated[str, typer.Option(help="The tasks to learn from.")] = "train",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    backbone: Annotated[str, typer.Option(help="What reads the tasks: a name, folder or hub id.")] = (
        "SmolLM2-135M-Instruct"
    ),
    read: Reads = [],  # noqa: B006 - typer wants a list, nobody changes it
    prompt_format: Annotated[PromptFormat, typer.Option(help="How a task is put to the backbone.")] = "chat",
    read_tokens: Annotated[int, typer.Option(min=32, help="How much of a task is read.")] = 256,
    head: Annotated[
        Literal["landmarks", "linear"], typer.Option(help="What weights multiply: nearness to tasks, or hidden states.")
    ] = "landmarks",
    landmarks: Annotated[int, typer.Option(min=1, help="At most so many; few tasks get fewer.")] = 512,
    objective: Annotated[
        Literal["kl", "squares"], typer.Option(help="KL to soft targets, or squared errors of scores.")
    ] = "kl",
    tau: Annotated[
        list[float] | None,
        typer.Option(help="Softness of the targets; of several the best in cross-validation.", show_default="0.5"),
    ] = None,
    decay: Annotated[
        list[float] | None,
        typer.Option(help="Shrinks the head; of several the best in cross-validation.", show_default="0.3 1"),
    ] = None,
    gamma: Annotated[
        list[float] | None,
        typer.Option(help="How near a landmark has to be to matter; of several the best.", show_default="1 4"),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation.")] = 5,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Train a head by gradient on recorded outcomes. Needs no server, no configuration and no Ray."""
    with explained(), written(out) as file:
        check_json(json)
        from training import train_sft as room

        given: dict[str, Any] = {"taus": tuple(tau or ()), "decays": tuple(decay or ())}
        given |= {"gammas": tuple(gamma or ()), "reads": reads(read)}
        settings = room.SftRun(
            outcomes,
            file,
            workers=names(workers),
            split=split,
            seed=seed,
            backbone=backbone,
            prompt_format=prompt_format,
            max_tokens=read_tokens,
            head=head,
            objective=objective,
            landmarks=landmarks,
            folds=folds,
            device=device,
            progress=not quiet,
            **{name: value for name, value in given.items() if value},
        )
        tell(room.run(settings), json)


@train.command(
    epilog="Examples:  [bold]fugu train evolve --outcomes outcomes/ --checkpoint sft.safetensors --out "
    "evolved.safetensors[/]   ·   [bold]fugu train evolve --outcomes outcomes/ -c pool.yaml --mode fugu-trinity "
    "--out trinity.safetensors --budget-usd 20[/]   ·   [bold]fugu train evolve … --resume[/]"
)
def evolve(
    out: Out,
    outcomes: Annotated[
        Path | None,
        typer.Option(
            parser=recorded,
            help="The folder of recorded outcomes, or of tasks to play live; a path or s3://, gs://.",
            metavar="DIR",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Play live sessions with this pool instead of looking outcomes up."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks to play live, as label takes them.", metavar="SOURCE")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            parser=fetched,
            help="Start from this head, usually by sft; a path or s3://, gs://.",
            show_default="zeros",
            metavar="FILE",
        ),
    ] = None,
    workers: Workers = "",
    split: Annotated[str, typer.Option(help="The tasks to play.")] = "train",
    val_split: Annotated[str, typer.Option(help="The tasks that say which generation is best.")] = "val",
    mode: Annotated[
        Literal["fugu", "fugu-trinity"], typer.Option(help="One worker a task, or three roles in turns.")
    ] = "fugu",
    generations: Annotated[int, typer.Option(min=1)] = 60,
    size: Annotated[
        int | None, typer.Option(min=1, help="Tasks per generation.", show_default="all recorded, 16 live")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Different answers of a worker to a task.")] = 1,
    sigma: Annotated[float, typer.Option(help="The first step size.")] = 0.03,
    population: Annotated[
        int | None, typer.Option(help="Candidates per generation.", show_default="4 + 3 ln n")
    ] = None,
    mirrored: Annotated[bool, typer.Option("--mirrored", help="Candidates in opposite pairs.")] = False,
    seed: Annotated[int, typer.Option(min=1)] = 42,
    diversity: Annotated[float, typer.Option(help="Worth of evenly used workers in the fitness.")] = 0.0,
    turn_cost: Annotated[float, typer.Option(help="Cost of turns in the fitness.")] = 0.1,
    usd_cost: Annotated[float, typer.Option(help="Cost of a USD per task in the fitness.")] = 0.0,
    choose: Annotated[Literal["argmax", "sample"], typer.Option(help="How candidates choose.")] = "argmax",
    racing: Annotated[
        bool | None,
        typer.Option(
            "--racing/--no-racing", help="Stop hopeless candidates early.", show_default="live sessions with roles"
        ),
    ] = None,
    validate_every: Annotated[int, typer.Option(min=1, help="Generations between validations.")] = 5,
    validation_tasks: Annotated[
        int | None, typer.Option(min=1, help="Tasks to validate on.", show_default="all recorded, 300 live")
    ] = None,
    max_excluded: Annotated[
        float, typer.Option(min=0, max=1, help="Most of the episodes that may end without a reward.")
    ] = 0.2,
    max_turns: Annotated[int, typer.Option(min=1, help="Of a session with roles.")] = 5,
    guard: Annotated[bool, typer.Option("--guard/--no-guard", help="Every session ends with an answer.")] = True,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    reward: Annotated[
        str | None,
        typer.Option(help="Called with task and answer instead of the graders.", metavar="MODULE:FUNCTION"),
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Sessions at once.")] = None,
    max_calls: Annotated[int | None, typer.Option(min=1, help="Stop before more calls are made.")] = None,
    budget_usd: BudgetUsd = None,
    singular: Annotated[
        int | None,
        typer.Option(
            help="Evolve the singular values of this layer of the backbone, too (-1: the last).", metavar="LAYER"
        ),
    ] = None,
    cross_fit: Annotated[
        int,
        typer.Option(
            min=0, help="Judge changes of a start by sft by tasks that it does not know: refit in so many parts."
        ),
    ] = 5,
    axes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Search along so many principal axes of the head, 0: every weight by itself.",
            show_default="64 on landmarks, else 0",
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="What reads the tasks.", show_default="the checkpoint's, or the embedded model")
    ] = None,
    read: Reads = [],  # noqa: B006 - typer wants a list, nobody changes it
    prompt_format: Annotated[PromptFormat, typer.Option(help="For a start from zeros.")] = "chat",
    read_tokens: Annotated[
        int | None, typer.Option(min=32, help="How much of a task is read.", show_default="the checkpoint's, or 1024")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last generation that was kept.")] = False,
    address: Address = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Evolve a head by sep-CMA-ES, with the end of a task as the only signal."""
    with explained(), made(out, "evolve") as file:
        check_json(json)
        from training import evolve as room
        from training.evolution import Settings
        from training.fitness import Worth

        places = reads(read)
        reading: dict[str, Any] = {"reads": places} if places else {}
        settings = room.EvolveRun(
            file,
            outcomes,
            config=config,
            sources=tuple(tasks or ()),
            workers=names(workers),
            checkpoint=checkpoint,
            split=split,
            val_split=val_split,
            mode=mode,
            generations=generations,
            size=size,
            samples=samples,
            search=Settings(sigma, population, mirrored, seed),
            worth=Worth(diversity, turn_cost, usd_cost),
            choose=choose,
            racing=racing,
            validate_every=validate_every,
            validation_tasks=validation_tasks,
            max_excluded=max_excluded,
            max_turns=max_turns,
            guard=guard,
            max_tokens=max_tokens,
            temperature=temperature,
            reward=reward,
            concurrency=concurrency,
            max_calls=max_calls,
            budget_usd=budget_usd,
            axes=axes,
            cross_fit=cross_fit,
            singular=singular,
            reading=room.Reading(
                backbone, prompt_format=prompt_format, max_tokens=read_tokens, device=device, **reading
            ),
            address=address,
            resume=resume,
            progress=not quiet,
        )
        tell(room.run(settings), json)


@train.command(
    epilog="Examples:  [bold]fugu train add-worker newcomer --outcomes outcomes/ --checkpoint router.safetensors "
    "--out wider.safetensors[/]   ·   labelled first, on 300 chosen tasks: [bold]fugu train add-worker newcomer "
    "-c pool.yaml --outcomes outcomes/ --checkpoint router.safetensors --out wider.safetensors --tasks 300 "
    "--budget-usd 2[/]"
)
def add_worker(
    worker: Annotated[str, typer.Argument(help="The newcomer, as the outcomes call it.")],
    outcomes: Annotated[
        str,
        typer.Option(
            help="The folder of recorded outcomes, with --config of the newcomer's, too; a path or s3://, gs://.",
            metavar="DIR",
        ),
    ],
    checkpoint: Annotated[
        Path,
        typer.Option(help="The head without it; a path or s3://, gs://.", metavar="FILE", parser=fetched),
    ],
    out: Out,
    split: Annotated[str, typer.Option(help="The tasks to learn from.")] = "train",
    val_split: Annotated[str, typer.Option(help="The tasks to measure on.")] = "val",
    tasks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Learn from so many of its tasks; with --config try so many.", show_default="all; tried: 300"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A pool with the newcomer: label it first, and nobody else."),
    ] = None,
    held: Annotated[int, typer.Option(min=1, help="With --config: tasks of --val-split that it tries.")] = 200,
    pick: Annotated[
        Literal["spread", "random"],
        typer.Option(help="With --config: tasks that cover all others, or any of them."),
    ] = "spread",
    samples: Annotated[int, typer.Option(min=1, help="With --config: answers to each task.")] = 1,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    budget_usd: BudgetUsd = None,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Stop before more calls are made.")] = None,
    tau: Annotated[float | None, typer.Option(help="Softness of the targets.", show_default="the head's")] = None,
    decay: Annotated[float | None, typer.Option(min=0, help="Shrinks its row.", show_default="the head's")] = None,
    polish: Annotated[int, typer.Option(min=0, help="Steps for all rows together, at the end.")] = 5,
    retrain: Annotated[bool, typer.Option("--retrain/--no-retrain", help="Compare with training all anew.")] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    backbone: Annotated[str | None, typer.Option(help="What reads the tasks.", show_default="the checkpoint's")] = None,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    address: Address = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Add a worker to a trained head by fitting its row only, then polishing all rows for a moment. With --config it is
    labelled first, on as many tasks as are needed and no more."""
    with explained(), written(out) as file, kept_at(outcomes) as folder:
        check_json(json)
        from training import add_worker as room

        if config is not None:
            from training import newcomer

            labelled = newcomer.run(
                newcomer.NewcomerRun(
                    worker,
                    config,
                    folder,
                    checkpoint,
                    split,
                    val_split,
                    tasks or newcomer.NewcomerRun.tasks,
                    held,
                    pick,
                    samples,
                    seed,
                    max_tokens,
                    temperature,
                    budget_usd,
                    max_requests,
                    backbone,
                    device=device,
                    address=address,
                    progress=not quiet,
                )
            )
            if labelled is not None:
                out_console.print(labelled.table())
            tasks = None  # all that it has tried
        elif budget_usd is not None or max_requests is not None:
            raise ConfigError("--budget-usd and --max-requests are about labelling; give --config, too")

        settings = room.AddWorkerRun(
            worker,
            folder,
            checkpoint,
            file,
            split,
            val_split,
            tasks,
            tau,
            decay,
            polish,
            retrain=retrain,
            seed=seed,
            backbone=backbone,
            device=device,
            progress=not quiet,
        )
        tell(room.run(settings), json)
