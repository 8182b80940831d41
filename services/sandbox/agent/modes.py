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
from typing import NoReturn

from . import HOME, MODULES_AT_START
from .archive import (
    COMPILE_ERROR,
    EXCEPTION,
    INPUT_PREFIX,
    LOADED,
    NOT_JSON,
    TOO_LONG,
    VALUE,
    Archive,
    encode_archive,
    encode_reply,
    read_archive,
    write_files,
)
from .cells import serve_session
from .code_tests import serve_calls, serve_code_test
from .json_calls import JsonCall, make_json_call, to_json
from .program import Begin, run_program
from .protocol import memory_file
from .submission import LoadError, describe_exception, find_function, load_module

REPLIES, INPUTS = 3, 4
"""Descriptors of the pipes for replies and for inputs."""


def serve_functions(archive: Archive, home: str) -> NoReturn:
    """Calls the function for one input after another; the next one comes when the reply before it is complete."""
    output_bytes = archive.header["output_bytes"]

    sys.path.insert(0, home)
    try:
        name = archive.header["function_name"]
        names = load_module(archive.blobs[0], name, f"{home}/submission.py")
        call = make_json_call(find_function(names, name), archive.header["signature"], names)
    except LoadError as error:
        _reply(COMPILE_ERROR if error.does_not_compile else EXCEPTION, str(error), output_bytes)
        os._exit(0)
    _reply(LOADED, "", output_bytes)
    inputs = os.fdopen(INPUTS, "rb")
    while prefix := inputs.read(INPUT_PREFIX.size):
        kind, answer = _call(call, inputs.read(*INPUT_PREFIX.unpack(prefix)), output_bytes)
        _reply(kind, answer, output_bytes)
    os._exit(0)


def _call(call: JsonCall, arguments_json: bytes, output_bytes: int) -> tuple[bytes, str]:
    try:
        result = call(arguments_json)
    except BaseException as error:
        return EXCEPTION, describe_exception(error)
    try:
        return VALUE, to_json(result, output_bytes)
    except BaseException as error:
        return NOT_JSON, f"the result is a {type(result).__name__}: {describe_exception(error)}"


def _reply(kind: bytes, text: str, output_bytes: int) -> None:
    payload = text.encode(errors="backslashreplace")
    reply = encode_reply(kind, payload) if len(payload) <= output_bytes else encode_reply(TOO_LONG, b"")
    rest = memoryview(reply)
    while rest:
        rest = rest[os.write(REPLIES, rest) :]


MODES: dict[str, tuple[Callable[[Archive, str], NoReturn], int]] = {
    "program": (run_program, 4),
    "functions": (serve_functions, 5),
    "calls": (serve_calls, 5),
    "code_test": (serve_code_test, 6),
    "session": (serve_session, 4),
}
"""Mode by name: the function that runs it, and the descriptor of its archive."""


def hide_own_modules() -> None:
    """Hides this package from programs, which may have modules of the same name."""
    package = __package__
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def rehearse() -> None:
    """Executes what every run begins with, so that the memory pages that it writes to are copied before the run."""
    archive = memory_file(encode_archive({"paths": [], "executable": []}, [b"pass"]))
    try:
        exec(compile(read_archive(archive).blobs[0], "<rehearsal>", "exec"), {})
    finally:
        os.close(archive)


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
        if shadowed == path or shadowed in MODULES_AT_START:
            continue
        for name in [name for name in sys.modules if name == shadowed or name.startswith(f"{shadowed}.")]:
            del sys.modules[name]


def run_mode(name: str, home: str) -> NoReturn:
    """Reads the job's archive, writes its files and runs it; the process is confined already. Raises Begin when a whole
    program is ready to run.
    """
    run, archive_descriptor = MODES[name]
    archive = read_archive(archive_descriptor)
    os.close(archive_descriptor)
    header = archive.header
    os.environ.update(header["environment"])
    first = header["first_file"]
    files = archive.blobs[first : first + len(header["paths"])]
    write_files(home, zip(header["paths"], files, header["executable"], strict=True))
    hide_shadowed_modules(header["paths"])
    run(archive, home)
    raise AssertionError(f"mode {name} returned")


def main() -> Callable[[], NoReturn]:
    """Runs the mode that the argument names, in a container and in an interpreter of its own; returns what runs a whole
    program.
    """
    hide_own_modules()
    try:
        run_mode(sys.argv[1], HOME)
    except Begin as program:
        return program.run
