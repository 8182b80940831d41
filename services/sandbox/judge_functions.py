"""Judges functions by what they return for JSON arguments; results are compared here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from perigee.sandbox.compare import Tolerance, find_result_difference
from services.sandbox.box.limits import BoxLimits
from services.sandbox.box.orders import Outcome
from services.sandbox.box.payload import (
    COMPILE_ERROR,
    EXCEPTION,
    LOADED,
    NOT_JSON,
    TOO_LONG,
    VALUE,
    Reply,
    read_replies,
)
from services.sandbox.execute import read_verdict
from services.sandbox.jobs import CompileReport, FunctionTest, Submission, Test, TestOutcome, Verdict
from services.sandbox.judge_stdio import CUT_BYTES, decide, open_checker, run_checker
from services.sandbox.pool import Slot
from services.sandbox.programs import LoadedProgram, explain, last_words, open_program, opened
from services.sandbox.slots import Opener

_VERDICT_BY_REPLY = {
    EXCEPTION: Verdict.RUNTIME_ERROR,
    NOT_JSON: Verdict.WRONG_ANSWER,
    COMPILE_ERROR: Verdict.COMPILE_ERROR,
    TOO_LONG: Verdict.OUTPUT_LIMIT,
}
_FORGED = "the submission wrote to the file of its replies"


async def judge_functions(
    opener: Opener, submission: Submission, slot: Slot
) -> tuple[list[TestOutcome], CompileReport | None]:
    """The outcome of each test; one process answers them all, and the next goes on where it ended too early."""
    results: list[TestOutcome] = []
    async with open_program(opener, submission.program, slot.program) as loaded:
        await loaded.load()
        while len(results) < len(submission.tests):
            results += await _run(loaded, submission, len(results))
            failed = any(result.verdict is not Verdict.ACCEPTED for result in results)
            if submission.stop_at_first_failure and failed:
                break
    if submission.checker is not None:
        results = await check_results(opener, submission, slot, results)
    return [cut_output(result) for result in results], None


async def _run(loaded: LoadedProgram, submission: Submission, first: int) -> list[TestOutcome]:
    tests, limits = submission.tests[first:], submission.program.limits
    header = {
        "function_name": submission.function_name,
        "output_bytes": limits.output_bytes,
        "first_input": 1 + first,
    }
    inputs = [test.arguments_json for test in submission.tests if isinstance(test, FunctionTest)]
    parcel = loaded.parcel(header, [submission.program.source, *inputs])
    with opened(b"", b"", b"", b"", parcel) as descriptors:
        outcome = await loaded.run_mode("functions", descriptors, answers=len(tests) + 1)
        tolerance = submission.how if isinstance(submission.how, Tolerance) else None
        return function_results(outcome, descriptors[3], tests, limits, tolerance)


async def check_results(
    opener: Opener, submission: Submission, slot: Slot, results: list[TestOutcome]
) -> list[TestOutcome]:
    """Lets the caller's checker decide on what functions returned."""
    assert submission.checker is not None
    checked = []
    async with open_checker(opener, submission.checker, slot.judge) as checker:
        for result, test in zip(results, submission.tests, strict=False):
            assert isinstance(test, FunctionTest)
            if result.output and result.verdict in (Verdict.ACCEPTED, Verdict.WRONG_ANSWER):
                decision = await run_checker(checker, test.arguments_json, result.output, test.expected_json)
                result = decide(result, decision)
            checked.append(result)
    return checked


def cut_output(result: TestOutcome) -> TestOutcome:
    """The outcome with as much of its output as is told."""
    if len(result.output) <= CUT_BYTES:
        return result
    return dataclasses.replace(result, output=result.output[:CUT_BYTES], output_truncated=True)


def function_results(
    outcome: Outcome, replies_file: int, tests: Sequence[Test], limits: BoxLimits, tolerance: Tolerance | None
) -> list[TestOutcome]:
    """The results that one process of a submission gives: of the tests it answered, and of the one that ended it.
    Outputs are whole.

    A submission that cannot be loaded gives the same result for all of `tests`.
    """
    times_ms = [-(-time_us // 1000) for time_us in outcome.answers_us]
    replies = read_replies(replies_file, len(times_ms), limits.output_bytes)
    if not replies or replies[0].kind != LOADED:
        result = (
            _reply_result(replies[0], None, limits, times_ms[0], tolerance) if replies else _end_result(outcome, limits)
        )
        return [result] * len(tests)
    results = [
        _reply_result(reply, test, limits, time_ms, tolerance)
        for reply, test, time_ms in zip(replies[1:], tests, times_ms[1:], strict=False)
    ]
    # an answer that was told but is not there was forged; it keeps its place, so that the next ones meet their tests
    results += [TestOutcome(Verdict.RUNTIME_ERROR, reason=_FORGED)] * (len(times_ms) - 1 - len(results))
    complete = len(results) == len(tests)
    return results if complete else [*results, _end_result(outcome, limits)]


def _reply_result(
    reply: Reply, test: Test | None, limits: BoxLimits, wall_ms: int, tolerance: Tolerance | None
) -> TestOutcome:
    if reply.kind in _VERDICT_BY_REPLY:
        limit = f"output limit of {limits.output_bytes} bytes" if reply.kind == TOO_LONG else ""
        return TestOutcome(
            _VERDICT_BY_REPLY[reply.kind], wall_ms, reason=limit or reply.payload.decode(errors="replace")
        )
    if not isinstance(test, FunctionTest) or reply.kind != VALUE:
        return TestOutcome(Verdict.RUNTIME_ERROR, wall_ms, reason=_FORGED)
    difference = find_result_difference(reply.payload, test.expected, tolerance)
    return TestOutcome(
        Verdict.ACCEPTED if difference is None else Verdict.WRONG_ANSWER,
        wall_ms,
        reply.payload,
        difference or "",
        share=1.0 if difference is None else 0.0,
    )


def _end_result(outcome: Outcome, limits: BoxLimits) -> TestOutcome:
    return TestOutcome(
        read_verdict(outcome) if outcome.stop else Verdict.RUNTIME_ERROR,
        outcome.wall_ms,
        reason=explain(outcome, limits) or last_words(outcome),
        cpu_ms=outcome.cpu_ms,
        peak_bytes=outcome.peak_bytes or 0,
        exit_code=-1 if outcome.exit_code is None else outcome.exit_code,
        signal=outcome.signal,
    )
