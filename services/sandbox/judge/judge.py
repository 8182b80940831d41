"""Judges submissions: runs them against their tests and sums up the results."""

from __future__ import annotations

import math
import time

from services.kit.telemetry import get_logger
from services.sandbox.judge.functions import judge_code, judge_functions
from services.sandbox.judge.interactive import judge_interactive
from services.sandbox.judge.stdio import judge_stdio
from services.sandbox.runtime import metrics
from services.sandbox.runtime.failure import SandboxFailedError
from services.sandbox.runtime.jobs import (
    CodeTest,
    CompileReport,
    FunctionTest,
    InteractiveTest,
    JudgeResult,
    Status,
    Submission,
    TestResult,
)
from services.sandbox.runtime.pool import Pool
from services.sandbox.runtime.worker_slots import SlotPair

log = get_logger(__name__)

Results = tuple[list[TestResult], CompileReport | None]


async def judge(pool: Pool, submission: Submission, remaining_s: float | None = None) -> JudgeResult:
    """Judges a submission in one pair of slots; failures of the sandbox come back as INFRA_ERROR.

    Raises ResourceExhaustedError when no pair of slots is free in time.
    """
    async with pool.lease(estimate_cost_s(submission), remaining_s) as pair:
        started = time.monotonic()
        try:
            results, report = await _judge(pool, submission, pair)
        except SandboxFailedError as error:
            log.warning("sandbox_failed", reason=error.message)
            results, report = [TestResult(Status.INFRA_ERROR, reason=error.message)] * len(submission.tests), None
        wall_ms = math.ceil((time.monotonic() - started) * 1000)
    result = sum_up(submission, results, report, wall_ms)
    metrics.count("judge", result.status.name, started)
    return result


def estimate_cost_s(submission: Submission) -> float:
    """Returns the time that a submission may take at most, by which the queue is ordered."""
    program = submission.program
    compile_ms = program.compile_limits.wall_ms if program.runtime.config.compile else 0
    return (compile_ms + len(submission.tests) * program.limits.wall_ms) / 1000


async def _judge(pool: Pool, submission: Submission, pair: SlotPair) -> Results:
    first = submission.tests[0]
    if isinstance(first, FunctionTest):
        return await judge_functions(pool.factory, submission, pair)
    if isinstance(first, CodeTest):
        return await judge_code(pool.factory, submission, pair)
    if isinstance(first, InteractiveTest):
        return await judge_interactive(pool.factory, submission, pair)
    return await judge_stdio(pool.factory, submission, pair)


def sum_up(
    submission: Submission, results: list[TestResult], report: CompileReport | None, wall_ms: int
) -> JudgeResult:
    """Adds SKIPPED for tests that were not run, and drops results after the first failure when that is asked for."""
    tests = len(submission.tests)
    if report is not None and not report.ok:
        output = (report.stderr or report.stdout).decode(errors="replace").strip()
        results = [TestResult(Status.COMPILE_ERROR, reason=output or report.reason)] * tests
    failed = next((index for index, result in enumerate(results) if result.status is not Status.ACCEPTED), None)
    status = Status.ACCEPTED if failed is None else results[failed].status
    if failed is not None and submission.stop_at_first_failure and status is not Status.COMPILE_ERROR:
        results = results[: failed + 1]
    skipped = [TestResult(Status.SKIPPED)] * (tests - len(results))
    peak_bytes = max((result.peak_bytes for result in results), default=0)
    return JudgeResult(status, [*results, *skipped], submission.weights, wall_ms, peak_bytes, report)
