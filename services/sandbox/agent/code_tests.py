"""Code tests: Python that tests functions and classes of a submission, which run in another process.

The test calls stand-ins. A submission may forge replies, which changes what it says its functions returned and nothing
else: what arrives becomes plain values, stand-ins and exceptions, or ends the test. Whose fault a failure is decides
between a wrong answer and a failure of the test, so exceptions are distinguished by where they began.
"""

from __future__ import annotations

import ast
import builtins
import json
import linecache
import os
import re
import sys
import types
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from .agreeable import AgreeingPeer
from .archive import Archive
from .calls import COMPILE_ERROR, LOAD_ERROR, LOADED, serve_submission
from .peers import ChannelBrokenError, SubmissionError
from .stand_ins import MARK, CallerPeer
from .submission import MESSAGE_CHARACTERS, split_names

_MOST_NAMES = 2000
PASSED, FAILED, SUBMISSION_ERROR, TEST_ERROR = "passed", "failed", "submission_error", "test_error"
_SETUP_PATH, _TEST_PATH = "<setup code>", "<code test>"
# exceptions that no plain value can cause
_OWN_FAULTS = (NameError, SyntaxError, ImportError, OSError, SystemExit, KeyboardInterrupt, GeneratorExit)


@dataclass(frozen=True)
class CodeTestReport:
    """Result of a code test, with the first 1,000 characters of the reason; `calls` counts those of the function.

    SUBMISSION_ERROR: an exception of the submission's reached the end of the test, or its process ended. FAILED: an
    assertion did not hold, or the test failed on what the function had returned. TEST_ERROR: the test is at
    fault whatever the submission, as one that never calls the function.
    """

    ending: str
    message: str
    calls: int


def wait_until_loaded(peer: CallerPeer) -> tuple[str, str, dict[str, Any]]:
    """Returns LOADED, COMPILE_ERROR or LOAD_ERROR, the error's message, and stand-ins of what the submission defines.

    Once before any call. Raises ChannelBrokenError, also for more than there is need of: what the test takes before it
    calls the submission is its own fault.
    """
    peer.most_objects, most = _MOST_NAMES, peer.most_objects
    reply = peer.receive()
    peer.most_objects = most
    for kind in (COMPILE_ERROR, LOAD_ERROR):
        if kind in reply:
            return kind, str(reply[kind])[:MESSAGE_CHARACTERS], {}
    names = reply.get("names")
    if LOADED not in reply or not isinstance(names, dict):
        raise ChannelBrokenError("the submission's process did not report whether it has loaded")
    defined = {name: each for name, each in names.items() if isinstance(name, str) and callable(each)}
    return LOADED, "", {name: each for name, each in defined.items() if not name.startswith("__")}


def run_code_test(
    setup_code: str, code: str, function_name: str, peer: CallerPeer, names: dict[str, Any]
) -> CodeTestReport:
    """Runs `setup_code`, then `code`, in one namespace where the names in `function_name` are stand-ins, whatever the
    setup defines under them, and `candidate` is the first; then `check(candidate)` where `code` defines it.

    What else the submission defines has its names there where neither the setup nor Python has them. A fault of the
    test's is the submission's, unless the test has the same one with answers that agree with everything, whatever text
    they are: a submission must not gain by what it defines or returns that it is not judged.
    """
    report = _run_test(setup_code, code, function_name, peer, names)
    if report.ending == TEST_ERROR:
        known = (*names, *split_names(function_name))
        agreed = [_run_agreed(setup_code, code, function_name, text, known) for text in _AGREED_TEXTS]
        return report if all(_have_same_fault(report, each) for each in agreed) else replace(report, ending=FAILED)
    return report


_AGREED_TEXTS = ("", "agreed")


def _have_same_fault(report: CodeTestReport, agreed: CodeTestReport) -> bool:
    """Returns whether a test fails alike with both answers, or calls nothing with either."""
    return agreed.ending == TEST_ERROR and (agreed.message == report.message or agreed.calls == report.calls == 0)


def _run_agreed(setup_code: str, code: str, function_name: str, text: str, names: Iterable[str]) -> CodeTestReport:
    """Runs the test with answers that agree with everything, and are `text` where they are converted to one."""
    peer = AgreeingPeer(text)
    stand_ins = {name: peer.make_function(name) for name in names}
    return _run_test(setup_code, code, function_name, peer, stand_ins, without_asserts=True)


