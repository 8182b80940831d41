"""CPU time of each figure alone, and of all together: they share arms and supervised models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from bench.reproduce.arms import ARMS
from bench.reproduce.curves import read_results
from bench.reproduce.figures import FIGURES, Plot

CORES = 2

# An arm and a seed.
Trained = tuple[str, int]


def trained_for(plot: Plot) -> Iterator[Trained]:
    """Yields what a figure needs trained, the models that others start from included."""
    for seed in plot.seeds:
        left = [line.arm for line in plot.lines]
        while left:
            yield (name := left.pop(0)), seed
            left += [each for each in (ARMS[name].warmup, *ARMS[name].sources) if each]


def measured_seconds(name: str) -> dict[int, float]:
    """Returns the CPU seconds of an arm by seed, of the seeds on which they were measured."""
    return {seed: curve.cpu_seconds for seed, curve in read_results(name).items() if curve.cpu_seconds is not None}


def cpu_seconds(trained: Trained) -> float | None:
    """Returns the CPU seconds of an arm on a seed.

    Where they were not measured, their mean over the arm's other seeds, or else over all arms that change the same
    recipe from the same supervised model; None where there is none of these.
    """
    name, seed = trained
    own = measured_seconds(name)
    if seed in own:
        return own[seed]
    kind = ARMS[name].recipe, ARMS[name].warmup
    peers = [
        value
        for arm in ARMS.values()
        if arm.warmup and (arm.recipe, arm.warmup) == kind
        for value in measured_seconds(arm.name).values()
    ]
    known = list(own.values()) or peers
    return fmean(known) if known else None


def cost_row(name: str, trained: Iterable[Trained]) -> Sequence[str]:
    """Returns a row: CPU hours, and minutes on two cores; what was not measured is named, and left out of the sum."""
    seconds = {each: cpu_seconds(each) for each in dict.fromkeys(trained)}
    missing = dict.fromkeys(arm for (arm, _), value in seconds.items() if value is None)
    total = sum(value for value in seconds.values() if value is not None)
    return name, f"{total / 3600:.2f}", f"{total / CORES / 60:.0f}", ", ".join(missing)


def cost_rows() -> Sequence[Sequence[str]]:
    """Returns the table of the figures that train, its heading first and their sum last."""
    trained = {name: list(trained_for(plot)) for name, plot in FIGURES.items() if isinstance(plot, Plot)}
    return [
        ("figure", "CPU hours", f"minutes on {CORES} cores", "not measured"),
        *(cost_row(name, each) for name, each in trained.items()),
        cost_row("all", (one for each in trained.values() for one in each)),
    ]
