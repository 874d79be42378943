"""The head: one linear map from a hidden state to a logit per worker (TRINITY §3.1), and its checkpoint.

    logits = prior + W · φ(z)        z = (h − shift) · scale

φ(z) is z itself, or how near z is to landmarks (`orchestrator.landmarks`).

A checkpoint is one safetensors file. Tensors: `head.weight [L(+3), d or m]`; optional `head.shift [d]`,
`head.scale [d]` (identity when absent), `head.prior [L(+3)]` (zero when absent), `landmarks.*` (φ(z) = z when absent)
and `singular.<matrix>` offsets (`orchestrator.singular`). Metadata (`CheckpointInfo`): what the rows mean and what
hidden state they were trained on, so that a head is never put on another pool, backbone or prompt by mistake.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from actors.errors import CheckpointError
from orchestrator.choice import ROLES as ROLES
from orchestrator.choice import pick as pick
from orchestrator.landmarks import Landmarks

FORMAT = "fugu-router"
# Version 1 read one layer at one position, under "layer" and "position"; it is still read.
FORMAT_VERSION = 2
_METADATA = ("workers", "backbone", "revision", "prompt_format", "roles", "trained")
_LANDMARKS = ("basis", "centres", "gamma")

Position = Literal["penultimate", "last", "mean", "body"]
PromptFormat = Literal["chat", "raw"]
POSITIONS: tuple[str, ...] = get_args(Position)
PROMPT_FORMATS: tuple[str, ...] = get_args(PromptFormat)


class Read(NamedTuple):
    """Where a backbone is read. `layer` is -1 for the final hidden state after the model's last norm, or the number of
    transformer layers run (then there is no norm). `position`: "penultimate" is index -2 of the prompt (TRINITY §3.1),
    "last" is -1, "mean" averages over all tokens, "body" over all but the first, where causal models keep states of
    enormous size that say nothing about the text (Xiao et al. 2024, attention sinks)."""

    layer: int = -1
    position: Position = "penultimate"

    def __str__(self) -> str:
        return f"{self.position} of {'the final layer' if self.layer == -1 else f'layer {self.layer}'}"


FINAL = (Read(),)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a head belongs to.

    `workers` names the rows in order. `reads` says what the hidden state is: the concatenation of these reads. `roles`
    says that three more rows follow, for `ROLES`. `max_tokens` is how much of a conversation was read in training
    (None: not said); no more is read in serving. `trained` is free: how the head was made and what it measured.
    `domains` names the field of the training tasks that each landmark stands for, in order; empty: not said.
    """

    workers: tuple[str, ...]
    backbone: str
    revision: str
    reads: tuple[Read, ...] = FINAL
    prompt_format: PromptFormat = "chat"
    roles: bool = False
    trained: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    domains: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.workers) + (len(ROLES) if self.roles else 0)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A head's tensors (float32, on the CPU) with what they belong to. `singular` maps a matrix's name to its
    offsets `[min(m, n)]`; empty is identity."""

    info: CheckpointInfo
    weight: Tensor
    shift: Tensor | None = None
    scale: Tensor | None = None
    singular: Mapping[str, Tensor] = field(default_factory=dict)
    prior: Tensor | None = None
    landmarks: Landmarks | None = None

    @property
    def dimension(self) -> int:
        """Size d of the hidden states that it reads."""
        return int((self.weight if self.landmarks is None else self.landmarks.basis).shape[1])

    def standardised(self, hidden: Tensor) -> Tensor:
        """Hidden states `[B, d]` → z `[B, d]`, float32, on the same device."""
        hidden = hidden.float()
        if self.shift is not None:
            hidden = hidden - self.shift.to(hidden.device)
        return hidden if self.scale is None else hidden * self.scale.to(hidden.device)

    def features(self, hidden: Tensor) -> Tensor:
        """Hidden states `[B, d]` → what the weights multiply, φ(z) `[B, d or m]`, float32, on the same device."""
        standardised = self.standardised(hidden)
        return standardised if self.landmarks is None else self.landmarks.features(standardised)

    def domains(self, hidden: Tensor) -> list[str | None]:
        """Hidden states `[B, d]` → the domain of the landmark that is nearest to each; None where none is near."""
        if self.landmarks is None or not self.info.domains:
            return [None] * len(hidden)
        nearest, which = self.features(hidden).max(dim=1)
        near = (nearest >= self.landmarks.near).tolist()
        return [self.info.domains[at] if there else None for at, there in zip(which.tolist(), near, strict=True)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[B, d]` → logits `[B, L(+3)]`, float32, on the hidden states' device."""
        logits = self.features(hidden) @ self.weight.to(hidden.device).T
        return logits if self.prior is None else logits + self.prior.to(hidden.device)


