"""What a trained router is worth on recorded outcomes, next to everything simpler.

    python -m benchmarks.router_quality --outcomes DIR [--without NAME,NAME] [--split val] [--json FILE]

DIR is an outcomes folder with the splits `train` and `--split`. The pool is every worker with an outcome for each task;
`--without` adds a second pool without these. All ways of choosing learn from `train` alone: the head's settings are
chosen there by cross-validation, and the evolution sees no other task, not even to say which generation is best. Means
over `--seeds` seeds where there is chance; intervals of 95% by bootstrap over tasks, gains paired by task.

The second table of a pool is about data sets that were never seen: whole data sets of `train` are held out, five parts
in turn, for each seed another partition; its intervals resample whole data sets. Settings are those chosen on all of
`train` (a few candidates, the same for all parts).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.model_files import resolve_model
from orchestrator.head import Checkpoint
from training import baselines
from training.evaluate import Estimate, bootstrap
from training.evolution import Settings
from training.features import task_states
from training.fit import Candidate, Kind, fit, folds_of, unseen_logits
from training.generations import Course, evolve
from training.outcomes import Outcomes, Task, read_outcomes
from training.players import RecordedPlayer, Table
from training.policy import AXES, Policy, principal_axes
from training.train_sft import SftRun, choose, info_of

Matrix = NDArray[np.float64]
# TF-IDF: so many of the most frequent words and pairs of words; the ridge's penalty in units of kernel values.
_VOCABULARY = 8000
_RIDGE = 1.0
_FOLDS = 5
_NEIGHBOURS = 20
# The paper's 0.03 is for a start from zeros.
_SIGMA = 0.01
_LINEAR_DECAYS = (10.0, 30.0, 100.0)


@dataclass(frozen=True, eq=False)
class Data:
    """Tasks with scores `[N, L]` and hidden states `[N, d]`; `alike` are the TF-IDF cosines of all tasks of a run, of
    which these are the rows `place`."""

    tasks: tuple[Task, ...]
    scores: Matrix
    hidden: Tensor
    alike: Tensor
    place: NDArray[np.int64]

    def part(self, rows: NDArray[np.int64]) -> Data:
        tasks = tuple(self.tasks[row] for row in rows.tolist())
        return Data(tasks, self.scores[rows], self.hidden[rows], self.alike, self.place[rows])

    def columns(self, columns: Sequence[int]) -> Data:
        return replace(self, scores=self.scores[:, list(columns)])

    def words(self, train: Data) -> Tensor:
        """TF-IDF cosines `[N, M]` with the tasks of `train`."""
        return self.alike[self.place][:, train.place]

    @property
    def datasets(self) -> list[str]:
        return [task.dataset for task in self.tasks]


# A way of choosing: training tasks, measured tasks, seed → preferences [N, L].
Way = Callable[[Data, Data, int], Matrix]


@dataclass(frozen=True)
class Row:
    name: str
    score: Estimate
    gain: Estimate
    by_seed: tuple[float, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outcomes", type=Path, required=True)
    parser.add_argument("--workers", default="", help="only these, in the first pool, too")
    parser.add_argument("--without", default="", help="a second pool without these workers")
    parser.add_argument("--split", default="val")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--generations", type=int, default=60, help="of the evolution")
    parser.add_argument("--landmarks", type=int, default=SftRun.landmarks)
    parser.add_argument("--no-unseen", action="store_true", help="leave the tables of unseen data sets out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = read_outcomes(options.outcomes)
    asked = options.workers.split(",") if options.workers else found.workers
    whole = tuple(name for name in asked if np.isfinite(found.scores([name])).all())
    left = tuple(name for name in whole if name not in options.without.split(","))
    settings = SftRun(options.outcomes, Path(), workers=whole, landmarks=options.landmarks, progress=False)
    data = data_of(found, settings, options.split)
    report = {}
    for workers in dict.fromkeys((whole, left)):
        print(f"\n## {len(workers)} workers: {', '.join(workers)}\n")
        parts = [part.columns([whole.index(name) for name in workers]) for part in data]
        report[str(len(workers))] = measure(parts[0], parts[1], replace(settings, workers=workers), options)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(train: Data, held: Data, settings: SftRun, options: argparse.Namespace) -> dict[str, Any]:
    scores = torch.from_numpy(train.scores).float()
    chosen, tried = choose(train.hidden, scores, train.datasets, settings)
    linear, _ = choose(train.hidden, scores, train.datasets, replace(settings, head="linear", decays=_LINEAR_DECAYS))
    print(f"chosen on train: {chosen}, linear: {linear}\n")
    ways = ways_of(settings, chosen, linear, options.generations)
    rows = compared(ways, train, held, range(options.seeds), [str(row) for row in range(len(held.tasks))])
    oracle = held.scores.max(1)
    single = held.scores[:, train.scores.mean(0).argmax()]
    rng = np.random.default_rng(0)
    rows.append(Row("oracle", bootstrap(oracle, rng), bootstrap(oracle - single, rng), ()))
    show(f"{len(held.tasks)} tasks of {options.split}, {len(train.tasks)} to learn from", rows)
    report: dict[str, Any] = {"chosen": repr(chosen), "seen": [plain(row) for row in rows]}
    report["tried"] = [repr(one) for one in tried]
    if not options.no_unseen:
        apart = {name: way for name, way in ways.items() if name != "head, evolved"}
        rows = unseen(apart, train, range(options.seeds))
        show(f"data sets never seen: {len(set(train.datasets))} of train, held out in {_FOLDS} parts", rows)
        report["unseen"] = [plain(row) for row in rows]
    return report


def data_of(found: Outcomes, settings: SftRun, split: str) -> tuple[Data, Data]:
    """The training tasks and the measured ones."""
    train, held = found.split("train"), found.split(split)
    tasks = (*train.tasks, *held.tasks)
    info = info_of(settings, settings.workers)
    states = task_states(
        tasks, info, resolve_model(settings.backbone).folder, singular={}, max_tokens=settings.max_tokens
    )
    words = tf_idf([task.prompt for task in train.tasks], [task.prompt for task in tasks])
    alike = torch.sparse.mm(words.to_sparse(), words.T)
    scores, every = np.concatenate([part.scores(settings.workers) for part in (train, held)]), np.arange(len(tasks))
    both = Data(tasks, scores, states, alike, every)
    return both.part(every[: len(train.tasks)]), both.part(every[len(train.tasks) :])


def ways_of(settings: SftRun, chosen: Candidate, linear: Candidate, generations: int) -> dict[str, Way]:
    """Every way of choosing, by name."""

    def head(train: Data, kind: Kind, candidate: Candidate) -> Checkpoint:
        how = {"method": "sft", "tau": candidate.tau, "decay": candidate.decay, "objective": kind.objective}
        info = replace(info_of(settings, settings.workers), trained=how)
        return fit(train.hidden, torch.from_numpy(train.scores).float(), info, candidate, kind)[0]

    def fitted(kind: Kind, candidate: Candidate) -> Way:
        def way(train: Data, held: Data, seed: int) -> Matrix:
            return logits(head(train, replace(kind, seed=seed), candidate), held)

        return way

    def evolved(train: Data, held: Data, seed: int) -> Matrix:
        start = head(train, replace(settings.kind, seed=seed), chosen)
        return logits(evolution(start, train, seed, generations), held)

    return {
        "best single": lambda train, held, _: np.tile(train.scores.mean(0), (len(held.tasks), 1)),
        "lookup per data set": lambda train, held, _: baselines.lookup(train.datasets, train.scores, held.datasets),
        "kNN, hidden states": lambda train, held, _: baselines.nearest(train.hidden, train.scores, held.hidden),
        "kNN, TF-IDF": by_words,
        "ridge, TF-IDF": ridge,
        "linear head": fitted(replace(settings.kind, head="linear"), linear),
        "head": fitted(settings.kind, chosen),
        "head, evolved": evolved,
    }


def evolution(start: Checkpoint, train: Data, seed: int, generations: int) -> Checkpoint:
    """The head after so many generations on the training tasks. They also say whether it is better than its start:
    both by what heads say that were not fitted on the task in question."""
    policy = Policy(start, axes=principal_axes(start, train.hidden, AXES))
    table = Table(train.scores, np.full_like(train.scores, np.nan))
    unseen = unseen_logits(start, train.hidden, torch.from_numpy(train.scores).float(), folds=_FOLDS, seed=seed)
    known = (train.hidden, table)
    player = RecordedPlayer(policy, known, known, unseen=unseen)
    course = Course(Settings(sigma=_SIGMA, seed=seed + 1), generations, len(train.tasks), validate_every=generations)
    with tempfile.TemporaryDirectory() as folder:
        found = evolve(player, policy.vector(), course, Path(folder) / "state.pkl", identity={})
    return policy.checkpoint(found.theta, {})


def compared(
    ways: Mapping[str, Way], train: Data, held: Data, seeds: Sequence[int], groups: Sequence[str]
) -> list[Row]:
    reached = {}
    for name, way in ways.items():
        # Only heads place their landmarks by chance.
        drawn = seeds if name in ("head", "head, evolved") else seeds[:1]
        reached[name] = [taken(way(train, held, seed), held) for seed in drawn]
    return rows_of(reached, groups)


def unseen(ways: Mapping[str, Way], train: Data, seeds: Sequence[int]) -> list[Row]:
    """Each way on data sets that it did not learn from: what it reaches on every task of `train`, per seed."""
    reached: dict[str, list[Matrix]] = {name: [] for name in ways}
    for seed in seeds:
        values = {name: np.full(len(train.tasks), np.nan) for name in ways}
        for fold in folds_of(train.datasets, _FOLDS, seed):
            rest = np.setdiff1d(np.arange(len(train.tasks)), fold.numpy())
            known, new = train.part(rest), train.part(fold.numpy())
            for name, way in ways.items():
                values[name][fold.numpy()] = taken(way(known, new, seed), new)
        for name in ways:
            reached[name].append(values[name])
    return rows_of(reached, train.datasets)


def rows_of(reached: Mapping[str, Sequence[Matrix]], groups: Sequence[str]) -> list[Row]:
    means = {name: np.mean(values, axis=0) for name, values in reached.items()}
    single = means["best single"]
    rows = []
    for name, values in reached.items():
        by_seed = tuple(float(one.mean()) for one in values)
        rows.append(Row(name, grouped(means[name], groups), grouped(means[name] - single, groups), by_seed))
    return rows


def grouped(values: Matrix, groups: Sequence[str]) -> Estimate:
    """A mean over tasks with its 95% interval from resampling whole groups of them (Efron 1979)."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(index, values), np.bincount(index)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(sizes), size=(2000, len(sizes)))
    low, high = np.percentile(sums[drawn].sum(1) / sizes[drawn].sum(1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def taken(preferences: Matrix, held: Data) -> Matrix:
    return held.scores[np.arange(len(held.tasks)), preferences.argmax(1)]


def logits(head: Checkpoint, held: Data) -> Matrix:
    found: Matrix = head.logits(held.hidden).double().numpy()
    return found


def tf_idf(train: Sequence[str], texts: Sequence[str]) -> Tensor:
    """Rows `[N, V]` of length 1: words and pairs of words, 1 + ln(count), times ln((1 + N) / (1 + documents)) + 1
    (Salton & Buckley 1988); what is rare in the training texts is left out."""
    counts = [Counter(terms(text)) for text in texts]
    documents = Counter(term for text in train for term in set(terms(text)))
    known = {term: place for place, (term, _) in enumerate(documents.most_common(_VOCABULARY))}
    rarity = {term: math.log((1 + len(train)) / (1 + documents[term])) + 1 for term in known}
    rows = torch.zeros(len(texts), len(known))
    for row, count in enumerate(counts):
        for term, times in count.items():
            if term in known:
                rows[row, known[term]] = (1 + math.log(times)) * rarity[term]
    return torch.nn.functional.normalize(rows)


def terms(text: str) -> list[str]:
    words = re.findall(r"[a-z]+|\d+|[^\sa-z\d]", text.lower())
    return [*words, *(f"{left} {right}" for left, right in pairwise(words))]


def by_words(train: Data, held: Data, _seed: int) -> Matrix:
    """Mean score of each worker on the training tasks with the most similar words."""
    closest = held.words(train).topk(min(_NEIGHBOURS, len(train.tasks))).indices
    found: Matrix = train.scores[closest.numpy()].mean(1)
    return found


def ridge(train: Data, held: Data, _seed: int) -> Matrix:
    """Ridge regression of the workers' scores on TF-IDF rows, by their products (there are more terms than tasks)."""
    mean = train.scores.mean(0)
    factor = torch.linalg.cholesky(train.words(train) + _RIDGE * torch.eye(len(train.tasks)))
    found = torch.cholesky_solve(torch.from_numpy(train.scores - mean).float(), factor)
    return np.asarray(mean + (held.words(train) @ found).numpy())


def show(title: str, rows: Sequence[Row]) -> None:
    print(f"{title}\n\n| | score | 95% | gain over best single | 95% | by seed |\n|---|---|---|---|---|---|")
    for row in rows:
        seeds = " ".join(f"{one:.4f}" for one in row.by_seed) if len(set(row.by_seed)) > 1 else ""
        print(
            f"| {row.name} | {row.score.mean:.4f} | {row.score.low:.3f}–{row.score.high:.3f} | {row.gain.mean:+.4f} | "
            f"{row.gain.low:+.3f} to {row.gain.high:+.3f} | {seeds} |",
            flush=True,
        )
    print()


def plain(row: Row) -> dict[str, Any]:
    return {"name": row.name, "score": vars_of(row.score), "gain": vars_of(row.gain), "by_seed": list(row.by_seed)}


def vars_of(estimate: Estimate) -> list[float]:
    return [estimate.mean, estimate.low, estimate.high]


if __name__ == "__main__":
    main()
