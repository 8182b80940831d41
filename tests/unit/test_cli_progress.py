"""A bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from perigee.cli import view as view_module
from perigee.cli.view import ProgressView


def show(terminal: bool, plain: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100)
    with ProgressView(console, "scored", 1200, plain=plain) as view:
        view.advance(700)
        view.advance(500, note="3 failed")
    return stream.getvalue()


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "PLAIN_EVERY_S", 0.0)
    assert show(terminal=False) == "scored: 700 of 1,200\nscored: 1,200 of 1,200, 3 failed\n"
    monkeypatch.setattr(view_module, "PLAIN_EVERY_S", 1e6)
    assert show(terminal=True, plain=True) == "scored: 1,200 of 1,200, 3 failed\n"


def test_a_bar_on_a_terminal() -> None:
    text = show(terminal=True)
    assert "1200/1200" in text
    assert "3 failed" in text
    assert "━" in text
