"""Decisions of checkers and interactors: how each protocol starts the program, and what its end says.

The protocols are testlib's (https://github.com/MikeMirzayanov/testlib), that of Kattis' output validators
(https://icpc.io/problem-package-format), and those that DMOJ knows beside testlib's
(https://docs.dmoj.ca/#/judge/problem_format).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.runtime.jobs import Checker

MESSAGE_CHARACTERS = 1000
_UTF8_BYTES = 4
FILES = {"input": "input.txt", "output": "output.txt", "answer": "answer.txt", "feedback": "feedback/"}
NEXT_PASS, SCORE, JUDGE_MESSAGE = "nextpass.in", "feedback/score.txt", "feedback/judgemessage.txt"
_TESTLIB: tuple[str, ...] = ("input", "output", "answer")
_ARGUMENTS: dict[pb.CheckerProtocol.ValueType, tuple[str, ...]] = {
    pb.CHECKER_PROTOCOL_KATTIS: ("input", "answer", "feedback"),
    pb.CHECKER_PROTOCOL_PEG: ("answer", "output", "input"),
}
_NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?!\S)"
_POINTS = re.compile(rf"\s*(?:points\s+)?{_NUMBER}", re.ASCII)
_SCORE = re.compile(rf"\s*{_NUMBER}", re.ASCII)
_PARTIALLY = re.compile(r"partially correct \((\d{1,3})\)", re.ASCII)
_COCI = re.compile(r"^partial (\d{1,18})/(\d{0,17}[1-9]\d{0,17})$", re.ASCII | re.MULTILINE)
# uncaught exceptions of Python and of the JVM, a panic of Go: their exit codes are those of wrong answers
_CRASH = re.compile(rb"\s*(?:Traceback \(most recent call last\):|Exception in thread \"|panic: )")
_ENDINGS_TESTLIB = {0: True, 1: False, 2: False, 4: False, 8: False}
_ENDINGS = {
    pb.CHECKER_PROTOCOL_KATTIS: {42: True, 43: False},
    pb.CHECKER_PROTOCOL_PEG: {0: True, 1: False},
    pb.CHECKER_PROTOCOL_EXIT_CODE: {0: True, 1: False},
}
_FAIL, _POINTS_CODE, _PERCENT_BASE = 3, 7, 50
_TESTLIBS = (pb.CHECKER_PROTOCOL_UNSPECIFIED, pb.CHECKER_PROTOCOL_TESTLIB, pb.CHECKER_PROTOCOL_COCI)


@dataclass(frozen=True)
class Ending:
    """End of a checker or an interactor: `signal` is 0 unless one ended it, `limit` names the limit that it passed."""

    exit_code: int
    signal: int = 0
    stderr: bytes = b""
    stdout: bytes = b""
    limit: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files that it left, of those that `files_of` names."""


@dataclass(frozen=True)
class Decision:
    """Decision of a checker or an interactor.

    `verdict` is ACCEPTED, WRONG_ANSWER, UNJUDGEABLE or INFRA_ERROR, `fraction` the part of the test's points from 0 to
    1, None for a failure, `message` the program's own, or why it failed. `is_declared` is set where the program itself
    says that the test is wrong. `next_input` begins another pass.
    """

    verdict: pb.TestVerdict.ValueType
    fraction: float | None
    message: str
    is_declared: bool = False
    next_input: bytes | None = None


def arguments_of(checker: Checker, test_arguments: Sequence[str], is_interactor: bool = False) -> list[str]:
    """Returns the arguments of a checker or an interactor."""
    if checker.replace_arguments:
        return [fill(argument) for argument in checker.arguments] + [*test_arguments]
    names = _ARGUMENTS.get(checker.protocol, _TESTLIB)
    if is_interactor and checker.protocol in (pb.CHECKER_PROTOCOL_COCI, pb.CHECKER_PROTOCOL_EXIT_CODE):
        names = ("input", "answer")
    return [*(FILES[name] for name in names), *checker.arguments, *test_arguments]


def fill(argument: str) -> str:
    """Returns an argument with the names of the files in their places."""
    for name, file in FILES.items():
        argument = argument.replace(f"{{{name}}}", file)
    return argument


def files_of(checker: Checker, passes: int) -> list[str]:
    """Names the files that say something beside the program's end."""
    kattis = checker.protocol == pb.CHECKER_PROTOCOL_KATTIS
    next_pass = [f"feedback/{NEXT_PASS}" if kattis else NEXT_PASS] if passes > 1 else []
    return [*([SCORE, JUDGE_MESSAGE] if kattis else []), *next_pass]


