"""Plots of the report: each takes the records and returns a figure, or None when they lack what it shows.

Every thing has one color throughout; the ground is transparent, and lines have labels in place of legends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from perigee.report.records import OVERALL, Iteration, RunRecords
from perigee.statistics import Interval

# Readable on light and dark ground, told apart by the color-blind (after Okabe and Ito).
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY = (
    "#3b7dd8", "#e08a1e", "#2a9d74", "#b05fb8", "#58b4e0", "#d9534f", "#8a93a2",
)  # fmt: skip
LINE_COLORS = (BLUE, ORANGE, GREEN)
DOMAIN_COLORS = (ORANGE, GREEN, PURPLE, SKY, RED)
PHASE_COLORS = {
    "preparation": RED, "rollout": BLUE, "scoring": SKY, "training": ORANGE, "checkpoint": PURPLE, "weights": GREEN,
    "commit": GREY,
    # Where trainer and workers share devices.
    "leave": "#1f4e8c", "onload": "#a8741a", "convert": "#6d3f86", "offload": "#8c2f39",
    # Workers generate for the next iteration.
    "ahead": "#7fb0ee",
}  # fmt: skip
# Tokens by how many versions old they are: fresh ones are pale.
AGE_COLORS = ("#9ecae8", "#58a5d8", "#2f74b8", "#1d4c85", "#122c54")
GRID = "rgba(128,138,155,0.22)"
FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
SMOOTHING = 5
# Height of the ground of a plot of lines, and of a label.
PLOT_PIXELS, LABEL_PIXELS = 260, 16
Points = tuple[list[int], list[float]]
# Iteration and accuracy of each evaluation.
Estimates = Sequence[tuple[int, Interval]]


def plot_accuracy(records: RunRecords) -> go.Figure | None:
    """Plots held-out accuracy per domain: greedy, and sampled with its 95% interval."""
    evaluations = records.evaluations
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.domains))
    if not names:
        return None
    colors = {OVERALL: BLUE, **dict(zip([n for n in names if n != OVERALL], DOMAIN_COLORS, strict=False))}
    figure = make_subplots(cols=len(names), shared_yaxes=True, horizontal_spacing=0.07, subplot_titles=names)
    for column, name in enumerate(names, start=1):
        color = colors.get(name, GREY)
        where = {"row": 1, "col": column}
        _add_sampled(figure, [(e.iteration, e.sampled[name]) for e in evaluations if name in e.sampled], color, where)
        _add_greedy(figure, [(e.iteration, e.greedy[name]) for e in evaluations if name in e.greedy], color, where)
    figure.update_layout(new_figure(height=340).layout)
    figure.update_layout(hovermode="closest", margin={"t": 36, "r": 24})
    style_axes(figure)
    style_iterations(figure, records)
    # The names of the lines have room behind their ends.
    figure.update_xaxes(range=[-0.05 * (width := max(1, last_iteration(records))), 1.3 * width])
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def _add_sampled(figure: go.Figure, points: Estimates, color: str, where: Mapping[str, int]) -> None:
    """Draws the mean with its interval as a band."""
    x = [iteration for iteration, _ in points]
    figure.add_scatter(
        x=x + x[::-1], y=[e.high for _, e in points] + [e.low for _, e in reversed(points)], fill="toself",
        fillcolor=with_alpha(color, 0.18), line_width=0, hoverinfo="skip", mode="lines", **where,
    )  # fmt: skip
    line = {"color": color, "width": 2.5}
    _add_means(figure, points, "sampled", where, line=line, marker={"size": 6})


def _add_greedy(figure: go.Figure, points: Estimates, color: str, where: Mapping[str, int]) -> None:
    """Draws the mean with its interval as bars."""
    bars = {
        "type": "data", "symmetric": False, "width": 3, "thickness": 1,
        "array": [e.high - e.mean for _, e in points], "arrayminus": [e.mean - e.low for _, e in points],
    }  # fmt: skip
    line = {"color": color, "width": 1.5, "dash": "dot"}
    marker = {"symbol": "diamond-open", "size": 8}
    _add_means(figure, points, "greedy", where, line=line, marker=marker, error_y=bars)


def _add_means(figure: go.Figure, points: Estimates, kind: str, where: Mapping[str, int], **style: Any) -> None:
    """Draws a line through the means, with the name of the kind behind its end: sampled lower, greedy higher."""
    figure.add_scatter(
        x=[iteration for iteration, _ in points], y=[e.mean for _, e in points], mode="lines+markers",
        hovertext=[f"{kind} {e.mean:.1%} ({e.low:.1%} to {e.high:.1%})" for _, e in points], hoverinfo="text",
        **style, **where,
    )  # fmt: skip
    if points:
        yanchor = "top" if kind == "sampled" else "bottom"
        label_end(figure, points[-1][0], points[-1][1].mean, kind, style["line"]["color"], yanchor=yanchor, **where)


def plot_reward(records: RunRecords) -> go.Figure | None:
    """Plots the mean reward of an iteration, and its moving mean."""
    x, y = _points(records.iterations, "reward/mean")
    if not x:
        return None
    figure = new_figure()
    figure.add_scatter(x=x, y=y, mode="lines", line={"color": with_alpha(BLUE, 0.45), "width": 1.2}, name="iteration")
    smooth = moving_mean(y, SMOOTHING)
    figure.add_scatter(x=x, y=smooth, mode="lines", line={"color": BLUE, "width": 2.5}, name=f"mean of {SMOOTHING}")
    label_end(figure, x[-1], smooth[-1], f"mean of {SMOOTHING}", BLUE)
    style_iterations(figure, records)
    figure.update_yaxes(title_text="reward")
    return figure


def plot_rates(records: RunRecords) -> go.Figure | None:
    """Plots fractions of trajectories: partial, of several versions, cut for repeating themselves."""
    lines = (
        ("rollout/partial_rate", "partial"),
        ("train/multi_version_rate", "several versions"),
        ("rollout/repetition_rate", "repeated"),
    )
    figure = plot_lines(records, "fraction of trajectories", *lines, tickformat=".0%")
    if figure is not None:
        figure.update_layout(margin={"r": 130})
    return figure


def plot_logprob_diff(records: RunRecords) -> go.Figure | None:
    """Plots the largest difference between the engine's and the trainer's log-probabilities of the same token."""
    figure = plot_lines(records, "nats", ("train/train_infer_logprob_diff_max", "largest"))
    if figure is not None:
        figure.add_hline(y=1e-3, line={"color": RED, "width": 1, "dash": "dash"})
        figure.update_yaxes(type="log", exponentformat="power", dtick=1)
        for label in figure.layout.annotations:
            # Labels, other than lines, are placed by the logarithm.
            label.y = math.log10(max(label.y, 1e-12))
    return figure


def plot_staleness(records: RunRecords) -> go.Figure | None:
    """Plots the tokens of an iteration's training by how many versions older than the newest they are."""
    stacks = [(row.number, ages) for row in records.iterations if (ages := tokens_by_age(row))]
    if not stacks:
        return None
    figure = new_figure(barmode="stack", bargap=0.12)
    oldest = len(AGE_COLORS) - 1
    for age, color in enumerate(AGE_COLORS):
        counts = [sum(n for a, n in ages.items() if min(a, oldest) == age) for _, ages in stacks]
        if any(counts):
            name = f"{age}{' or more' if age == oldest else ''} version{'' if age == 1 else 's'} old"
            figure.add_bar(x=[number for number, _ in stacks], y=counts, marker_color=color, name=name)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    figure.update_layout(margin={"t": 40, "r": 24})
    style_iterations(figure, records)
    figure.update_yaxes(title_text="tokens trained")
    return figure


