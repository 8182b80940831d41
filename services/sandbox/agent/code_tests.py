"""The test's side of code tests: a submission's function that is called in another process.

What comes back may be anything that the submission wrote; it becomes plain values and built-in exceptions, or ends the
test.


The submission's side of code tests: loads it, and answers calls of its function that come line by line.

Requests and replies are dictionaries of plain values, one per line. A request has `id`, `arguments` and `keywords`. The
first reply tells how loading went: `loaded`, `compile_error` or `load_error`. Each further one has the request's `id`
and either `value` and the arguments that the call has `changed`, or `raised` (names of the exception's classes), its
`arguments`, None where they are not plain, and `message`, or `refused`, why the value cannot be told.

The submission shares this process and could write replies of its own, which changes what it says its function returned
and nothing else.


Runs one code test: Python that tests a function, which is a stand-in here and runs elsewhere.

Which side is to blame decides between a wrong answer and a failure of the test, so it is told apart by where an
exception began: in the submission, in an assertion, or in the test's own code.


The two sides of a code test as modes of a box: the submission, whose function is called, and the calling test."""

from __future__ import annotations

import builtins
import json
import linecache
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, BinaryIO, NoReturn

from .archive import Parcel
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


PASSED, FAILED, SUBMISSION_ERROR, TEST_ERROR = "passed", "failed", "submission_error", "test_error"
_SETUP_PATH, _TEST_PATH = "<setup code>", "<code test>"
_MARK = "_raised_by_the_submission"
# no plain value that a function returns brings these about
_OWN_FAULTS = (NameError, SyntaxError, ImportError, OSError, SystemExit, KeyboardInterrupt, GeneratorExit)

Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class CodeTestReport:
    """How a code test ended, with the first 1,000 characters of why; `calls` counts those of the function.

    SUBMISSION_ERROR: an exception of the submission's reached the end of the test, or its process ended. FAILED: an
    assertion did not hold, or the test could not go on with what the function had returned. TEST_ERROR: the test is at
    fault and says nothing of the submission, as one that never calls the function.
    """

    ending: str
    message: str
    calls: int


@dataclass
class _Watch:
    calls: int = 0
    channel: ChannelBrokenError | None = None
    fault: UnfitArgumentError | None = None


def run_code_test(setup_code: str, code: str, function_name: str, call: Call) -> CodeTestReport:
    """Runs `setup_code`, then `code`, in one namespace where `function_name` and `candidate` call the submission's
    function by `call`, whatever the setup defines under these names; then `check(candidate)` where `code` defines it.
    """
    watch = _Watch()
    stand_in = _make_stand_in(function_name, call, watch)
    module = types.ModuleType("code_test")
    module.__dict__["__builtins__"] = builtins
    sys.modules["code_test"] = module
    namespace = module.__dict__
    try:
        _execute(setup_code, _SETUP_PATH, namespace)
    except BaseException as error:
        return CodeTestReport(TEST_ERROR, _cut(f"the setup code raised {_describe_briefly(error)}"), 0)
    namespace.update({function_name: stand_in, "candidate": stand_in})
    check_before = namespace.get("check")
    failure: BaseException | None = None
    try:
        _execute(code, _TEST_PATH, namespace)
        check = namespace.get("check")
        if isinstance(check, types.FunctionType) and check is not check_before and check is not stand_in:
            check(stand_in)
    except BaseException as error:
        failure = error
    ending, message = _decide(failure, watch, function_name)
    return CodeTestReport(ending, _cut(message), watch.calls)


def _make_stand_in(function_name: str, call: Call, watch: _Watch) -> Callable[..., Any]:
    def stand_in(*arguments: Any, **keywords: Any) -> Any:
        watch.calls += 1
        try:
            return call(arguments, keywords)
        except ChannelBrokenError as error:
            watch.channel = error
            raise
        except UnfitArgumentError as error:
            watch.fault = error
            raise
        except BaseException as error:
            setattr(error, _MARK, True)
            raise

    stand_in.__name__ = stand_in.__qualname__ = function_name
    return stand_in


def _execute(code: str, path: str, namespace: dict[str, Any]) -> None:
    linecache.cache[path] = (len(code), None, code.splitlines(keepends=True), path)
    exec(compile(code, path, "exec", dont_inherit=True), namespace)


def _decide(failure: BaseException | None, watch: _Watch, function_name: str) -> tuple[str, str]:
    # what the test made of these two does not matter: it may have caught them
    if watch.fault is not None:
        # what an earlier call returned may be too deep to be handed back, but has no types that are not plain
        is_own = watch.calls == 1 or isinstance(watch.fault.__cause__, TypeError)
        return TEST_ERROR if is_own else FAILED, str(watch.fault)
    if watch.channel is not None:
        return SUBMISSION_ERROR, str(watch.channel)
    if failure is None:
        return (PASSED, "") if watch.calls else (TEST_ERROR, f"the test does not call {function_name}")
    if getattr(failure, _MARK, False):
        return SUBMISSION_ERROR, str(failure) if isinstance(failure, SubmissionError) else _describe_briefly(failure)
    if isinstance(failure, _OWN_FAULTS) or not watch.calls:
        return TEST_ERROR, f"the test raised {_describe_briefly(failure)}{_place(failure)}"
    if isinstance(failure, AssertionError):
        return FAILED, f"{_describe_briefly(failure)}{_place(failure)}"
    return FAILED, f"what was returned led to {_describe_briefly(failure)}{_place(failure)}"


def _describe_briefly(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except ValueError:  # an integer with too many digits to print
        text = ""
    return f"{name}: {text}" if text else name


def _place(error: BaseException) -> str:
    """The line of the test where it happened, or an empty string."""
    line = 0
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _TEST_PATH:
            line = trace.tb_lineno
        trace = trace.tb_next
    text = linecache.getline(_TEST_PATH, line).strip()
    return f" at `{text}`, line {line}" if text else ""


def _cut(text: str) -> str:
    return text[:MESSAGE_CHARACTERS]


REQUESTS, REPLIES = 3, 4
"""Descriptors of the pipes between the two."""
REPORT = 5
"""Descriptor of the file that tells how the test ended; only the test has it. It begins with `CALLED` as soon as the
test has called the function."""
CALLED = b" "


def serve_calls(parcel: Parcel, home: str) -> NoReturn:
    """The submission's side: answers calls until the test has ended."""
    header = parcel.header
    with os.fdopen(REQUESTS, "rb") as requests, os.fdopen(REPLIES, "wb") as replies:
        serve_function(
            parcel.blobs[0],
            header["function_name"],
            requests,
            replies,
            path=f"{home}/submission.py",
            max_reply_bytes=header["reply_bytes"],
        )
        os._exit(0)


def serve_code_test(parcel: Parcel, home: str) -> NoReturn:
    """The test's side: runs it and writes its report."""
    header = parcel.header
    with os.fdopen(REQUESTS, "wb") as requests, os.fdopen(REPLIES, "rb") as replies:
        function = RemoteFunction(requests, replies, max_reply_bytes=header["reply_bytes"])
        try:
            loaded, message = function.wait_until_loaded()
        except ChannelBrokenError as error:
            loaded, message = "broken", str(error)
        report = {"loaded": loaded, "message": message}
        if loaded == LOADED:
            setup, code = (blob.decode() for blob in parcel.blobs[:2])
            called = False

            def call(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
                nonlocal called
                if not called:
                    os.write(REPORT, CALLED)
                    called = True
                return function(arguments, keywords)

            report |= asdict(run_code_test(setup, code, header["function_name"], call))
        os.write(REPORT, json.dumps(report).encode())
        os._exit(0)
