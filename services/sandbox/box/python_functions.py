"""Loads a submission and calls its function, once per input.

A forged reply is a wrong answer of the submission that forged it: what replies are compared with stays in the service.
"""

from __future__ import annotations

import builtins
import json
import linecache
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

from .payload import COMPILE_ERROR, EXCEPTION, LOADED, NOT_JSON, TOO_LONG, VALUE, Parcel, encode_reply

REPLIES, PROGRESS = 3, 4
"""Descriptors of the file of replies and of the pipe that tells progress."""
ANSWERED, FINISHED = b"a", b"f"
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
