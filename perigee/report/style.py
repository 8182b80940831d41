"""The look of the plots: one color per thing throughout, transparent ground, direct labels in place of legends."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

# Readable on light and dark ground, told apart by the color-blind (after Okabe and Ito).
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY = (
    "#3b7dd8", "#e08a1e", "#2a9d74", "#b05fb8", "#58b4e0", "#d9534f", "#8a93a2",
)  # fmt: skip
DOMAIN_COLORS = (ORANGE, GREEN, PURPLE, SKY, RED)
PHASE_COLORS = {
    "preparation": RED, "rollout": BLUE, "scoring": SKY, "training": ORANGE, "checkpoint": PURPLE, "weights": GREEN,
    "commit": GREY,
}  # fmt: skip
# Tokens by how many versions old they are: fresh ones are pale.
AGE_COLORS = ("#9ecae8", "#58a5d8", "#2f74b8", "#1d4c85", "#122c54")
GRID = "rgba(128,138,155,0.22)"
FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def new_figure(height: int = 320, **layout: Any) -> go.Figure:
    """An empty figure in the style of the report; the page sets the color of its text."""
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
    """Quiet grid lines, no zero line, on every axis of the figure."""
    figure.update_xaxes(gridcolor=GRID, zeroline=False, linecolor=GRID, showgrid=False, ticks="outside", tickcolor=GRID)
    figure.update_yaxes(gridcolor=GRID, zeroline=False, linecolor="rgba(0,0,0,0)")


def label_end(figure: go.Figure, x: float, y: float, text: str, color: str, **where: Any) -> None:
    """Writes the name of a line at its end."""
    figure.add_annotation(
        x=x, y=y, text=text, showarrow=False, xanchor="left", xshift=8, font={"color": color, "size": 12}, **where
    )


def with_alpha(color: str, alpha: float) -> str:
    """A #rrggbb color as rgba()."""
    red, green, blue = (int(color[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
