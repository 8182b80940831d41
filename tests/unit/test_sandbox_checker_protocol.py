"""What checkers and interactors decide by how they end."""

from __future__ import annotations

import subprocess
import sys
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.judge import decisions
from services.sandbox.judge.decisions import Decision, Ending, arguments_of
from services.sandbox.runtime.jobs import Checker, Program

ACCEPTED, WRONG, FAILED = pb.TEST_VERDICT_ACCEPTED, pb.TEST_VERDICT_WRONG_ANSWER, pb.TEST_VERDICT_UNJUDGEABLE


NO_PROGRAM = cast(Program, None)
TESTLIB, KATTIS = pb.CHECKER_PROTOCOL_TESTLIB, pb.CHECKER_PROTOCOL_KATTIS
COCI, PEG, EXIT_CODE = pb.CHECKER_PROTOCOL_COCI, pb.CHECKER_PROTOCOL_PEG, pb.CHECKER_PROTOCOL_EXIT_CODE


def read_decision(exit_code: int, signal: int, stderr: bytes, limit: str = "") -> Decision:
    return decisions.read_decision(Ending(exit_code, signal, stderr, limit=limit), Checker(NO_PROGRAM))


@pytest.mark.parametrize(
    ("exit_code", "stderr", "decision"),
    [
        (0, b"ok 3 numbers\n", Decision(ACCEPTED, 1.0, "ok 3 numbers")),
        (0, b"", Decision(ACCEPTED, 1.0, "")),
        (1, b"wrong answer 1st words differ\n", Decision(WRONG, 0.0, "wrong answer 1st words differ")),
        (2, b"wrong output format Unexpected end\n", Decision(WRONG, 0.0, "wrong output format Unexpected end")),
        (7, b"points 0.250 too long\n", Decision(WRONG, 0.25, "points 0.250 too long")),
        (7, b"0.5", Decision(WRONG, 0.5, "0.5")),
        (7, b"points 1", Decision(ACCEPTED, 1.0, "points 1")),
        (7, b"points 0", Decision(WRONG, 0.0, "points 0")),
        (7, b"points 5e-1 fine", Decision(WRONG, 0.5, "points 5e-1 fine")),
        (4, b"", Decision(WRONG, 0.0, "")),
        (8, b"unexpected eof", Decision(WRONG, 0.0, "unexpected eof")),
        (50, b"partially correct (50) half", Decision(WRONG, 0.5, "partially correct (50) half")),
        (0, b"partially correct (0) none", Decision(WRONG, 0.0, "partially correct (0) none")),
        (57, b"partially correct (7) with TESTSYS", Decision(WRONG, 0.07, "partially correct (7) with TESTSYS")),
        (100, b"partially correct (100)", Decision(ACCEPTED, 1.0, "partially correct (100)")),
        (1, b"\xff", Decision(WRONG, 0.0, "\N{REPLACEMENT CHARACTER}")),
    ],
)
def test_decisions(exit_code: int, stderr: bytes, decision: Decision) -> None:
    assert read_decision(exit_code, 0, stderr) == decision


