"""The ways in which a box's Python runs a job, by the name that orders use.

Each gets the job's parcel from its last descriptor, writes the job's files, and does not return.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from . import MODULES_AT_START
from .control import memory_file
from .files import write_files
from .payload import Parcel, encode_parcel, read_parcel
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


def rehearse() -> None:
    """Goes through what every run begins with, so that the pages which it writes to are this process's own already."""
    parcel = memory_file(encode_parcel({"paths": [], "executable": []}, [b"pass"]))
    try:
        exec(compile(read_parcel(parcel).blobs[0], "<rehearsal>", "exec"), {})
    finally:
        os.close(parcel)


def hide_shadowed_modules(paths: Iterable[str]) -> None:
    """Lets a file of the job be imported whose name is that of a module that is there ahead of time, as an interpreter
    that starts in the job's folder would.
    """
    for path in paths:
        shadowed = path.removesuffix("/__init__.py").removesuffix(".py")
        if shadowed == path or shadowed in MODULES_AT_START:
            continue
        for name in [name for name in sys.modules if name == shadowed or name.startswith(f"{shadowed}.")]:
            del sys.modules[name]


def run_mode(name: str, home: str) -> NoReturn:
    """Takes the job in hand and runs it; the process is confined already."""
    run, parcel_descriptor = MODES[name]
    parcel = read_parcel(parcel_descriptor)
    os.close(parcel_descriptor)
    header = parcel.header
    os.environ.update(header["environment"])
    first = header["first_file"]
    files = parcel.blobs[first : first + len(header["paths"])]
    write_files(home, zip(header["paths"], files, header["executable"], strict=True))
    hide_shadowed_modules(header["paths"])
    run(parcel, home)
    raise AssertionError(f"mode {name} returned")
