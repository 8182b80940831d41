"""Loads the fixtures of every part and lists the tools that were not there."""

from pathlib import Path

import pytest

pytest_plugins = [
    f"tests.fixtures.{path.stem}"
    for path in sorted((Path(__file__).parent / "fixtures").glob("*.py"))
    if path.stem != "__init__"
]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names each missing tool or data set once, after the results."""
    missing = sorted({str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])})  # type: ignore[index]
    if missing:
        terminalreporter.section("not shown here")
        for reason in missing:
            terminalreporter.write_line(reason.removeprefix("Skipped: "))
