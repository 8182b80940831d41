"""Deadlines of the sandbox's clients."""

from __future__ import annotations

from perigee.sandbox.client import wait_s
from perigee.sandbox.v1 import sandbox_pb2 as pb


def test_a_call_waits_for_all_that_its_limits_allow() -> None:
    request = pb.JudgeRequest(tests=[pb.TestCase()] * 10, limits=pb.Limits(wall_ms=120_000))
    assert wait_s(request) > 10 * 120
    without = wait_s(request)
    request.checker.program.limits.wall_ms = 30_000
    assert wait_s(request) >= without + 10 * 30
    request.retry_starved = True
    assert wait_s(request) >= 2 * without
    assert wait_s(pb.ExecuteRequest(limits=pb.Limits(wall_ms=110_000))) > 110
    slow = pb.ExecuteRequest(compile_limits=pb.Limits(wall_ms=120_000))
    assert wait_s(slow) > 120


def test_a_call_waits_for_extra_time_and_further_passes() -> None:
    request = pb.JudgeRequest(tests=[pb.TestCase()] * 10, limits=pb.Limits(wall_ms=10_000))
    without = wait_s(request)
    request.extra_time["java"].factor = 5
    assert wait_s(request) >= without + 10 * 40
    request.passes = 2
    assert wait_s(request) >= without + 2 * 10 * 40
