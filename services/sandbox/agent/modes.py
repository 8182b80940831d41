"""Modes in which the agent's Python runs a job, by the name that requests use: a program, calls of a function, the two
sides of a code test, the cells of a session.

What a submission prints, raises, patches or forges here can change what it reports about itself, never what it is
compared with: expected outputs stay in the service, and a forged reply is a wrong answer of the one that forged it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import NoReturn

from . import HOME, MODULES_AT_START
from .archive import Archive, read_archive, write_files
from .program import Begin

MODES = {
    "program": ("program", "run_program", 4),
    "functions": ("functions", "serve_functions", 5),
    "calls": ("code_tests", "serve_calls", 5),
    "code_test": ("code_tests", "serve_code_test", 6),
    "session": ("cells", "serve_session", 4),
}
"""Mode by name: the module and the function that run it, and the descriptor of its archive."""


@cache
def load_mode(name: str) -> Callable[[Archive, str], NoReturn]:
    """Returns the function that runs a mode; imports what it needs, and that alone, as an interpreter that was started
    for it waits for that.
    """
    module, function, _ = MODES[name]
    run: Callable[[Archive, str], NoReturn] = getattr(import_module(f".{module}", __package__), function)
    return run


def hide_own_modules() -> None:
    """Hides this package from programs, which may have modules of the same name."""
    package = __package__
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


_seeds: list[Callable[[], None]] = []


def find_generators() -> None:
    """Finds generators of random numbers that modules made while they were imported ahead."""
    modules = sys.modules
    if "random" in modules:
        generator = modules["random"].Random
        _seeds.extend(each.seed for each in gc.get_objects() if isinstance(each, generator))
    if "numpy.random" in modules:
        _seeds.append(modules["numpy.random"].seed)


def seed_generators() -> None:
    """Gives the generators that all programs share by birth states of their own."""
    for seed in _seeds:
        seed()


def hide_shadowed_modules(paths: Iterable[str]) -> None:
    """Removes preloaded modules that have the name of a file of the job, so that the file is imported instead."""
    for path in paths:
        shadowed = path.removesuffix("/__init__.py").removesuffix(".py")
        if shadowed == path or shadowed in MODULES_AT_START or shadowed not in sys.modules:
            continue
        for name in [name for name in sys.modules if name == shadowed or name.startswith(f"{shadowed}.")]:
            del sys.modules[name]


def run_mode(name: str, home: str) -> NoReturn:
    """Reads the job's archive, writes its files and runs it; the process is confined already. Raises Begin when a whole
    program is ready to run.
    """
    archive_descriptor = MODES[name][2]
    archive = read_archive(archive_descriptor)
    os.close(archive_descriptor)
    header = archive.header
    os.environ.update(header["environment"])
    first = header["first_file"]
    files = archive.blobs[first : first + len(header["paths"])]
    write_files(home, zip(header["paths"], files, header["executable"], strict=True))
    hide_shadowed_modules(header["paths"])
    load_mode(name)(archive, home)
    raise AssertionError(f"mode {name} returned")


def main() -> Callable[[], NoReturn]:
    """Runs the mode that the argument names, in a container and in an interpreter of its own; returns what runs a whole
    program.
    """
    load_mode(sys.argv[1])
    hide_own_modules()
    try:
        run_mode(sys.argv[1], HOME)
    except Begin as program:
        return program.run
