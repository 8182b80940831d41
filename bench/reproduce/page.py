"""docs/reproduction.md, and pages that show parts of it.

Each part between `<!-- NAME -->` and `<!-- end -->` is written from the results.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from bench.reproduce.costs import cost_rows
from bench.reproduce.curves import RESULTS
from bench.reproduce.figures import FIGURES
from perigee.files import write_atomically

PAGES = (Path("docs/reproduction.md"), Path("docs/long2short.md"))
PART = re.compile(r"(?<=<!-- )(?!end )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)


def write_page() -> None:
    """Draws the figures that were measured, and writes each part of the pages anew."""
    for plot in FIGURES.values():
        if (measured := plot.read()) is not None:
            figure = plot.draw(measured)
            figure.savefig(RESULTS / f"{plot.name}.svg", metadata={"Date": None})
            plt.close(figure)
    for page in PAGES:
        write_atomically(page, render_page(page.read_text(encoding="utf-8")).encode())


def render_page(page: str) -> str:
    """Returns the page with each part written anew from the results."""
    return PART.sub(lambda match: match[1] + match[2] + render_part(match[1]), page)


def render_part(name: str) -> str:
    """Returns what the page says of a figure, or the table of what figures cost."""
    if name == "costs":
        return render_table(cost_rows())
    if name == "costs":
        return f"{render_table(cost_rows())}"
    if (measured := FIGURES[name].read()) is None:
        return f"Not run yet: `make reproduce FIGURE={name}`.\n"
    found = FIGURES[name].find(measured)
    return f"![{name}]({RESULTS.name}/{name}.svg)\n\n{found.sentence}\n\n{render_table(found.rows)}"


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the first row is its heading."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:], ""])
