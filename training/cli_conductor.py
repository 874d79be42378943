"""`fugu train conductor | grpo`, `fugu eval-ultra`: from a small model to one that writes workflows, and its worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from actors.console import explained
from training.cli_options import EMBEDDED, Address, Device, Folder, Json, Quiet
from training.commands import adapter_at, check_json, tell

conductor_commands = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
ultra_commands = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

Precision = Literal["auto", "float32", "bfloat16"]
Model = Annotated[str, typer.Option(help="What learns to conduct: a name, folder or hub id.")]
State = Annotated[
    str | None,
    typer.Option(
        help="The folder of the state to resume from; a path or s3://, gs://.",
        show_default="runs/conductor/…; OUT.state where --out is an address",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the last checkpoint.")]
Single = Annotated[float, typer.Option(min=0, max=1, help="Share of tasks for one specialist; the rest need several.")]


@conductor_commands.command(
    epilog="Examples:  [bold]fugu train conductor --warm-start --out adapters/conductor-warm --steps 60[/]   ·   "
    "[bold]fugu train conductor --warm-start --out adapters/conductor-warm --resume[/]"
)
def conductor(
    out: Folder,
    warm_start: Annotated[
        bool, typer.Option("--warm-start", help="Learn to write well-formed plans, before reinforcement.")
    ] = False,
    steps: Annotated[int, typer.Option(min=1)] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Plans per step.")] = 16,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0, max=1)] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    single: Single = 0.3,
    whole: Annotated[
        float, typer.Option(min=0, max=1, help="Share of plans that hand the whole question to one worker.")
    ] = 0.1,
    again: Annotated[
        float, typer.Option(min=0, max=1, help="Share of conversations that go on after a first result.")
    ] = 0.0,
    model: Model = "SmolLM2-135M-Instruct",
    checks: Annotated[int, typer.Option(min=0, help="Plans that are sampled and parsed in the end.")] = 100,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 10,
    validate_every: Annotated[int, typer.Option(min=1)] = 20,
    state: State = None,
    device: Device = "auto",
    precision: Precision = "auto",
    resume: Resume = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Warm a conductor up: it learns to write plans that parse, for whatever workers; who is good at what is left to
    `fugu train grpo`."""
    with explained(), adapter_at(out, state) as (folder, kept):
        check_json(json)
        from actors.errors import ConfigError
        from training import conductor_sft as room
        from training.lora import LoraSettings
        from training.plans import PlanSettings

        if not warm_start:
            raise ConfigError("give --warm-start for the first stage; the second is `fugu train grpo`")
        assert folder is not None
        settings = room.WarmStart(
            folder,
            LoraSettings(steps, batch, rank, 2 * rank, targets=room.TARGETS, learning_rate=learning_rate, seed=seed),
            PlanSettings(single=single, whole=whole, again=again, seed=seed),
            model=model,
            state=kept,
            checkpoint_every=checkpoint_every,
            validate_every=validate_every,
            checks=checks,
            device=device,
            precision=precision,
            resume=resume,
            progress=not quiet,
        )
        tell(room.run(settings), json)


