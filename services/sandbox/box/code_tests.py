"""Runs one code test: Python that tests a function, which is a stand-in here and runs elsewhere.

Which side is to blame decides between a wrong answer and a failure of the test, so it is told apart by where an
exception began: in the submission, in an assertion, or in the test's own code.
"""

from __future__ import annotations

import builtins
import linecache
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .remote_function import ChannelBrokenError, SubmissionError, UnfitArgumentError

PASSED, FAILED, SUBMISSION_ERROR, TEST_ERROR = "passed", "failed", "submission_error", "test_error"
MESSAGE_CHARACTERS = 1000
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
        return CodeTestReport(TEST_ERROR, _cut(f"the setup code raised {_describe(error)}"), 0)
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
        return SUBMISSION_ERROR, str(failure) if isinstance(failure, SubmissionError) else _describe(failure)
    if isinstance(failure, _OWN_FAULTS) or not watch.calls:
        return TEST_ERROR, f"the test raised {_describe(failure)}{_place(failure)}"
    if isinstance(failure, AssertionError):
        return FAILED, f"{_describe(failure)}{_place(failure)}"
    return FAILED, f"what was returned led to {_describe(failure)}{_place(failure)}"


def _describe(error: BaseException) -> str:
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
