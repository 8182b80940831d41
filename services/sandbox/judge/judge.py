"""Judges submissions: runs them against their tests and sums up the results."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from itertools import zip_longest

from perigee.errors import ResourceExhaustedError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.kit.telemetry import get_logger
from services.sandbox.judge.functions import judge_code, judge_functions
from services.sandbox.judge.groups import Schedule, first_other, points_of, score_group, skipped_result
from services.sandbox.judge.interactive import judge_interactive
from services.sandbox.judge.results import Results
from services.sandbox.judge.stdio import judge_stdio
from services.sandbox.runtime import metrics
from services.sandbox.runtime.execute import is_starved
from services.sandbox.runtime.failure import SandboxFailedError, UnjudgeableError
from services.sandbox.runtime.jobs import Submission
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.worker_slots import SlotPair

log = get_logger(__name__)


async def judge(pool: Pool, submission: Submission, remaining_s: float | None = None) -> pb.JudgeResponse:
    """Judges a submission in one pair of slots; failures of the sandbox come back as INFRA_ERROR, of the problem as
    UNJUDGEABLE.

    One that was starved in a test is judged once more, alone, where its request says so. Raises ResourceExhaustedError
    when no pair of slots is free in time.
    """
    cost_s = estimate_cost_s(submission)
    begun = time.monotonic()
    response = await _judge_once(pool, submission, pool.lease(cost_s, remaining_s))
    if submission.request.retry_starved and any(map(is_starved, response.results)):
        left_s = None if remaining_s is None else remaining_s - (time.monotonic() - begun)
        with suppress(ResourceExhaustedError):  # the first response stands
            return await _judge_once(pool, submission, pool.lease_alone(cost_s, left_s))
    return response


async def _judge_once(
    pool: Pool, submission: Submission, lease: AbstractAsyncContextManager[SlotPair]
) -> pb.JudgeResponse:
    async with lease as pair:
        started = time.monotonic()
        try:
            results, compiled = await _judge(pool, submission, pair)
        except SandboxFailedError as error:
            log.warning("sandbox_failed", reason=error.message)
            failure = pb.TestResult(verdict=pb.TEST_VERDICT_INFRA_ERROR, reason=error.message)
            results, compiled = [failure] * len(submission.request.tests), None
        except UnjudgeableError as error:
            failure = pb.TestResult(verdict=pb.TEST_VERDICT_UNJUDGEABLE, reason=error.message)
            results, compiled = [failure] * len(submission.request.tests), None
        wall_ms = math.ceil((time.monotonic() - started) * 1000)
    response = sum_up(submission, results, compiled)
    response.wall_ms = wall_ms
    metrics.count("judge", pb.TestVerdict.Name(response.verdict).removeprefix("TEST_VERDICT_"), started)
    return response


def estimate_cost_s(submission: Submission) -> float:
    """Returns the time that a submission may take at most, by which the queue is ordered."""
    program = submission.program
    compile_ms = program.compile_limits.wall_ms if program.runtime.config.compile else 0
    runs = len(submission.request.tests) * max(1, submission.request.passes)
    return (compile_ms + runs * program.limits.wall_ms) / 1000


async def _judge(pool: Pool, submission: Submission, pair: SlotPair) -> Results:
    match submission.request.tests[0].WhichOneof("kind"):
        case "function":
            return await judge_functions(pool.factory, submission, pair)
        case "code":
            return await judge_code(pool.factory, submission, pair)
        case "interactive":
            return await judge_interactive(pool.factory, submission, pair)
    return await judge_stdio(pool.factory, submission, pair)


def sum_up(submission: Submission, results: list[pb.TestResult], compiled: pb.CompileResult | None) -> pb.JudgeResponse:
    """Adds names, points and groups, and SKIPPED for tests that are not to be run, also where they were."""
    request = submission.request
    if compiled is not None and compiled.reason:
        said = (compiled.stderr or compiled.stdout) if compiled.exit_code else b""
        output = said.decode(errors="replace").strip()
        failure = pb.TestResult(verdict=pb.TEST_VERDICT_COMPILE_ERROR, reason=output or compiled.reason)
        results = [failure] * len(request.tests)
    elif not all(result.verdict == pb.TEST_VERDICT_COMPILE_ERROR for result in results):
        results = apply_schedule(request, results)
    verdict = first_other([result.verdict for result in results])
    response = pb.JudgeResponse(verdict=verdict, results=results, compile=compiled)
    response.groups.extend(
        score_group(group, *zip(*members, strict=True))
        for group in request.groups
        if (members := [pair for pair in zip(request.tests, results, strict=True) if pair[0].group == group.name])
    )
    response.points = sum(group.points for group in response.groups)
    response.max_points = sum(group.max_points for group in response.groups)
    for result, test in zip(response.results, request.tests, strict=True):
        result.name, result.points = test.name, result.points * points_of(test)
        response.passed += result.verdict == pb.TEST_VERDICT_ACCEPTED
        if not test.group:
            response.max_points += points_of(test)
            response.points += result.points
    accepted = float(verdict == pb.TEST_VERDICT_ACCEPTED)
    response.score = response.points / response.max_points if response.max_points else accepted
    response.peak_memory_bytes = max((result.peak_memory_bytes for result in results), default=0)
    return response


def apply_schedule(request: pb.JudgeRequest, results: Sequence[pb.TestResult]) -> list[pb.TestResult]:
    """Returns a result for each test: function tests are run in one process, also those that the schedule skips."""
    schedule, scheduled = Schedule(request), []
    for test, result in zip_longest(request.tests, results):
        kept = skipped_result() if result is None or schedule.skips(test) else result
        schedule.note(test, kept)
        scheduled.append(kept)
    return scheduled
