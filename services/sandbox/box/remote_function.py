"""The test's side of code tests: a submission's function that is called in another process.

What comes back may be anything that the submission wrote; it becomes plain values and built-in exceptions, or ends the
test.
"""

from __future__ import annotations

import builtins
import os
import threading
from collections.abc import Sequence
from itertools import count
from typing import Any, BinaryIO

from .values import decode, encode

LOADED, COMPILE_ERROR, LOAD_ERROR = "loaded", "compile_error", "load_error"
# raised inside a generator or an iterator they would end a loop of the test as if it had run through
_CONTROL_FLOW = (StopIteration, StopAsyncIteration, GeneratorExit)
_MESSAGE_CHARACTERS = 1000


class SubmissionError(RuntimeError):
    """The submission raised an exception that is not built in, or returned what is not a plain value."""


class ChannelBrokenError(BaseException):
    """The submission ended, or its replies are none; not an Exception, so that tests do not take it for a result."""


class UnfitArgumentError(BaseException):
    """The test called the function with what is not a plain value."""


class RemoteFunction:
    """Calls by lines, one at a time, from any thread; `max_reply_bytes` bounds what is read of a reply."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO, *, max_reply_bytes: int) -> None:
        self._requests = requests
        self._replies = replies
        self._max_reply_bytes = max_reply_bytes
        self._lock = threading.Lock()
        # replies to the calls of a test that was ended before it read them are told by their numbers
        self._ids = count(int.from_bytes(os.urandom(7), "big"))

    def wait_until_loaded(self) -> tuple[str, str]:
        """LOADED, COMPILE_ERROR or LOAD_ERROR, and the error's message; to be called once per submission, before any
        call.

        Raises ChannelBrokenError.
        """
        reply = self._read()
        for kind in (LOADED, COMPILE_ERROR, LOAD_ERROR):
            if kind in reply:
                return kind, _text(reply[kind])
        raise ChannelBrokenError("the submission's process did not tell whether it has loaded")

    def __call__(self, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """What the function returns; lists, dictionaries and sets among the arguments change as it has changed them.

        Raises what it raised, as a built-in exception of the same name or else of its nearest built-in ancestor below
        Exception, or SubmissionError; ChannelBrokenError; UnfitArgumentError.
        """
        with self._lock:
            return self._call(next(self._ids), arguments, keywords)

    def _call(self, identity: int, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        try:
            line = encode({"id": identity, "arguments": list(arguments), "keywords": keywords}, exact=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise UnfitArgumentError(f"an argument cannot be handed over: {error}") from error
        try:
            self._requests.write(line.encode("ascii") + b"\n")
            self._requests.flush()
        except BrokenPipeError as error:
            raise ChannelBrokenError("the submission's process has ended") from error
        reply = self._read()
        while reply.get("id") != identity:
            reply = self._read()
        return _take(reply, arguments, keywords)

    def _read(self) -> dict[str, Any]:
        line = self._replies.readline(self._max_reply_bytes)
        if not line.endswith(b"\n"):
            ended = len(line) < self._max_reply_bytes
            raise ChannelBrokenError("the submission's process has ended" if ended else "a reply is too long")
        try:
            reply = decode(line.decode("ascii"))
        except ValueError as error:
            raise ChannelBrokenError(f"a reply is malformed: {error}") from error
        if not isinstance(reply, dict):
            raise ChannelBrokenError("a reply is malformed: no dictionary")
        return reply


def _take(reply: dict[str, Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    if "value" in reply:
        changed = reply.get("changed")
        named: dict[Any, Any] = {**dict(enumerate(arguments)), **keywords}
        for name, contents in changed.items() if isinstance(changed, dict) else ():
            if name in named:
                _merge(named[name], contents)
        return reply["value"]
    names = reply.get("raised")
    if isinstance(names, list):
        raise _as_exception(names, _text(reply.get("message")), reply.get("arguments"))
    raise SubmissionError(f"the submission returned {_text(reply.get('refused')) or 'nothing'}")


def _merge(old: Any, new: Any) -> Any:
    """The new value; lists, dictionaries and sets of the old one that are still there keep their identity."""
    if type(old) is not type(new):
        return new
    if type(old) is list:
        old[:] = [*(_merge(*pair) for pair in zip(old, new)), *new[len(old) :]]  # noqa: B905  # the shorter one ends it
        return old
    if type(old) is tuple:
        return (*(_merge(*pair) for pair in zip(old, new)), *new[len(old) :])  # noqa: B905
    if type(old) is dict:
        merged = {key: _merge(old[key], value) if key in old else value for key, value in new.items()}
        old.clear()
        old.update(merged)
        return old
    if type(old) is set:
        old.clear()
        old.update(new)
        return old
    return new


def _as_exception(names: list[Any], message: str, arguments: Any) -> BaseException:
    attempts = [arguments, (message,)] if isinstance(arguments, tuple) else [(message,)]
    for position, name in enumerate(names):
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            continue
        if issubclass(kind, _CONTROL_FLOW) or (position and kind in (Exception, BaseException)):
            break
        for attempt in attempts:
            try:
                return kind(*attempt)
            except (TypeError, ValueError, OverflowError):  # some classes take certain arguments only
                continue
    return SubmissionError(message)


def _text(value: Any) -> str:
    """What is text; anything else could fail to print."""
    return value[:_MESSAGE_CHARACTERS] if isinstance(value, str) else ""
