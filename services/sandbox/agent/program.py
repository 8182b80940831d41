"""Mode that runs a whole program in a warm interpreter as `python3 main.py` would: what it sees of itself, how it ends,
and what it leaves behind.

Whatever is needed after the program's first statement is taken from its module before, since programs replace it.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import sys
import traceback
import types
import warnings
from atexit import _run_exitfuncs
from builtins import getattr, isinstance, issubclass, len, max, repr, reversed, str, type  # noqa: UP029
from collections.abc import Callable
from functools import partial
from gc import collect, get_objects
from importlib.machinery import SourceFileLoader
from itertools import islice
from os import _exit, close, getpid, kill
from signal import SIG_DFL, SIGINT
from signal import signal as set_signal
from sys import _current_frames
from typing import TYPE_CHECKING, Any, NoReturn

from .archive import Archive

if TYPE_CHECKING:
    from mmap import mmap

REPORT = 3
"""Descriptor of the file with the error of a source that does not compile."""
REASON_BYTES = 65536
_NOT_FLUSHED = 120
"""Exit code of an interpreter that could not flush its standard streams."""
_WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


class Begin(BaseException):
    """Unwinds the stack before the program runs, which then has the whole of it and sees no other frames below its own.

    `run` goes on from there.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__()
        self.run = run


_ending: mmap | None = None
_ending_of = 0


def report_end_in(shared: mmap) -> None:
    """Has this process say that it is about to end in memory shared with the job supervisor: 1 and the exit code."""
    global _ending, _ending_of
    _ending, _ending_of = shared, getpid()


def run_program(archive: Archive, home: str) -> NoReturn:
    """Runs the main file of the working folder, by an interpreter of its own where the header says so; raises Begin for
    one that runs here.

    A warm interpreter has read its PYTHON variables long ago, and takes no source with NUL.
    """
    main, arguments = archive.header["main"], archive.header["arguments"]
    path = f"{home}/{main}"
    own_interpreter = archive.header["own_interpreter"] or b"\0" in archive.blobs[0]
    if own_interpreter:
        warnings.simplefilter("ignore")  # it warns itself
    code = _compile(b"" if b"\0" in archive.blobs[0] else archive.blobs[0], path)
    os.close(REPORT)
    sys.argv = [main, *arguments]
    sys.orig_argv = [sys.executable, *sys.argv]
    if own_interpreter:
        os.execv(sys.executable, sys.orig_argv)
    sys.path.insert(0, home)
    raise Begin(partial(_run, code, path, home))


def _compile(source: bytes, path: str) -> types.CodeType:
    """Compiles the program; ends the process with a report in the interpreter's own words where that fails."""
    try:
        return compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        text = "".join(traceback.format_exception_only(type(error), error))
        encoded = getattr(error, "text", "") is None or "(unicode error)" in str(error)
    if encoded:  # the interpreter decodes a file in other words than a text
        os.dup2(REPORT, 2)
        os.execv(sys.executable, [sys.executable, path])
    os.write(REPORT, text.encode(errors="replace")[:REASON_BYTES] or b"error")
    _exit(1)


def _run(code: types.CodeType, path: str, home: str) -> NoReturn:
    """Runs the program as `__main__`, and ends the process as the interpreter would."""
    module = types.ModuleType("__main__")
    loader = SourceFileLoader("__main__", path)
    module.__dict__.update(__annotations__={}, __builtins__=builtins, __file__=path, __cached__=None, __loader__=loader)
    sys.modules["__main__"] = module
    names = module.__dict__
    del module, loader  # what ends the program may not hold it
    loaded = len(sys.modules)
    failure: BaseException | None = None
    try:
        exec(code, names)
    except BaseException as error:
        failure = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
    del names
    exit_code = 0 if failure is None else _report(failure)
    del failure
    finish(exit_code, home, loaded)


