"""95% intervals of accuracies, paired tests of two models on the same problems, and votes over answers."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

# The two-sided 95% quantile of the standard normal distribution.
Z_95 = 1.959963984540054
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """Mean with its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """The mean with its interval: 0.590 [0.561, 0.619]."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def is_apart_from(self, other: Interval) -> bool:
        """Returns whether the two intervals do not overlap."""
        return self.low > other.high or other.low > self.high


def wilson_interval(correct: int, total: int) -> Interval:
    """Returns Wilson's score interval of a fraction: one answer per problem."""
    if total == 0:
        return Interval(math.nan, math.nan, math.nan)
    interval = _wilson_at(correct / total, total)
    # Rounding must not put the fraction itself outside.
    return Interval(interval.mean, min(interval.mean, interval.low), max(interval.mean, interval.high))


def clustered_interval(correct_by_problem: Sequence[Sequence[bool]]) -> Interval:
    """Returns the interval of the mean accuracy when each problem was answered several times.

    Answers to one problem depend on each other, so the problem is the unit: the Wilson interval at the number of
    independent answers that has the same variance as the mean over problems (ratio estimator).
    """
    answered = [answers for answers in correct_by_problem if answers]
    if not answered:
        return Interval(math.nan, math.nan, math.nan)
    total = sum(len(answers) for answers in answered)
    mean = sum(map(sum, answered)) / total
    problems = len(answered)
    if problems == 1 or mean in (0.0, 1.0):
        plain = wilson_interval(round(mean * problems), problems)
        return Interval(mean, min(mean, plain.low), max(mean, plain.high))
    squares = math.fsum((sum(answers) - mean * len(answers)) ** 2 for answers in answered)
    variance = squares * problems / (problems - 1) / total**2
    if variance == 0.0:
        # Every problem is as often right as the others: no less certain than independent answers.
        return _wilson_at(mean, total)
    return _wilson_at(mean, mean * (1 - mean) / variance)


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> Interval:
    """Returns the sum of the first numbers by that of the second, such as tokens by right answers, a pair per problem.

    The interval is normal at the variance of the ratio estimator, the problem being the unit. Raises ValueError when
    the second numbers have no positive sum.
    """
    below = math.fsum(second for _, second in pairs)
    if below <= 0:
        raise ValueError("the second numbers have no positive sum")
    ratio = math.fsum(first for first, _ in pairs) / below
    if len(pairs) == 1:
        return Interval(ratio, -math.inf, math.inf)
    squares = math.fsum((first - ratio * second) ** 2 for first, second in pairs)
    half = Z_95 * math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / below
    return Interval(ratio, ratio - half, ratio + half)


def majority(answers: Sequence[tuple[str, bool]]) -> bool:
    """Returns whether the most frequent answer is right; of answers as frequent, the one that was given first counts.

    An empty answer has no vote; without any vote the result is False.
    """
    votes = Counter(answer for answer, _ in answers if answer)
    if not votes:
        return False
    [(winner, _)] = votes.most_common(1)
    return next(correct for answer, correct in answers if answer == winner)


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the two-sided p of McNemar's exact test, from the problems that only one of two models has right."""
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    tail = sum(math.comb(discordant, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << discordant))


def paired_bootstrap(differences: Sequence[float], seed: int = 0) -> tuple[Interval, float]:
    """Returns the mean of the problems' differences with its percentile interval, and a two-sided p, by resampling.

    Raises ValueError without differences.
    """
    if not differences:
        raise ValueError("there is no problem to compare")
    generator = random.Random(seed)
    size = len(differences)
    means = sorted(fmean(generator.choices(differences, k=size)) for _ in range(RESAMPLES))
    below = sum(mean <= 0 for mean in means)
    above = sum(mean >= 0 for mean in means)
    p = min(1.0, 2 * (min(below, above) + 1) / (RESAMPLES + 1))
    low, high = means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]
    return Interval(fmean(differences), low, high), p


def _wilson_at(fraction: float, effective: float) -> Interval:
    scale = 1 + Z_95**2 / effective
    center = (fraction + Z_95**2 / (2 * effective)) / scale
    half = Z_95 / scale * math.sqrt(fraction * (1 - fraction) / effective + Z_95**2 / (4 * effective**2))
    return Interval(fraction, max(0.0, center - half), min(1.0, center + half))
