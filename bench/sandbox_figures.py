"""Arithmetic of the sandbox's figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """Measurements of one of the alternatives that take turns: a list per turn."""

    name: str
    turns: list[list[float]]

    @property
    def samples(self) -> list[float]:
        """All measurements."""
        return [sample for turn in self.turns for sample in turn]

    @property
    def median(self) -> float:
        """Median of all measurements."""
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        """95th percentile of all measurements."""
        return percentile(self.samples, 0.95)


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The smallest sample that at least this share of the samples does not exceed; share in (0, 1]."""
    return sorted(samples)[max(0, math.ceil(fraction * len(samples)) - 1)]


@dataclass(frozen=True)
class Ratio:
    """Median of one arm over that of another, and the least and largest of the turns' own ratios."""

    median: float
    least: float
    largest: float


def ratio_of(arm: Arm, base: Arm) -> Ratio:
    """How many times `base` an arm takes; turns are compared pairwise. Raises ValueError when their numbers differ."""
    pairs = zip(arm.turns, base.turns, strict=True)
    ratios = [statistics.median(left) / statistics.median(right) for left, right in pairs]
    return Ratio(arm.median / base.median, min(ratios), max(ratios))


def relative_error(measured: float, known: float) -> float:
    """Signed share by which a measurement differs from what is known."""
    return measured / known - 1


def worst(errors: Sequence[float]) -> float:
    """The error that is farthest from zero."""
    return max(errors, key=abs)


@dataclass(frozen=True)
class Growth:
    """How a series changes over a number of jobs: its ends, its middle, and the slope of its least-squares line."""

    first: float
    middle: float
    last: float
    per_thousand: float

    @property
    def change(self) -> float:
        """The last value less the first."""
        return self.last - self.first


def growth_of(jobs: Sequence[int], values: Sequence[float]) -> Growth:
    """Growth of `values` sampled after so many `jobs`; raises ValueError for fewer than two samples."""
    if len(values) < 2:
        raise ValueError("growth needs two samples")
    slope = statistics.linear_regression([count / 1000 for count in jobs], values, proportional=False).slope
    return Growth(values[0], values[len(values) // 2], values[-1], slope)


def largest_accepted(accepts: Callable[[int], bool], low: int, high: int, resolution: int) -> int:
    """The largest number that `accepts` takes, to within `resolution`, by bisection between `low` and `high`.

    Raises ValueError when `low` is refused or `high` is accepted: then the bounds do not hold it.
    """
    if not accepts(low):
        raise ValueError(f"{low} is refused already")
    if accepts(high):
        raise ValueError(f"{high} is still accepted")
    while high - low > resolution:
        middle = (low + high) // 2
        if accepts(middle):
            low = middle
        else:
            high = middle
    return low
