"""Curves and differences of arms on a plot, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib as mpl

mpl.use("svg")

from matplotlib.axes import Axes

from bench.reproduce.curves import Curve, Curves, interval_over
from perigee.statistics import Interval

# The same file for the same results; text stays text.
mpl.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "perigee", "font.size": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "figure.constrained_layout.use": True, "figure.figsize": (7.6, 2.9),
})  # fmt: skip

Measure = Callable[[Curve], Sequence[float]]


@dataclass(frozen=True)
class Line:
    """An arm as it is drawn and named."""

    arm: str
    label: str
    color: str


@dataclass(frozen=True)
class Finding:
    """What the runs say about the claim, in a sentence, and a table whose first row is its heading."""

    sentence: str
    rows: Sequence[Sequence[str]]


def draw_curves(axes: Axes, curves: Curves, line: Line, measure: Measure, by_samples: bool = False) -> None:
    """Draws the mean over seeds, and each seed thinly; over iterations, or over the responses sampled."""
    by_seed = [measure(curve) for curve in curves.values()]
    x_by_seed = [
        [point.samples if by_samples else point.iteration for point in curve.points] for curve in curves.values()
    ]
    for x, y in zip(x_by_seed, by_seed, strict=True):
        axes.plot(x, y, color=line.color, linewidth=0.7, alpha=0.5)
    x_mean, y_mean = ([fmean(column) for column in zip(*rows, strict=True)] for rows in (x_by_seed, by_seed))
    axes.plot(x_mean, y_mean, "o-", color=line.color, markersize=3.5, label=line.label)
    if not by_samples:
        axes.set_xticks(x_mean)


def draw_differences(axes: Axes, base: Curves, other: Curves, line: Line, measure: Measure) -> None:
    """Draws the difference from the base within seeds, with its interval as a band."""
    seeds = sorted(base.keys() & other.keys())
    gaps = [
        interval_over([y - x for x, y in zip(*pair, strict=True)])
        for pair in zip(
            zip(*(measure(base[seed]) for seed in seeds), strict=True),
            zip(*(measure(other[seed]) for seed in seeds), strict=True),
            strict=True,
        )
    ]
    x = [point.iteration for point in base[seeds[0]].points]
    axes.plot(x, [gap.mean for gap in gaps], "o-", color=line.color, markersize=3.5, label=line.label)
    draw_band(axes, x, gaps, line.color)
    axes.set_xticks(x)


def draw_band(axes: Axes, x: Sequence[float], intervals: Sequence[Interval], color: str) -> None:
    """Draws intervals as a band; none without bounds."""
    if len(intervals) and all(abs(interval.low) < float("inf") for interval in intervals):
        lows, highs = ([getattr(interval, end) for interval in intervals] for end in ("low", "high"))
        axes.fill_between(x, lows, highs, color=color, alpha=0.15, linewidth=0)