def tokens_by_age(row: Iteration) -> dict[int, float]:
    """Returns tokens by age in versions, counted from the newest version among them."""
    by_version = {int(version): count for version, count in row.below("train/tokens_by_version").items()}
    if not by_version:
        return {}
    newest = max(by_version)
    return {newest - version: count for version, count in by_version.items()}


def plot_timeline(records: RunRecords) -> go.Figure | None:
    """Plots the phases of each iteration from its start, one row per iteration."""
    spans = [(row.number, phase, *span) for row in records.iterations for phase, span in phase_spans(row).items()]
    if not spans:
        return None
    rows = len({number for number, *_ in spans})
    figure = new_figure(height=min(900, 120 + 14 * rows), barmode="overlay", bargap=0.25, hovermode="closest")
    for phase in [name for name in PHASE_COLORS if any(span[1] == name for span in spans)]:
        own = [(number, start, seconds) for number, name, start, seconds in spans if name == phase]
        figure.add_bar(
            orientation="h", y=[n for n, _, _ in own], base=[start for _, start, _ in own],
            x=[seconds for _, _, seconds in own], marker_color=PHASE_COLORS[phase], marker_line_width=0, name=phase,
            # These overlap with others: a thinner bar shows both.
            width=0.32 if phase in ("scoring", "ahead") else 0.75,
            hovertemplate=f"iteration %{{y}}: {phase} %{{x:.2f}} s from %{{base:.2f}} s<extra></extra>",
        )  # fmt: skip
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0})
    figure.update_layout(margin={"t": 40, "r": 24})
    figure.update_xaxes(title_text="seconds since the iteration began", showgrid=True)
    figure.update_yaxes(title_text="iteration", autorange="reversed", showgrid=False)
    return figure


