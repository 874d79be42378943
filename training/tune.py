"""`fugu tune`: settings of SFT and of evolution, found by Ray Tune with ASHA on recorded outcomes.

Beside the checkpoint, in `<its name>.tune/`: Tune's own folder (`trials/`, with what every trial was given and
reported), the parts of the tasks that trials learn from and are scored on (`data/`), and `tune.json`, which says what
the tuning is about.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.errors import CheckpointError, ConfigError, DataError, FuguError
from actors.model_files import EMBEDDED_ALIAS, resolve_model
from orchestrator.head import load_checkpoint, save_checkpoint
from training import train_sft
from training.evaluate import Estimate, bootstrap
from training.features import read_limit, task_states
from training.outcomes import Outcomes, Task, read_outcomes
from training.start import reading_of
from training.tune_report import Trial, TuneReport, TuneRun
from training.tune_space import Config, Knob, corners, first_of, space_of
from training.tune_trial import (
    Laboratory,
    Pass,
    evolve_settings,
    lay_out,
    parts_of,
    read_scores,
    replicate,
    scores_of,
    sft_settings,
    train,
    write_scores,
)

__all__ = ["Trial", "TuneReport", "TuneRun", "run"]

_TRIALS = "trials"
_IDENTITY = "tune.json"
# Of every three trials that reach a rung one goes on.
_REDUCTION = 3


def run(settings: TuneRun) -> TuneReport:
    """Tune, train once more with the best settings on all tasks of `split`, and write that checkpoint.

    Everything that can be known to be wrong is found before the first trial. Broken off at any moment, `resume` goes
    on: what trials have scored is kept, replicate by replicate.

    Raises:
        ConfigError: settings or knobs that make no sense, a tuning that is there already, or another one to resume.
        DataError: outcomes that cannot be used; no trial succeeded, with the reason of the first.
        CheckpointError: a start of other workers.
    """
    began = time.perf_counter()
    _check_folder(settings)
    space = space_of(settings.method, settings.over)
    first = first_of(settings.method, space)
    laboratory, learn, held = _checked(settings, space, first)
    _claim(settings, laboratory, space, learn, held)
    score = held if settings.objective == "val" else None
    lay_out(
        laboratory,
        learn,
        score,
        folds=settings.folds,
        replicates=settings.replicates,
        hold_out=settings.hold_out,
    )
    _read_once(laboratory, space, first, (*learn.tasks, *(() if held is None else held.tasks)), settings.progress)
    trials = _tuned(settings, laboratory, space, first)
    whole = [trial for trial in trials if trial.replicates == settings.replicates and trial.score is not None]
    if not whole:
        reason = next((trial.error for trial in trials if trial.error), "")
        if reason:
            raise DataError(f"no trial succeeded: {reason}")
        raise ConfigError(f"no trial came to its end yet; go on with --resume ({settings.folder})")
    best = whole[0]
    final = Pass(
        settings.outcomes,
        settings.folder / "best" / settings.out.name,
        settings.split,
        settings.val_split,
        settings.seed,
        len(learn.tasks),
        settings.progress,
    )
    shutil.rmtree(final.out.parent, ignore_errors=True)  # of a run that was resumed: trained again from nothing
    train(laboratory, best.config, final)
    _write(settings, final.out, best, len(trials))
    single, validation, gain = _measured(settings, laboratory, learn, held)
    return TuneReport(
        out=settings.out,
        folder=settings.folder,
        method=settings.method,
        objective=settings.objective,
        replicates=settings.replicates,
        best=best,
        trials=tuple(trials),
        best_single=single,
        validation=validation,
        gain=gain,
        seconds=time.perf_counter() - began,
    )


def _checked(
    settings: TuneRun, space: Mapping[str, Knob], first: Config
) -> tuple[Laboratory, Outcomes, Outcomes | None]:
    """What trials share, the tasks that they learn from, and the validation tasks (None: there are none)."""
    for name in ("trials", "replicates", "concurrency"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    if settings.checkpoint is not None and settings.method != "evolve":
        raise ConfigError(f"a start (--checkpoint) is for the method evolve; {settings.method} makes its own")
    if settings.method != "sft" and find_spec("matplotlib") is None:
        raise ConfigError("matplotlib, which draws the curves, is not installed; install the extra `train`")
    start = None if settings.checkpoint is None else load_checkpoint(settings.checkpoint)
    found = read_outcomes(settings.outcomes)
    where = settings.outcomes / "outcomes.parquet"
    workers = settings.workers or (found.workers if start is None else start.info.workers)
    if len(workers) < 2 or len(set(workers)) != len(workers):
        raise ConfigError(f"a router chooses among at least two workers; these are {', '.join(workers) or 'none'}")
    if start is not None and set(start.info.workers) != set(workers):
        names = ", ".join(start.info.workers)
        raise CheckpointError(f"{settings.checkpoint} is of the workers {names}; these are {', '.join(workers)}")
    learn = _part(found, settings.split, workers, str(where))
    held = None
    if settings.objective == "val" or any(task.split == settings.val_split for task in found.tasks):
        held = _part(found, settings.val_split, workers, str(where))
    if held is None and settings.method != "sft":
        raise DataError(f"{where}: an evolution needs tasks of the split {settings.val_split} to choose by at the end")
    backbone = settings.backbone or (None if start is None else start.info.backbone)
    laboratory = Laboratory(
        settings.method,
        settings.folder,
        tuple(workers),
        settings.seed,
        settings.checkpoint and settings.checkpoint.resolve(),
        backbone,
        settings.max_tokens,
        settings.device,
        settings.cache,
    )
    anywhere = Pass(settings.outcomes, settings.out, settings.split, settings.val_split, 0, len(learn.tasks))
    for config in corners(space, first):
        if settings.method != "evolve":
            train_sft.check(sft_settings(laboratory, config, anywhere))
        if settings.method != "sft":
            evolve_settings(laboratory, config, anywhere, settings.checkpoint)
    resolve_model(backbone or EMBEDDED_ALIAS)
    list(parts_of(learn, settings.folds, settings.seed, settings.hold_out))
    return laboratory, learn, held


def _part(found: Outcomes, split: str, workers: Sequence[str], where: str) -> Outcomes:
    """The tasks of a split that two of the workers have scores for, which is what says who is better."""
    part = found.split(split)
    if missing := [name for name in workers if name not in part.workers]:
        raise DataError(
            f"{where} has no outcome of {', '.join(missing)} on the split {split}; there are {', '.join(part.workers)}"
        )
    told = np.isfinite(part.scores(workers)).sum(1) >= 2
    tasks = tuple(task for task, has in zip(part.tasks, told.tolist(), strict=True) if has)
    if not tasks:
        raise DataError(f"{where}: no task of the split {split} has outcomes of two of these workers")
    ids = {task.task_id for task in tasks}
    return Outcomes(tasks, tuple(one for one in part.outcomes if one.task_id in ids and one.worker in workers))


def _claim(
    settings: TuneRun, laboratory: Laboratory, space: Mapping[str, Knob], learn: Outcomes, held: Outcomes | None
) -> None:
    """Make the folder, or find that it is this tuning's.

    Raises:
        ConfigError: it is another one's.
    """
    digest = hashlib.sha256()
    for part in (learn, held) if held is not None else (learn,):
        digest.update(repr([(task.task_id, task.prompt) for task in part.tasks]).encode())
        digest.update(np.ascontiguousarray(part.scores(laboratory.workers)).tobytes())
    keys = ("method", "objective", "hold_out", "trials", "replicates", "seed", "backbone", "max_tokens")
    identity = {key: getattr(settings, key) for key in keys} | {
        "workers": list(laboratory.workers),
        "space": {name: str(knob) for name, knob in space.items()},
        "start": None if settings.checkpoint is None else _digest(settings.checkpoint),
        "data": digest.hexdigest()[:16],
    }
    path = settings.folder / _IDENTITY
    if not settings.resume:
        settings.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(identity, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    if differ := [key for key in {**before, **identity} if before.get(key) != identity.get(key)]:
        told = "; ".join(f"{key} was {before.get(key)}, is {identity.get(key)}" for key in differ)
        raise ConfigError(f"cannot resume {settings.folder}: it is another tuning ({told})")


def _check_folder(settings: TuneRun) -> None:
    """A tuning that is there is not overwritten, and one that is not cannot be resumed.

    Raises:
        ConfigError: says which.
    """
    there = (settings.folder / _TRIALS).exists() and (settings.folder / _IDENTITY).exists()
    if there and not settings.resume:
        raise ConfigError(f"{settings.folder} holds a tuning; go on with it with --resume, or remove it")
    if settings.resume and not there:
        raise ConfigError(f"{settings.folder} holds no tuning that could be resumed")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _read_once(
    laboratory: Laboratory, space: Mapping[str, Knob], first: Config, tasks: Sequence[Task], progress: bool
) -> None:
    """Have every task's hidden states on disk for every way of reading that trials may ask for, so that none of them
    runs the backbone."""
    seen: set[tuple[Any, ...]] = set()
    anywhere = Pass(Path(), Path(), "", "", 0, len(tasks))
    start = None if laboratory.checkpoint is None else load_checkpoint(laboratory.checkpoint)
    for config in corners(space, first):
        if start is not None:
            info, asked = start.info, evolve_settings(laboratory, config, anywhere, None).reading.max_tokens
        elif laboratory.method == "evolve":
            made = evolve_settings(laboratory, config, anywhere, None)
            info, asked = reading_of(made, None, laboratory.workers), made.reading.max_tokens
        else:
            sft = sft_settings(laboratory, config, anywhere)
            info, asked = train_sft.info_of(sft, laboratory.workers), sft.max_tokens
        limit = read_limit(info, asked)
        if (key := (info.reads, info.prompt_format, limit)) in seen:
            continue
        seen.add(key)
        folder = resolve_model(laboratory.backbone or info.backbone, revision=info.revision).folder
        task_states(
            tasks,
            info,
            folder,
            singular={} if start is None else start.singular,
            max_tokens=limit,
            device=laboratory.device,
            cache=laboratory.cache,
            progress=progress,
        )


def _tuned(settings: TuneRun, laboratory: Laboratory, space: Mapping[str, Knob], first: Config) -> list[Trial]:
    """Run what is left of the trials; all of them, the best first, those with more replicates before the others."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from training.label import connected
    from training.tune_progress import shown

    # Tune's own progress goes to standard output, where the report belongs; ours is shown instead.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    domains = {name: knob.domain() for name, knob in space.items()}
    with connected(settings.address), shown(settings.trials, settings.progress) as watching:
        trial: Any = tune.with_parameters(_trial, laboratory=laboratory, replicates=settings.replicates)
        trial = tune.with_resources(trial, {"cpu": 1})
        if settings.resume:
            path = str(settings.folder / _TRIALS)
            tuner = tune.Tuner.restore(path, trial, resume_unfinished=True, restart_errored=True, param_space=domains)
        else:
            scheduler = ASHAScheduler(max_t=settings.replicates, grace_period=1, reduction_factor=_REDUCTION)
            search = BasicVariantGenerator(
                points_to_evaluate=[dict(first)], max_concurrent=settings.concurrency, random_state=settings.seed
            )
            tuner = tune.Tuner(
                trial,
                param_space=domains,
                tune_config=tune.TuneConfig(
                    metric="score",
                    mode="max",
                    scheduler=scheduler,
                    search_alg=search,
                    num_samples=settings.trials,
                    reuse_actors=True,  # a new process takes longer than many a trial
                ),
                run_config=tune.RunConfig(
                    name=_TRIALS, storage_path=str(settings.folder), verbose=0, callbacks=[watching]
                ),
            )
        found = tuner.fit()
        results = [found[index] for index in range(len(found))]
    if len(results) < settings.trials or not all(one.error or (one.metrics or {}).get("done") for one in results):
        # Tune has taken the interrupt itself, to write down how far it was.
        raise KeyboardInterrupt
    trials = [_told(one) for one in results]
    return sorted(trials, key=lambda one: (one.score is not None, one.replicates, one.score or 0.0), reverse=True)


