"""Curves of the runs, and what is derived from them over seeds: intervals, crossings, correlations.

Each seed draws its own weights, training problems and held-out problems, so that what differs between seeds holds the
chance of the problems, too: an interval is Student's over the seeds' figures, for 95%. Arms are compared within a seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perigee.statistics import Interval

RESULTS = Path("docs/reproduction")
# The two-sided 95% quantile of Student's t, by degrees of freedom; for more than 9 that of 9, which is larger.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Point:
    """An evaluation: what was sampled before it, sampled accuracy by kind of problem, mean response tokens."""

    iteration: int
    samples: int
    tokens: int
    accuracy: Mapping[str, float]
    response_tokens: float


@dataclass(frozen=True)
class Curve:
    """One run: its evaluations, and over its iterations the mean reward and response length of the rollouts."""

    points: Sequence[Point]
    reward: Sequence[float | None]
    response_tokens: Sequence[float | None]
    # Of its own processes, without its warm-up's.
    cpu_seconds: float | None = None

    def accuracies(self, kind: str = "overall") -> list[float]:
        """Returns the accuracy of each evaluation."""
        return [point.accuracy[kind] for point in self.points]

    def samples_to(self, accuracy: float) -> float:
        """Returns the responses sampled before the rising fit of the curve reaches an accuracy; infinity if never."""
        fit = rising_fit(self.accuracies())
        samples = [float(point.samples) for point in self.points]
        if fit[-1] < accuracy:
            return math.inf
        index = next(index for index, value in enumerate(fit) if value >= accuracy)
        if index == 0:
            return samples[0]
        part = (accuracy - fit[index - 1]) / (fit[index] - fit[index - 1])
        return samples[index - 1] + part * (samples[index] - samples[index - 1])


Curves = Mapping[int, Curve]


def read_results(arm: str) -> Curves:
    """Returns an arm's curves by seed; empty where it was not run."""
    path = RESULTS / f"{arm}.json"
    if not path.is_file():
        return {}
    seeds = json.loads(path.read_text(encoding="utf-8"))["seeds"]
    return {
        int(seed): Curve(**curve | {"points": [Point(**point) for point in curve["points"]]})
        for seed, curve in seeds.items()
    }


def interval_over(values: Sequence[float]) -> Interval:
    """Returns the mean of the seeds' figures with Student's 95% interval; without bounds for one seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = T_95[min(len(values), len(T_95) + 1) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def differences(base: Curves, other: Curves, figure: Callable[[Curve], float]) -> list[float]:
    """Returns the other arm's figure less the base's, for each seed that both have."""
    return [figure(other[seed]) - figure(base[seed]) for seed in sorted(base.keys() & other.keys())]


def sample_ratios(fast: Curves, slow: Curves) -> list[float]:
    """Returns how many times the fast arm's responses the slow one needs, for each seed that both have.

    The accuracy is the highest that the rising fits of both reach. A seed where that is not above the start says
    nothing, and is left out.
    """
    ratios = []
    for seed in sorted(fast.keys() & slow.keys()):
        pair = fast[seed], slow[seed]
        accuracy = min(rising_fit(curve.accuracies())[-1] for curve in pair)
        reached = [curve.samples_to(accuracy) for curve in pair]
        if min(reached) > 0:
            ratios.append(reached[1] / reached[0])
    return ratios


def geometric_interval(ratios: Sequence[float]) -> Interval:
    """Returns the geometric mean of ratios with Student's 95% interval of their logarithms."""
    logs = interval_over([math.log(ratio) for ratio in ratios])
    high = math.exp(logs.high) if logs.high < 700 else math.inf
    return Interval(math.exp(logs.mean), math.exp(logs.low), high)


def correlation_interval(correlations: Sequence[float]) -> Interval:
    """Returns the mean of correlations with Student's 95% interval, both of Fisher's transform; bounds in -1..1."""
    # Of a correlation of one the transform is infinite.
    interval = interval_over([math.atanh(0.999999 * value) for value in correlations])
    if len(correlations) < 2:
        return Interval(math.tanh(interval.mean), -math.inf, math.inf)
    return Interval(*(math.tanh(value) for value in (interval.mean, interval.low, interval.high)))


def rising_fit(values: Sequence[float]) -> list[float]:
    """Returns the nearest values, in squares, that never fall (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) >= statistics.fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [statistics.fmean(block) for block in blocks for _ in block]


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Returns Pearson's correlation."""
    return float(np.corrcoef(left, right)[0, 1])
