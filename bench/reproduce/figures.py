"""The figures of the page: the arms that each needs, what is drawn, and what the runs say about the claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.reproduce.arms import BY_RATE, MORE_SEEDS, RATE_SEED, SEEDS, SHORTENING_SEEDS
from bench.reproduce.curves import (
    Curve,
    Curves,
    correlation,
    correlation_interval,
    differences,
    geometric_interval,
    interval_over,
    read_results,
    sample_ratios,
)
from bench.reproduce.drawing import STYLES, Finding, Line, Measure, add_legend, draw_curves, draw_differences, show
from bench.reproduce.measured import GradientNoise, SandboxStarts
from bench.reproduce.tradeoff import draw_tradeoff, find_shortest
from perigee.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY
from perigee.statistics import Interval

# An accuracy this much lower counts as a loss.
MARGIN = 0.05

Results = Mapping[str, Curves]


@dataclass(frozen=True)
class Plot:
    """A figure of the page: its arms, the first of which is the one compared against, and what is made of them."""

    name: str
    lines: Sequence[Line]
    draw_lines: Callable[[Results, Sequence[Line]], Figure]
    find_lines: Callable[[Results, Sequence[Line]], Finding]
    seeds: Sequence[int] = SEEDS

    def read(self) -> Results | None:
        """Returns the curves of the arms on those of its seeds that all of them have; None where there is none."""
        results = {line.arm: read_results(line.arm) for line in self.lines}
        seeds = sorted(set.intersection(set(self.seeds), *(set(curves) for curves in results.values())))
        return {arm: {seed: curves[seed] for seed in seeds} for arm, curves in results.items()} if seeds else None

    def draw(self, results: Results) -> Figure:
        """Draws the figure."""
        return self.draw_lines(results, self.lines)

    def find(self, results: Results) -> Finding:
        """Returns what the runs say, and on how many seeds."""
        found = self.find_lines(results, self.lines)
        return Finding(f"{found.sentence} Seeds: {len(results[self.lines[0].arm])}.", found.rows)


def accuracy(curve: Curve) -> list[float]:
    """Returns the accuracy on all held-out problems at each evaluation."""
    return curve.accuracies()


def length(curve: Curve) -> list[float]:
    """Returns the mean response tokens at each evaluation."""
    return [point.response_tokens for point in curve.points]


def draw_growth(results: Results, lines: Sequence[Line]) -> Figure:
    """Draws accuracy and response length over the iterations, and one against the other."""
    curves = results[lines[0].arm]
    figure, (left, middle, right) = plt.subplots(1, 3)
    draw_curves(left, curves, lines[0], accuracy)
    left.set(xlabel="iteration", ylabel="held-out accuracy")
    draw_curves(middle, curves, Line("", "", ORANGE), length)
    middle.set(xlabel="iteration", ylabel="response tokens")
    for (seed, curve), marker in zip(curves.items(), cycle("os^Dv")):
        right.plot(
            length(curve),
            accuracy(curve),
            f"{marker}-",
            color=GREY,
            markersize=3.5,
            linewidth=0.8,
            label=f"seed {seed}",
        )
    right.set(xlabel="response tokens", ylabel="held-out accuracy")
    add_legend(figure, right)
    return figure


def find_growth(results: Results, lines: Sequence[Line]) -> Finding:
    """Finds whether accuracy and length grow, and their correlation over the evaluations of a run."""
    curves = results[lines[0].arm].values()
    gain = interval_over([accuracy(curve)[-1] - accuracy(curve)[0] for curve in curves])
    growth = interval_over([length(curve)[-1] - length(curve)[0] for curve in curves])
    together = correlation_interval([correlation(accuracy(curve), length(curve)) for curve in curves])
    evaluations = min(len(curve.points) for curve in curves)
    found = judge("both grow", gain, growth)
    rows = [
        ("", "first", "last", "change, 95%"),
        ("held-out accuracy", *ends(curves, accuracy, 3), show(gain)),
        ("response tokens", *ends(curves, length, 1), show(growth, 1)),
        (f"correlation of the two over the {evaluations} evaluations of a run", "", "", show(together)),
    ]
    return Finding(f"{found} Their correlation over the {evaluations} evaluations of a run is {show(together)}.", rows)


def draw_sizes(results: Results, lines: Sequence[Line]) -> Figure:
    """Draws accuracy over iterations, and against response length."""
    figure, (left, right) = plt.subplots(1, 2)
    for line in lines:
        draw_curves(left, results[line.arm], line, accuracy)
        for curve in results[line.arm].values():
            right.plot(length(curve), accuracy(curve), line.style, color=line.color, markersize=3, linewidth=0.8)
    left.set(xlabel="iteration", ylabel="held-out accuracy")
    right.set(xlabel="response tokens", ylabel="held-out accuracy")
    add_legend(figure, left)
    return figure


def find_sizes(results: Results, lines: Sequence[Line]) -> Finding:
    """Finds whether the small model at its end is above the large one before its training, and thinks longer."""
    small, large = (results[line.arm] for line in lines)
    gap, longer = (
        interval_over([measure(small[seed])[-1] - measure(large[seed])[0] for seed in sorted(small)])
        for measure in (accuracy, length)
    )
    rows = [
        ("model", "accuracy before", "tokens before", "accuracy at the end", "tokens at the end"),
        *(
            (line.label, first, first_tokens, last, last_tokens)
            for line in lines
            for curves in [results[line.arm].values()]
            for first, last in [ends(curves, accuracy, 3)]
            for first_tokens, last_tokens in [ends(curves, length, 1)]
        ),
    ]
    claim = f"the {lines[0].label} model after training is above the {lines[1].label} one before it, which thinks less"
    return Finding(
        f"{judge(claim, gap, longer)} The difference is {show(gap)}, at {show(longer, 1)} tokens more.", rows
    )


def draw_comparison(results: Results, lines: Sequence[Line]) -> Figure:
    """Draws accuracy by responses sampled, and the differences from the first arm within seeds."""
    figure, (left, right) = plt.subplots(1, 2)
    for line in lines:
        draw_curves(left, results[line.arm], line, accuracy, by_samples=True)
    left.set(xlabel="responses sampled", ylabel="held-out accuracy")
    right.axhline(0, color=GREY, linewidth=1)
    for place, line in enumerate(lines[1:]):
        draw_differences(right, results[lines[0].arm], results[line.arm], line, accuracy, 0.3 * place)
    right.set(xlabel="iteration", ylabel=f"accuracy less {lines[0].label}'s")
    add_legend(figure, left)
    return figure


def draw_bars(results: Results, lines: Sequence[Line]) -> Figure:
    """Draws the accuracy of each arm at the end, with its interval and its seeds."""
    figure, axes = plt.subplots(figsize=(4.2, 2.9))
    for place, line in enumerate(lines):
        last = [accuracy(curve)[-1] for curve in results[line.arm].values()]
        interval = interval_over(last)
        axes.bar(place, interval.mean, 0.6, color=line.color, alpha=0.7)
        axes.plot([place] * len(last), last, "o", color="black", markersize=3)
        if math.isfinite(interval.low):
            axes.vlines(place, interval.low, interval.high, color="black", linewidth=1)
    axes.set_xticks(range(len(lines)), [line.label for line in lines])
    axes.set(ylabel="accuracy of verdicts", ylim=(0, 1.05))
    return figure


def settled(curve: Curve) -> float:
    """Returns the mean accuracy of the last two evaluations, whose chance is less than that of one."""
    return fmean(accuracy(curve)[-2:])


def chosen_rate(results: Results, label: str) -> float:
    """Returns the learning rate with the highest settled accuracy of an algorithm, the lower one of equals."""
    return max(BY_RATE[label], key=lambda rate: fmean(map(settled, results[BY_RATE[label][rate].name].values())))


def draw_rates(results: Results, lines: Sequence[Line]) -> Figure:
    """Draws settled accuracy by learning rate, a line for each algorithm."""
    figure, axes = plt.subplots(figsize=(4.6, 2.9))
    for label, arms in BY_RATE.items():
        line = next(line for line in lines if line.label == label)
        right = [fmean(map(settled, results[arm.name].values())) for arm in arms.values()]
        axes.plot(list(arms), right, line.style, color=line.color, label=label)
    axes.set(xlabel="learning rate", ylabel="held-out accuracy", xscale="log")
    axes.legend()
    return figure


def find_rates(results: Results, lines: Sequence[Line]) -> Finding:
    """Finds the learning rate of each algorithm."""
    labels = list(dict.fromkeys(line.label for line in lines))
    found = " and ".join(
        f"{chosen_rate(results, label):.0e} for {label}" for label in labels if len(BY_RATE[label]) > 1
    )
    rates = sorted({rate for arms in BY_RATE.values() for rate in arms})
    rows = [
        ("learning rate", *labels),
        *((f"{rate:.0e}", *(rate_text(results, label, rate) for label in labels)) for rate in rates),
    ]
    return Finding(f"The best rate is {found}.", rows)


def rate_text(results: Results, label: str, rate: float) -> str:
    """Returns the settled accuracy of an algorithm at a rate; nothing where it was not tried."""
    arm = BY_RATE[label].get(rate)
    return f"{fmean(map(settled, results[arm.name].values())):.3f}" if arm else ""


def draw_lengths(results: Results, lines: Sequence[Line]) -> Figure:
    """Draws accuracy and response length over the iterations."""
    figure, (left, right) = plt.subplots(1, 2)
    for axes, measure, name in ((left, accuracy, "held-out accuracy"), (right, length, "response tokens")):
        for line in lines:
            draw_curves(axes, results[line.arm], line, measure)
        axes.set(xlabel="iteration", ylabel=name)
    add_legend(figure, left)
    return figure


def find_comparison(results: Results, lines: Sequence[Line]) -> Finding:
    """Finds whether the last arm is ahead of the first on all problems."""
    base, other = (results[line.arm] for line in (lines[0], lines[-1]))
    gap = interval_over(differences(base, other, lambda curve: accuracy(curve)[-1]))
    ratios = sample_ratios(other, base)
    found = judge(f"{lines[-1].label} ends above {lines[0].label}", gap)
    rows = [
        (
            "arm",
            "accuracy before",
            "at the end",
            "of hard problems",
            "responses sampled",
            f"difference from {lines[0].label}, 95%",
        ),
        *(arm_row(results, lines[0], line) for line in lines),
    ]
    if not ratios:
        return Finding(
            f"{found} On no seed do both rise, so that their responses to an accuracy cannot be compared.", rows
        )
    left_out = f", on the {len(ratios)} of {len(base)} seeds on which both rise" if len(ratios) < len(base) else ""
    return Finding(
        f"{found} To the accuracy that both reach, {lines[0].label} takes {show(geometric_interval(ratios), 2)} times "
        f"the responses of {lines[-1].label}{left_out}.",
        rows,
    )


def find_shortening(results: Results, lines: Sequence[Line]) -> Finding:
    """Finds whether the last arm's responses are shorter than the first's at no loss of accuracy."""
    base, other = (results[line.arm] for line in (lines[0], lines[-1]))
    shorter = interval_over(differences(other, base, lambda curve: math.log(length(curve)[-1])))
    gap = interval_over(differences(base, other, lambda curve: accuracy(curve)[-1]))
    part = Interval(*(1 - math.exp(-value) for value in (shorter.mean, shorter.low, shorter.high)))
    rows = [
        ("arm", "accuracy at the end", "response tokens", f"accuracy less {lines[0].label}'s, 95%"),
        *(length_row(results, lines[0], line) for line in lines),
    ]
    sentence = (
        f"{judge('responses become shorter', shorter)} The length falls by {show(part, 2)} of itself, and accuracy "
    )
    return Finding(f"{sentence}changes by {show(gap)}.", rows)


def find_better_judge(results: Results, lines: Sequence[Line]) -> Finding:
    """Finds whether the last judge is right more often than the first."""
    last = {line.label: [accuracy(curve)[-1] for curve in results[line.arm].values()] for line in lines}
    first, best = (results[line.arm] for line in (lines[0], lines[-1]))
    gap = interval_over(differences(first, best, lambda curve: accuracy(curve)[-1]))
    rows = [
        ("judge", "accuracy, 95%"),
        *((label, show(interval_over(values))) for label, values in last.items()),
        ("difference", show(gap)),
    ]
    found = judge(f"the {lines[-1].label} is right more often than the {lines[0].label}", gap)
    own = interval_over(last[lines[0].label])
    coin = f" The {lines[0].label} is not told from a coin." if own.low <= 0.5 <= own.high else ""
    return Finding(f"{found}{coin}", rows)


def find_no_loss(results: Results, lines: Sequence[Line]) -> Finding:
    """Finds whether the first arm loses nothing against the others."""
    gaps = [
        interval_over(differences(results[line.arm], results[lines[0].arm], lambda curve: accuracy(curve)[-1]))
        for line in lines[1:]
    ]
    shifted = [Interval(gap.mean + MARGIN, gap.low + MARGIN, gap.high + MARGIN) for gap in gaps]
    rows = [
        (
            "arm",
            "accuracy before",
            "at the end",
            "of hard problems",
            "responses sampled",
            f"difference from {lines[0].label}, 95%",
        ),
        *(arm_row(results, lines[0], line) for line in lines),
    ]
    return Finding(judge(f"{lines[0].label} loses at most {MARGIN} against each of the others", *shifted), rows)


def judge(claim: str, *intervals: Interval) -> str:
    """Returns in a sentence whether intervals are all above 0, as the claim has it, or one of them below."""
    if all(interval.low > 0 for interval in intervals):
        return f"**Holds here**: {claim}."
    if any(interval.high < 0 for interval in intervals):
        reverse = ": it is the other way round" if len(intervals) == 1 else ""
        return f"**Does not hold here** that {claim}{reverse}."
    support, against = ("the mean is", "the mean is") if len(intervals) == 1 else ("the means are", "a mean is")
    way = f"{support} on its side" if all(interval.mean > 0 for interval in intervals) else f"{against} against it"
    return f"**Not decided** by these seeds whether {claim}; {way}."


def arm_row(results: Results, base: Line, line: Line) -> Sequence[str]:
    """Returns an arm's row: accuracy before, after and on hard problems, responses, and the difference within seeds."""
    curves = results[line.arm]
    hard = fmean(curve.accuracies("hard")[-1] for curve in curves.values())
    gap = differences(results[base.arm], curves, lambda curve: accuracy(curve)[-1])
    sampled = fmean(curve.points[-1].samples for curve in curves.values())
    return line.label, *ends(curves.values(), accuracy, 3), f"{hard:.3f}", f"{sampled:.0f}", gap_text(line, base, gap)


