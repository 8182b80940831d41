"""Accuracy against response length of several models on the same problems: JSON, a table, and a page.

All figures are of responses sampled at temperature 1, but for the greedy accuracy. Intervals are of 95%, the problem
being the unit; differences and ratios to the long model are paired by problem.
"""

from __future__ import annotations

import html
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import plotly.graph_objects as go
from rich.console import Console
from rich.table import Table

from perigee.cli.eval.results import GREEDY, OVERALL, Answer, by_suite, compare, is_correct, summarize
from perigee.cli.long2short.config import ComparisonConfig
from perigee.errors import FailedPreconditionError
from perigee.files import write_atomically
from perigee.report.page import fill_page
from perigee.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, new_figure, with_alpha
from perigee.statistics import Interval, ratio_interval

LONG, SHORT = "long", "short"
COMPARISON_FILE, PAGE_FILE = "comparison.json", "report.html"
COLORS = {LONG: GREY, SHORT: SKY, "merge": BLUE, "rejection": ORANGE, "dpo": PURPLE, "rl": GREEN}
HEAD = (
    "model", "accuracy", "greedy", "tokens", "tokens per right answer", "capped", "shorter by", "accuracy lost",
    "result",
)  # fmt: skip
# Two tables, so that neither is wider than a terminal of 80 columns.
TERMINAL_TABLES = (
    ("model", "accuracy", "greedy", "accuracy lost"),
    ("model", "tokens", "tokens per right answer", "shorter by", "capped"),
)


@dataclass(frozen=True)
class Row:
    """Figures of one model."""

    name: str
    problems: int
    samples: int
    accuracy: Interval
    """Of sampled responses."""
    greedy: Interval | None
    tokens: Interval
    """Mean of the sampled responses."""
    tokens_per_right: Interval | None
    """Sampled tokens by right responses; None without a right one."""
    capped: float
    """Fraction of the sampled responses that reached the cap."""
    failures: int
    shortening: Interval | None = None
    """Fraction of the long model's tokens that is saved; None for the long model."""
    accuracy_loss: Interval | None = None
    """Accuracy of the long model minus this one's; None for the long model."""
    shortfalls: Sequence[str] = ()
    """What the model misses of the comparison's bounds."""

    @property
    def result(self) -> str:
        """Whether a method is within the bounds, and what it misses."""
        if self.name in (LONG, SHORT) or self.shortening is None:
            return ""
        return "; ".join(self.shortfalls) or "within the bounds"


def make_rows(answers: Mapping[str, Sequence[Answer]], config: ComparisonConfig) -> list[Row]:
    """Returns a row for each model by its answers, the long one first.

    Raises FailedPreconditionError when the sampled responses of a model have verdicts for fewer than two problems.
    """
    rows = [_describe(name, some) for name, some in answers.items()]
    return [rows[0], *(_relate(row, answers[row.name], answers[rows[0].name], config) for row in rows[1:])]


def _describe(name: str, answers: Sequence[Answer]) -> Row:
    [suite] = by_suite(answers)
    figures = summarize(answers)[OVERALL]
    groups = _sampled(answers)
    if figures.avg_at_k is None or figures.sample_length is None:
        raise FailedPreconditionError(f"no sampled response of {name} to {suite} has a verdict; see its answers.jsonl")
    if len(groups) < 2:
        raise FailedPreconditionError(
            f"one problem of {suite} alone has verdicts for {name}, and intervals want two: hold out more problems"
        )
    sizes = {key: len(group) for key, group in groups.items()}
    tokens = {key: mean * sizes[key] for key, mean in _mean_tokens(answers).items()}
    right = {key: sum(map(is_correct, group)) for key, group in groups.items()}
    return Row(
        name=name,
        problems=figures.problems,
        samples=figures.samples,
        accuracy=figures.avg_at_k,
        greedy=figures.greedy,
        tokens=ratio_interval([(tokens[key], sizes[key]) for key in groups]),
        tokens_per_right=ratio_interval([(tokens[key], right[key]) for key in groups]) if any(right.values()) else None,
        capped=figures.sample_length.truncated,
        failures=figures.failures,
    )


def _relate(row: Row, answers: Sequence[Answer], long: Sequence[Answer], config: ComparisonConfig) -> Row:
    """Returns the row with its differences from the long model."""
    means, long_means = (_mean_tokens(each) for each in (answers, long))
    ratio = ratio_interval([(means[key], long_means[key]) for key in means if key in long_means])
    shortening = Interval(1 - ratio.mean, 1 - ratio.high, 1 - ratio.low)
    [gain] = [each.difference for each in compare(long, answers) if each.measure != GREEDY]
    loss = Interval(-gain.mean, -gain.high, -gain.low)
    shortfalls = []
    if shortening.mean < config.min_shortening:
        shortfalls.append(f"shorter by {shortening.mean:.1%}, less than {config.min_shortening:.0%}")
    if loss.mean > config.max_accuracy_loss:
        shortfalls.append(f"loses {loss.mean:.3f} of accuracy, more than {config.max_accuracy_loss:g}")
    return replace(row, shortening=shortening, accuracy_loss=loss, shortfalls=shortfalls)


