"""A cluster from the command line: `ray up`, `ray down`, `ray job submit` and `serve deploy`, with what they leave out.

A cluster is a file of Ray's launcher (cluster.yaml), whose head is reached by ssh, or the address of a dashboard, such
as one that `kubectl port-forward` opens. Commands on the head run through cluster/node.sh, in the environment of the
cluster. Nothing here imports ray at the top: Ray reads its settings then.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.config_file import read_yaml
from actors.errors import ClusterError, ConfigError
from serve.emit import text

CODE = Path(__file__).resolve().parents[1]
NODE = "sh ~/fugu/cluster/node.sh"
DASHBOARD = "http://127.0.0.1:8265"
SERVE_FILE = "~/.fugu/serve.yaml"

# Starting and ending machines, and the rest.
LAUNCH_SECONDS = 3600.0
COMMAND_SECONDS = 300.0

_SDKS = {
    "aws": ("boto3", "boto3"),
    "gcp": ("googleapiclient", "google-api-python-client"),
    "azure": ("azure", "azure-…"),
}
# Without it, and without a terminal, every ssh command is printed.
_STYLE = ("--log-style", "pretty")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_file(path: Path) -> dict[str, Any]:
    """The cluster that a file of Ray's launcher describes, by Ray's own schema.

    Raises:
        ConfigError: it cannot be read or is wrong, what it copies to the nodes is not there, or the cloud's Python
            package is missing here.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("provider"), dict):
        raise ConfigError(f"{path} is not a cluster file: it has no provider")
    kind = str(raw["provider"].get("type"))
    module, package = _SDKS.get(kind, ("yaml", ""))
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{path}: provider {kind} needs a package that is not installed: pip install {package}")
    from click import ClickException
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(raw))
    except ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "the file"
        raise ConfigError(f"{path}: {where}: {error.message}") from None
    except ClickException as error:
        raise ConfigError(f"{path}: {error.message}") from None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for local in (raw.get("file_mounts") or {}).values():
        if not (CODE / Path(local).expanduser()).exists() and Path(local).name != "auth_token":
            raise ConfigError(f"{path}: file_mounts: there is no {local} here")
    return raw


def up(path: Path) -> None:
    """Start the cluster, or bring a running one to what the file says now.

    Raises:
        ConfigError: as `check_file`. ClusterError: `ray up` failed; what it printed says why.
    """
    check_file(path)
    # Every node gets this file; who does not have it talks to none of them.
    _run([*_ray(), "get-auth-token", "--generate"], "making a token for the cluster", quiet=True)
    launch = [*_ray(), "up", "--yes", "--no-config-cache", *_STYLE, str(path.resolve())]
    _run(launch, "ray up", seconds=LAUNCH_SECONDS)


def down(path: Path) -> None:
    """End the cluster and its machines; those of your own are left without a process of Ray.

    Raises:
        ConfigError, ClusterError: as `up`. Every machine is told to stop first, whatever became of the others.
    """
    raw = check_file(path)
    _run([*_ray(), "down", "--yes", *_STYLE, str(path.resolve())], "ray down", seconds=LAUNCH_SECONDS)
    failed: list[ClusterError] = []
    # On machines of one's own `ray down` ends the head; the others would go on until they miss it.
    for address in raw["provider"].get("worker_ips") or ():
        try:
            _run([*_ssh(raw["auth"], address), f"{NODE} stop"], f"ray stop on {address}")
        except ClusterError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def submit(cluster: Path | str, command: Sequence[str], name: str | None = None) -> str:
    """Run `fugu` with these arguments on the head, whatever becomes of this machine; returns the job's name.

    Raises:
        ConfigError: a name that cannot be one, or no command. ClusterError: the cluster did not take it.
    """
    if not command:
        raise ConfigError("there is nothing to submit; for example: fugu submit train evolve --help")
    name = name or "-".join([*_words(command), secrets.token_hex(3)])
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be the name of a job: letters, digits, . _ - only")
    job = ["ray", "job", "submit", "--no-wait", "--submission-id", name]
    started = f"{NODE} job {shlex.join(command)}"
    if isinstance(cluster, str):
        _run([*_ray(), *job[1:], "--address", cluster, "--", "sh", "-c", started], "submitting the job")
    else:
        inner = shlex.join([*job, "--address", DASHBOARD, "--", "sh", "-c", started])
        on_head(cluster, f"run {inner}", "submitting the job")
    return name


def deploy(cluster: Path | str, config: Mapping[str, Any], wait: float) -> None:
    """Let the cluster serve this (`serve.emit.serve_config`), and wait until it does. A cluster that serves already is
    brought to it replica by replica.

    Raises:
        ClusterError: it was refused, or is not serving after `wait` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(text(config))
        if isinstance(cluster, str):
            serve = [sys.executable, "-m", "ray.serve.scripts"]
            _run([*serve, "deploy", "--address", cluster, str(file)], "serve deploy")
            return
        _run([*_ray(), "rsync-up", str(cluster.resolve()), str(file), SERVE_FILE], "sending the configuration")
    on_head(cluster, f"run serve deploy --address {DASHBOARD} {SERVE_FILE}", "serve deploy")
    on_head(cluster, f"run fugu status --wait {wait:g}", "waiting for the deployments", seconds=wait + COMMAND_SECONDS)


def on_head(cluster: Path, action: str, what: str, *, seconds: float = COMMAND_SECONDS) -> None:
    """Let cluster/node.sh do something on the head; what it prints is printed.

    Raises:
        ClusterError: it failed, or the head cannot be reached.
    """
    command = [*_ray(), "exec", "--no-config-cache", *_STYLE, str(cluster.resolve()), f"{NODE} {action}"]
    _run(command, what, seconds=seconds)


def _ssh(auth: Mapping[str, Any], address: str) -> list[str]:
    """To a machine that is not the head, as Ray's launcher reaches it."""
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=10"]
    if auth.get("ssh_proxy_command"):
        options.append(f"ProxyCommand={auth['ssh_proxy_command']}")
    key = ["-i", str(Path(auth["ssh_private_key"]).expanduser())] if auth.get("ssh_private_key") else []
    given = [word for option in options for word in ("-o", option)]
    return ["ssh", *key, *given, f"{auth['ssh_user']}@{address}"]


def _ray() -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts"]


def _run(command: Sequence[str], what: str, *, seconds: float = COMMAND_SECONDS, quiet: bool = False) -> None:
    """From the code's folder, which the paths in a cluster file are relative to."""
    environ = os.environ | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        done = subprocess.run(
            command, cwd=CODE, env=environ, timeout=seconds, check=False, stdout=subprocess.DEVNULL if quiet else None
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{what}: not done after {seconds:g} s") from None
    if done.returncode != 0:
        raise ClusterError(f"{what} failed (exit code {done.returncode}); the lines above say why")


def _words(command: Sequence[str]) -> list[str]:
    """What a job is called after: the command without its options."""
    words: list[str] = []
    for word in command:
        if word.startswith("-") or not _NAME.fullmatch(word) or len(words) == 2:
            break
        words.append(word)
    return ["fugu", *words]
