"""The pictures of an evaluation, as PNG files; drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Point:
    """One way of answering: its quality with a 95% interval, and what it takes (USD or calls, per task)."""

    name: str
    ours: bool
    price: float
    mean: float
    low: float
    high: float


def draw_quality(points: Sequence[Point], path: Path, *, price: str, title: str) -> None:
    """Quality against price, one dot per way of answering; ours stand out."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    prices = [point.price for point in points]
    # Equal prices (every router makes one call) would lie on each other: then the names make the axis.
    spread = max(prices) > 1.01 * min(prices) if prices else False
    ordered = sorted(points, key=lambda point: point.mean)
    for row, point in enumerate(ordered):
        colour = "tab:red" if point.ours else "tab:gray"
        error = [[max(0.0, point.mean - point.low)], [max(0.0, point.high - point.mean)]]
        if spread:
            axes.errorbar(point.price, point.mean, yerr=error, fmt="o", color=colour, capsize=3)
            axes.annotate(
                point.name,
                (point.price, point.mean),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
        else:
            axes.errorbar(point.mean, row, xerr=error, fmt="o", color=colour, capsize=3)
    if spread:
        axes.set_xlabel(price)
        axes.set_ylabel("mean score")
        axes.margins(x=0.2)
    else:
        axes.set_yticks(range(len(ordered)), [point.name for point in ordered], fontsize=8)
        axes.set_xlabel("mean score, 95% interval")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_shares(shares: Mapping[str, Mapping[str, float]], workers: Sequence[str], path: Path, *, title: str) -> None:
    """Which worker answers how much of each domain, as stacked bars."""
    figure = Figure(figsize=(max(6, 1.1 * len(shares) + 3), 4.5), layout="constrained")
    axes = figure.subplots()
    domains, colours = list(shares), matplotlib.colormaps["tab20"]
    base = [0.0] * len(domains)
    for index, worker in enumerate(workers):
        heights = [shares[domain].get(worker, 0.0) for domain in domains]
        axes.bar(domains, heights, bottom=base, label=worker, color=colours(index % 20))
        base = [low + height for low, height in zip(base, heights, strict=True)]
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of tasks")
    axes.tick_params(axis="x", rotation=30)
    axes.set_title(title)
    figure.legend(loc="outside right upper", fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
