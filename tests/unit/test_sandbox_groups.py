"""Groups of tests: which are run, and their points."""

from __future__ import annotations

from typing import cast

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.judge.judge import sum_up
from services.sandbox.runtime.jobs import Submission

ALL, MINIMUM, SUM = pb.GROUP_POLICY_ALL, pb.GROUP_POLICY_MINIMUM, pb.GROUP_POLICY_SUM
VERDICTS = {1.0: pb.TEST_VERDICT_ACCEPTED}


def judged(groups: list[pb.TestGroup], results: list[tuple[str, float]], stop: bool = False) -> pb.JudgeResponse:
    """The response where each test (group, part of its 10 points that it earned) was run."""
    tests = [pb.TestCase(group=group, points=10) for group, _ in results]
    request = pb.JudgeRequest(tests=tests, groups=groups, stop_at_first_failure=stop)
    found = [
        pb.TestResult(verdict=VERDICTS.get(fraction, pb.TEST_VERDICT_WRONG_ANSWER), points=fraction)
        for _, fraction in results
    ]
    return sum_up(cast(Submission, FakeSubmission(request)), found, None)


class FakeSubmission:
    """A submission of which nothing but the request is read."""

    def __init__(self, request: pb.JudgeRequest) -> None:
        self.request = request


@pytest.mark.parametrize(
    ("policy", "points", "expected"),
    [(ALL, None, 0), (MINIMUM, None, 5), (SUM, None, 15), (MINIMUM, 40, 10), (SUM, 40, 30)],
)
def test_policies(policy: pb.GroupPolicy.ValueType, points: float | None, expected: float) -> None:
    group = pb.TestGroup(name="a", policy=policy, points=points)
    response = judged([group], [("a", 1.0), ("a", 0.5) if policy != MINIMUM else ("a", 0.25)])
    assert response.points == response.groups[0].points == expected
    assert response.max_points == (points or 20)
    assert response.score == expected / (points or 20)
    assert response.groups[0].verdict == response.verdict == pb.TEST_VERDICT_WRONG_ANSWER
    assert judged([group], [("a", 1.0), ("a", 1.0)]).score == 1.0


def states(response: pb.JudgeResponse) -> str:
    return "".join(pb.TestVerdict.Name(result.verdict)[len("TEST_VERDICT_")] for result in response.results)


def test_needed_groups_and_stops() -> None:
    groups = [
        pb.TestGroup(name="a", stop_at_first_failure=True),
        pb.TestGroup(name="b", policy=MINIMUM),
        pb.TestGroup(name="c", needs=["a"]),
        pb.TestGroup(name="d", needs=["b"]),
        pb.TestGroup(name="e", needs=["c"]),
    ]
    results = [("a", 0.0), ("a", 1.0), ("b", 0.5), ("c", 1.0), ("d", 1.0), ("e", 1.0), ("", 1.0)]
    response = judged(groups, results)
    assert states(response) == "WSWSASA"
    assert [(group.name, group.points) for group in response.groups] == [
        ("a", 0),
        ("b", 5),
        ("c", 0),
        ("d", 10),
        ("e", 0),
    ]
    assert (response.points, response.max_points) == (25, 70)
    assert states(judged(groups, [("", 0.5), ("b", 1.0)], stop=True)) == "WS"


def test_a_score_without_points_is_the_verdict() -> None:
    group = pb.TestGroup(name="a", points=0)
    assert judged([group], [("a", 1.0)]).score == 1.0
    assert judged([group], [("a", 0.0)]).score == 0.0
