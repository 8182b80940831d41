"""Groups of tests: which tests are run, and what points a group makes."""

from __future__ import annotations

from collections.abc import Sequence

from perigee.sandbox.v1 import sandbox_pb2 as pb


def points_of(test: pb.TestCase) -> float:
    """Returns the points of a test."""
    return test.points if test.HasField("points") else 1.0


def skipped_result() -> pb.TestResult:
    """Returns the result of a test that is not run."""
    return pb.TestResult(verdict=pb.TEST_VERDICT_SKIPPED)


class Schedule:
    """Decides which tests are run, by the results of those before them.

    In a group a test has failed when it is not accepted and earned nothing, or when the group needs every test.
    """

    def __init__(self, request: pb.JudgeRequest) -> None:
        self._groups = {group.name: group for group in request.groups}
        self._stops = request.stop_at_first_failure
        self._failed: set[str] = set()
        self._is_over = False

    def skips(self, test: pb.TestCase) -> bool:
        """Returns whether a test is left out."""
        group = self._groups.get(test.group)
        if self._is_over or group is None:
            return self._is_over
        stopped = group.stop_at_first_failure and group.name in self._failed
        return stopped or not self._failed.isdisjoint(group.needs)

    def note(self, test: pb.TestCase, result: pb.TestResult) -> None:
        """Takes the result of a test, whose points are a fraction."""
        if result.verdict == pb.TEST_VERDICT_ACCEPTED:
            return
        self._is_over |= self._stops
        group = self._groups.get(test.group)
        if group is not None and (not result.points or needs_all(group)):
            self._failed.add(group.name)


def needs_all(group: pb.TestGroup) -> bool:
    """Returns whether a group has its points only when every test is accepted."""
    return group.policy in (pb.GROUP_POLICY_UNSPECIFIED, pb.GROUP_POLICY_ALL)


def first_other(verdicts: Sequence[pb.TestVerdict.ValueType]) -> pb.TestVerdict.ValueType:
    """Returns ACCEPTED when all verdicts are, else the first other one."""
    others = (verdict for verdict in verdicts if verdict != pb.TEST_VERDICT_ACCEPTED)
    return next(others, pb.TEST_VERDICT_ACCEPTED)


def score_group(group: pb.TestGroup, tests: Sequence[pb.TestCase], results: Sequence[pb.TestResult]) -> pb.GroupResult:
    """Returns the result of a group from those of its tests, whose points are fractions."""
    total = sum(points_of(test) for test in tests)
    accepted = [result.verdict == pb.TEST_VERDICT_ACCEPTED for result in results]
    if needs_all(group):
        fraction = float(all(accepted))
    elif group.policy == pb.GROUP_POLICY_MINIMUM:
        fraction = min((result.points for result in results), default=1.0)
    else:
        earned = sum(points_of(test) * result.points for test, result in zip(tests, results, strict=True))
        fraction = earned / total if total else float(all(accepted))
    most = group.points if group.HasField("points") else total
    return pb.GroupResult(
        name=group.name,
        verdict=first_other([result.verdict for result in results]),
        points=most * fraction,
        max_points=most,
        passed=sum(accepted),
    )