@pytest.mark.parametrize(
    ("exit_code", "signal", "stderr", "limit", "reason"),
    [
        (3, 0, b"FAIL answer expected\n", "", "ended with exit code 3: FAIL answer expected"),
        (5, 0, b"", "", "ended with exit code 5"),
        (50, 0, b"partially correct (49) x", "", "ended with exit code 50: partially correct (49)"),
        (255, 0, b"", "", "ended with exit code 255"),
        (-1, 11, b"", "", "was ended by signal 11"),
        (0, 9, b"", "", "was ended by signal 9"),
        (-1, 9, b"x", "wall-clock limit of 5 ms", "passed its wall-clock limit of 5 ms: x"),
        (0, 0, b"ok", "output limit of 5 bytes", "passed its output limit of 5 bytes: ok"),
        (7, 0, b"", "", "without a message like `points 0.5`"),
        (7, 0, b"points", "", "without a message like `points 0.5`"),
        (7, 0, b"points nan", "", "without a message like `points 0.5`"),
        (7, 0, b"points 0x1", "", "without a message like `points 0.5`"),
        (7, 0, "points \N{ARABIC-INDIC DIGIT ONE}".encode(), "", "without a message like `points 0.5`"),
        (7, 0, b"points 1of2", "", "without a message like `points 0.5`"),
        (7, 0, b'the submission wrote "points 1"', "", "without a message like `points 0.5`"),
        (7, 0, b"points for test 1", "", "without a message like `points 0.5`"),
        (7, 0, b"points 50 of 100", "", "gave 50 points of 1"),
        (7, 0, b"points -0.1", "", "gave -0.1 of the points, which is no fraction from 0 to 1"),
        (7, 0, b"1e999", "", "gave 1e999 points of 1"),
        (2, 0, b"panic: runtime error: index out of range", "", "ended with an uncaught exception: panic: runtime"),
        (1, 0, b'Exception in thread "main" java.lang.Error', "", "ended with an uncaught exception: Exception in"),
    ],
)
def test_whatever_is_no_decision_is_a_failure_with_a_reason(
    exit_code: int, signal: int, stderr: bytes, limit: str, reason: str
) -> None:
    decision = read_decision(exit_code, signal, stderr, limit)
    assert (decision.verdict, decision.fraction) == (FAILED, None)
    assert decision.message.startswith("the checking program ")
    assert reason in decision.message


def test_a_python_checker_that_raises_has_not_decided() -> None:
    checker = "import sys; print(f'points {1 / int(sys.argv[1])}', file=sys.stderr); sys.exit(7)"
    runs = [subprocess.run([sys.executable, "-c", checker, each], capture_output=True) for each in ("4", "0")]
    fine, crashed = (read_decision(run.returncode, 0, run.stderr) for run in runs)
    assert fine == Decision(WRONG, 0.25, "points 0.25")
    assert runs[1].returncode == 1
    assert crashed.verdict == FAILED
    assert crashed.message.endswith("ended with an uncaught exception: ZeroDivisionError: division by zero")


def test_messages_are_cut() -> None:
    assert read_decision(1, 0, b" " + "é".encode() * 2000).message == "é" * 1000
    assert len(read_decision(3, 0, b"x" * 10**6).message) == 1000
    crash = b"Traceback (most recent call last):\n" + b"  deep\n" * 10_000 + b"ValueError: 5"
    assert read_decision(1, 0, crash).message.endswith("exception: ValueError: 5")
    assert read_decision(7, 0, b"points 0.5 " + b"x" * 10**6).fraction == 0.5


@settings(deadline=None, max_examples=30)
@given(st.integers(-1, 255), st.integers(0, 64), st.binary(max_size=40), st.sampled_from(["", "CPU limit"]))
def test_only_the_codes_for_it_decide(exit_code: int, signal: int, stderr: bytes, limit: str) -> None:
    decision = read_decision(exit_code, signal, stderr, limit)
    if signal or limit or exit_code not in (0, 1, 2, 4, 7, 8):
        assert decision.verdict == FAILED
    if decision.verdict == FAILED:
        assert decision.fraction is None
        assert decision.message
    else:
        assert decision.fraction is not None
        assert (decision.verdict == ACCEPTED) == (decision.fraction == 1)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1), st.text(max_size=20))
def test_any_fraction_with_any_text(fraction: float, text: str) -> None:
    assert read_decision(7, 0, f"points {fraction!r} {text}".encode()).fraction == fraction


