"""Writes `report.html` into the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perigee.report.headline import headline_lines
from perigee.report.page import render_page
from perigee.report.records import read_records

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Report:
    """A written report: its path, and its headline for a terminal."""

    path: Path
    headline: Sequence[str]


def write_report(run_path: Path) -> Report:
    """Makes the report of the records in `run_path` and puts it there in one step.

    Raises InvalidArgumentError when the records cannot be read.
    """
    records = read_records(run_path)
    path = run_path / REPORT_FILE
    aside = path.with_name(f".{REPORT_FILE}.{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(render_page(records))
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    return Report(path=path, headline=headline_lines(records))
