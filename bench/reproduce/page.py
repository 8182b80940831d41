"""docs/reproduction.md: each part between `<!-- NAME -->` and `<!-- end -->` is written from the results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from bench.reproduce.curves import RESULTS, read_results
from bench.reproduce.figures import FIGURES, Plot, Results
from perigee.files import write_atomically

PAGE = Path("docs/reproduction.md")
PART = re.compile(r"(?<=<!-- )(?!end )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def write_page() -> None:
    """Draws the figures whose arms were run, and writes each part of the page anew."""
    for plot in FIGURES.values():
        results = read_plot(plot)
        if results is not None:
            figure = plot.draw(results, plot.lines)
            figure.savefig(RESULTS / f"{plot.name}.svg", metadata={"Date": None})
            plt.close(figure)
    write_atomically(PAGE, render_page(PAGE.read_text(encoding="utf-8")).encode())


def render_page(page: str) -> str:
    """Returns the page with each part written anew from the results."""
    return PART.sub(lambda match: match[1] + match[2] + render_part(FIGURES[match[1]]), page)


def render_part(plot: Plot) -> str:
    """Returns what the page says of a figure."""
    results = read_plot(plot)
    if results is None:
        return f"Not run yet: `make reproduce FIGURE={plot.name}`.\n"
    found = plot.find(results, plot.lines)
    seeds = len(results[plot.lines[0].arm])
    image = f"![{plot.name}]({RESULTS.name}/{plot.name}.svg)"
    return f"{image}\n\n{found.sentence} Seeds: {seeds}.\n\n{render_table(found.rows)}"


def read_plot(plot: Plot) -> Results | None:
    """Returns the curves of a figure's arms on the seeds that all of them have; None where there is no such seed."""
    results = {line.arm: read_results(line.arm) for line in plot.lines}
    seeds = sorted(set.intersection(*(set(curves) for curves in results.values())))
    return {arm: {seed: curves[seed] for seed in seeds} for arm, curves in results.items()} if seeds else None


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the first row is its heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:], ""])