def length_row(results: Results, base: Line, line: Line) -> Sequence[str]:
    """Returns an arm's row: accuracy and length at the end, and the difference of accuracy within seeds."""
    curves = results[line.arm]
    gap = differences(results[base.arm], curves, lambda curve: accuracy(curve)[-1])
    return (
        line.label,
        ends(curves.values(), accuracy, 3)[1],
        ends(curves.values(), length, 1)[1],
        gap_text(line, base, gap),
    )


def gap_text(line: Line, base: Line, gap: Sequence[float]) -> str:
    """Returns the difference of an arm from the base; nothing for the base itself."""
    return "" if line == base else show(interval_over(gap))


def ends(curves: Collection[Curve], measure: Measure, digits: int) -> tuple[str, str]:
    """Returns the mean over seeds of the first and of the last evaluation."""
    first, last = (interval_over([measure(curve)[index] for curve in curves]).mean for index in (0, -1))
    return f"{first:.{digits}f}", f"{last:.{digits}f}"


FIGURES: dict[str, Plot | GradientNoise | SandboxStarts] = {
    plot.name: plot
    for plot in (
        Plot("growth", (Line("base", "base", BLUE),), draw_growth, find_growth, MORE_SEEDS),
        Plot("sizes", (Line("base", "small", BLUE), Line("large", "large", ORANGE, "s--")), draw_sizes, find_sizes),
        Plot(
            "long2short",
            (
                Line("long2short_long", "long", GREY),
                Line("long2short_short", "short", SKY),
                Line("long2short_merge", "merge", BLUE),
                Line("long2short_rejection", "rejection sampling", ORANGE),
                Line("long2short_dpo", "DPO", PURPLE),
                Line("long2short_rl", "RL", GREEN),
            ),
            draw_tradeoff,
            find_shortest,
            SHORTENING_SEEDS,
        ),
        Plot(
            "curriculum",
            (Line("base", "uniform", GREY, "s--"), Line("curriculum", "curriculum", BLUE)),
            draw_comparison,
            find_comparison,
        ),
        Plot(
            "rest",
            (Line("rest_3e-04", "ReST", ORANGE, "s--"), Line("base", "mirror descent", BLUE)),
            draw_comparison,
            find_comparison,
            MORE_SEEDS,
        ),
        Plot(
            "rest-at-one-rate",
            (Line("rest", "ReST", ORANGE, "s--"), Line("base", "mirror descent", BLUE)),
            draw_comparison,
            find_comparison,
        ),
        Plot(
            "rates",
            tuple(
                Line(arm.name, label, color, style)
                for (label, arms), color, style in zip(BY_RATE.items(), (ORANGE, BLUE, SKY), STYLES, strict=True)
                for arm in arms.values()
            ),
            draw_rates,
            find_rates,
            (RATE_SEED,),
        ),
        Plot(
            "prioritized",
            (Line("base", "uniform", GREY, "s--"), Line("prioritized", "prioritized", GREEN)),
            draw_comparison,
            find_comparison,
        ),
        Plot(
            "length",
            (Line("base", "no length reward", GREY, "s--"), Line("length_reward", "length reward", GREEN)),
            draw_lengths,
            find_shortening,
        ),
        Plot(
            "partial",
            (
                Line("base", "partial, reused", BLUE),
                Line("masked", "partial, masked", ORANGE, "s--"),
                Line("whole_rollouts", "whole", GREY, "^:"),
            ),
            draw_comparison,
            find_no_loss,
        ),
        Plot(
            "judges",
            (Line("value_head", "value head", GREY), Line("judge", "chain-of-thought judge", BLUE)),
            draw_bars,
            find_better_judge,
        ),
        GradientNoise(),
        SandboxStarts(),
    )
}
