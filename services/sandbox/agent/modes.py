"""Runs a submission as `python main.py` would, in an interpreter that is already there.

What the submission prints, raises, patches or forges here can change what it reports about itself, never what it is
compared with: expected outputs stay in the service.


Loads a submission and calls its function, once per input.

A forged reply is a wrong answer of the submission that forged it: what replies are compared with stays in the service.


A stateful interpreter: runs cell after cell in one namespace, as a notebook's kernel does.

Cells come over a socket; each brings a parcel (code and files), a file for each of its outputs and one for the reply.


The ways in which a box's Python runs a job, by the name that orders use.

Each gets the job's parcel from its last descriptor, writes the job's files, and does not return.


Runs one of Python's modes in a container: what a warm box forks, an interpreter of its own starts here.

Arguments: the mode, after the folders to import from.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import contextlib
import gc
import io
import json
import linecache
import os
import signal
import socket
import sys
import traceback
import types
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from . import MODULES_AT_START, protocol
from .archive import (
    COMPILE_ERROR,
    EXCEPTION,
    LOADED,
    NOT_JSON,
    TOO_LONG,
    VALUE,
    Parcel,
    encode_parcel,
    encode_reply,
    read_parcel,
    write_files,
)
from .code_tests import serve_calls, serve_code_test
from .protocol import ANSWERED, FINISHED, HOME, memory_file

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


REPLIES, PROGRESS = 3, 4
"""Descriptors of the file of replies and of the pipe that tells progress."""
_REASON_BYTES = 2000


def serve_functions(parcel: Parcel, home: str) -> NoReturn:
    """Calls the function for each input from the parcel's `first` on; an answer is appended to the file of replies,
    then told by a byte of progress."""
    output_bytes = parcel.header["output_bytes"]

    def fail(kind: bytes, text: str) -> NoReturn:
        _reply(kind, text, output_bytes, FINISHED)
        os._exit(0)

    module = load_submission(parcel.blobs[0], home, fail)
    name = parcel.header["function_name"]
    function = module.__dict__.get(name)
    if not callable(function):
        fail(EXCEPTION, f"the function {name} is not defined")
    _reply(LOADED, "", output_bytes, ANSWERED)
    for arguments_json in parcel.blobs[parcel.header["first_input"] :]:
        kind, answer = _call(function, arguments_json)
        _reply(kind, answer, output_bytes, ANSWERED)
    os._exit(0)


def load_submission(source: bytes, home: str, fail: Callable[[bytes, str], NoReturn]) -> types.ModuleType:
    """The submission as a module; `fail` is told COMPILE_ERROR or EXCEPTION and why when it cannot be loaded."""
    path = f"{home}/submission.py"
    text = source.decode(errors="replace")
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        fail(COMPILE_ERROR, describe(error))
    module = types.ModuleType("submission")
    module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["submission"] = module
    sys.path.insert(0, home)
    try:
        exec(code, module.__dict__)
    except BaseException as error:
        fail(EXCEPTION, describe(error))
    return module


def _call(function: Callable[..., Any], arguments_json: bytes) -> tuple[bytes, str]:
    try:
        result = function(*json.loads(arguments_json))
    except BaseException as error:
        return EXCEPTION, describe(error)
    try:
        return VALUE, json.dumps(result)
    except BaseException as error:
        return NOT_JSON, f"the result is a {type(result).__name__}: {describe(error)}"


def describe(error: BaseException) -> str:
    """Class and message of an exception, whatever it does while it is described."""
    try:
        return "".join(traceback.format_exception_only(type(error), error)).strip()[-_REASON_BYTES:]
    except BaseException:
        return type(error).__name__


def _reply(kind: bytes, text: str, output_bytes: int, progress: bytes) -> None:
    payload = text.encode(errors="backslashreplace")
    reply = encode_reply(kind, payload) if len(payload) <= output_bytes else encode_reply(TOO_LONG, b"")
    rest = memoryview(reply)
    while rest:
        rest = rest[os.write(REPLIES, rest) :]
    os.write(PROGRESS, progress)


CELLS = 3
"""Descriptor of the socket."""
REPLIED = b"replied %d"
"""What is sent when a cell has been run."""


def serve_session(parcel: Parcel, home: str) -> NoReturn:
    """Runs cells until the service closes the socket."""
    channel = socket.socket(fileno=CELLS)
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins)
    sys.modules["__main__"] = module
    sys.path.insert(0, home)
    while True:
        try:
            _run_next(channel, module, home)
        except EOFError:
            os._exit(0)
        except KeyboardInterrupt:  # an interrupt that came when its cell had just ended
            continue


def _run_next(channel: socket.socket, module: types.ModuleType, home: str) -> None:
    message = protocol.receive(channel)
    parcel_file, stdout, stderr, reply_file = message.descriptors
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    parcel = read_parcel(parcel_file)
    header = parcel.header
    write_files(home, zip(header["paths"], parcel.blobs[1:], header["executable"], strict=True))
    reply = _run_cell(parcel.blobs[0], header["number"], module)
    _flush_cell()
    rest = memoryview(json.dumps(reply).encode())
    while rest:
        rest = rest[os.write(reply_file, rest) :]
    message.close()
    channel.send(REPLIED % header["number"])


def _flush_cell() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # the cell closed or replaced it
            continue


def _run_cell(source: bytes, number: int, module: types.ModuleType) -> dict[str, Any]:
    path = f"<cell {number}>"
    text = source.decode()
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    try:
        tree = ast.parse(text, path)
        last = tree.body[-1] if tree.body else None
        if not isinstance(last, ast.Expr):
            exec(compile(tree, path, "exec", dont_inherit=True), module.__dict__)
            return {"ok": True, "result": None}
        del tree.body[-1]
        exec(compile(tree, path, "exec", dont_inherit=True), module.__dict__)
        value = eval(compile(ast.Expression(last.value), path, "eval", dont_inherit=True), module.__dict__)
        if value is not None:
            module.__dict__["_"] = value
        return {"ok": True, "result": None if value is None else repr(value)}
    except BaseException as error:
        return _tell_error(error)


def _tell_error(error: BaseException) -> dict[str, Any]:
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    try:
        sys.stderr.write("".join(traceback.format_exception(type(error), error, trace)))
        value = str(error)
    except BaseException:  # what a cell's own exception does while it is described
        value = describe(error)
    return {"ok": False, "error_name": type(error).__name__, "error_value": value}


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


def main() -> None:
    """The process is confined by the container already."""
    *path, mode = sys.argv[1:]
    sys.path += path
    hide_own_modules()
    run_mode(mode, HOME)