@conductor_commands.command(
    epilog="Examples:  [bold]fugu train grpo --start adapters/conductor-warm --out adapters/conductor --steps 60[/]   "
    "·   [bold]fugu train grpo --settings configs/conductor-7b.yaml --dry-run[/]   ·   "
    "[bold]fugu train grpo … --resume[/]"
)
def grpo(
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="The adapter to write; a path or s3://, gs://.", metavar="DIR")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="A YAML file with all of the run's settings.", metavar="FILE")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The pool.", show_default="configs/embedded.yaml")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="The adapter to begin with, usually a warm start.")] = None,
    model: Annotated[str | None, typer.Option(help="What learns.", show_default="SmolLM2-135M-Instruct")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks, as label takes them.", metavar="SOURCE", show_default="composite ones without end"),
    ] = None,
    single: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of tasks for one specialist.", show_default="0.3")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, show_default="60")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Per step.", show_default="4")] = None,
    group: Annotated[int | None, typer.Option(min=2, help="Workflows per question.", show_default="8")] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0, max=1, show_default="0.0003")] = None,
    beta: Annotated[float | None, typer.Option(min=0, help="Weight of the KL term.", show_default="0")] = None,
    clip: Annotated[float | None, typer.Option(min=0, max=1, show_default="0.2")] = None,
    right: Annotated[
        float | None, typer.Option(help="Reward of a right answer; the paper's code: 1.5.", show_default="1")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=2, help="2: half of the workflows are planned upon again.")] = 1,
    assign: Annotated[
        Literal["conductor", "router"] | None,
        typer.Option(
            help="Who gives steps to workers; the router's head must be of this pool.", show_default="conductor"
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Learn all weights, not an adapter.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, show_default="0")] = None,
    validate_every: Annotated[int | None, typer.Option(min=1, show_default="10")] = None,
    validation: Annotated[int | None, typer.Option(min=0, help="Questions.", show_default="48")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, show_default="5")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build everything but the weights, and tell.")] = False,
    state: State = None,
    device: Device = "auto",
    precision: Precision = "auto",
    address: Address = None,
    resume: Resume = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Train a conductor by reinforcement (GRPO): workflows it writes are run on the pool, and right answers rewarded.
    Options stand over what a settings file says."""
    with explained():
        check_json(json)
        from training import grpo_file
        from training import grpo_placed as room

        within: dict[str, dict[str, Any]] = {
            "grpo": {
                "steps": steps,
                "questions": questions,
                "group": group,
                "learning_rate": learning_rate,
                "beta": beta,
                "clip": clip,
                "seed": seed,
            },
            "rollouts": {"right": right},
            "recursion": {"share": 0.5} if rounds == 2 else {},
        }
        given: dict[str, Any] = {
            "out": out and Path(out),
            "config": config,
            "start": start,
            "model": model,
            "sources": tuple(tasks) if tasks else None,
            "single": single,
            "assign": assign,
            "validate_every": validate_every,
            "validation": validation,
            "checkpoint_every": checkpoint_every,
            "state": state and Path(state),
            "address": address,
        }
        plain = {"device": device, "precision": precision, "resume": resume, "progress": not quiet}
        run = grpo_file.with_changes(
            settings,
            {name: value for name, value in given.items() if value is not None} | plain,
            {name: {k: v for k, v in part.items() if v is not None} for name, part in within.items()},
            defaults={"config": EMBEDDED, "grpo": {"steps": 60}, "rollouts": {"steps": "bare"}},
            full=full,
        )
        tell(grpo_file.dry_run(run) if dry_run else room.run(run, out=out, state=state), json)


@ultra_commands.command(
    epilog="Examples:  [bold]fugu eval-ultra --adapter adapters/conductor --warm adapters/conductor-warm --out "
    "runs/ultra[/]   ·   an endpoint: [bold]fugu eval --url http://127.0.0.1:8000 --model fugu-ultra …[/]"
)
def eval_ultra(
    adapter: Annotated[Path, typer.Option(help="The conductor's adapter.", metavar="DIR")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Report, picture and all answers go here.", metavar="DIR")],
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The pool.", show_default="configs/embedded.yaml")
    ] = EMBEDDED,
    warm: Annotated[
        Path | None, typer.Option(help="The adapter that its training started with, to compare.", metavar="DIR")
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Fresh composite tasks, and as many single ones.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the tasks.")] = 70_001,
    calls: Annotated[int, typer.Option(min=3, help="What votes, panels and mixtures may make per answer.")] = 5,
    retries: Annotated[int, typer.Option(min=0, help="Further tries at a plan that parses.")] = 2,
    untrained: Annotated[
        bool, typer.Option("--untrained/--no-untrained", help="Measure the model without any training, too.")
    ] = True,
    others: Annotated[
        bool, typer.Option("--others/--no-others", help="Measure votes, a panel and a mixture of agents, too.")
    ] = True,
    subsets: Annotated[
        bool, typer.Option("--subsets/--no-subsets", help="Measure without each worker in turn, too.")
    ] = True,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure fugu-ultra in this process: against every worker, the router, votes, a panel, a mixture of agents, its
    warm start, no training at all, and itself without each worker."""
    with explained():
        check_json(json)
        from training import ultra_evaluate as room

        settings = room.UltraRun(
            config,
            adapter,
            out,
            warm=warm,
            tasks=tasks,
            seed=seed,
            calls=calls,
            retries=retries,
            untrained=untrained,
            subsets=subsets,
            others=others,
            progress=not quiet,
        )
        tell(room.run(settings), json)