def _report(error: BaseException) -> int:
    """Reports an exception by the program's hook, and a failure of that; returns the exit code, or minus the signal by
    which the program ends itself.
    """
    if isinstance(error, SystemExit):
        return _exit_code(error)
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
    if "excepthook" not in sys.__dict__:
        _write_error("sys.excepthook is missing\n")
        sys.excepthook = sys.__excepthook__
    second: BaseException | None = None
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except BaseException as raised:
        second = raised.with_traceback(raised.__traceback__ and raised.__traceback__.tb_next)
    if isinstance(second, SystemExit):
        return _exit_code(second)
    if second is not None:
        _write_error("Error in sys.excepthook:\n")
        sys.__excepthook__(type(second), second, second.__traceback__)
        _write_error("\nOriginal exception was:\n")
        sys.__excepthook__(type(error), error, error.__traceback__)
    return -SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _exit_code(exit_: SystemExit) -> int:
    code = exit_.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF
    with contextlib.suppress(Exception):  # the object has no text
        _write_error(str(code))
    _write_error("\n")
    return 1


def _write_error(text: str) -> None:
    stream: Any = getattr(sys, "stderr", sys.__stderr__)
    with contextlib.suppress(Exception):  # the program has closed or replaced the stream
        stream.write(text)


def finish(exit_code: int, home: str, loaded: int) -> NoReturn:
    """Ends as the interpreter does: joins threads, runs exit functions, flushes streams and finalizes the program's
    objects. Of the modules, the first `loaded` are the interpreter's, which is not taken apart.
    """
    try:
        if (threading := sys.modules.get("threading")) is not None:
            _join_threads(threading)
        _run_exitfuncs()
        flushed = _flush("stdout") & _flush("stderr")
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        is_alone = len(_current_frames()) == 1
        if is_alone:  # a daemon thread would use what has been finalized
            _drop_modules(home, loaded)
        _flush_open_files()
        for name in ("stdout", "stderr"):  # to which destructors may have written
            _flush(name, reported=False)
        if "ctypes" in sys.modules:
            sys.modules["ctypes"].CDLL(None).fflush(None)
        if not flushed and exit_code >= 0:
            exit_code = _NOT_FLUSHED
        if is_alone and exit_code >= 0 and _ending is not None and getpid() == _ending_of:  # no fork of the program
            _report_end(_ending, exit_code)
    finally:
        if exit_code < 0:
            set_signal(-exit_code, SIG_DFL)
            kill(getpid(), -exit_code)
        _exit(exit_code)


def _report_end(shared: mmap, exit_code: int) -> None:
    """Reports to the job supervisor how the program ends, and wakes it by closing the outputs: the kernel takes a
    millisecond to take the process apart.
    """
    shared[1] = exit_code
    shared[0] = 1
    for output in (1, 2):
        with contextlib.suppress(OSError):  # the program has closed it
            close(output)


def _join_threads(threading: types.ModuleType) -> None:
    try:
        threading._shutdown()
    except Exception as error:
        _ignore(repr(threading), error)


def _drop_modules(home: str, loaded: int) -> None:
    """Finalizes what the program's own modules hold: destructors run, suspended generators end, files are closed."""
    sys.last_type = sys.last_value = sys.last_traceback = None
    collect()  # brings objects into the order in which they refer to each other: a stream before its descriptor
    # from the end: a look at the interpreter's own modules would copy the memory pages that they are on
    for name in ["__main__", *islice(reversed(sys.modules), max(0, len(sys.modules) - loaded))]:
        if name == "__main__" or str(getattr(sys.modules[name], "__file__", None)).startswith(f"{home}/"):
            sys.modules.pop(name, None)
    collect()


def _flush(name: str, reported: bool = True) -> bool:
    """Flushes a standard stream; returns whether that succeeded, and reports an error as the interpreter does."""
    stream: Any = getattr(sys, name, None)
    try:
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
    except Exception as error:
        if reported and name != "stderr":
            _ignore(repr(stream), error)
        return False
    return True


def _ignore(source: str, error: Exception) -> None:
    """Reports an exception that nothing can handle, as the interpreter does."""
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    lines = traceback.format_exception(type(error), error, trace, chain=False)
    _write_error(f"Exception ignored in: {source}\n{''.join(lines)}")


def _flush_open_files() -> None:
    """Flushes files that are still referred to, as from another module."""
    for stream in [each for each in get_objects() if issubclass(type(each), _WRITERS)]:  # a class may lie
        with contextlib.suppress(OSError, ValueError):  # closed, or without a reader
            stream.flush()