def read_decision(ending: Ending, checker: Checker, most_points: float = 1.0) -> Decision:
    """Reads the decision of a checker or an interactor on a test of `most_points` from how its process ended.

    Whatever is no decision is a failure of the program, UNJUDGEABLE: other exit codes, a signal, a limit, an uncaught
    exception, or points that are no number within the test's.
    """
    message = message_of(ending, checker.protocol)
    if ending.limit:
        return failure(f"passed its {ending.limit}", message)
    if ending.signal:
        return failure(f"was ended by signal {ending.signal}", message)
    match checker.protocol:
        case pb.CHECKER_PROTOCOL_PEG if (ratio := find_ratio(ending.stdout)) and ending.exit_code in (0, 1):
            return by_fraction(ratio, message)
        case pb.CHECKER_PROTOCOL_COCI if ending.exit_code == _POINTS_CODE:
            found = _COCI.search(ending.stderr.decode(errors="replace"))
            if found is None:
                return failure("ended with exit code 7 without a line like `partial 1/2`", message)
            return by_fraction(int(found[1]) / int(found[2]), message)
        case pb.CHECKER_PROTOCOL_TESTLIB | pb.CHECKER_PROTOCOL_UNSPECIFIED:
            percent = _PARTIALLY.match(message)
            if percent is not None and ending.exit_code in (int(percent[1]), int(percent[1]) + _PERCENT_BASE):
                return by_fraction(int(percent[1]) / 100, message)
            if ending.exit_code == _POINTS_CODE:
                hint = "ended with exit code 7 without a message like `points 0.5`"
                return by_points(_POINTS.match(message), hint, message, checker, most_points)
    accepts = _ENDINGS.get(checker.protocol, _ENDINGS_TESTLIB).get(ending.exit_code)
    if accepts is None:
        declared = ending.exit_code == _FAIL and checker.protocol in _TESTLIBS
        return replace(failure(f"ended with exit code {ending.exit_code}", message), is_declared=declared)
    if not accepts and _CRASH.match(ending.stderr):
        end = ending.stderr[-MESSAGE_CHARACTERS:].decode(errors="replace").strip().rpartition("\n")[2]
        return failure("ended with an uncaught exception", end)
    score = ending.files.get(SCORE)
    if accepts and most_points and score is not None:  # where there are no points, no part of them can be given
        hint = "left a feedback/score.txt that is no number"
        return by_points(_SCORE.match(score.decode(errors="replace")), hint, message, checker, most_points)
    if accepts:
        following = (content for path, content in ending.files.items() if path.endswith(NEXT_PASS))
        return Decision(pb.TEST_VERDICT_ACCEPTED, 1.0, message, next_input=next(following, None))
    return Decision(pb.TEST_VERDICT_WRONG_ANSWER, 0.0, message)


def message_of(ending: Ending, protocol: pb.CheckerProtocol.ValueType) -> str:
    """Returns what the program says about its decision."""
    text = ending.stderr
    if protocol in (pb.CHECKER_PROTOCOL_PEG, pb.CHECKER_PROTOCOL_EXIT_CODE):
        text = ending.stdout or text
    text = ending.files.get(JUDGE_MESSAGE) or text
    return text[: _UTF8_BYTES * MESSAGE_CHARACTERS].decode(errors="replace").strip()[:MESSAGE_CHARACTERS]


def find_ratio(stdout: bytes) -> float | None:
    """Returns the ratio of the first two lines in a row that are numbers with one above 0; None when there are none."""
    for above, below in pairwise(stdout.decode(errors="replace").split("\n")):
        try:
            ratio = float(above) / float(below)
        except (ValueError, ZeroDivisionError):
            continue
        if ratio > 0:
            return ratio
    return None


def by_points(found: re.Match[str] | None, hint: str, message: str, checker: Checker, most_points: float) -> Decision:
    """Returns the decision that a number of points stands for. Later words of a message are not searched for one:
    messages quote what submissions wrote.
    """
    if found is None:
        return failure(hint, message)
    points = float(found[1])
    fractions = checker.points_scale == pb.POINTS_SCALE_FRACTION or (
        checker.points_scale == pb.POINTS_SCALE_UNSPECIFIED and points <= 1
    )
    if fractions:
        return by_fraction(points, message)
    if not 0 <= points <= most_points:
        return failure(f"gave {found[1]} points of {most_points:g}", message)
    return by_fraction(points / most_points if most_points else 0.0, message)


def by_fraction(fraction: float, message: str) -> Decision:
    """Returns the decision that a part of the points stands for."""
    if not (math.isfinite(fraction) and 0 <= fraction <= 1):
        return failure(f"gave {fraction:g} of the points, which is no fraction from 0 to 1", message)
    verdict = pb.TEST_VERDICT_ACCEPTED if fraction == 1 else pb.TEST_VERDICT_WRONG_ANSWER
    return Decision(verdict, fraction, message)


def failure(reason: str, message: str) -> Decision:
    """Returns that the program failed."""
    text = f"the checking program {reason}: {message}" if message else f"the checking program {reason}"
    return Decision(pb.TEST_VERDICT_UNJUDGEABLE, None, text[:MESSAGE_CHARACTERS])