def _trial(config: dict[str, Any], laboratory: Laboratory, replicates: int) -> None:
    """A trial, in a process of Tune's. What it has scored stands in its checkpoint."""
    from ray import tune

    scores: list[float] = []
    if (kept := tune.get_checkpoint()) is not None:
        with kept.as_directory() as folder:
            scores = read_scores(Path(folder))
    torch.set_num_threads(1)
    for number in range(len(scores), replicates):
        with tempfile.TemporaryDirectory() as folder:
            scores.append(replicate(laboratory, config, number, Path(folder)))
        with tempfile.TemporaryDirectory() as folder:
            write_scores(Path(folder), scores)
            report = {"score": float(np.mean(scores)), "replicates": len(scores), "last": scores[-1]}
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def _told(result: Any) -> Trial:
    metrics = result.metrics or {}
    error = "" if result.error is None else _reason(result.error)
    score = metrics.get("score")
    return Trial(
        dict(result.config or {}),
        None if score is None or error else float(score),
        int(metrics.get("replicates", 0)),
        float(metrics.get("time_total_s", 0.0)),
        error,
    )


def _reason(error: BaseException) -> str:
    """The last line of what a trial raised, which Ray wraps in its traceback."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, FuguError):
        return cause.message
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__


def _write(settings: TuneRun, made: Path, best: Trial, trials: int) -> None:
    head = load_checkpoint(made)
    note = {"settings": dict(best.config), "score": best.score, "objective": settings.objective, "trials": trials}
    info = replace(head.info, trained={**head.info.trained, "tuned": note})
    save_checkpoint(settings.out, replace(head, info=info))


def _measured(
    settings: TuneRun, laboratory: Laboratory, learn: Outcomes, held: Outcomes | None
) -> tuple[str | None, Estimate | None, Estimate | None]:
    """The best single worker on the training tasks, and what the checkpoint reaches on the validation tasks, alone and
    over that worker."""
    if held is None:
        return None, None, None
    best = int(np.nanmean(learn.scores(laboratory.workers), axis=0).argmax())
    found = scores_of(laboratory, settings.out, held)
    single = held.scores(laboratory.workers)[:, best]
    gains = (found - single)[np.isfinite(single)]
    rng = np.random.default_rng(settings.seed)
    gain = bootstrap(gains, rng) if len(gains) else None
    return laboratory.workers[best], bootstrap(found, rng), gain
