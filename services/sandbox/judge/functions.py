"""Judges functions by what they return for JSON arguments; results are compared here.

Judges functions by the caller's own Python: the test runs in a box of its own and calls the submission in another,
so that what the test expects is out of the submission's reach.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from perigee.sandbox.compare import Tolerance, find_result_difference
from services.sandbox.agent import code_tests
from services.sandbox.agent.archive import (
    COMPILE_ERROR,
    EXCEPTION,
    LOADED,
    NOT_JSON,
    TOO_LONG,
    VALUE,
    Reply,
    read_replies,
)
from services.sandbox.agent.code_tests import CALLED, FAILED, PASSED, SUBMISSION_ERROR
from services.sandbox.agent.protocol import BoxLimits, Outcome
from services.sandbox.judge.pairs import Pair, pipes
from services.sandbox.judge.stdio import CUT_BYTES, decide, open_checker, read_outcome, run_checker
from services.sandbox.runtime.jobs import CodeTest, CompileReport, FunctionTest, Submission, Test, TestOutcome, Verdict
from services.sandbox.runtime.pool import Slot
from services.sandbox.runtime.programs import (
    LoadedProgram,
    Streams,
    explain,
    last_words,
    open_program,
    opened,
    read_execution,
    read_output,
    read_verdict,
)
from services.sandbox.runtime.sandboxes import Opener

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


_PATIENCE_MS = 5000
_REPORT_BYTES = 65536
_REPLY_BYTES = 1 << 20
_LEAST_MEMORY_BYTES = 128 << 20
_ENDINGS = {
    PASSED: Verdict.ACCEPTED,
    FAILED: Verdict.WRONG_ANSWER,
    SUBMISSION_ERROR: Verdict.RUNTIME_ERROR,
}
_LOAD_VERDICTS = {code_tests.COMPILE_ERROR: Verdict.COMPILE_ERROR, code_tests.LOAD_ERROR: Verdict.RUNTIME_ERROR}


async def judge_code(
    opener: Opener, submission: Submission, slot: Slot
) -> tuple[list[TestOutcome], CompileReport | None]:
    """The outcome of each test, up to the first failure when that is asked for; each has processes of its own."""
    results: list[TestOutcome] = []
    tester = dataclasses.replace(
        submission.program, source=b"", files=(), limits=give_room(submission.program.limits), environment={}
    )
    async with (
        open_program(opener, submission.program, slot.program) as loaded,
        open_program(opener, tester, slot.judge) as judging,
    ):
        await loaded.load()
        await judging.load()
        for test in submission.tests:
            assert isinstance(test, CodeTest)
            results.append(await run_code_test(loaded, judging, submission, test))
            if results[-1].verdict is Verdict.COMPILE_ERROR:
                return results * len(submission.tests), None
            if submission.stop_at_first_failure and results[-1].verdict is not Verdict.ACCEPTED:
                break
    return results, None


def give_room(limits: BoxLimits) -> BoxLimits:
    """The limits of the test's own process: it waits for the submission, so it may take longer."""
    return dataclasses.replace(
        limits,
        wall_ms=limits.wall_ms + _PATIENCE_MS,
        cpu_ms=limits.cpu_ms + _PATIENCE_MS,
        memory_bytes=max(limits.memory_bytes, _LEAST_MEMORY_BYTES),
    )


async def run_code_test(
    loaded: LoadedProgram, judging: LoadedProgram, submission: Submission, test: CodeTest
) -> TestOutcome:
    """The outcome of one test."""
    header = {"function_name": submission.function_name, "reply_bytes": _REPLY_BYTES}
    job = loaded.parcel(header, [submission.program.source])
    test_job = judging.parcel(header, [submission.setup_code, test.code])
    with opened(b"", b"", b"", job, b"", b"", b"", b"", test_job) as descriptors:
        stdin, stdout, stderr, parcel = descriptors[:4]
        test_stdin, test_stdout, test_stderr, report, test_parcel = descriptors[4:]
        with pipes() as ends:
            called = [stdin, stdout, stderr, ends.to_program, ends.from_program, parcel]
            calling = [test_stdin, test_stdout, test_stderr, ends.from_judge, ends.to_judge, report, test_parcel]
            pair = Pair(
                loaded.box,
                loaded.run_mode("calls", called),
                judging.box,
                judging.run_mode("code_test", calling),
            )
            await pair.begin()
        outcome, judged, _ = await pair.finish()
        execution = read_execution(outcome, Streams(stdin, stdout, stderr), submission.program.limits)
        told, cut = read_output(report, _REPORT_BYTES)
        words, _ = read_output(test_stderr, _REPORT_BYTES)
    known = read_outcome(execution)
    if outcome.stop in ("wall", "cpu", "memory", "output"):
        return known
    if told == CALLED and judged.stop is not None:
        # a value that is too much for the test, such as range(10**12), is the submission's
        reason = f"what was returned led the test past its {explain(judged, judging.program.limits)}"
        return dataclasses.replace(known, verdict=Verdict.WRONG_ANSWER, reason=reason)
    if not told.strip() or cut:
        why = explain(judged, judging.program.limits) or words.decode(errors="replace").strip() or last_words(judged)
        return dataclasses.replace(known, verdict=Verdict.INFRA_ERROR, reason=f"the test did not end well: {why}")
    return decide_code_test(known, outcome, json.loads(told))


def decide_code_test(known: TestOutcome, outcome: Outcome, report: dict[str, Any]) -> TestOutcome:
    """The verdict that a test's report stands for."""
    loaded = report["loaded"]
    if loaded in _LOAD_VERDICTS:
        return dataclasses.replace(known, verdict=_LOAD_VERDICTS[loaded], reason=report["message"])
    if loaded != code_tests.LOADED:
        reason = known.reason if outcome.signal or outcome.exit_code else report["message"]
        return dataclasses.replace(known, verdict=Verdict.RUNTIME_ERROR, reason=reason)
    verdict = _ENDINGS.get(report["ending"], Verdict.INFRA_ERROR)
    share = 1.0 if verdict is Verdict.ACCEPTED else 0.0
    return dataclasses.replace(known, verdict=verdict, reason=report["message"], share=share)
