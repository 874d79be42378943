"""`fugu label`, `fugu train`, `fugu eval`: from a pool to labels, a trained router and a table.

Each command fills the settings of one function and shows its report. Whatever is heavy is imported by the command that
needs it. Exit codes: 0 done, 1 a gate was not passed, 2 a mistake (told in a line), 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from actors.errors import ConfigError, DataError
from training.commands import check_json, err_console, explained, names, pairs, reads, tell

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
train = typer.Typer(help="Train a router.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(train, name="train")

EMBEDDED = Path(__file__).resolve().parents[1] / "configs" / "embedded.yaml"

Device = Literal["auto", "cpu", "cuda"]
PromptFormat = Literal["chat", "raw"]

Outcomes = Annotated[Path, typer.Option("--outcomes", help="The folder of recorded outcomes.", metavar="DIR")]
Workers = Annotated[str, typer.Option("--workers", help="Only these, in this order (commas between).", metavar="A,B,C")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the report as JSON, too.", metavar="FILE")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Join the Ray at this address instead of starting one.", metavar="RAY")
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
        show_default="penultimate",
    ),
]


@app.command(
    epilog="Examples:  [bold]fugu label --tasks embedded --out outcomes/[/]   ·   "
    "[bold]fugu label -c pool.yaml --tasks reasoning-gym --tasks mine.jsonl --out outcomes/ --samples 3 "
    "--budget-usd 5[/]   ·   [bold]fugu label --out outcomes/ --resume[/]"
)
def label(
    out: Annotated[
        Path, typer.Option("--out", "--outcomes", "-o", help="The outcomes folder to write.", metavar="DIR")
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
    with explained():
        check_json(json)
        from training import label as room
        from training.tasks import Columns, TaskSource

        if resume and not (out / room.JOURNAL).exists():
            raise DataError(f"{out} holds no labelling that could be resumed")
        source = TaskSource(count, task_seed, difficulty, Columns(grader, names=pairs(columns, "--columns")))
        settings = room.LabelRun(
            config,
            out,
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


@train.command(
    epilog="Examples:  [bold]fugu train sft --outcomes outcomes/ --out router.safetensors[/]   ·   "
    "[bold]fugu train sft --outcomes outcomes/ --workers a,b,c --out router.safetensors --tau 0.25 "
    "--weight-decay 3[/]"
)
def sft(
    outcomes: Outcomes,
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint to write.", metavar="FILE")],
    workers: Workers = "",
    split: Annotated[str, typer.Option(help="The tasks to learn from.")] = "train",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    backbone: Annotated[str, typer.Option(help="What reads the tasks: a name, folder or hub id.")] = (
        "SmolLM2-135M-Instruct"
    ),
    read: Reads = [],  # noqa: B006 - typer wants a list, nobody changes it
    prompt_format: Annotated[PromptFormat, typer.Option(help="How a task is put to the backbone.")] = "chat",
    read_tokens: Annotated[int, typer.Option(min=32, help="How much of a task is read.")] = 1024,
    tau: Annotated[
        list[float] | None,
        typer.Option(
            help="Softness of the targets; of several the best in cross-validation.", show_default="0.1 0.25 0.5"
        ),
    ] = None,
    weight_decay: Annotated[
        list[float] | None,
        typer.Option(help="Shrinks the head; of several the best in cross-validation.", show_default="0.3 1 3 10"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 150,
    learning_rate: Annotated[float, typer.Option(min=0)] = 0.01,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation.")] = 5,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Train a head by gradient on recorded outcomes. Needs no server, no configuration and no Ray."""
    with explained():
        check_json(json)
        from training import train_sft as room

        given: dict[str, Any] = {"taus": tuple(tau or ()), "decays": tuple(weight_decay or ()), "reads": reads(read)}
        settings = room.SftRun(
            outcomes,
            out,
            workers=names(workers),
            split=split,
            seed=seed,
            backbone=backbone,
            prompt_format=prompt_format,
            max_tokens=read_tokens,
            epochs=epochs,
            learning_rate=learning_rate,
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
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint to write.", metavar="FILE")],
    outcomes: Annotated[
        Path | None, typer.Option(help="The folder of recorded outcomes, or of tasks to play live.", metavar="DIR")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Play live sessions with this pool instead of looking outcomes up."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Tasks to play live, as label takes them.", metavar="SOURCE")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Start from this head, usually by sft.", show_default="zeros")
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
    backbone: Annotated[
        str | None, typer.Option(help="What reads the tasks.", show_default="the checkpoint's, or the embedded model")
    ] = None,
    read: Reads = [],  # noqa: B006 - typer wants a list, nobody changes it
    prompt_format: Annotated[PromptFormat, typer.Option(help="For a start from zeros.")] = "chat",
    read_tokens: Annotated[int, typer.Option(min=32, help="How much of a task is read.")] = 1024,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last generation that was kept.")] = False,
    address: Address = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Evolve a head by sep-CMA-ES, with the end of a task as the only signal."""
    with explained():
        check_json(json)
        from training import evolve as room
        from training.evolution import Settings
        from training.fitness import Worth

        places = reads(read)
        reading: dict[str, Any] = {"reads": places} if places else {}
        settings = room.EvolveRun(
            out,
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
    "--out wider.safetensors[/]   ·   first its labels: [bold]fugu label -c pool.yaml --out outcomes/ "
    "--workers newcomer --max-requests 300[/]"
)
def add_worker(
    worker: Annotated[str, typer.Argument(help="The newcomer, as the outcomes call it.")],
    outcomes: Outcomes,
    checkpoint: Annotated[Path, typer.Option(help="The head without it.", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint to write.", metavar="FILE")],
    split: Annotated[str, typer.Option(help="The tasks to learn from.")] = "train",
    val_split: Annotated[str, typer.Option(help="The tasks to measure on.")] = "val",
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Learn from so many of its tasks.", show_default="all")
    ] = None,
    tau: Annotated[float | None, typer.Option(help="Softness of the targets.", show_default="the head's")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, show_default="the head's")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="For its row.", show_default="the head's")] = None,
    polish: Annotated[int, typer.Option(min=0, help="Epochs for all rows together, at the end.")] = 30,
    retrain: Annotated[bool, typer.Option("--retrain/--no-retrain", help="Compare with training all anew.")] = True,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    backbone: Annotated[str | None, typer.Option(help="What reads the tasks.", show_default="the checkpoint's")] = None,
    device: Annotated[Device, typer.Option(help="Where the backbone runs.")] = "auto",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Add a worker to a trained head by fitting its row only, then polishing all rows for a moment."""
    with explained():
        check_json(json)
        from training import add_worker as room

        settings = room.AddWorkerRun(
            worker,
            outcomes,
            checkpoint,
            out,
            split,
            val_split,
            tasks,
            tau,
            weight_decay,
            epochs,
            polish,
            retrain=retrain,
            seed=seed,
            backbone=backbone,
            device=device,
            progress=not quiet,
        )
        tell(room.run(settings), json)


@app.command(
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