class _WithoutAsserts(ast.NodeTransformer):
    """Has what is asserted evaluated, whatever comes of it."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.copy_location(ast.Expr(node.test), node)


def _run_test(
    setup_code: str,
    code: str,
    function_name: str,
    peer: CallerPeer,
    names: dict[str, Any],
    *,
    without_asserts: bool = False,
) -> CodeTestReport:
    module = types.ModuleType("code_test")
    module.__dict__["__builtins__"] = builtins
    sys.modules["code_test"] = module
    namespace = module.__dict__
    try:
        _execute(setup_code, _SETUP_PATH, namespace)
    except BaseException as error:
        return CodeTestReport(TEST_ERROR, _cut(f"the setup code raised {_summarize(error)}"), 0)
    for name, stand_in in names.items():
        if not hasattr(builtins, name):
            namespace.setdefault(name, stand_in)
    tested = split_names(function_name)
    candidate = names.get(tested[0])
    namespace.update({name: names[name] for name in tested if name in names}, candidate=candidate)
    check_before = namespace.get("check")
    failure: BaseException | None = None
    try:
        _execute(code, _TEST_PATH, namespace, without_asserts)
        check = namespace.get("check")
        if isinstance(check, types.FunctionType) and check is not check_before:
            check(candidate)
    except BaseException as error:
        failure = error
    ending, message = _decide(failure, peer, function_name, code)
    return CodeTestReport(ending, _cut(message), peer.calls)


def _execute(code: str, path: str, namespace: dict[str, Any], without_asserts: bool = False) -> None:
    linecache.cache[path] = (len(code), None, code.splitlines(keepends=True), path)
    tree = ast.parse(code, path)
    if without_asserts:
        tree = ast.fix_missing_locations(_WithoutAsserts().visit(tree))
    exec(compile(tree, path, "exec", dont_inherit=True), namespace)


def _decide(failure: BaseException | None, peer: CallerPeer, function_name: str, code: str) -> tuple[str, str]:
    # these two count even if the test has caught them
    if peer.fault is not None:
        return TEST_ERROR, str(peer.fault)
    if peer.broken is not None:
        return SUBMISSION_ERROR, str(peer.broken)
    if failure is None:
        return (PASSED, "") if peer.calls else (TEST_ERROR, f"the test does not call {function_name}")
    if getattr(failure, MARK, False):
        return SUBMISSION_ERROR, str(failure) if isinstance(failure, SubmissionError) else _summarize(failure)
    if isinstance(failure, NameError) and re.search(rf"\b{getattr(failure, 'name', None)}\s*[(.]", code):
        return SUBMISSION_ERROR, f"{_summarize(failure)}{_location(failure)}"  # it is the submission's to define
    if isinstance(failure, _OWN_FAULTS) or not peer.calls:
        return TEST_ERROR, f"the test raised {_summarize(failure)}{_location(failure)}"
    if isinstance(failure, AssertionError):
        return FAILED, f"{_summarize(failure)}{_location(failure)}"
    return FAILED, f"what was returned led to {_summarize(failure)}{_location(failure)}"


def _summarize(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # an integer with too many digits to print, or an object of the submission's
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
"""Descriptor of the test's report, which only the test has. It begins with `CALLED` while the submission loads, and as
soon as the test has called it."""
CALLED = b" "


def serve_calls(archive: Archive, home: str) -> NoReturn:
    """Runs the submission's side: answers calls until the test has ended."""
    header = archive.header
    with os.fdopen(REQUESTS, "rb") as requests, os.fdopen(REPLIES, "wb") as replies:
        serve_submission(
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
        peer = CallerPeer(requests, replies, max_reply_bytes=header["reply_bytes"])
        peer.on_first_call = lambda: os.write(REPORT, CALLED)
        os.write(REPORT, CALLED)  # a submission may send more than there is room for
        try:
            loaded, message, names = wait_until_loaded(peer)
        except (ChannelBrokenError, Exception) as error:  # nothing of the test has run yet
            loaded, message, names = "broken", str(error)[:MESSAGE_CHARACTERS], {}
        os.ftruncate(REPORT, 0)
        os.lseek(REPORT, 0, os.SEEK_SET)
        report = {"loaded": loaded, "message": message}
        if loaded == LOADED:
            setup, code = (blob.decode() for blob in archive.blobs[:2])
            report |= asdict(run_code_test(setup, code, header["function_name"], peer, names))
        os.write(REPORT, json.dumps(report).encode())
        os._exit(0)
