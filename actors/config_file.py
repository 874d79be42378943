"""The configuration file: YAML → `actors.config.FuguConfig`. `${ENV}` expands.

`${NAME}` takes an environment variable, `${NAME:-text}` falls back to `text`. A worker whose `api_key` names a
variable that is not set is disabled with a reason, not an error; any other missing variable is an error.
Relative paths in the file are relative to the file.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from actors.config import FuguConfig
from actors.errors import ConfigError
from actors.storage import local_copy

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def load_config(path: Path | str, environ: Mapping[str, str] | None = None) -> FuguConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, has an unknown key or a wrong value (named by its path in
            the file), names an unset variable outside `api_key`, or leaves no worker in use.
    """
    path = Path(path)
    return parse_config(read_yaml(path), path.parent, str(path), environ)


def read_yaml(path: Path) -> Any:
    """What stands in a YAML file.

    Raises:
        ConfigError: it cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # Its own text quotes the file, where a key may stand.
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}: {getattr(error, 'problem', None)}" if mark is not None else ""
        raise ConfigError(f"{path} is not valid YAML{where}") from None


def parse_config(raw: Any, base: Path, where: str, environ: Mapping[str, str] | None = None) -> FuguConfig:
    """The configuration that `raw` spells out; relative paths in it are relative to `base`, messages call it `where`.

    Raises:
        ConfigError: as `load_config`.
    """
    environ = os.environ if environ is None else environ
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{where} must be a mapping with the keys workers, router, conductor, serve, placement, telemetry"
        )
    if not isinstance(raw.get("workers"), list):
        raise ConfigError(f"{where}: workers: must be a list with at least one worker")
    if "disabled" in raw:
        raise ConfigError(f"{where}: disabled: unknown key")
    raw = copy.deepcopy(raw)
    disabled = _take_out_unset_keys(raw, environ)
    raw = _expand(raw, environ, where)
    for index, worker in enumerate(raw["workers"]):
        if isinstance(worker, dict):
            _resolve_paths(worker, ("adapter", "outcomes"), base, f"{where}: workers.{index}")
    for name, keys in (("router", ("checkpoint",)), ("conductor", ("adapter", "memory"))):
        if isinstance(part := raw.get(name), dict):
            _resolve_paths(part, keys, base, f"{where}: {name}")
            part |= named_pins(part)
            for within in ("canary", "pins"):
                if isinstance(files := part.get(within), dict):
                    paths = tuple(files) if within == "pins" else ("checkpoint",)
                    _resolve_paths(files, paths, base, f"{where}: {name}.{within}")
    try:
        config = FuguConfig.model_validate({**raw, "disabled": disabled})
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from None
    if not config.active:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in disabled.items())
        raise ConfigError(f"{where}: no worker is left to answer ({reasons})")
    return config


def _take_out_unset_keys(raw: dict[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Drop `api_key` from workers whose variable is unset or empty, and say which variable each one lacks."""
    disabled: dict[str, str] = {}
    for worker in raw["workers"]:
        if not isinstance(worker, dict) or not isinstance(worker.get("api_key"), str):
            continue
        missing = [name for name, default in _VARIABLE.findall(worker["api_key"]) if not (environ.get(name) or default)]
        if missing:
            del worker["api_key"]
            disabled[str(worker.get("name"))] = f"{missing[0]} is not set"
    return disabled


def _expand(value: Any, environ: Mapping[str, str], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, environ, f"{where}: {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, environ, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        found = environ.get(match[1]) or match[2]
        if found is None:
            raise ConfigError(f"{where}: the environment variable {match[1]} is not set")
        return found

    return _VARIABLE.sub(lookup, value)


def named_pins(part: Mapping[str, Any]) -> dict[str, Any]:
    """What a part of a file, the router's or the conductor's, says of pins, with their names as text: a bare date is a
    number to YAML."""
    told = {name: part[name] for name in ("pins", "pin_sha256") if isinstance(part.get(name), dict)}
    return {name: {str(pin): value for pin, value in values.items()} for name, values in told.items()}


def _resolve_paths(section: dict[str, Any], keys: tuple[str, ...], base: Path, where: str) -> None:
    for key in keys:
        if isinstance(section.get(key), str):
            if "://" in section[key]:
                if key != "checkpoint":
                    raise ConfigError(
                        f"{where}.{key}: {section[key]} is not a path; mount it, or copy it to where every node has it"
                    )
                try:
                    section[key] = str(local_copy(section[key]))
                except ConfigError as error:
                    raise ConfigError(f"{where}.{key}: {error.message}") from None
            section[key] = str((base / Path(section[key]).expanduser()).resolve())


def _explain(error: ValidationError) -> str:
    """Each fault as `path.in.file: what`, without the offending input, which may be a secret."""
    lines = []
    for fault in error.errors(include_input=False, include_url=False):
        where = ".".join(str(part) for part in fault["loc"]) or "file"
        what = "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"]
        lines.append(f"{where}: {what}")
    return "; ".join(lines)
