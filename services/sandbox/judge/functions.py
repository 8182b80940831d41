"""Judges functions: by what they return for JSON arguments, compared here, or by the caller's own Python.

Such a code test runs in a sandbox of its own and calls the submission in another, so that its expectations are out of
the submission's reach.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Sequence
from typing import Any

from perigee.sandbox.compare import Tolerance, find_result_difference
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.agent import calls
from services.sandbox.agent.archive import (
    COMPILE_ERROR,
    EXCEPTION,
    LOADED,
    NOT_JSON,
    TOO_LONG,
    VALUE,
    Reply,
    encode_inputs,
    read_replies,
)
from services.sandbox.agent.code_tests import CALLED, FAILED, PASSED, SUBMISSION_ERROR, TEST_ERROR
from services.sandbox.agent.protocol import Limits, RunResult
from services.sandbox.judge.checkers import open_checker, run_checker
from services.sandbox.judge.groups import Schedule, skipped_result
from services.sandbox.judge.pairs import PairedRun, pipes
from services.sandbox.judge.results import (
    Results,
    cut_output,
    decide,
    limit_verdict,
    unjudged_result,
    verdict_of,
)
from services.sandbox.runtime.jobs import Submission
from services.sandbox.runtime.programs import (
    LoadedProgram,
    Streams,
    describe_exit,
    exit_code_of,
    explain,
    is_wall_limited,
    open_program,
    opened,
    read_execution,
    read_output,
    status_of_run,
)
from services.sandbox.runtime.sandboxes import SandboxFactory
from services.sandbox.runtime.worker_slots import SlotPair

_VERDICT_BY_REPLY = {
    EXCEPTION: pb.TEST_VERDICT_RUNTIME_ERROR,
    NOT_JSON: pb.TEST_VERDICT_WRONG_ANSWER,
    COMPILE_ERROR: pb.TEST_VERDICT_COMPILE_ERROR,
    TOO_LONG: pb.TEST_VERDICT_OUTPUT_LIMIT,
}
_FORGED = "the submission forged a reply"


async def judge_functions(factory: SandboxFactory, submission: Submission, pair: SlotPair) -> Results:
    """Returns the result of each test; one process answers them all, another continues when it ends too early."""
    results: list[pb.TestResult] = []
    async with open_program(factory, submission.program, pair.program) as loaded:
        await loaded.load()
        while (first := len(results)) < len(submission.request.tests):
            found = await _run(loaded, submission, first)
            if submission.checker is not None:
                await check_results(factory, submission, pair, found, first)
            for result in found:
                cut_output(result)
            results += found
            failed = any(result.verdict != pb.TEST_VERDICT_ACCEPTED for result in results)
            if submission.request.stop_at_first_failure and failed:
                break
    return results, None


async def _run(loaded: LoadedProgram, submission: Submission, first: int) -> list[pb.TestResult]:
    expected, limits = submission.expected[first:], submission.program.limits
    header = {
        "function_name": submission.request.function_name,
        "signature": submission.request.function_signature,
        "output_bytes": limits.output_bytes,
    }
    archive = loaded.archive(header, [submission.program.source])
    inputs = encode_inputs(test.function.arguments_json.encode() for test in submission.request.tests[first:])
    with opened(b"", b"", b"", b"", inputs, archive) as descriptors:
        run = await loaded.run_mode("functions", descriptors, answers=len(expected) + 1)
        tolerance = submission.comparator if isinstance(submission.comparator, Tolerance) else None
        return function_results(run, descriptors[3], expected, limits, tolerance)


async def check_results(
    factory: SandboxFactory, submission: Submission, pair: SlotPair, results: list[pb.TestResult], first: int
) -> None:
    """Has the caller's checker decide on the results of functions for the tests from `first` on."""
    assert submission.checker is not None
    checked = [
        (result, test)
        for result, test in zip(results, submission.request.tests[first:], strict=False)
        if result.output and result.verdict in (pb.TEST_VERDICT_ACCEPTED, pb.TEST_VERDICT_WRONG_ANSWER)
    ]
    if not checked:
        return
    async with open_checker(factory, submission.checker, pair.judge) as checker:
        for result, test in checked:
            arguments, expected = test.function.arguments_json.encode(), test.function.expected_json.encode()
            decide(result, await run_checker(checker, arguments, result.output, test, expected))


