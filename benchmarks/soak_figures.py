"""What `benchmarks/soak.py` makes of its samples: memory growth per process, latency per window, a picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import psutil

from benchmarks.soak_load import Load

DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Memory:
    """A process at a moment: seconds since the beginning, bytes of its own (USS), with its part of shared pages (PSS),
    and with all of them (RSS)."""

    at: float
    uss: int
    pss: int
    rss: int


@dataclass(frozen=True, slots=True)
class Growth:
    """A process over the run, in MB. `first` and `last` are medians of USS after warm-up and at the end, a fifth of
    the time between each; `percent` compares them, `resident` (percent) the same medians of RSS. `slope` is MB per hour
    (Theil-Sen)."""

    process: str
    first: float
    last: float
    resident: float
    pss: float
    slope: float

    @property
    def percent(self) -> float:
        return 100 * (self.last / self.first - 1)


@dataclass(frozen=True, slots=True)
class Window:
    """Latency that the server added to requests whose provider answered at once, milliseconds."""

    at: float
    requests: int
    p50: float
    p99: float


def name_of(process: psutil.Process) -> str:
    command = process.cmdline() or [process.name()]
    name = next((part for part in command if part.startswith("ray::")), Path(command[0]).name)
    script = next((Path(part).stem for part in command[1:] if part.endswith(".py")), "")
    module = next((after for part, after in itertools.pairwise(command) if part == "-m"), "")
    return f"{name} {script or module}".strip()


def sample(tree: Sequence[psutil.Process], at: float, kept: dict[tuple[int, str], list[Memory]]) -> None:
    """Note the memory of every process under its id and name. Those that have just ended are left out."""
    for process in tree:
        try:
            info = process.memory_full_info()
            kept.setdefault((process.pid, name_of(process)), []).append(Memory(at, info.uss, info.pss, info.rss))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def growth(kept: dict[tuple[int, str], list[Memory]], warm: float, end: float) -> list[Growth]:
    """Of every process that lived from before `warm` (seconds) to the end, the largest first. A name that several
    have gets their process ids."""
    found = []
    fifth = (end - warm) / 5
    lived = {key: samples for key, samples in kept.items() if samples[0].at <= warm and samples[-1].at >= end - fifth}
    names = [name for _, name in lived]
    for (pid, name), samples in lived.items():
        after = [each for each in samples if each.at >= warm]
        early = [each for each in after if each.at <= warm + fifth]
        late = [each for each in after if each.at >= end - fifth]
        if not early or not late:
            continue
        first, last = (statistics.median(each.uss for each in part) / 1e6 for part in (early, late))
        before, now = (statistics.median(each.rss for each in part) for part in (early, late))
        slope = theil_sen([each.at / 3600 for each in after], [each.uss / 1e6 for each in after])
        shown = name if names.count(name) == 1 else f"{name} ({pid})"
        found.append(Growth(shown, first, last, 100 * (now / before - 1), after[-1].pss / 1e6, slope))
    return sorted(found, key=lambda each: -each.last)


def windows(load: Load, seconds: float, warm: float) -> list[Window]:
    """One for every `seconds` after `warm`; a direct call's median in the same window is taken off."""
    found = []
    last = max((each.at for each in load.ended), default=0.0)
    at = warm
    while at + seconds <= last + 0.5 * seconds:
        clean = [
            each.seconds
            for each in load.ended
            if each.clean and each.ending == "answered" and at <= each.at < at + seconds
        ]
        direct = [spent for when, spent in load.direct if at <= when < at + seconds]
        if len(clean) >= 20 and direct:
            off = statistics.median(direct)
            p50, p99 = (1e3 * (float(np.percentile(clean, p)) - off) for p in (50, 99))
            found.append(Window(at, len(clean), p50, p99))
        at += seconds
    return found


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points (Sen 1968): one bad window does not bend it."""
    xs, ys = np.asarray(x), np.asarray(y)
    first, second = np.triu_indices(len(xs), k=1)
    apart = xs[second] - xs[first]
    return float(np.median((ys[second] - ys[first])[apart > 0] / apart[apart > 0])) if len(xs) > 1 else 0.0


def slope_with_interval(x: Sequence[float], y: Sequence[float], seed: int = 1) -> tuple[float, float, float]:
    """`theil_sen` and its 95% interval, by resampling the points."""
    rng = np.random.default_rng(seed)
    xs, ys = np.asarray(x), np.asarray(y)
    draws = []
    for _ in range(DRAWS):
        chosen = np.sort(rng.integers(0, len(xs), len(xs)))
        if len(set(chosen.tolist())) > 1:
            draws.append(theil_sen(xs[chosen], ys[chosen]))
    low, high = np.percentile(draws, (2.5, 97.5))
    return theil_sen(xs, ys), float(low), float(high)


def draw(
    path: Path,
    kept: dict[tuple[int, str], list[Memory]],
    latency: Sequence[Window],
    grown: Sequence[Growth],
    warm: float,
) -> None:
    """Memory of the processes in `grown`, relative to what each had when warm, over latency per window."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    names = {each.process: each for each in grown}
    for (pid, name), samples in kept.items():
        row = names.get(name) or names.get(f"{name} ({pid})")
        if row is not None:
            minutes = [each.at / 60 for each in samples]
            above.plot(minutes, [each.uss / 1e6 / row.first for each in samples], label=name, linewidth=1)
    above.axhline(1.05, color="grey", linestyle=":", linewidth=1)
    above.axvline(warm / 60, color="grey", linestyle=":", linewidth=1)
    above.set_ylabel("memory of its own (USS), 1 = when warm")
    above.legend(fontsize=6, ncols=2)
    below.plot([each.at / 60 for each in latency], [each.p50 for each in latency], label="p50")
    below.plot([each.at / 60 for each in latency], [each.p99 for each in latency], label="p99")
    below.set_yscale("log")
    below.set_ylabel("added latency, ms")
    below.set_xlabel("minutes")
    below.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
