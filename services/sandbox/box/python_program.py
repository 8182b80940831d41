"""Runs a submission as `python main.py` would, in an interpreter that is already there.

What the submission prints, raises, patches or forges here can change what it reports about itself, never what it is
compared with: expected outputs stay in the service.
"""

from __future__ import annotations

import atexit
import builtins
import os
import signal
import sys
import traceback
import types
from typing import NoReturn

from .payload import Parcel

REPORT = 3
"""Descriptor of the file that tells why a source does not compile; empty when it does."""
REASON_BYTES = 65536


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
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = module
    sys.argv = [path, *parcel.header["arguments"]]
    sys.path.insert(0, home)
    finish(_execute(code, module))


def _execute(code: types.CodeType, module: types.ModuleType) -> int:
    """The exit code that Python gives for this program; below 0 the signal by which it ends itself."""
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


def finish(exit_code: int) -> NoReturn:
    """Ends as the interpreter does (threads joined, exit functions run, streams flushed), without taking it apart."""
    threading = sys.modules.get("threading")
    try:
        if threading is not None:
            threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:
        exit_code = exit_code or 120  # as CPython does when it cannot flush
    finally:
        if exit_code < 0:
            signal.signal(-exit_code, signal.SIG_DFL)
            os.kill(os.getpid(), -exit_code)
        os._exit(exit_code)
