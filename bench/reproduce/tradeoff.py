"""Accuracy against response length of a long model and what four methods made of it: figure 7.

The first model is the long one, the second the short one that merging takes, the last that of reinforcement learning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.reproduce.curves import Curve, Curves, differences, interval_over
from bench.reproduce.drawing import Finding, Line
from perigee.cli.long2short.config import ComparisonConfig
from perigee.statistics import Interval

# What a method is to save of the long model's tokens, and what it may lose.
BOUNDS = ComparisonConfig()
MARKERS = "osvD^*"

Results = Mapping[str, Curves]


def accuracy(curve: Curve) -> float:
    """Returns the accuracy of the sampled responses."""
    return curve.accuracies()[-1]


def length(curve: Curve) -> float:
    """Returns the mean tokens of the sampled responses."""
    return curve.points[-1].response_tokens


def tokens_per_right(curve: Curve) -> float:
    """Returns all sampled tokens by right responses; infinite where none is right."""
    return length(curve) / accuracy(curve) if accuracy(curve) else math.inf


def shortening(results: Results, base: Line, line: Line) -> Interval:
    """Returns the fraction of the long model's tokens that a model saves, compared within seeds."""
    long, other = results[base.arm], results[line.arm]
    return interval_over([1 - length(other[seed]) / length(long[seed]) for seed in sorted(long)])


def loss(results: Results, base: Line, line: Line) -> Interval:
    """Returns the accuracy that a model loses, compared within seeds."""
    return interval_over(differences(results[line.arm], results[base.arm], accuracy))


def draw_tradeoff(results: Results, lines: Sequence[Line]) -> Figure:
    """Draws accuracy against response length: a small point for each seed, a large one for their mean."""
    figure, axes = plt.subplots(figsize=(5.2, 3.4))
    for line, marker in zip(lines, MARKERS, strict=True):
        x, y = ([measure(curve) for curve in results[line.arm].values()] for measure in (length, accuracy))
        axes.plot(x, y, marker, color=line.color, markersize=3, alpha=0.5)
        axes.plot([fmean(x)], [fmean(y)], marker, color=line.color, markersize=8, label=line.label)
    axes.set(xlabel="response length (tokens)", ylabel="held-out accuracy (fraction)")
    axes.legend()
    return figure


def find_shortest(results: Results, lines: Sequence[Line]) -> Finding:
    """Finds which methods are within the bounds, and whether the last one is right most often for its tokens."""
    long, _, *methods = lines
    best = {line.label: fmean(map(tokens_per_right, results[line.arm].values())) for line in methods}
    first = min(best, key=lambda label: best[label])
    missing = {line.label: shortfalls(results, long, line) for line in methods}
    within = [label for label, missed in missing.items() if not missed]
    bounds = f"at least {BOUNDS.min_shortening:.0%} shorter at a loss of at most {BOUNDS.max_accuracy_loss:g}"
    sentences = [
        judge_last(results, lines),
        f"The fewest tokens for a right answer takes {first}: {best[first]:.1f}.",
        f"On the mean of the seeds {', '.join(within) or 'no method'} {'is' if len(within) < 2 else 'are'} {bounds}"
        + "".join(f"; {label} {' and '.join(missed)}" for label, missed in missing.items() if missed)
        + ".",
    ]
    head = ("model", "accuracy", "tokens", "tokens per right answer", "shorter by, 95%", "accuracy lost, 95%")
    return Finding(" ".join(sentences), [head, *(tradeoff_row(results, long, line) for line in lines)])


def judge_last(results: Results, lines: Sequence[Line]) -> str:
    """Returns whether the last method takes fewer tokens for a right answer than each of the others, by intervals."""
    last = lines[-1]
    saved = {
        line.label: interval_over(differences(results[last.arm], results[line.arm], tokens_per_right))
        for line in lines[2:-1]
    }
    claim = f"{last.label} takes the fewest tokens for a right answer of the four methods"
    if all(interval.low > 0 for interval in saved.values()):
        return f"**Holds here**: {claim}."
    if less := [label for label, interval in saved.items() if interval.high < 0]:
        return f"**Does not hold here** that {claim}: {join_verb(less)} fewer."
    fewer = [label for label, interval in saved.items() if interval.mean < 0]
    way = f"; by the means {join_verb(fewer)} fewer" if fewer else "; by the means it does"
    return f"**Not decided** by these seeds whether {claim}{way}."


def join_verb(methods: Sequence[str]) -> str:
    """Returns methods as the subject of a sentence, with its verb."""
    return f"{' and '.join(methods)} {'takes' if len(methods) == 1 else 'take'}"


def shortfalls(results: Results, long: Line, line: Line) -> list[str]:
    """Returns what a method misses of the bounds, on the mean of the seeds."""
    saved, lost = shortening(results, long, line).mean, loss(results, long, line).mean
    missed = [f"is {saved:.0%} shorter"] if saved < BOUNDS.min_shortening else []
    return [*missed, *([f"loses {lost:.3f}"] if lost > BOUNDS.max_accuracy_loss else [])]


def tradeoff_row(results: Results, long: Line, line: Line) -> Sequence[str]:
    """Returns a model's row, with its differences from the long one."""
    curves = list(results[line.arm].values())
    means = [fmean(map(measure, curves)) for measure in (accuracy, length, tokens_per_right)]
    figures = f"{means[0]:.3f}", f"{means[1]:.1f}", f"{means[2]:.1f}"
    if line == long:
        return line.label, *figures, "", ""
    related = shortening(results, long, line), loss(results, long, line)
    return line.label, *figures, show(related[0], ".0%"), show(related[1], "+.3f")


def show(interval: Interval, form: str) -> str:
    """Returns a mean with its bounds; of one seed the figure alone."""
    if interval.low == float("-inf"):
        return f"{interval.mean:{form}} (one seed)"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
