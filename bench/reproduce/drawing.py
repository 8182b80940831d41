"""Curves and differences of arms on a plot, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import matplotlib as mpl

mpl.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.reproduce.curves import Curve, Curves, interval_over
from perigee.statistics import Interval

# The same file for the same results; text stays text.
mpl.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "perigee", "font.size": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "figure.constrained_layout.use": True, "figure.figsize": (7.6, 2.9),
})  # fmt: skip

# Of the arms of a plot, in their order.
STYLES = ("s--", "o-", "^:")

Measure = Callable[[Curve], Sequence[float]]


@dataclass(frozen=True)
class Line:
    """An arm as it is drawn and named."""

    arm: str
    label: str
    color: str
    # Marker and dashes, as Matplotlib writes them; they tell lines apart where there is no color.
    style: str = "o-"


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
        axes.plot(x, y, line.style.lstrip("os^"), color=line.color, linewidth=0.7, alpha=0.5)
    x_mean, y_mean = ([fmean(column) for column in zip(*rows, strict=True)] for rows in (x_by_seed, by_seed))
    axes.plot(x_mean, y_mean, line.style, color=line.color, markersize=3.5, label=line.label)
    if not by_samples:
        axes.set_xticks(x_mean)


def draw_differences(axes: Axes, base: Curves, other: Curves, line: Line, measure: Measure, shift: float = 0.0) -> None:
    """Draws the difference from the base within seeds, moved sideways; with its interval where there is one."""
    seeds = sorted(base.keys() & other.keys())
    gaps = [
        interval_over([y - x for x, y in zip(*pair, strict=True)])
        for pair in zip(
            zip(*(measure(base[seed]) for seed in seeds), strict=True),
            zip(*(measure(other[seed]) for seed in seeds), strict=True),
            strict=True,
        )
    ]
    iterations = [point.iteration for point in base[seeds[0]].points]
    halves = [gap.high - gap.mean if len(seeds) > 1 else 0.0 for gap in gaps]
    axes.errorbar(
        [iteration + shift for iteration in iterations], [gap.mean for gap in gaps], halves,
        fmt=line.style, color=line.color, markersize=3.5, capsize=2.5, elinewidth=1,
    )  # fmt: skip
    axes.set_xticks(iterations)


def add_legend(figure: Figure, axes: Axes) -> None:
    """Names the lines of a plot above all plots of the figure, where no line can lie."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)


def show(interval: Interval, digits: int = 3) -> str:
    """Returns a mean with its bounds; of one seed the figure alone."""
    if math.isinf(interval.low) or math.isinf(interval.high):
        return f"{interval.mean:.{digits}f} (one seed)"
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
