"""Cells of a session: each of its contexts is an interpreter that runs its cells in one namespace.

The session's own process runs no cell: interpreters are its forks, so that one can be started anew. What cells report
can be forged by them: the service reads it as untrusted.
"""

from __future__ import annotations

import ast
import builtins
import json
import linecache
import os
import select
import signal
import socket
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from . import kernel, protocol
from .archive import Archive, read_archive, write_files
from .notebook import make_kernel
from .submission import describe_exception

CELLS = 3
"""Descriptor of the socket."""
BEGAN = b"began %d"
"""Message that a cell's interpreter has it: an interrupt from now on is that cell's and ends nothing else."""
REPLIED = b"replied %d"
"""Message that a cell has ended."""
RunCell = Callable[[str, int], dict[str, Any]]
"""Runs the source of a cell, given its number; returns the reply."""


@dataclass(frozen=True)
class Interpreter:
    """Process of a context."""

    pid: int
    ended: int
    """Descriptor that is readable when it has ended."""
    inbox: socket.socket


class Interrupts:
    """Handler of SIGINT that raises KeyboardInterrupt in cells alone, also for one that comes while its cell begins."""

    def __init__(self) -> None:
        self.allowed = self.pending = False

    def __call__(self, _: int, frame: types.FrameType | None) -> None:
        """Handles the signal; one that comes in `run` itself, before its cell or after, must not end the session."""
        ours = (Interrupts.run.__code__, Interrupts.__call__.__code__)
        if self.allowed and (frame is None or frame.f_code not in ours):
            raise KeyboardInterrupt
        self.pending = True

    def run(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the reply of a call that may be interrupted."""

        def begin() -> dict[str, Any]:
            if self.pending:
                raise KeyboardInterrupt
            return call()

        self.allowed = True
        try:
            reply = begin()
        except KeyboardInterrupt:
            reply = {"ok": False, "error_name": "KeyboardInterrupt", "error_value": ""}
        self.allowed = False
        return reply


_interrupts = Interrupts()


def serve_session(archive: Archive, home: str) -> NoReturn:
    """Hands each cell to its context's interpreter, until the service closes the socket or an interpreter ends.

    Cells come over a socket; each brings an archive (code and files), a file for each of its outputs and one for the
    reply.
    """
    channel = socket.socket(fileno=CELLS)
    sys.path.insert(0, home)
    module = types.ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins)
    sys.modules["__main__"] = module
    run_cell = make_kernel(module) if archive.header["kernel"] else _plain_runner(module)
    signal.signal(signal.SIGINT, _interrupts)
    interpreters: dict[str, Interpreter] = {}
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poller.poll()}
        for interpreter in interpreters.values():
            if interpreter.ended in ready:
                _end_alike(interpreter.pid)
        try:
            packet = protocol.receive(channel)
        except (EOFError, ConnectionError):
            os._exit(0)
        context = packet.header["context"]
        if packet.header["kind"] == "restart":
            if (old := interpreters.pop(context, None)) is not None:
                poller.unregister(old.ended)
                _discard(old)
            continue
        if context not in interpreters:
            interpreters[context] = _start(channel, run_cell, home)
            poller.register(interpreters[context].ended, select.POLLIN)
        protocol.send(interpreters[context].inbox, packet.header, packet.descriptors)
        packet.close()


def _start(channel: socket.socket, run_cell: RunCell, home: str) -> Interpreter:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        kernel.die_with_parent(signal.SIGKILL)
        ours.close()
        _serve_context(theirs, channel, run_cell, home)
    theirs.close()
    return Interpreter(pid, kernel.open_pidfd(pid), ours)


def _discard(interpreter: Interpreter) -> None:
    os.kill(interpreter.pid, signal.SIGKILL)
    os.waitpid(interpreter.pid, 0)
    os.close(interpreter.ended)
    interpreter.inbox.close()


def _end_alike(pid: int) -> NoReturn:
    """Ends the session as one of its interpreters has ended."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _serve_context(inbox: socket.socket, channel: socket.socket, run_cell: RunCell, home: str) -> NoReturn:
    """Runs cell after cell until the session ends."""
    while True:
        try:
            _run_next(inbox, channel, run_cell, home)
        except EOFError:
            os._exit(0)


def _run_next(inbox: socket.socket, channel: socket.socket, run_cell: RunCell, home: str) -> None:
    message = protocol.receive(inbox)
    _interrupts.pending = False  # those so far were for other cells
    archive_file, stdout, stderr, reply_file = message.descriptors
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    archive = read_archive(archive_file)
    header = archive.header
    channel.send(BEGAN % header["number"])
    try:
        write_files(home, zip(header["paths"], archive.blobs[1:], header["executable"], strict=True), header["append"])
    except OSError as error:
        reply = {"ok": False, "error_name": type(error).__name__, "error_value": str(error)}
    else:
        with _environment(header["environment"]):
            reply = _interrupts.run(lambda: run_cell(archive.blobs[0].decode(), header["number"]))
    _flush_cell()
    rest = memoryview(json.dumps(reply).encode())
    while rest:
        rest = rest[os.write(reply_file, rest) :]
    message.close()
    channel.send(REPLIED % header["number"])


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _flush_cell() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # the cell closed or replaced it
            continue


def _plain_runner(module: types.ModuleType) -> RunCell:
    def run_cell(text: str, number: int) -> dict[str, Any]:
        return _run_cell(text, f"<cell {number}>", module)

    return run_cell


def _run_cell(text: str, path: str, module: types.ModuleType) -> dict[str, Any]:
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
        return _report_error(error)


def _report_error(error: BaseException) -> dict[str, Any]:
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    try:
        sys.stderr.write("".join(traceback.format_exception(type(error), error, trace)))
        value = str(error)
    except BaseException:  # exceptions of a cell may raise while they are described
        value = describe_exception(error)
    return {"ok": False, "error_name": type(error).__name__, "error_value": value}
