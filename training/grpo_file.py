"""A GRPO run in a YAML file, and what it would take: `fugu train grpo --settings FILE --dry-run`.

The file's keys are the fields of `training.grpo_train.GrpoRun` and of what is inside it; unknown ones are errors.
Paths in it are relative to the file.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from training.grpo_train import GrpoRun, task_numbers  # first: it sets up OpenMP before torch is imported

import torch  # isort: skip
import yaml

from actors.config_file import load_config
from actors.errors import ConfigError
from actors.estimate import text_tokens
from actors.model_files import resolve_model
from training.conductor_questions import question_at

if TYPE_CHECKING:
    from rich.table import Table

_PATHS = ("config", "start")  # read; what is written is relative to where the command runs


def with_changes(
    path: Path | None,
    changes: Mapping[str, Any],
    within: Mapping[str, Mapping[str, Any]],
    *,
    defaults: Mapping[str, Any] | None = None,
    full: bool = False,
) -> GrpoRun:
    """The run that a file describes (None: that of `defaults`), with `changes` by field, `within` those of the parts of
    a run, and with `full` all weights learnt.

    Raises:
        ConfigError: the file cannot be read, something is missing, or a key or value is wrong; says which.
    """
    raw = dict(defaults or {}) if path is None else _from_file(path)
    raw |= changes
    for name, part in within.items():
        if part:
            raw[name] = {**(raw.get(name) or {}), **part}
    if full:
        raw["grpo"] = {**raw["grpo"], "lora": None}
    run: GrpoRun = _read(GrpoRun, raw, "the run" if path is None else str(path))
    return run


def _from_file(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values")
    for name in _PATHS:
        if isinstance(raw.get(name), str):
            raw[name] = str(path.parent / raw[name])
    return raw


def _read(kind: Any, raw: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a mapping."""
    hints = get_type_hints(kind)
    if unknown := sorted(set(raw) - set(hints)):
        raise ConfigError(f"{where}: no setting {unknown[0]}; there are {', '.join(sorted(hints))}")
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in raw.items()}
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"{where}: {missing[0]} is missing")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _read(hint, value, where)
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        return _value(next(one for one in get_args(hint) if one is not type(None)), value, where)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if hint is Path and "://" in str(value):
        raise ConfigError(f"{where}: {value} is no path; give --out and --state on the command line for an address")
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    plain = get_origin(hint) or hint
    allowed = get_args(hint) if not isinstance(plain, type) else ()
    fits = value in allowed if allowed else isinstance(value, plain) and (plain is bool or not isinstance(value, bool))
    if is_dataclass(value) or fits:
        return value
    raise ConfigError(f"{where}: {str(value)[:60]!r} does not fit" + (f"; one of {allowed}" if allowed else ""))


@dataclass(frozen=True)
class DryRun:
    """What a run would take. Numbers of the model and bytes without any weights made; calls at most, with every plan at
    its longest; `prompt_tokens` is an estimate for the first question."""

    model: str
    numbers: int
    learnt: int
    weight_bytes: int
    training_bytes: int
    workers: tuple[str, ...]
    disabled: Mapping[str, str]
    prompt_tokens: int
    completions: int
    calls_per_step: int
    calls: int
    first_question: str

    def json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title=f"dry run: {self.model}", show_header=False)
        table.add_row("numbers in all, learnt", f"{self.numbers:,}, {self.learnt:,}")
        table.add_row("memory of weights", f"{self.weight_bytes / 2**30:.1f} GiB")
        table.add_row("gradients and optimiser", f"{self.training_bytes / 2**30:.1f} GiB")
        table.add_row("workers", ", ".join(self.workers))
        for name, reason in self.disabled.items():
            table.add_row("not in use", f"{name}: {reason}")
        table.add_row("tokens of a prompt", f"about {self.prompt_tokens:,}")
        table.add_row("completions a step", f"{self.completions:,}")
        table.add_row("calls, at most", f"{self.calls_per_step:,} a step, {self.calls:,} in all")
        table.add_row("first question", self.first_question)
        return table


def dry_run(settings: GrpoRun) -> DryRun:
    """Build everything but the weights: configuration, tasks, prompt, the model's layers on torch's `meta` device, and
    what is learnt of them.

    Raises:
        ConfigError, DataError: what the run itself would raise.
    """
    config = load_config(settings.config)
    pool = tuple(spec.name for spec in config.active)
    if not pool:
        raise ConfigError(f"{settings.config}: no worker is in use: " + "; ".join(config.disabled.values()))
    tasks, _ = task_numbers(settings)
    question = question_at(0, tasks, pool, settings.subsets, settings.grpo.seed)
    prompt = "\n".join(message.text for message in question.messages(pool, settings.prompt))
    model, dtype = _bare_model(settings)
    numbers = sum(weight.numel() for weight in model.parameters())
    learnt = numbers
    if settings.grpo.lora is not None:
        from peft import LoraConfig, get_peft_model

        shape = settings.grpo.lora
        adapted = get_peft_model(
            model,
            LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=list(shape.targets), task_type="CAUSAL_LM"),
        )
        learnt = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    completions = settings.grpo.questions * settings.grpo.group
    calls = completions * settings.rollouts.max_steps
    return DryRun(
        model=settings.model,
        numbers=numbers,
        learnt=learnt,
        weight_bytes=numbers * (4 if settings.grpo.lora is None else dtype.itemsize),
        training_bytes=learnt * 12,  # a gradient and AdamW's two moments, float32 each
        workers=pool,
        disabled=config.disabled,
        prompt_tokens=text_tokens(prompt),
        completions=completions,
        calls_per_step=calls,
        calls=calls * settings.grpo.steps,
        first_question=f"{question.task.task_id}, for {len(question.allowed)} workers",
    )


def _bare_model(settings: GrpoRun) -> tuple[Any, torch.dtype]:
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.float32 if settings.precision == "float32" else torch.bfloat16
    try:
        if settings.architecture is not None:
            about = AutoConfig.for_model(**settings.architecture)
        else:
            about = AutoConfig.from_pretrained(resolve_model(settings.model).folder, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(about, dtype=dtype), dtype
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{settings.model}: no such model: {(str(error).splitlines() or [''])[0][:200]}") from None
