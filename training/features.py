"""Hidden states of many prompts, computed once and kept on disk, so that an epoch costs matrix products only."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actors.errors import ConfigError
from actors.messages import Message
from actors.model_files import cache_dir
from orchestrator.backbone import Backbone, Device
from orchestrator.head import CheckpointInfo, PromptFormat, Read
from orchestrator.prompt import encode
from training.outcomes import Task

# Of heads that do not say how much was read when they were trained.
_MAX_TOKENS = 1024


def features(
    backbone: Backbone,
    conversations: Sequence[Sequence[Message]],
    *,
    prompt_format: PromptFormat,
    max_tokens: int,
    revision: str,
    cache: Path | None,
    batch_tokens: int = 4096,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Tensor:
    """Hidden states `[N, d]`, float32, in the order given: the backbone's reads side by side.

    With `cache` (an SQLite file, made when missing) known states are read and new ones are written batch by batch, so
    that a run that is killed goes on where it was. Each read is kept by itself, so that another choice among reads
    already made costs no pass. It is keyed by `revision` of the backbone, the numbers it is computed in, position,
    layer and the tokens read, which hold prompt format, limit and text.
    """
    prompts = encode(backbone.tokenizer, conversations, prompt_format, max_tokens)
    found = torch.zeros(len(prompts), backbone.dimension)
    if cache is None:
        _compute(backbone, prompts, range(len(prompts)), found, batch_tokens, on_progress, lambda _indices: None)
        return found
    settings = [f"{revision}|{backbone.dtype}|{read.position}|{read.layer}|".encode() for read in backbone.reads]
    tokens = [array("q", prompt).tobytes() for prompt in prompts]
    keys = [[hashlib.sha256(setting + text).digest() for setting in settings] for text in tokens]
    parts = found.view(len(prompts), len(settings), -1)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache, timeout=60)) as store:
        store.execute("CREATE TABLE IF NOT EXISTS states (key BLOB PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID")
        missing = []
        for index in range(len(prompts)):
            rows = [store.execute("SELECT state FROM states WHERE key = ?", (key,)).fetchone() for key in keys[index]]
            if None in rows:
                missing.append(index)
                continue
            for place, (state,) in enumerate(rows):
                parts[index, place] = torch.from_numpy(np.frombuffer(state, dtype=np.float32).copy())

        def keep(indices: Sequence[int]) -> None:
            with store:
                rows = [
                    (key, parts[index, place].numpy().tobytes())
                    for index in indices
                    for place, key in enumerate(keys[index])
                ]
                store.executemany("INSERT OR REPLACE INTO states VALUES (?, ?)", rows)

        _compute(backbone, prompts, missing, found, batch_tokens, on_progress, keep)
    return found


def middle_read(folder: Path) -> Read:
    """The read that serves routing best on the embedded backbone, layer 16 of its 30, and its like in others: states
    in the middle of a language model still tell what a text is about, later ones only what comes next.

    Raises:
        ConfigError: the folder's configuration does not say how many layers the model has.
    """
    where = folder / "config.json"
    try:
        layers = int(json.loads(where.read_text())["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where} does not say how many layers the backbone has; name a read of it") from error
    return Read(max(1, round(layers * 16 / 30)), "body")


def read_limit(info: CheckpointInfo, asked: int | None = None) -> int:
    """How much of a task is read for a head, in tokens: what is asked for, but no more than the router reads for a head
    that says how much it was trained on."""
    if info.max_tokens is not None:
        return info.max_tokens if asked is None else min(asked, info.max_tokens)
    return asked or int(info.trained.get("read_tokens", _MAX_TOKENS))


def _compute(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[int],
    found: Tensor,
    batch_tokens: int,
    on_progress: Callable[[int, int], None],
    keep: Callable[[Sequence[int]], None],
) -> None:
    done = len(prompts) - len(wanted)
    on_progress(done, len(prompts))
    for part, states in backbone.hidden_all([prompts[index] for index in wanted], batch_tokens=batch_tokens):
        indices = [wanted[position] for position in part]
        found[indices] = states
        keep(indices)
        done += len(indices)
        on_progress(done, len(prompts))


def task_states(
    tasks: Sequence[Task],
    info: CheckpointInfo,
    folder: Path,
    *,
    singular: Mapping[str, Tensor],
    max_tokens: int,
    device: Device = "auto",
    cache: Path | None = None,
    progress: bool = True,
) -> Tensor:
    """Hidden states `[N, d]` of the tasks' prompts as a router with a head of this kind sees them, with a progress bar.
    `folder` holds the backbone; `cache` defaults to one file for all runs of this user.

    Raises:
        ConfigError: the backbone lacks a layer.
        CheckpointError: the singular-value offsets do not fit it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    backbone = Backbone.load(folder, reads=info.reads, device=device, singular=singular or None)
    scales = hashlib.sha256(b"".join(name.encode() + singular[name].numpy().tobytes() for name in sorted(singular)))
    columns = (TextColumn("reading the tasks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        row = bar.add_task("read", total=len(tasks))
        return features(
            backbone,
            [(Message("user", task.prompt),) for task in tasks],
            prompt_format=info.prompt_format,
            max_tokens=max_tokens,
            revision=f"{info.backbone}@{info.revision}" + (f"+{scales.hexdigest()}" if singular else ""),
            cache=cache or cache_dir() / "features.sqlite",
            on_progress=lambda done, _total: bar.update(row, completed=done),
        )
