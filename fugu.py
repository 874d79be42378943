"""The command line: `fugu serve`, `fugu ask`, `fugu pool check`, `fugu keys`, and the commands of `training.cli`."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from actors.config import FuguConfig
from actors.config_file import load_config
from actors.console import error_line
from actors.errors import ConfigError, FuguError
from serve import cluster_cli, keys_cli
from training import cli

app = typer.Typer(
    help="One endpoint, many minds: a small trained model decides which language model answers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
pool = typer.Typer(help="The workers of a configuration.", no_args_is_help=True)
app.add_typer(pool, name="pool")
app.add_typer(cli.app)
app.add_typer(cluster_cli.app)
app.add_typer(keys_cli.app, name="keys")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

EMBEDDED = Path(__file__).resolve().parent / "configs" / "embedded.yaml"
DEFAULT_URL = "http://127.0.0.1:8000"

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="The configuration file.", show_default="configs/embedded.yaml")
]


@app.command(
    epilog="Examples:  [bold]fugu serve[/]   ·   [bold]fugu serve -c configs/frontier.yaml --port 9000[/]   ·   "
    "[bold]fugu serve --address auto[/] (join a running Ray)   ·   "
    "[bold]fugu serve -c pool.yaml --host 0.0.0.0 --emit-serve-config > serve.yaml[/] (for [bold]serve deploy[/])"
)
def serve(
    config: ConfigOption = EMBEDDED,
    host: Annotated[str | None, typer.Option(help="Listen here instead of serve.host.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Listen here instead of serve.port.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Join the Ray at this address instead of starting one.", metavar="RAY")
    ] = None,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Start Ray's dashboard too.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds until every model must be loaded.")] = 600.0,
    emit: Annotated[
        bool, typer.Option("--emit-serve-config", help="Print what `serve deploy` takes for this, and serve nothing.")
    ] = False,
) -> None:
    """Serve the pool of a configuration as one OpenAI-compatible endpoint."""
    if emit:
        from serve import emit as emitted

        try:
            out.print(emitted.text(emitted.serve_config(config, host=host, port=port)), markup=False, soft_wrap=True)
        except FuguError as error:
            _fail(error)
        return
    from serve import lifetime

    settings = _override(_load(config), host, port)
    for name, reason in settings.disabled.items():
        err.print(f"[yellow]{name} is not in use:[/] {reason}")
    code = lifetime.run(settings, address=address, dashboard=dashboard, timeout=timeout, console=out, errors=err)
    raise typer.Exit(code)


@app.command(
    epilog='Examples:  [bold]fugu ask "What is 17 + 25?" --trace[/]   ·   '
    '[bold]fugu ask "Prove it." --allow logic[/]   ·   [bold]echo "Hello" | fugu ask -[/]'
)
def ask(
    question: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    url: Annotated[
        str, typer.Option(help="The running server.", envvar="FUGU_URL", show_default=DEFAULT_URL)
    ] = DEFAULT_URL,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Start this pool for the one question, then stop it.")
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show who answered and how that was decided.")] = False,
    model: Annotated[str, typer.Option(help="The served model.")] = "fugu",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Only this worker (may be given again).")] = None,
    deny: Annotated[list[str] | None, typer.Option(help="Not this worker (may be given again).")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only workers with this tag (may be given again).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes a sampled decision repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Length of the answer.")] = None,
) -> None:
    """Ask one question and stream the answer."""
    from serve import client, lifetime

    if question == "-":
        question = sys.stdin.read()
    wishes: dict[str, Any] = {"trace": trace, "allow": allow, "deny": deny or [], "tags": tag or [], "seed": seed}
    messages = [{"role": "system", "content": system}] if system else []
    body = {
        "model": model,
        "messages": [*messages, {"role": "user", "content": question}],
        "stream": True,
        "max_completion_tokens": max_tokens,
        "fugu": wishes,
    }
    key = os.environ.get("FUGU_API_KEY")
    try:
        if config is None:
            client.ask(url, body, key, console=out)
        else:
            settings = lifetime.on_a_free_port(_load(config))
            with lifetime.running(settings, console=err) as server:
                client.ask(server.url, body, lifetime.first_key(settings), console=out)
    except FuguError as error:
        _fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@pool.command(epilog="Examples:  [bold]fugu pool check[/]   ·   [bold]fugu pool check -c configs/frontier.yaml[/]")
def check(config: ConfigOption = EMBEDDED) -> None:
    """Call each worker once: does it answer, how fast, with which limits and price. Exit code 1 if one failed."""
    from serve import lifetime

    settings = _load(config)
    try:
        with lifetime.pool_of(settings, console=err) as workers:
            # After the settings that Ray reads when it is imported were made.
            from serve import checks

            failed = asyncio.run(checks.check_all(settings, workers, console=out))
    except FuguError as error:
        _fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(1 if failed else 0)


def _load(path: Path) -> FuguConfig:
    try:
        return load_config(path)
    except ConfigError as error:
        _fail(error)


def _override(config: FuguConfig, host: str | None, port: int | None) -> FuguConfig:
    changes = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    return config.model_copy(update={"serve": config.serve.model_copy(update=changes)})


def _fail(error: FuguError) -> NoReturn:
    err.print(error_line(error), soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    """The entry point of the `fugu` script."""
    app()


if __name__ == "__main__":
    main()
