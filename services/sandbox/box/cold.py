"""Runs one of Python's modes in a container: what a warm box forks, an interpreter of its own starts here.

Arguments: the mode, after the folders to import from.
"""

from __future__ import annotations

import sys

from .limits import HOME
from .modes import hide_own_modules, run_mode


def main() -> None:
    """The process is confined by the container already."""
    *path, mode = sys.argv[1:]
    sys.path += path
    hide_own_modules()
    run_mode(mode, HOME)