def _sampled(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Returns the sampled responses with a verdict by problem."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer["attempt"] != GREEDY and answer["verdict"] != "failed":
            groups[answer["id"]].append(answer)
    return groups


def _mean_tokens(answers: Sequence[Answer]) -> dict[str, float]:
    """Returns the mean length of each problem's sampled responses."""
    return {key: fmean(int(each["tokens"]) for each in group) for key, group in _sampled(answers).items()}


def write_comparison(folder: Path, rows: Sequence[Row], facts: Sequence[str], title: str) -> None:
    """Writes comparison.json and report.html; `facts` are sentences about how the methods were run."""
    values = {"rows": [asdict(row) | {"result": row.result} for row in rows], "facts": list(facts)}
    write_atomically(folder / COMPARISON_FILE, f"{json.dumps(values, indent=2)}\n".encode())
    write_atomically(folder / PAGE_FILE, render_page(rows, facts, title).encode())


def cells_of(row: Row) -> list[str]:
    """Returns what a table shows of a row, in the order of HEAD."""

    def show(interval: Interval | None, form: str) -> str:
        """Writes a mean with its interval."""
        if interval is None:
            return "-"
        return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"

    digits = ".1f" if row.tokens.mean < 100 else ".0f"
    lengths = (show(row.tokens, digits), show(row.tokens_per_right, digits), f"{row.capped:.1%}")
    related = (show(row.shortening, ".0%"), show(row.accuracy_loss, "+.3f"))
    return [row.name, show(row.accuracy, ".3f"), show(row.greedy, ".3f"), *lengths, *related, row.result]


def show_table(rows: Sequence[Row], facts: Sequence[str], console: Console) -> None:
    """Prints the rows, what came out of each method, and a line for each fact."""
    for names in TERMINAL_TABLES:
        table = Table(*names, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for row in rows:
            cells = dict(zip(HEAD, cells_of(row), strict=True))
            table.add_row(*(cells[name] for name in names))
        console.print(table, highlight=False)
        console.print()
    results = [f"{row.name}: {row.result}" for row in rows if row.result]
    for line in (*results, *facts):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def render_page(rows: Sequence[Row], facts: Sequence[str], title: str) -> str:
    """Returns the page as HTML: a plot of accuracy against tokens, the table, the facts."""
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells_of(row))}</tr>" for row in rows)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class='quiet'>long2short: {rows[0].problems:,} held-out problems, {rows[0].samples} samples of each at "
        "temperature 1; 95% intervals, by problem. Shorter and lost: against the long model, paired by problem.</p>",
        "<h2>Accuracy against response length</h2><figure id='tradeoff'></figure>",
        f"<h2>Figures</h2><table><tr>{head}</tr>{body}</table>",
        "<h2>How</h2>",
        *(f"<p>{html.escape(fact)}</p>" for fact in facts),
    ]
    return fill_page(title, parts, {"tradeoff": json.loads(plot_tradeoff(rows).to_json())})


def plot_tradeoff(rows: Sequence[Row]) -> go.Figure:
    """Plots the accuracy of each model against its mean response length, with intervals of both."""
    figure = new_figure(height=460, hovermode="closest")
    for row in rows:
        color = COLORS.get(row.name, RED)
        figure.add_scatter(
            x=[row.tokens.mean], y=[row.accuracy.mean], mode="markers+text", text=[row.name], name=row.name,
            textposition="top right", textfont_color=color, marker={"size": 10, "color": color},
            error_x=_bars(row.tokens, color), error_y=_bars(row.accuracy, color),
            hovertemplate=f"{row.name}: %{{y:.1%}} at %{{x:.1f}} tokens<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="tokens of a response", rangemode="tozero", showgrid=True)
    figure.update_yaxes(title_text="accuracy of sampled responses", tickformat=".0%")
    return figure


def _bars(interval: Interval, color: str) -> dict[str, object]:
    """Returns the error bars of an interval as plotly has them."""
    above, below = interval.high - interval.mean, interval.mean - interval.low
    style = {"width": 3, "thickness": 1, "color": with_alpha(color, 0.6)}
    return {"type": "data", "symmetric": False, "array": [above], "arrayminus": [below], **style}
