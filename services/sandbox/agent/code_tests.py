"""Code tests: Python that tests a function of a submission, which runs in another process.

The test calls a stand-in. Requests and replies are dictionaries of plain values, one per line. A request has `id`,
`arguments` and `keywords`. The first reply says how loading went: `loaded`, `compile_error` or `load_error`. Each
further one has the request's `id` and either `value` and the arguments that the call has `changed`, or `raised` (names
of the exception's classes), its `arguments`, None unless they are plain, and `message`, or `refused`, why the value
cannot be passed on.

A submission may forge replies, which changes what it says its function returned and nothing else: what arrives becomes
plain values and built-in exceptions, or ends the test. Whose fault a failure is decides between a wrong answer and a
failure of the test, so exceptions are distinguished by where they began.
"""

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

from .archive import Archive
from .values import decode, encode

LOADED, COMPILE_ERROR, LOAD_ERROR = "loaded", "compile_error", "load_error"
# raised inside a generator or an iterator they would end a loop of the test as if it had run through
_CONTROL_FLOW = (StopIteration, StopAsyncIteration, GeneratorExit)
_MESSAGE_CHARACTERS = 1000


class SubmissionError(RuntimeError):
    """The submission raised an exception that is not built in, or returned what is not a plain value."""


class ChannelBrokenError(BaseException):
    """The submission ended, or a reply is malformed; not an Exception, so that tests do not take it for a result."""


class UnfitArgumentError(BaseException):
    """The test called the function with an argument that is no plain value."""