def masked_softmax(logits: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed columns only: `[B, L]` float64 whose masked entries are exactly 0.

    Raises:
        ValueError: a row allows nothing, or an allowed logit is not a finite number.
    """
    if logits.shape != allowed.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, the mask {tuple(allowed.shape)}")
    if not bool(allowed.any(dim=-1).all()):
        raise ValueError("a row of the mask allows no worker")
    masked = logits.double().masked_fill(~allowed, -math.inf)
    if not bool(torch.isfinite(masked[allowed]).all()):
        raise ValueError("the logits are not finite")
    return torch.softmax(masked, dim=-1)


def save_checkpoint(path: Path | str, checkpoint: Checkpoint) -> None:
    """Write the file whole or not at all (temporary file in the same folder, then rename).

    Raises:
        CheckpointError: the tensors do not fit each other or the metadata, or hold numbers that are not
        finite.
    """
    path = Path(path)
    _check_tensors(checkpoint, str(path))
    info = checkpoint.info
    tensors = {"head.weight": checkpoint.weight}
    if checkpoint.shift is not None:
        tensors["head.shift"] = checkpoint.shift
    if checkpoint.scale is not None:
        tensors["head.scale"] = checkpoint.scale
    if checkpoint.prior is not None:
        tensors["head.prior"] = checkpoint.prior
    if checkpoint.landmarks is not None:
        tensors |= {f"landmarks.{part}": getattr(checkpoint.landmarks, part) for part in _LANDMARKS}
    tensors |= {f"singular.{name}": offsets for name, offsets in checkpoint.singular.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "workers": json.dumps(info.workers),
        "backbone": info.backbone,
        "revision": info.revision,
        "reads": json.dumps(info.reads),
        "prompt_format": info.prompt_format,
        "roles": json.dumps(info.roles),
        "max_tokens": json.dumps(info.max_tokens),
        "trained": json.dumps(info.trained, sort_keys=True, allow_nan=False),
    }
    if info.domains:
        metadata["domains"] = json.dumps(info.domains)
    data = save({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read and check a checkpoint on its own; `check_fits` compares it with a pool and a backbone.

    Raises:
        CheckpointError: the file is missing, cut off or not a router checkpoint; metadata is missing or
        wrong; tensors
            have the wrong shape or hold numbers that are not finite. The message names the file and the part.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} is cut off or not a safetensors file: {error}") from error
    info = _read_info(metadata, str(path))
    if "head.weight" not in tensors:
        raise CheckpointError(f"checkpoint {path} has no tensor head.weight")
    singular = {
        name.removeprefix("singular."): tensor for name, tensor in tensors.items() if name.startswith("singular.")
    }
    known = {"head.weight", "head.shift", "head.scale", "head.prior"} | {f"singular.{name}" for name in singular}
    parts = [f"landmarks.{part}" for part in _LANDMARKS]
    found = [part for part in parts if part in tensors]
    if found and len(found) < len(parts):
        raise CheckpointError(f"checkpoint {path} has only {', '.join(found)} of {', '.join(parts)}")
    known |= set(found)
    if unknown := sorted(set(tensors) - known):
        raise CheckpointError(f"checkpoint {path} has unknown tensors: {', '.join(unknown)}")
    checkpoint = Checkpoint(
        info=info,
        weight=tensors["head.weight"].float(),
        shift=tensors["head.shift"].float() if "head.shift" in tensors else None,
        scale=tensors["head.scale"].float() if "head.scale" in tensors else None,
        singular={name: tensor.float() for name, tensor in singular.items()},
        prior=tensors["head.prior"].float() if "head.prior" in tensors else None,
        landmarks=Landmarks(*(tensors[part].float() for part in found)) if found else None,
    )
    _check_tensors(checkpoint, str(path))
    return checkpoint


def check_fits(
    checkpoint: Checkpoint,
    *,
    workers: Sequence[str],
    dimension: int,
    backbone: str | None = None,
    revision: str | None = None,
    where: str = "checkpoint",
) -> None:
    """Refuse a checkpoint of another pool or backbone. Workers may come in any order: rows go by name.
    `backbone` and `revision` are compared where given; `dimension` is the backbone's hidden size.

    Raises:
        CheckpointError: names everything that differs, at once.
    """
    info, faults = checkpoint.info, []
    if missing := [name for name in workers if name not in info.workers]:
        faults.append(f"it has no row for {', '.join(missing)}")
    if extra := [name for name in info.workers if name not in workers]:
        faults.append(f"it has rows for {', '.join(extra)}, not in this pool")
    if backbone is not None and backbone != info.backbone:
        faults.append(f"it was trained on the backbone {info.backbone}, this is {backbone}")
    if revision is not None and revision != info.revision:
        faults.append(f"it was trained on revision {info.revision} of the backbone, this is {revision}")
    if dimension != checkpoint.dimension:
        faults.append(f"it reads hidden states of size {checkpoint.dimension}, this backbone has {dimension}")
    if faults:
        raise CheckpointError(f"{where} does not fit: {'; '.join(faults)}")


def _read_info(metadata: Mapping[str, str], where: str) -> CheckpointInfo:
    version = metadata.get("format_version", "of no version")
    if metadata.get("format") != FORMAT or version not in ("1", str(FORMAT_VERSION)):
        found = f"{metadata.get('format', 'of no format')}, version {version}"
        raise CheckpointError(f"{where} is {found}; this program reads {FORMAT} up to version {FORMAT_VERSION}")
    needed = [*_METADATA, *(["position", "layer"] if version == "1" else ["reads"])]
    if missing := [key for key in needed if key not in metadata]:
        raise CheckpointError(f"{where} lacks metadata: {', '.join(missing)}")

    def parsed(key: str, kind: type) -> Any:
        try:
            value = json.loads(metadata[key])
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{where}: metadata {key} is not JSON: {error}") from error
        if type(value) is not kind:
            raise CheckpointError(f"{where}: metadata {key} must be {kind.__name__}")
        return value

    workers = parsed("workers", list)
    if not workers or not all(isinstance(name, str) and name for name in workers):
        raise CheckpointError(f"{where}: metadata workers must be a list of names")
    if len(set(workers)) != len(workers):
        raise CheckpointError(f"{where}: metadata workers names a worker twice")
    if metadata["prompt_format"] not in PROMPT_FORMATS:
        found = metadata["prompt_format"]
        raise CheckpointError(f"{where}: metadata prompt_format is {found!r}, not one of {PROMPT_FORMATS}")
    reads = [[parsed("layer", int), metadata["position"]]] if version == "1" else parsed("reads", list)
    limit = parsed("max_tokens", int) if metadata.get("max_tokens", "null") != "null" else None
    if limit is not None and limit < 1:
        raise CheckpointError(f"{where}: metadata max_tokens is {limit}; it must be at least 1")
    domains = parsed("domains", list) if "domains" in metadata else []
    if not all(isinstance(name, str) for name in domains):
        raise CheckpointError(f"{where}: metadata domains must be a list of names")
    return CheckpointInfo(
        workers=tuple(workers),
        backbone=metadata["backbone"],
        revision=metadata["revision"],
        reads=_reads(reads, where),
        prompt_format=metadata["prompt_format"],  # type: ignore[arg-type]  # checked above
        roles=parsed("roles", bool),
        trained=parsed("trained", dict),
        max_tokens=limit,
        domains=tuple(domains),
    )


def _reads(found: Sequence[Any], where: str) -> tuple[Read, ...]:
    reads = []
    for entry in found:
        if not isinstance(entry, list) or len(entry) != 2:
            raise CheckpointError(f"{where}: metadata reads must be pairs of layer and position, not {entry!r}")
        layer, position = entry
        if type(layer) is not int or (layer != -1 and layer < 1):
            raise CheckpointError(f"{where}: metadata layer is {layer!r}; it must be -1 or at least 1")
        if position not in POSITIONS:
            raise CheckpointError(f"{where}: metadata position is {position!r}, not one of {POSITIONS}")
        reads.append(Read(layer, position))
    if not reads or len(set(reads)) != len(reads):
        raise CheckpointError(f"{where}: metadata reads must name at least one place, each once")
    return tuple(reads)


def _check_tensors(checkpoint: Checkpoint, where: str) -> None:
    weight, info = checkpoint.weight, checkpoint.info
    if weight.ndim != 2 or weight.shape[0] != info.rows or weight.shape[1] < 1:
        raise CheckpointError(
            f"{where}: head.weight has shape {list(weight.shape)}; "
            f"{len(info.workers)} workers{' and 3 roles' if info.roles else ''} need [{info.rows}, d]"
        )
    tensors = {"head.weight": weight}
    if checkpoint.prior is not None:
        if checkpoint.prior.shape != (info.rows,):
            raise CheckpointError(f"{where}: head.prior has shape {list(checkpoint.prior.shape)}, not [{info.rows}]")
        tensors["head.prior"] = checkpoint.prior
    if (landmarks := checkpoint.landmarks) is not None:
        if fault := landmarks.fault(weight.shape[1]):
            raise CheckpointError(f"{where}: {fault}")
        tensors |= {f"landmarks.{part}": getattr(landmarks, part) for part in _LANDMARKS}
    if info.domains and len(info.domains) != (landmarks.count if landmarks is not None else 0):
        raise CheckpointError(f"{where}: metadata domains names {len(info.domains)}, not one per landmark")
    for name, vector in (("head.shift", checkpoint.shift), ("head.scale", checkpoint.scale)):
        if vector is None:
            continue
        if vector.shape != (checkpoint.dimension,):
            raise CheckpointError(f"{where}: {name} has shape {list(vector.shape)}, not [{checkpoint.dimension}]")
        tensors[name] = vector
    for name, offsets in checkpoint.singular.items():
        if offsets.ndim != 1:
            raise CheckpointError(f"{where}: singular.{name} has shape {list(offsets.shape)}, not one dimension")
        tensors[f"singular.{name}"] = offsets
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{where}: {name} holds numbers that are not finite")