def phase_spans(row: Iteration) -> dict[str, tuple[float, float]]:
    """Returns start and length in seconds of each phase."""
    times = row.below("time")
    names = [key.removesuffix("/start") for key in times if key.endswith("/start")]
    return {name: (times[f"{name}/start"], times[f"{name}/seconds"]) for name in names}


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Returns the mean of each value and those before it, `window` at most."""
    return [
        sum(values[max(0, index + 1 - window) : index + 1]) / min(window, index + 1) for index in range(len(values))
    ]


def plot_lines(records: RunRecords, unit: str, *lines: tuple[str, str], **axis: str) -> go.Figure | None:
    """Plots metrics over the iterations, each with its label; `axis` styles the vertical axis."""
    found = [(_points(records.iterations, key), name) for key, name in lines]
    drawn = [(points, name, color) for (points, name), color in zip(found, LINE_COLORS, strict=False) if points[0]]
    if not drawn:
        return None
    figure = new_figure()
    shifts = label_shifts([y[-1] for (_, y), _, _ in drawn], max(max(y) for (_, y), _, _ in drawn))
    for ((x, y), name, color), shift in zip(drawn, shifts, strict=True):
        figure.add_scatter(x=x, y=y, mode="lines", line={"color": color, "width": 2}, name=name)
        label_end(figure, x[-1], y[-1], name, color, yshift=shift)
    style_iterations(figure, records)
    figure.update_yaxes(**({"title_text": unit, "rangemode": "tozero"} | axis))
    return figure


def label_shifts(ends: Sequence[float], top: float) -> list[float]:
    """Returns by how many pixels the label at each line's end goes up, so that none covers another.

    The axis goes from 0 to `top` over PLOT_PIXELS.
    """
    shifts = [0.0] * len(ends)
    below = -math.inf
    for index in sorted(range(len(ends)), key=lambda index: ends[index]):
        own = PLOT_PIXELS * ends[index] / top if top > 0 else 0.0
        below = max(own, below + LABEL_PIXELS)
        shifts[index] = below - own
    return shifts


def style_iterations(figure: go.Figure, records: RunRecords) -> None:
    """Gives axes of iterations those of the run as ticks, ten or so."""
    last = last_iteration(records)
    figure.update_xaxes(title_text="iteration", tickvals=list(range(0, last + 1, max(1, math.ceil(last / 10)))))


def last_iteration(records: RunRecords) -> int:
    """Returns the number of the last iteration that was recorded or evaluated."""
    return max((*(row.number for row in records.iterations), *(e.iteration for e in records.evaluations)), default=1)


def _points(iterations: Sequence[Iteration], key: str) -> Points:
    pairs = [(row.number, value) for row in iterations if (value := row.get(key)) is not None]
    return [number for number, _ in pairs], [value for _, value in pairs]


def new_figure(height: int = 320, **layout: Any) -> go.Figure:
    """Returns an empty figure in the style of the report; the page sets the color of its text."""
    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"l": 56, "r": 96, "t": 16, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13},
        showlegend=False,
        hovermode="x unified",
        hoverlabel={"font": {"family": FONT}},
    )
    style_axes(figure)
    figure.update_layout(**layout)
    return figure


def style_axes(figure: go.Figure) -> None:
    """Draws quiet grid lines and no zero line on every axis."""
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=GRID, showgrid=False, ticks="outside", tickcolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor="rgba(0,0,0,0)")


def label_end(figure: go.Figure, x: float, y: float, text: str, color: str, **where: Any) -> None:
    """Writes the name of a line at its end."""
    figure.add_annotation(
        x=x, y=y, text=text, showarrow=False, xanchor="left", xshift=8, font={"color": color, "size": 12}, **where
    )


def with_alpha(color: str, alpha: float) -> str:
    """Returns a #rrggbb color as rgba()."""
    red, green, blue = (int(color[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
