"""Trains the arms of the figures on every seed, draws them, and writes docs/reproduction.md.

    python -m bench.reproduce [--figure curriculum ...] [--seeds 0 1 2] [--draw]

Run it again to go on where it was ended. `--draw` trains nothing.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Collection, Sequence

from bench.reproduce.arms import ARMS
from bench.reproduce.figures import FIGURES, Plot
from bench.reproduce.page import write_page
from bench.reproduce.runs import record, run_arms


def train(names: Sequence[str], seeds: Collection[int] | None) -> None:
    """Measures and trains what figures need, seed by seed, and writes the page after each seed.

    Of the seeds of each figure those given; all of them without.
    """
    plots = [FIGURES[name] for name in names]
    for plot in plots:
        if not isinstance(plot, Plot):
            plot.measure()
    curves = [plot for plot in plots if isinstance(plot, Plot)]
    for seed in sorted({seed for plot in curves for seed in plot.seeds if seeds is None or seed in seeds}):
        arms = dict.fromkeys(line.arm for plot in curves if seed in plot.seeds for line in plot.lines)
        for arm, curve in run_arms([ARMS[name] for name in arms], seed):
            record(arm, seed, curve)
        write_page()


def main() -> None:
    """Trains and draws what the command line names."""
    parser = argparse.ArgumentParser(description="Reproduces the report's figures on small models.")
    parser.add_argument("--figure", nargs="+", choices=FIGURES, default=list(FIGURES), help="figures; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the figures' seeds these alone")
    parser.add_argument("--draw", action="store_true", help="draw from the results that are there, without a run")
    arguments = parser.parse_args()
    try:
        if not arguments.draw:
            train(arguments.figure, arguments.seeds)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"a run ended with code {error.returncode}: see the newest *.log below runs/reproduce, and run this again"
        ) from error
    write_page()


if __name__ == "__main__":
    main()
