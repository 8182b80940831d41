"""Function tests: calls of a submission's function, one input after another, and their results as JSON."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from .archive import COMPILE_ERROR, EXCEPTION, INPUT_PREFIX, LOADED, NOT_JSON, TOO_LONG, VALUE, Archive, encode_reply
from .json_calls import JsonCall, make_json_call, to_json
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