class RemoteFunction:
    """Function of a submission that is called in another process, one call at a time, from any thread."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO, *, max_reply_bytes: int) -> None:
        self._requests = requests
        self._replies = replies
        self._max_reply_bytes = max_reply_bytes
        self._lock = threading.Lock()
        # replies to calls of an earlier test, which ended before it read them, have other numbers
        self._ids = count(int.from_bytes(os.urandom(7), "big"))

    def wait_until_loaded(self) -> tuple[str, str]:
        """Returns LOADED, COMPILE_ERROR or LOAD_ERROR, and the error's message, once before any call.

        Raises ChannelBrokenError.
        """
        reply = self._read()
        for kind in (LOADED, COMPILE_ERROR, LOAD_ERROR):
            if kind in reply:
                return kind, _text(reply[kind])
        raise ChannelBrokenError("the submission's process did not report whether it has loaded")

    def __call__(self, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Calls the function and returns its result; changes its list, dictionary and set arguments as the call did.

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
    """Returns the new value; lists, dictionaries and sets that were in the old one keep their identity."""
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
    """Returns text as it is and nothing for anything else, which could fail to print."""
    return value[:_MESSAGE_CHARACTERS] if isinstance(value, str) else ""


MESSAGE_CHARACTERS = 1000
_NAME_CHARACTERS = 100
_MAX_CLASSES = 20
_CONTAINERS = (list, dict, set, tuple)


def serve_function(
    source: bytes, function_name: str, requests: BinaryIO, replies: BinaryIO, *, path: str, max_reply_bytes: int
) -> None:
    """Serves calls until the requests or the reader of the replies end; `path` is the submission's name in tracebacks.

    A value whose reply takes more than `max_reply_bytes`, 32 KiB or more, is refused.
    """
    try:
        try:
            function = load_function(source, function_name, path)
        except LoadError as error:
            _send(
                replies,
                encode({COMPILE_ERROR if error.does_not_compile else LOAD_ERROR: str(error)[-MESSAGE_CHARACTERS:]}),
            )
            return
        _send(replies, encode({LOADED: True}))
        for line in requests:
            _send(replies, _answer(function, decode(line.decode("ascii")), max_reply_bytes - 1))
    except BrokenPipeError:
        return


class LoadError(Exception):
    """Submission that does not compile, raises while it is loaded, or lacks the function."""

    def __init__(self, message: str, does_not_compile: bool = False) -> None:
        super().__init__(message)
        self.does_not_compile = does_not_compile


def load_function(source: bytes, name: str, path: str) -> Callable[..., Any]:
    """Loads a submission as a module and returns its function; raises LoadError."""
    text = source.decode(errors="replace")
    linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LoadError(describe_exception(error), does_not_compile=True) from None
    module = types.ModuleType("submission")
    module.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["submission"] = module
    try:
        exec(code, module.__dict__)
    except BaseException as error:  # even SystemExit is the submission's failure
        raise LoadError(describe_exception(error)) from None
    function = module.__dict__.get(name)
    if not callable(function):
        raise LoadError(f"the function {name} is not defined")
    return function  # type: ignore[no-any-return]


def _answer(function: Callable[..., Any], request: dict[str, Any], max_characters: int) -> str:
    arguments, keywords = request["arguments"], request["keywords"]
    named = [*enumerate(arguments), *keywords.items()]
    before = {name: encode(argument) for name, argument in named if type(argument) in _CONTAINERS}
    identity = {"id": request["id"]}
    try:
        value = function(*arguments, **keywords)
    except BaseException as error:
        return encode({**identity, **_exception_reply(error)})
    try:
        changed = {
            name: argument for name, argument in named if name in before and _has_changed(argument, before[name])
        }
        return encode({**identity, "value": value, "changed": changed}, max_characters)
    except BaseException as error:  # methods of a value may raise anything
        return encode(
            {
                **identity,
                "refused": f"a value that cannot be compared: {describe_exception(error)[-MESSAGE_CHARACTERS:]}",
            }
        )


def _has_changed(argument: Any, before: str) -> bool:
    """Returns whether a container has changed; one that is no longer plain is left as it was for the test."""
    try:
        return encode(argument) != before
    except (TypeError, ValueError):
        return False


def _exception_reply(error: BaseException) -> dict[str, Any]:
    names = [str(kind.__name__)[:_NAME_CHARACTERS] for kind in type(error).__mro__[:_MAX_CLASSES]]
    arguments = BaseException.__getattribute__(error, "args")
    try:
        encode(arguments, 4 * MESSAGE_CHARACTERS, exact=True)
    except (TypeError, ValueError):
        arguments = None
    return {"raised": names, "message": describe_exception(error)[-MESSAGE_CHARACTERS:], "arguments": arguments}


def describe_exception(error: BaseException) -> str:
    """Returns class and message of an exception, 2,000 characters at most, whatever it does while it is described."""
    try:
        return "".join(traceback.format_exception_only(type(error), error)).strip()[-2 * MESSAGE_CHARACTERS :]
    except BaseException:  # exceptions of a submission may raise while they are described
        return type(error).__name__


def _send(replies: BinaryIO, line: str) -> None:
    replies.write(line.encode("ascii") + b"\n")
    replies.flush()


PASSED, FAILED, SUBMISSION_ERROR, TEST_ERROR = "passed", "failed", "submission_error", "test_error"
_SETUP_PATH, _TEST_PATH = "<setup code>", "<code test>"
_MARK = "_raised_by_the_submission"
# exceptions that no plain value can cause
_OWN_FAULTS = (NameError, SyntaxError, ImportError, OSError, SystemExit, KeyboardInterrupt, GeneratorExit)

Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class CodeTestReport:
    """Result of a code test, with the first 1,000 characters of the reason; `calls` counts those of the function.

    SUBMISSION_ERROR: an exception of the submission's reached the end of the test, or its process ended. FAILED: an
    assertion did not hold, or the test failed on what the function had returned. TEST_ERROR: the test is at
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
        return CodeTestReport(TEST_ERROR, _cut(f"the setup code raised {_summarize(error)}"), 0)
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
    # these two count even if the test has caught them
    if watch.fault is not None:
        # a value of an earlier call may be too deep to be passed back, but is of plain types
        is_own = watch.calls == 1 or isinstance(watch.fault.__cause__, TypeError)
        return TEST_ERROR if is_own else FAILED, str(watch.fault)
    if watch.channel is not None:
        return SUBMISSION_ERROR, str(watch.channel)
    if failure is None:
        return (PASSED, "") if watch.calls else (TEST_ERROR, f"the test does not call {function_name}")
    if getattr(failure, _MARK, False):
        return SUBMISSION_ERROR, str(failure) if isinstance(failure, SubmissionError) else _summarize(failure)
    if isinstance(failure, _OWN_FAULTS) or not watch.calls:
        return TEST_ERROR, f"the test raised {_summarize(failure)}{_location(failure)}"
    if isinstance(failure, AssertionError):
        return FAILED, f"{_summarize(failure)}{_location(failure)}"
    return FAILED, f"what was returned led to {_summarize(failure)}{_location(failure)}"


def _summarize(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except ValueError:  # an integer with too many digits to print
        text = ""
    return f"{name}: {text}" if text else name


def _location(error: BaseException) -> str:
    """Returns the line of the test where it happened, or an empty string."""
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
"""Descriptor of the test's report, which only the test has. It begins with `CALLED` as soon as the test has called the
function."""
CALLED = b" "


def serve_calls(archive: Archive, home: str) -> NoReturn:
    """Runs the submission's side: answers calls until the test has ended."""
    header = archive.header
    with os.fdopen(REQUESTS, "rb") as requests, os.fdopen(REPLIES, "wb") as replies:
        serve_function(
            archive.blobs[0],
            header["function_name"],
            requests,
            replies,
            path=f"{home}/submission.py",
            max_reply_bytes=header["reply_bytes"],
        )
        os._exit(0)


def serve_code_test(archive: Archive, home: str) -> NoReturn:
    """Runs the test's side, and writes its report."""
    header = archive.header
    with os.fdopen(REQUESTS, "wb") as requests, os.fdopen(REPLIES, "rb") as replies:
        function = RemoteFunction(requests, replies, max_reply_bytes=header["reply_bytes"])
        try:
            loaded, message = function.wait_until_loaded()
        except ChannelBrokenError as error:
            loaded, message = "broken", str(error)
        report = {"loaded": loaded, "message": message}
        if loaded == LOADED:
            setup, code = (blob.decode() for blob in archive.blobs[:2])
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
