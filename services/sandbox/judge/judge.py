"""Runs submissions against their tests and turns what the boxes report into verdicts."""

from __future__ import annotations

import math
import time

from services.kit.telemetry import get_logger
from services.sandbox.judge.functions import judge_code, judge_functions
from services.sandbox.judge.interactive import judge_interactive
from services.sandbox.judge.stdio import judge_stdio
from services.sandbox.runtime import metrics
from services.sandbox.runtime.helper_process import BoxFailedError
from services.sandbox.runtime.jobs import (
    CodeTest,
    CompileReport,
    FunctionTest,
    InteractiveTest,
    Judgement,
    Submission,
    TestOutcome,
    Verdict,
)
from services.sandbox.runtime.pool import Pool, Slot

log = get_logger(__name__)

Results = tuple[list[TestOutcome], CompileReport | None]


async def judge(pool: Pool, submission: Submission, remaining_s: float | None = None) -> Judgement:
    """Judges a submission in one slot; the box's own failures come back as INFRA_ERROR.

    Raises ResourceExhaustedError when the job cannot have a slot in time.
    """
    async with pool.take(estimate_cost_s(submission), remaining_s) as slot:
        started = time.monotonic()
        try:
            results, report = await _judge(pool, submission, slot)
        except BoxFailedError as error:
            log.warning("box_failed", reason=error.message)
            results, report = [TestOutcome(Verdict.INFRA_ERROR, reason=error.message)] * len(submission.tests), None
        wall_ms = math.ceil((time.monotonic() - started) * 1000)
    judgement = sum_up(submission, results, report, wall_ms)
    metrics.count("judge", judgement.verdict, started)
    return judgement


def estimate_cost_s(submission: Submission) -> float:
    """The time that a submission may take at most, for the order of the line."""
    program = submission.program
    compile_ms = program.compile_limits.wall_ms if program.runtime.config.compile else 0
    return (compile_ms + len(submission.tests) * program.limits.wall_ms) / 1000


async def _judge(pool: Pool, submission: Submission, slot: Slot) -> Results:
    first = submission.tests[0]
    if isinstance(first, FunctionTest):
        return await judge_functions(pool.opener, submission, slot)
    if isinstance(first, CodeTest):
        return await judge_code(pool.opener, submission, slot)
    if isinstance(first, InteractiveTest):
        return await judge_interactive(pool.opener, submission, slot)
    return await judge_stdio(pool.opener, submission, slot)


def sum_up(submission: Submission, results: list[TestOutcome], report: CompileReport | None, wall_ms: int) -> Judgement:
    """Fills up what was not run, and forgets what should not have been."""
    tests = len(submission.tests)
    if report is not None and not report.ok:
        words = (report.stderr or report.stdout).decode(errors="replace").strip()
        results = [TestOutcome(Verdict.COMPILE_ERROR, reason=words or report.reason)] * tests
    failed = next((index for index, result in enumerate(results) if result.verdict is not Verdict.ACCEPTED), None)
    verdict = Verdict.ACCEPTED if failed is None else results[failed].verdict
    if failed is not None and submission.stop_at_first_failure and verdict is not Verdict.COMPILE_ERROR:
        results = results[: failed + 1]
    skipped = [TestOutcome(Verdict.SKIPPED)] * (tests - len(results))
    peak_bytes = max((result.peak_bytes for result in results), default=0)
    return Judgement(verdict, [*results, *skipped], submission.worths, wall_ms, peak_bytes, report)
