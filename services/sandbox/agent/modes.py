"""Modes in which the agent's Python runs a job, by the name that requests use: a program, calls of a function, the two
sides of a code test, the cells of a session.

What a submission prints, raises, patches or forges here can change what it reports about itself, never what it is
compared with: expected outputs stay in the service, and a forged reply is a wrong answer of the one that forged it.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import io
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NoReturn

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
from .protocol import memory_file
from .submission import LoadError, describe_exception, find_function, load_module

REPORT = 3
"""Descriptor of the file with the error of a source that does not compile."""
REASON_BYTES = 65536
_NOT_FLUSHED = 120
"""Exit code of an interpreter that could not flush its standard streams."""
_WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


def run_program(archive: Archive, home: str) -> NoReturn:
    """Runs `main.py` of the working folder as `python main.py` would."""
    path = f"{home}/{archive.header['main']}"
    try:
        code = compile(archive.blobs[0], path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        text = "".join(traceback.format_exception_only(type(error), error))
        os.write(REPORT, text.encode(errors="replace")[:REASON_BYTES] or b"error")
        os._exit(1)
    os.close(REPORT)
    sys.argv = [path, *archive.header["arguments"]]
    sys.path.insert(0, home)
    loaded = len(sys.modules)
    finish(_execute(code, path), home, loaded)


def _execute(code: types.CodeType, path: str) -> int:
    """Runs the program as `__main__`; returns its exit code, or minus the signal by which it ends itself.

    Afterwards nothing but `sys.modules` refers to the module.
    """
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = module
    try:
        exec(code, module.__dict__)
    except SystemExit as exit_:
        return _exit_code(exit_)
    except BaseException as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if type(error) is KeyboardInterrupt else 1
    return 0


def _exit_code(exit_: SystemExit) -> int:
    if exit_.code is None:
        return 0
    if isinstance(exit_.code, int):
        return exit_.code & 0xFF
    sys.stderr.write(f"{exit_.code}\n")
    return 1


def finish(exit_code: int, home: str, loaded: int) -> NoReturn:
    """Ends as the interpreter does: joins threads, runs exit functions, flushes streams and finalizes the program's
    objects. Of the modules, the first `loaded` are the interpreter's, which is not taken apart.
    """
    threading = sys.modules.get("threading")
    try:
        if threading is not None:
            threading._shutdown()
        atexit._run_exitfuncs()
        flushed = _flush(sys.stdout) & _flush(sys.stderr)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        if len(sys._current_frames()) == 1:  # a daemon thread would use what has been finalized
            _drop_modules(home, loaded)
        _flush_open_files()
        flushed &= _flush(sys.stdout) & _flush(sys.stderr)
        if not flushed and exit_code >= 0:
            exit_code = _NOT_FLUSHED
    finally:
        if exit_code < 0:
            signal.signal(-exit_code, signal.SIG_DFL)
            os.kill(os.getpid(), -exit_code)
        os._exit(exit_code)


def _drop_modules(home: str, loaded: int) -> None:
    """Finalizes what the program's own modules hold: destructors run, suspended generators end, files are closed."""
    gc.collect()  # brings objects into the order in which they refer to each other: a stream before its descriptor
    # from the end: a look at the interpreter's own modules would copy the memory pages that they are on
    for name in ["__main__", *islice(reversed(sys.modules), max(0, len(sys.modules) - loaded))]:
        if name == "__main__" or str(getattr(sys.modules[name], "__file__", None)).startswith(f"{home}/"):
            sys.modules.pop(name, None)
    gc.collect()


def _flush(stream: Any) -> bool:
    """Flushes a standard stream; returns whether that succeeded, and reports an error as the interpreter does."""
    try:
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
    except Exception as error:
        if stream is not sys.stderr:
            trace = error.__traceback__.tb_next if error.__traceback__ else None
            lines = traceback.format_exception(type(error), error, trace, chain=False)
            sys.stderr.write(f"Exception ignored in: {stream!r}\n{''.join(lines)}")
        return False
    return True


def _flush_open_files() -> None:
    """Flushes files that are still referred to, as from another module."""
    for stream in [each for each in gc.get_objects() if isinstance(each, _WRITERS)]:
        with contextlib.suppress(OSError, ValueError):  # closed, or without a reader
            stream.flush()


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


def hide_shadowed_modules(paths: Iterable[str]) -> None:
    """Removes preloaded modules that have the name of a file of the job, so that the file is imported instead."""
    for path in paths:
        shadowed = path.removesuffix("/__init__.py").removesuffix(".py")
        if shadowed == path or shadowed in MODULES_AT_START:
            continue
        for name in [name for name in sys.modules if name == shadowed or name.startswith(f"{shadowed}.")]:
            del sys.modules[name]


def run_mode(name: str, home: str) -> NoReturn:
    """Reads the job's archive, writes its files and runs it; the process is confined already."""
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


def main() -> None:
    """Runs a mode in a container, in an interpreter of its own; the arguments are import folders and the mode."""
    *path, mode = sys.argv[1:]
    sys.path += path
    hide_own_modules()
    run_mode(mode, HOME)