def function_results(
    run: RunResult, replies_file: int, expected: Sequence[object], limits: Limits, tolerance: Tolerance | None
) -> list[pb.TestResult]:
    """Returns the results of the tests that one process answered, and of the one that ended it, with their whole
    outputs.

    A submission that cannot be loaded gives the same result for all tests.
    """
    times_ms = [-(-time_us // 1000) for time_us in run.answers_us]
    replies = read_replies(replies_file, len(times_ms))
    if not replies or replies[0].kind != LOADED:
        result = _failed_reply(replies[0], limits, times_ms[0]) if replies else _end_result(run, limits)
        return [result] * len(expected)
    results = [
        _reply_result(reply, value, limits, time_ms, tolerance)
        for reply, value, time_ms in zip(replies[1:], expected, times_ms[1:], strict=False)
    ]
    complete = len(results) == len(expected)
    return results if complete else [*results, _end_result(run, limits)]


def _failed_reply(reply: Reply, limits: Limits, wall_ms: int) -> pb.TestResult:
    reason = reply.payload.decode(errors="replace") if reply.kind in _VERDICT_BY_REPLY else _FORGED
    if reply.kind == TOO_LONG:
        reason = f"output limit of {limits.output_bytes} bytes"
    verdict = _VERDICT_BY_REPLY.get(reply.kind, pb.TEST_VERDICT_RUNTIME_ERROR)
    return pb.TestResult(verdict=verdict, wall_ms=wall_ms, reason=reason)


def _reply_result(
    reply: Reply, expected: object, limits: Limits, wall_ms: int, tolerance: Tolerance | None
) -> pb.TestResult:
    if reply.kind != VALUE:
        return _failed_reply(reply, limits, wall_ms)
    difference = find_result_difference(reply.payload, expected, tolerance)
    verdict = pb.TEST_VERDICT_ACCEPTED if difference is None else pb.TEST_VERDICT_WRONG_ANSWER
    points = float(difference is None)
    return pb.TestResult(verdict=verdict, wall_ms=wall_ms, output=reply.payload, reason=difference or "", points=points)


def _end_result(run: RunResult, limits: Limits) -> pb.TestResult:
    return pb.TestResult(
        verdict=verdict_of(status_of_run(run)) if run.stop else pb.TEST_VERDICT_RUNTIME_ERROR,
        wall_ms=run.wall_ms,
        reason=explain(run, limits) or describe_exit(run),
        cpu_ms=run.cpu_ms,
        peak_memory_bytes=run.peak_bytes or 0,
        exit_code=exit_code_of(run),
        signal=run.signal,
        wall_limited=is_wall_limited(run, limits),
    )


_PATIENCE_MS = 5000
_REPORT_BYTES = 65536
_REPLY_BYTES = 1 << 20
_LEAST_MEMORY_BYTES = 128 << 20
_ENDINGS = {
    PASSED: pb.TEST_VERDICT_ACCEPTED,
    FAILED: pb.TEST_VERDICT_WRONG_ANSWER,
    SUBMISSION_ERROR: pb.TEST_VERDICT_RUNTIME_ERROR,
    TEST_ERROR: pb.TEST_VERDICT_UNJUDGEABLE,
}
_LOAD_VERDICTS = {
    calls.COMPILE_ERROR: pb.TEST_VERDICT_COMPILE_ERROR,
    calls.LOAD_ERROR: pb.TEST_VERDICT_RUNTIME_ERROR,
}


async def judge_code(factory: SandboxFactory, submission: Submission, pair: SlotPair) -> Results:
    """Returns the result of each test; each has its own processes."""
    results: list[pb.TestResult] = []
    tests, schedule = submission.request.tests, Schedule(submission.request)
    tester = dataclasses.replace(
        submission.program, source=b"", files=(), limits=tester_limits(submission.program.limits), environment={}
    )
    async with (
        open_program(factory, submission.program, pair.program) as loaded,
        open_program(factory, tester, pair.judge) as judging,
    ):
        await loaded.load()
        await judging.load()
        for test in tests:
            result = skipped_result()
            if not schedule.skips(test):
                result = await run_code_test(loaded, judging, submission, test.code.code.encode())
            if result.verdict == pb.TEST_VERDICT_COMPILE_ERROR:  # which a submission can forge in any test
                return [*results, *[result] * (len(tests) - len(results))], None
            schedule.note(test, result)
            results.append(result)
    return results, None


def tester_limits(limits: Limits) -> Limits:
    """Returns the limits of the test's own process, which waits for the submission and may take longer."""
    return dataclasses.replace(
        limits,
        wall_ms=limits.wall_ms + _PATIENCE_MS,
        cpu_ms=limits.cpu_ms + _PATIENCE_MS,
        memory_bytes=max(limits.memory_bytes, _LEAST_MEMORY_BYTES),
    )


async def run_code_test(
    loaded: LoadedProgram, judging: LoadedProgram, submission: Submission, code: bytes
) -> pb.TestResult:
    """Runs one test."""
    header = {"function_name": submission.request.function_name, "reply_bytes": _REPLY_BYTES}
    job = loaded.archive(header, [submission.program.source])
    test_job = judging.archive(header, [submission.request.setup_code.encode(), code])
    with opened(b"", b"", b"", job, b"", b"", b"", b"", test_job) as descriptors:
        stdin, stdout, stderr, archive = descriptors[:4]
        test_stdin, test_stdout, test_stderr, report, test_archive = descriptors[4:]
        with pipes() as ends:
            called = [stdin, stdout, stderr, ends.to_program, ends.from_program, archive]
            calling = [test_stdin, test_stdout, test_stderr, ends.from_judge, ends.to_judge, report, test_archive]
            paired = PairedRun(
                loaded.sandbox,
                loaded.run_mode("calls", called),
                judging.sandbox,
                judging.run_mode("code_test", calling),
            )
            await paired.begin()
        run, judged, _ = await paired.finish()
        execution = read_execution(run, Streams(stdin, stdout, stderr), submission.program.limits)
        reported, cut = read_output(report, _REPORT_BYTES)
        message, _ = read_output(test_stderr, _REPORT_BYTES)
    known = unjudged_result(execution)
    if limit_verdict(run) is not None:
        return known
    if not reported.strip() or cut:
        has_called = reported == CALLED
        limit = explain(judged, judging.program.limits)
        why = limit or message.decode(errors="replace").strip() or describe_exit(judged)
        known.verdict = decide_unreported(judged, has_called, judging.program.limits)
        known.reason = f"{'what was returned led to the end of the test' if has_called else 'the test ended'}: {why}"
        return known
    decide_code_test(known, run, json.loads(reported))
    return known


def decide_unreported(judged: RunResult, has_called: bool, limits: Limits) -> pb.TestVerdict.ValueType:
    """Returns the verdict where the test's process ended without a report.

    After a call an answer may have led there, as `range(10**12)` does. Before it the test sees nothing of the
    submission but its end, which stops the test.
    """
    if has_called:
        return pb.TEST_VERDICT_WRONG_ANSWER
    if judged.stop == "stopped":
        return pb.TEST_VERDICT_RUNTIME_ERROR
    was_killed = judged.stop is None and judged.signal == signal.SIGKILL
    infra = was_killed or is_wall_limited(judged, limits)
    return pb.TEST_VERDICT_INFRA_ERROR if infra else pb.TEST_VERDICT_UNJUDGEABLE


def decide_code_test(known: pb.TestResult, run: RunResult, report: dict[str, Any]) -> None:
    """Sets the verdict that a test's report stands for."""
    loaded, crashed = report["loaded"], bool(run.signal or run.exit_code)
    if loaded == calls.LOADED:
        known.verdict = _ENDINGS.get(report["ending"], pb.TEST_VERDICT_UNJUDGEABLE)
        known.points = float(known.verdict == pb.TEST_VERDICT_ACCEPTED)
    else:
        known.verdict = _LOAD_VERDICTS.get(loaded, pb.TEST_VERDICT_RUNTIME_ERROR)
    if not crashed or loaded == calls.LOADED or loaded in _LOAD_VERDICTS:
        known.reason = report["message"].encode(errors="replace").decode()
