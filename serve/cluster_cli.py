"""`fugu up | deploy | submit | status | down`: a cluster, from one's own machine.

Exit codes: 0 done, 1 `status --wait` waited in vain, 2 a mistake (told in a line), 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actors.console import explained, out_console

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

CODE = Path(__file__).resolve().parents[1]
FILE = CODE / "cluster.yaml"

File = Annotated[
    Path, typer.Argument(help="The cluster.", metavar="[CLUSTER]", show_default="cluster.yaml", envvar="FUGU_CLUSTER")
]
Cluster = Annotated[
    Path, typer.Option("--cluster", help="The cluster.", show_default="cluster.yaml", envvar="FUGU_CLUSTER")
]
Dashboard = Annotated[
    str | None,
    typer.Option("--url", help="The dashboard's address instead of a cluster file (Kubernetes).", metavar="URL"),
]


@app.command(
    epilog="Examples:  [bold]fugu up[/]   ·   [bold]fugu up cluster/onprem.yaml[/]   ·   "
    "[bold]fugu up && fugu deploy pool.yaml[/]"
)
def up(file: File = FILE) -> None:
    """Start a cluster, or bring a running one to what its file says now."""
    with explained():
        from serve import cluster

        cluster.up(file)


@app.command(
    epilog="Examples:  [bold]fugu deploy pool.yaml[/]   ·   "
    "[bold]fugu deploy pool.yaml --checkpoint s3://bucket/router.safetensors[/] (another checkpoint, no request fails)"
    "   ·   [bold]fugu deploy pool.yaml --canary /mnt/fugu/new.safetensors --share 0.05[/]"
)
def deploy(
    config: Annotated[Path, typer.Argument(help="The configuration to serve.")],
    file: Cluster = FILE,
    url: Dashboard = None,
    host: Annotated[str | None, typer.Option(help="Listen here, on every node, instead of serve.host.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Listen here instead of serve.port.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Decides instead of router.checkpoint; a path on the nodes, s3:// or gs://.")
    ] = None,
    canary: Annotated[str | None, typer.Option(help="Decides a share of the conversations.")] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the conversations, for the canary.")] = 0.0,
    wait: Annotated[float, typer.Option(min=0, help="Seconds until it must be serving.")] = 600.0,
) -> None:
    """Serve a configuration on a cluster, or change what is served there without a failed request."""
    with explained():
        from serve import cluster, emit

        made = emit.serve_config(
            config.resolve(), host=host, port=port, checkpoint=checkpoint, canary=canary, share=share
        )
        cluster.deploy(url or file, made, wait)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="Examples:  [bold]fugu submit train evolve --outcomes /mnt/fugu/outcomes -c configs/frontier.yaml "
    "--out /mnt/fugu/router.safetensors --resume[/]   ·   "
    "[bold]fugu submit --name labels label --tasks /mnt/fugu/mine.jsonl --out /mnt/fugu/outcomes[/]",
)
def submit(
    command: Annotated[list[str], typer.Argument(help="A command of fugu with its options.", metavar="COMMAND…")],
    file: Cluster = FILE,
    url: Dashboard = None,
    name: Annotated[str | None, typer.Option(help="What to call the job.", show_default="after the command")] = None,
) -> None:
    """Run a command on the cluster's head; it goes on when this machine goes away. Paths are the head's, relative ones
    within the code; its options stand after the command."""
    with explained():
        from serve import cluster

        job = cluster.submit(url or file, command, name)
        out_console.print(f"submitted [bold]{job}[/]; [bold]fugu status[/] shows how far it is", soft_wrap=True)


@app.command(
    epilog="Examples:  [bold]fugu status --cluster cluster.yaml[/] (from anywhere)   ·   "
    "[bold]fugu status --wait 600[/] (on a node: until everything serves)"
)
def status(
    file: Annotated[
        Path | None,
        typer.Option(
            "--cluster", help="Ask this cluster's head instead of the Ray on this machine.", envvar="FUGU_CLUSTER"
        ),
    ] = None,
    address: Annotated[
        str, typer.Option(help="The Ray to look at.", metavar="RAY", envvar=["FUGU_RAY", "RAY_ADDRESS"])
    ] = "auto",
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until all deployments run.")] = 0.0,
) -> None:
    """Nodes, deployments, provider actors with their limits, and jobs of a running cluster."""
    with explained():
        if file is not None:
            from serve import cluster

            cluster.check_file(file)
            cluster.on_head(file, f"run fugu status --wait {wait:g}", "asking the head", seconds=wait + 300)
            return
        from serve import overview

        ready = overview.show(address, wait, out_console)
    raise typer.Exit(0 if ready else 1)


@app.command(epilog="Examples:  [bold]fugu down[/]   ·   [bold]fugu down cluster/onprem.yaml --yes[/]")
def down(
    file: File = FILE,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """End a cluster with its machines. What is on shared storage stays."""
    with explained():
        from serve import cluster

        cluster.check_file(file)
        if not yes:
            typer.confirm(f"End the cluster of {file}, its jobs and what it serves?", abort=True)
        cluster.down(file)
