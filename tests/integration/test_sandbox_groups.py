"""Groups, protocols and arguments of checkers, passes and extra time, on programs that run."""

from __future__ import annotations

import pytest

from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox_fronts import Fronts
from tests.integration.test_sandbox_judging import ECHO, verdicts


def stdio(name: str, stdin: bytes, expected: bytes, **fields: object) -> pb.TestCase:
    return pb.TestCase(name=name, stdio=pb.StdioTest(stdin=stdin, expected_stdout=expected), **fields)


async def test_groups_are_skipped_and_scored(fronts: Fronts) -> None:
    request = pb.JudgeRequest(
        language="python",
        source=ECHO,
        groups=[
            pb.TestGroup(name="easy", points=30),
            pb.TestGroup(name="wrong", points=50, stop_at_first_failure=True),
            pb.TestGroup(name="last", points=20, needs=["wrong"]),
        ],
        tests=[
            stdio("1", b"a", b"a", group="easy"),
            stdio("2", b"a", b"b", group="wrong"),
            stdio("3", b"a", b"a", group="wrong"),
            stdio("4", b"a", b"a", group="last"),
        ],
    )
    response = await fronts.grpc.judge(request)
    assert verdicts(response) == ["ACCEPTED", "WRONG_ANSWER", "SKIPPED", "SKIPPED"]
    assert [(group.name, group.points, group.max_points) for group in response.groups] == [
        ("easy", 30, 30),
        ("wrong", 0, 50),
        ("last", 0, 20),
    ]
    assert (response.points, response.score) == (30, 0.3)


VALIDATOR = b"""
import sys
content, answer, feedback, *rest = sys.argv[1:]
number = int(open(content).read())
open(feedback + "judgemessage.txt", "w").write(" ".join(rest))
if int(input()) != 2 * number:
    sys.exit(43)
if number < int(open(answer).read()):
    open(feedback + "nextpass.in", "w").write(str(2 * number))
sys.exit(42)
"""


async def test_a_validator_asks_for_passes(fronts: Fronts) -> None:
    validator = pb.Program(
        language="python", source=VALIDATOR, protocol=pb.CHECKER_PROTOCOL_KATTIS, args=["one"], points_scale=0
    )
    tests = [stdio("1", b"1", b"4", checker_args=["two"]), stdio("2", b"1", b"100")]
    request = pb.JudgeRequest(
        language="python",
        source=b"import os; assert not os.path.exists('x'); open('x', 'w'); print(int(input()) * 2)",
        tests=tests,
        checker=pb.Checker(program=validator),
        passes=3,
    )
    response = await fronts.grpc.judge(request)
    assert verdicts(response) == ["ACCEPTED", "UNJUDGEABLE"]
    assert response.results[0].reason == "one two"
    assert "more than 3 passes" in response.results[1].reason
    dialogues = [pb.TestCase(interactive=pb.InteractiveTest(input=b"1", answer=b"4"))]
    talking = pb.JudgeRequest(language="python", source=b"print(4)", tests=dialogues, interactor=validator, passes=3)
    talking.source = b"print(2, flush=True)"
    assert verdicts(await fronts.grpc.judge(talking)) == ["WRONG_ANSWER"]  # the second pass has another input


async def test_extra_time_by_language(fronts: Fronts) -> None:
    request = pb.JudgeRequest(
        language="python",
        source=b"import time; time.sleep(0.6)",
        tests=[stdio("1", b"", b"")],
        limits=pb.Limits(wall_ms=300),
    )
    assert verdicts(await fronts.grpc.judge(request)) == ["TIME_LIMIT"]
    request.extra_time["py"].CopyFrom(pb.ExtraTime(factor=2, added_ms=30_000))
    assert verdicts(await fronts.grpc.judge(request)) == ["ACCEPTED"]
    request.extra_time["py"].added_ms = 200_000
    with pytest.raises(InvalidArgumentError, match=r"limits\.wall_ms: is 200600 with extra time, at most"):
        await fronts.grpc.judge(request)


async def test_wrong_groups_are_named(fronts: Fronts) -> None:
    request = pb.JudgeRequest(
        language="python",
        source=b"1",
        groups=[pb.TestGroup(name="a", needs=["b"]), pb.TestGroup(name="a"), pb.TestGroup(name="c", needs=["a"])],
        tests=[stdio("1", b"", b"", group="c"), stdio("2", b"", b"", group="a"), stdio("3", b"", b"", group="x")],
        compile_args=["-O3"],
    )
    with pytest.raises(InvalidArgumentError) as caught:
        await fronts.grpc.judge(request)
    assert [violation.field for violation in caught.value.violations] == [
        "compile_args",
        "groups[0].needs",
        "groups[1].name",
        "tests[1].group",
        "tests[2].group",
    ]
