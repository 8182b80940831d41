"""A stateful interpreter: runs cell after cell in one namespace, as a notebook's kernel does.

Cells come over a socket; each brings a parcel (code and files), a file for each of its outputs and one for the reply.
"""

from __future__ import annotations

import ast
import builtins
import json
import linecache
import os
import socket
import sys
import traceback
import types
from typing import Any, NoReturn

from . import control
from .files import write_files
from .payload import Parcel, read_parcel
from .python_functions import describe

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
    message = control.receive(channel)
    parcel_file, stdout, stderr, reply_file = message.descriptors
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    parcel = read_parcel(parcel_file)
    header = parcel.header
    write_files(home, zip(header["paths"], parcel.blobs[1:], header["executable"], strict=True))
    reply = _run_cell(parcel.blobs[0], header["number"], module)
    _flush()
    rest = memoryview(json.dumps(reply).encode())
    while rest:
        rest = rest[os.write(reply_file, rest) :]
    message.close()
    channel.send(REPLIED % header["number"])


def _flush() -> None:
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
