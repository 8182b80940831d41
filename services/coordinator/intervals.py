"""95% confidence intervals of accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The two-sided 95% quantile of the standard normal distribution.
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


def wilson_interval(correct: int, total: int) -> Interval:
    """Wilson's score interval of a share: one answer per problem."""
    if total == 0:
        return Interval(math.nan, math.nan, math.nan)
    share = correct / total
    scale = 1 + Z_95**2 / total
    center = (share + Z_95**2 / (2 * total)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
    # Rounding must not put the share itself outside.
    return Interval(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def clustered_interval(correct_by_problem: Sequence[Sequence[bool]]) -> Interval:
    """Interval of the mean accuracy when each problem was answered several times.

    Answers to one problem depend on each other, so the problem is the unit: the Wilson interval at the number of
    independent answers that has the same variance as the mean over problems (ratio estimator).
    """
    answered = [answers for answers in correct_by_problem if answers]
    if not answered:
        return Interval(math.nan, math.nan, math.nan)
    sizes_P = np.array([len(answers) for answers in answered], dtype=np.float64)
    correct_P = np.array([sum(answers) for answers in answered], dtype=np.float64)
    mean = float(correct_P.sum() / sizes_P.sum())
    problems = len(answered)
    if problems == 1 or mean in (0.0, 1.0):
        plain = wilson_interval(round(mean * problems), problems)
        return Interval(mean, min(mean, plain.low), max(mean, plain.high))
    residual_P = correct_P - mean * sizes_P
    variance = float((residual_P**2).sum()) * problems / (problems - 1) / float(sizes_P.sum()) ** 2
    if variance == 0.0:
        # Every problem is as often right as the others: no less certain than independent answers.
        return _wilson_at(mean, float(sizes_P.sum()))
    return _wilson_at(mean, mean * (1 - mean) / variance)


def _wilson_at(share: float, effective: float) -> Interval:
    scale = 1 + Z_95**2 / effective
    center = (share + Z_95**2 / (2 * effective)) / scale
    half = Z_95 / scale * math.sqrt(share * (1 - share) / effective + Z_95**2 / (4 * effective**2))
    return Interval(share, max(0.0, center - half), min(1.0, center + half))
