"""The program's own process: gives up every privilege, then runs the submission.

What the submission prints, raises, patches or forges here can change what it reports about itself, never what it is
compared with: expected outputs stay in the service.
"""

from __future__ import annotations

import atexit
import builtins
import fcntl
import json
import linecache
import os
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from . import kernel
from .limits import BoxLimits
from .payload import COMPILE_ERROR, EXCEPTION, LOADED, NOT_JSON, TOO_LONG, VALUE, Job, encode_reply

REPORT, PROGRESS = 3, 4
"""Descriptors of the file of replies (or of the compiler's message) and of the pipe that tells progress."""
ANSWERED, FINISHED = b"a", b"f"
_REASON_BYTES = 2000
_HIGH_DESCRIPTOR = 100
_GRACE_CPU_S = 1


@dataclass(frozen=True)
class Confinement:
    """How a program's process is confined; `uid` None leaves the user as it is, `seccomp` empty installs no filter."""

    home: str
    uid: int | None
    seccomp: bytes
    bound_address_space: bool
    fresh_mounts: bool


def confine(confinement: Confinement, limits: BoxLimits, cpu_s: int, descriptors: list[int]) -> None:
    """Makes this process the submission's: `descriptors[i]` becomes descriptor i, all others are closed, privileges
    are gone.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH_DESCRIPTOR) for descriptor in descriptors]
    for target, descriptor in enumerate(high):
        os.dup2(descriptor, target, inheritable=target < REPORT)
    kernel.close_from(len(descriptors))
    for kind, value in _resource_limits(confinement, limits, cpu_s):
        resource.setrlimit(kind, (value, value))
    os.umask(0o077)
    if confinement.uid is not None:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        os.setgroups([])
        os.setresgid(confinement.uid, confinement.uid, confinement.uid)
        os.setresuid(confinement.uid, confinement.uid, confinement.uid)
    kernel.set_dumpable(True)
    kernel.forbid_new_privileges()
    if confinement.seccomp:
        kernel.install_filter(confinement.seccomp)
    os.chdir(confinement.home)


def _resource_limits(confinement: Confinement, limits: BoxLimits, cpu_s: int) -> list[tuple[int, int]]:
    values = [
        (resource.RLIMIT_CPU, cpu_s + _GRACE_CPU_S),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_FSIZE, max(limits.file_bytes, limits.output_bytes + 1)),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ]
    if confinement.uid is not None:
        values.append((resource.RLIMIT_NPROC, limits.processes))
    if confinement.bound_address_space:
        values.append((resource.RLIMIT_AS, limits.memory_bytes))
    return values


def run_program(source: bytes, arguments: list[str], home: str) -> NoReturn:
    """Runs `source` as `python main.py ARGUMENTS` would; one that does not compile is also told on descriptor 3."""
    path = f"{home}/main.py"
    with open(path, "wb") as file:
        file.write(source)
    try:
        code = compile(source, path, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        text = "".join(traceback.format_exception_only(type(error), error))
        os.write(REPORT, text.encode(errors="replace")[:_REASON_BYTES] or b"error")
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(1)
    os.close(REPORT)
    module = _main_module(path)
    sys.argv = [path, *arguments]
    sys.path.insert(0, home)
    _finish(_execute(code, module))


def _main_module(path: str) -> types.ModuleType:
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = module
    return module


def _execute(code: types.CodeType, module: types.ModuleType) -> int:
    """The exit code that Python gives for this program."""
    try:
        exec(code, module.__dict__)
    except SystemExit as exit_:
        return _exit_code(exit_)
    except BaseException as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    return 0


def _exit_code(exit_: SystemExit) -> int:
    if exit_.code is None:
        return 0
    if isinstance(exit_.code, int):
        return exit_.code & 0xFF
    sys.stderr.write(f"{exit_.code}\n")
    return 1


def _finish(exit_code: int) -> NoReturn:
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
        os._exit(exit_code)


def serve_functions(job: Job, first: int, home: str, output_bytes: int) -> NoReturn:
    """Loads the submission and calls its function for each input from `first` on; an answer is appended to the file of
    replies, then told by a byte of progress."""
    path = f"{home}/submission.py"
    text = job.source.decode(errors="replace")
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    try:
        code = compile(job.source, path, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        _reply(COMPILE_ERROR, _describe(error), output_bytes, FINISHED)
        os._exit(0)
    module = types.ModuleType("submission")
    module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["submission"] = module
    sys.path.insert(0, home)
    try:
        exec(code, module.__dict__)
    except BaseException as error:
        _reply(EXCEPTION, _describe(error), output_bytes, FINISHED)
        os._exit(0)
    name = job.header["function_name"]
    function = module.__dict__.get(name)
    if not callable(function):
        _reply(EXCEPTION, f"the function {name} is not defined", output_bytes, FINISHED)
        os._exit(0)
    _reply(LOADED, "", output_bytes, ANSWERED)
    for arguments_json in job.inputs[first:]:
        kind, answer = _call(function, arguments_json)
        _reply(kind, answer, output_bytes, ANSWERED)
    os._exit(0)


def _call(function: Callable[..., Any], arguments_json: bytes) -> tuple[bytes, str]:
    try:
        result = function(*json.loads(arguments_json))
    except BaseException as error:
        return EXCEPTION, _describe(error)
    try:
        return VALUE, json.dumps(result)
    except BaseException as error:
        return NOT_JSON, f"the result is a {type(result).__name__}: {_describe(error)}"


def _describe(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception_only(type(error), error)).strip()[-_REASON_BYTES:]
    except BaseException:  # a submission's exception may raise while it is described
        return type(error).__name__


def _reply(kind: bytes, text: str, output_bytes: int, progress: bytes) -> None:
    payload = text.encode(errors="backslashreplace")
    reply = encode_reply(kind, payload) if len(payload) <= output_bytes else encode_reply(TOO_LONG, b"")
    rest = memoryview(reply)
    while rest:
        rest = rest[os.write(REPORT, rest) :]
    os.write(PROGRESS, progress)
