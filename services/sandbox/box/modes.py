"""The ways in which a box's Python runs a job, by the name that orders use.

Each gets the job's parcel from its last descriptor, writes the job's files, and does not return.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from .files import write_files
from .payload import Parcel, read_parcel
from .python_calls import serve_calls, serve_code_test
from .python_functions import serve_functions
from .python_program import run_program
from .python_session import serve_session

MODES: dict[str, tuple[Callable[[Parcel, str], NoReturn], int]] = {
    "program": (run_program, 4),
    "functions": (serve_functions, 5),
    "calls": (serve_calls, 5),
    "code_test": (serve_code_test, 6),
    "session": (serve_session, 4),
}
"""Name: what runs it, and the descriptor of the parcel."""


def hide_own_modules() -> None:
    """Lets a program's own module named as this package is be imported, and keeps this package out of its sight."""
    package = __package__
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def run_mode(name: str, home: str) -> NoReturn:
    """Takes the job in hand and runs it; the process is confined already."""
    run, parcel_descriptor = MODES[name]
    parcel = read_parcel(parcel_descriptor)
    os.close(parcel_descriptor)
    header = parcel.header
    first = header["first_file"]
    files = parcel.blobs[first : first + len(header["paths"])]
    write_files(home, zip(header["paths"], files, header["executable"], strict=True))
    run(parcel, home)
    raise AssertionError(f"mode {name} returned")
