"""The command line `perigee`: local stack, training runs with a live view, status, reports."""

from __future__ import annotations

import sys


def run() -> None:
    """Runs the command line; ends with one sentence that says what to install when the extra `cli` is missing."""
    try:
        from perigee.cli.main import app
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == "perigee":
            raise
        sys.exit(f"perigee: the command line needs {error.name}, which is not installed: pip install 'perigee[cli]'")
    app()