@pytest.mark.parametrize(
    ("protocol", "ending", "fraction"),
    [
        (KATTIS, Ending(42), 1.0),
        (KATTIS, Ending(43), 0.0),
        (KATTIS, Ending(0), None),
        (KATTIS, Ending(42, files={"feedback/score.txt": b"2.5\n"}), 0.25),
        (KATTIS, Ending(42, files={"feedback/score.txt": b"much"}), None),
        (KATTIS, Ending(42, files={"feedback/score.txt": b""}), None),
        (KATTIS, Ending(43, files={"feedback/score.txt": b"10"}), 0.0),
        (COCI, Ending(7, stderr=b"a word\npartial 1/5\n"), 0.2),
        (COCI, Ending(7, stderr=b"partial 6/5"), None),
        (COCI, Ending(7, stderr=b"partial 1/0"), None),
        (COCI, Ending(7, stderr=b"points 0.5"), None),
        (COCI, Ending(7, stderr=b"partial 1/" + b"9" * 5000), None),
        (COCI, Ending(0), 1.0),
        (PEG, Ending(0, stdout=b"1\n10\n"), 0.1),
        (PEG, Ending(1, stdout=b"well\n1\n2\n"), 0.5),
        (PEG, Ending(0, stdout=b"0\n5\n"), 1.0),
        (PEG, Ending(1), 0.0),
        (PEG, Ending(0, stdout=b"3\n2\n"), None),
        (EXIT_CODE, Ending(0), 1.0),
        (EXIT_CODE, Ending(1), 0.0),
        (EXIT_CODE, Ending(2), None),
        (EXIT_CODE, Ending(7, stderr=b"points 0.5"), None),
    ],
)
def test_each_protocol(protocol: pb.CheckerProtocol.ValueType, ending: Ending, fraction: float | None) -> None:
    assert decisions.read_decision(ending, Checker(NO_PROGRAM, protocol), 10.0).fraction == fraction


@pytest.mark.parametrize(
    ("scale", "stderr", "fraction"),
    [
        (pb.POINTS_SCALE_UNSPECIFIED, b"points 5", 0.5),
        (pb.POINTS_SCALE_UNSPECIFIED, b"points 0.5", 0.5),
        (pb.POINTS_SCALE_UNSPECIFIED, b"points 1", 1.0),
        (pb.POINTS_SCALE_UNSPECIFIED, b"points 11", None),
        (pb.POINTS_SCALE_POINTS, b"points 1", 0.1),
        (pb.POINTS_SCALE_POINTS, b"points -1", None),
        (pb.POINTS_SCALE_FRACTION, b"points 5", None),
    ],
)
def test_what_points_mean(scale: pb.PointsScale.ValueType, stderr: bytes, fraction: float | None) -> None:
    checker = Checker(NO_PROGRAM, points_scale=scale)
    assert decisions.read_decision(Ending(7, stderr=stderr), checker, 10.0).fraction == fraction


def test_a_validator_that_accepts_a_test_without_points_has_accepted_it() -> None:
    checker = Checker(NO_PROGRAM, KATTIS, points_scale=pb.POINTS_SCALE_POINTS)
    ending = Ending(42, files={"feedback/score.txt": b"5"})
    assert decisions.read_decision(ending, checker, 0.0).verdict == ACCEPTED


def test_messages_and_the_next_pass_of_a_validator() -> None:
    files = {"feedback/judgemessage.txt": b"go on", "feedback/nextpass.in": b"2"}
    assert decisions.read_decision(Ending(42, files=files), Checker(NO_PROGRAM, KATTIS)) == Decision(
        ACCEPTED, 1.0, "go on", next_input=b"2"
    )
    assert decisions.read_decision(Ending(43, files=files), Checker(NO_PROGRAM, KATTIS)).next_input is None


def test_arguments() -> None:
    assert arguments_of(Checker(NO_PROGRAM), ["x"]) == ["input.txt", "output.txt", "answer.txt", "x"]
    kattis = Checker(NO_PROGRAM, KATTIS, arguments=("a",))
    assert arguments_of(kattis, []) == ["input.txt", "answer.txt", "feedback/", "a"]
    assert arguments_of(Checker(NO_PROGRAM, EXIT_CODE), [], is_interactor=True) == ["input.txt", "answer.txt"]
    own = Checker(NO_PROGRAM, arguments=("--answer={answer}", "{}"), replace_arguments=True)
    assert arguments_of(own, []) == ["--answer=answer.txt", "{}"]
