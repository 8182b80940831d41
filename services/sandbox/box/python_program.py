"""Runs a submission as `python main.py` would, in an interpreter that is already there.

What the submission prints, raises, patches or forges here can change what it reports about itself, never what it is
compared with: expected outputs stay in the service.
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
from typing import Any, NoReturn

from .payload import Parcel

REPORT = 3
"""Descriptor of the file that tells why a source does not compile; empty when it does."""
REASON_BYTES = 65536
_NOT_FLUSHED = 120
"""The exit code of an interpreter that could not write out its standard streams."""
_WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


def run_program(parcel: Parcel, home: str) -> NoReturn:
    """Runs `main.py` of the working folder with the parcel's arguments."""
    path = f"{home}/{parcel.header['main']}"
    try:
        code = compile(parcel.blobs[0], path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        text = "".join(traceback.format_exception_only(type(error), error))
        os.write(REPORT, text.encode(errors="replace")[:REASON_BYTES] or b"error")
        os._exit(1)
    os.close(REPORT)
    sys.argv = [path, *parcel.header["arguments"]]
    sys.path.insert(0, home)
    finish(_execute(code, path), home)


def _execute(code: types.CodeType, path: str) -> int:
    """Runs the program as `__main__` and returns Python's exit code for it; below 0 the signal by which it ends itself.

    Nothing but `sys.modules` refers to the module afterwards.
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


def finish(exit_code: int, home: str) -> NoReturn:
    """Ends as the interpreter does: threads are joined, exit functions run, streams flushed, the program's objects
    finalized. The interpreter itself is not taken apart.
    """
    threading = sys.modules.get("threading")
    try:
        if threading is not None:
            threading._shutdown()
        atexit._run_exitfuncs()
        flushed = _flush(sys.stdout) & _flush(sys.stderr)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        if len(sys._current_frames()) == 1:  # a daemon thread would meet what has been finalized
            _drop_modules(home)
        _flush_open_files()
        flushed &= _flush(sys.stdout) & _flush(sys.stderr)
        if not flushed and exit_code >= 0:
            exit_code = _NOT_FLUSHED
    finally:
        if exit_code < 0:
            signal.signal(-exit_code, signal.SIG_DFL)
            os.kill(os.getpid(), -exit_code)
        os._exit(exit_code)


def _drop_modules(home: str) -> None:
    """Finalizes what the program's own modules hold: destructors run, suspended generators end, files are closed."""
    gc.collect()  # brings objects into the order in which they refer to each other: a stream before its descriptor
    for name, module in list(sys.modules.items()):
        if name == "__main__" or str(getattr(module, "__file__", None)).startswith(f"{home}/"):
            del sys.modules[name]
    del module
    gc.collect()


def _flush(stream: Any) -> bool:
    """Whether what was printed to a standard stream is out; why it is not is told as the interpreter tells it."""
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
    """Writes out what is left in files that are still referred to, as from another module."""
    for stream in [each for each in gc.get_objects() if isinstance(each, _WRITERS)]:
        with contextlib.suppress(OSError, ValueError):  # closed, or without anybody to read it
            stream.flush()
