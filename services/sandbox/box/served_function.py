"""The submission's side of code tests: loads it, and answers calls of its function that come line by line.

Requests and replies are dictionaries of plain values, one per line. A request has `id`, `arguments` and `keywords`. The
first reply tells how loading went: `loaded`, `compile_error` or `load_error`. Each further one has the request's `id`
and either `value` and the arguments that the call has `changed`, or `raised` (names of the exception's classes), its
`arguments`, None where they are not plain, and `message`, or `refused`, why the value cannot be told.

The submission shares this process and could write replies of its own, which changes what it says its function returned
and nothing else.
"""

from __future__ import annotations

import builtins
import linecache
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, BinaryIO

from .values import decode, encode

MESSAGE_CHARACTERS = 1000
_NAME_CHARACTERS = 100
_MAX_CLASSES = 20
_CONTAINERS = (list, dict, set, tuple)


def serve_function(
    source: bytes, function_name: str, requests: BinaryIO, replies: BinaryIO, *, path: str, max_reply_bytes: int
) -> None:
    """Serves until the requests end or nobody reads the replies; `path` is the submission's name in tracebacks.

    A value whose reply takes more than `max_reply_bytes`, 32 KiB or more, is told as refused.
    """
    function, greeting = _load(source, function_name, path)
    try:
        _send(replies, encode(greeting))
        if function is not None:
            for line in requests:
                request = decode(line.decode("ascii"))
                _send(replies, _answer(function, request, max_reply_bytes - 1))
    except BrokenPipeError:
        return


def _load(source: bytes, function_name: str, path: str) -> tuple[Callable[..., Any] | None, dict[str, Any]]:
    """The function, or None, and what is told of it."""
    text = source.decode(errors="replace")
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return None, {"compile_error": _describe(error)}
    module = types.ModuleType("submission")
    module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["submission"] = module
    try:
        exec(code, module.__dict__)
    except BaseException as error:  # whatever it is, it is the submission's
        return None, {"load_error": _describe(error)}
    function = module.__dict__.get(function_name)
    if not callable(function):
        return None, {"load_error": f"the function {function_name} is not defined"}
    return function, {"loaded": True}


def _answer(function: Callable[..., Any], request: dict[str, Any], max_characters: int) -> str:
    arguments, keywords = request["arguments"], request["keywords"]
    named = [*enumerate(arguments), *keywords.items()]
    before = {name: encode(argument) for name, argument in named if type(argument) in _CONTAINERS}
    identity = {"id": request["id"]}
    try:
        value = function(*arguments, **keywords)
    except BaseException as error:
        return encode({**identity, **_tell_exception(error)})
    try:
        changed = {
            name: argument for name, argument in named if name in before and _has_changed(argument, before[name])
        }
        return encode({**identity, "value": value, "changed": changed}, max_characters)
    except BaseException as error:  # a value's own methods may raise anything
        return encode({**identity, "refused": f"a value that cannot be compared: {_describe(error)}"})


def _has_changed(argument: Any, before: str) -> bool:
    """Whether a container is not as it was; what is no plain value any more stays as it was for the test."""
    try:
        return encode(argument) != before
    except (TypeError, ValueError):
        return False


def _tell_exception(error: BaseException) -> dict[str, Any]:
    names = [str(kind.__name__)[:_NAME_CHARACTERS] for kind in type(error).__mro__[:_MAX_CLASSES]]
    arguments = BaseException.__getattribute__(error, "args")
    try:
        encode(arguments, 4 * MESSAGE_CHARACTERS, exact=True)
    except (TypeError, ValueError):
        arguments = None
    return {"raised": names, "message": _describe(error), "arguments": arguments}


def _describe(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception_only(type(error), error)).strip()[-MESSAGE_CHARACTERS:]
    except BaseException:  # a submission's exception may raise while it is described
        return type(error).__name__


def _send(replies: BinaryIO, line: str) -> None:
    replies.write(line.encode("ascii") + b"\n")
    replies.flush()
