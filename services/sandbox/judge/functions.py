"""Judges functions: by what they return for JSON arguments, compared here, or by the caller's own Python.

Such a code test runs in a sandbox of its own and calls the submission in another, so that its expectations are out of
the submission's reach.
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
from services.sandbox.agent.protocol import Limits, RunResult
from services.sandbox.judge.pairs import PairedRun, pipes
from services.sandbox.judge.stdio import CUT_BYTES, decide, open_checker, run_checker, unjudged_result
from services.sandbox.runtime.jobs import CodeTest, CompileReport, FunctionTest, Status, Submission, Test, TestResult
from services.sandbox.runtime.programs import (
    LoadedProgram,
    Streams,
    describe_exit,
    explain,
    open_program,
    opened,
    read_execution,
    read_output,
    status_of_run,
)
from services.sandbox.runtime.sandboxes import SandboxFactory
from services.sandbox.runtime.worker_slots import SlotPair

_STATUS_BY_REPLY = {
    EXCEPTION: Status.RUNTIME_ERROR,
    NOT_JSON: Status.WRONG_ANSWER,
    COMPILE_ERROR: Status.COMPILE_ERROR,
    TOO_LONG: Status.OUTPUT_LIMIT,
}
_FORGED = "the submission wrote to the file of its replies"


async def judge_functions(
    factory: SandboxFactory, submission: Submission, pair: SlotPair
) -> tuple[list[TestResult], CompileReport | None]:
    """Returns the result of each test; one process answers them all, another continues when it ends too early."""
    results: list[TestResult] = []
    async with open_program(factory, submission.program, pair.program) as loaded:
        await loaded.load()
        while len(results) < len(submission.tests):
            results += await _run(loaded, submission, len(results))
            failed = any(result.status is not Status.ACCEPTED for result in results)
            if submission.stop_at_first_failure and failed:
                break
    if submission.checker is not None:
        results = await check_results(factory, submission, pair, results)
    return [cut_output(result) for result in results], None


async def _run(loaded: LoadedProgram, submission: Submission, first: int) -> list[TestResult]:
    tests, limits = submission.tests[first:], submission.program.limits
    header = {
        "function_name": submission.function_name,
        "output_bytes": limits.output_bytes,
        "first_input": 1 + first,
    }
    inputs = [test.arguments_json for test in submission.tests if isinstance(test, FunctionTest)]
    archive = loaded.archive(header, [submission.program.source, *inputs])
    with opened(b"", b"", b"", b"", archive) as descriptors:
        run = await loaded.run_mode("functions", descriptors, answers=len(tests) + 1)
        tolerance = submission.comparator if isinstance(submission.comparator, Tolerance) else None
        return function_results(run, descriptors[3], tests, limits, tolerance)


async def check_results(
    factory: SandboxFactory, submission: Submission, pair: SlotPair, results: list[TestResult]
) -> list[TestResult]:
    """Has the caller's checker decide on the results of functions."""
    assert submission.checker is not None
    checked = []
    async with open_checker(factory, submission.checker, pair.judge) as checker:
        for result, test in zip(results, submission.tests, strict=False):
            assert isinstance(test, FunctionTest)
            if result.output and result.status in (Status.ACCEPTED, Status.WRONG_ANSWER):
                decision = await run_checker(checker, test.arguments_json, result.output, test.expected_json)
                result = decide(result, decision)
            checked.append(result)
    return checked


def cut_output(result: TestResult) -> TestResult:
    """Returns the result with as much of its output as a response holds."""
    if len(result.output) <= CUT_BYTES:
        return result
    return dataclasses.replace(result, output=result.output[:CUT_BYTES], output_truncated=True)


def function_results(
    run: RunResult, replies_file: int, tests: Sequence[Test], limits: Limits, tolerance: Tolerance | None
) -> list[TestResult]:
    """Returns the results of the tests that one process answered, and of the one that ended it, with their whole
    outputs.

    A submission that cannot be loaded gives the same result for all of `tests`.
    """
    times_ms = [-(-time_us // 1000) for time_us in run.answers_us]
    replies = read_replies(replies_file, len(times_ms), limits.output_bytes)
    if not replies or replies[0].kind != LOADED:
        result = (
            _reply_result(replies[0], None, limits, times_ms[0], tolerance) if replies else _end_result(run, limits)
        )
        return [result] * len(tests)
    results = [
        _reply_result(reply, test, limits, time_ms, tolerance)
        for reply, test, time_ms in zip(replies[1:], tests, times_ms[1:], strict=False)
    ]
    # an answer that was announced but is missing was forged; it is counted, so that the next ones meet their tests
    results += [TestResult(Status.RUNTIME_ERROR, reason=_FORGED)] * (len(times_ms) - 1 - len(results))
    complete = len(results) == len(tests)
    return results if complete else [*results, _end_result(run, limits)]


def _reply_result(
    reply: Reply, test: Test | None, limits: Limits, wall_ms: int, tolerance: Tolerance | None
) -> TestResult:
    if reply.kind in _STATUS_BY_REPLY:
        limit = f"output limit of {limits.output_bytes} bytes" if reply.kind == TOO_LONG else ""
        return TestResult(_STATUS_BY_REPLY[reply.kind], wall_ms, reason=limit or reply.payload.decode(errors="replace"))
    if not isinstance(test, FunctionTest) or reply.kind != VALUE:
        return TestResult(Status.RUNTIME_ERROR, wall_ms, reason=_FORGED)
    difference = find_result_difference(reply.payload, test.expected, tolerance)
    return TestResult(
        Status.ACCEPTED if difference is None else Status.WRONG_ANSWER,
        wall_ms,
        reply.payload,
        difference or "",
        fraction=1.0 if difference is None else 0.0,
    )


def _end_result(run: RunResult, limits: Limits) -> TestResult:
    return TestResult(
        status_of_run(run) if run.stop else Status.RUNTIME_ERROR,
        run.wall_ms,
        reason=explain(run, limits) or describe_exit(run),
        cpu_ms=run.cpu_ms,
        peak_bytes=run.peak_bytes or 0,
        exit_code=-1 if run.exit_code is None else run.exit_code,
        signal=run.signal,
    )


_PATIENCE_MS = 5000
_REPORT_BYTES = 65536
_REPLY_BYTES = 1 << 20
_LEAST_MEMORY_BYTES = 128 << 20
_ENDINGS = {
    PASSED: Status.ACCEPTED,
    FAILED: Status.WRONG_ANSWER,
    SUBMISSION_ERROR: Status.RUNTIME_ERROR,
}
_LOAD_STATUSES = {code_tests.COMPILE_ERROR: Status.COMPILE_ERROR, code_tests.LOAD_ERROR: Status.RUNTIME_ERROR}


async def judge_code(
    factory: SandboxFactory, submission: Submission, pair: SlotPair
) -> tuple[list[TestResult], CompileReport | None]:
    """Returns the result of each test, up to the first failure when that is asked for; each has its own processes."""
    results: list[TestResult] = []
    tester = dataclasses.replace(
        submission.program, source=b"", files=(), limits=tester_limits(submission.program.limits), environment={}
    )
    async with (
        open_program(factory, submission.program, pair.program) as loaded,
        open_program(factory, tester, pair.judge) as judging,
    ):
        await loaded.load()
        await judging.load()
        for test in submission.tests:
            assert isinstance(test, CodeTest)
            results.append(await run_code_test(loaded, judging, submission, test))
            if results[-1].status is Status.COMPILE_ERROR:
                return results * len(submission.tests), None
            if submission.stop_at_first_failure and results[-1].status is not Status.ACCEPTED:
                break
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
    loaded: LoadedProgram, judging: LoadedProgram, submission: Submission, test: CodeTest
) -> TestResult:
    """Runs one test."""
    header = {"function_name": submission.function_name, "reply_bytes": _REPLY_BYTES}
    job = loaded.archive(header, [submission.program.source])
    test_job = judging.archive(header, [submission.setup_code, test.code])
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
    if run.stop in ("wall", "cpu", "memory", "output"):
        return known
    if reported == CALLED and judged.stop is not None:
        # a value that is too large for the test, such as range(10**12), is the submission's fault
        reason = f"what was returned led the test past its {explain(judged, judging.program.limits)}"
        return dataclasses.replace(known, status=Status.WRONG_ANSWER, reason=reason)
    if not reported.strip() or cut:
        why = (
            explain(judged, judging.program.limits) or message.decode(errors="replace").strip() or describe_exit(judged)
        )
        return dataclasses.replace(known, status=Status.INFRA_ERROR, reason=f"the test did not end well: {why}")
    return decide_code_test(known, run, json.loads(reported))


def decide_code_test(known: TestResult, run: RunResult, report: dict[str, Any]) -> TestResult:
    """Returns the result that a test's report stands for."""
    loaded = report["loaded"]
    if loaded in _LOAD_STATUSES:
        return dataclasses.replace(known, status=_LOAD_STATUSES[loaded], reason=report["message"])
    if loaded != code_tests.LOADED:
        reason = known.reason if run.signal or run.exit_code else report["message"]
        return dataclasses.replace(known, status=Status.RUNTIME_ERROR, reason=reason)
    status = _ENDINGS.get(report["ending"], Status.INFRA_ERROR)
    fraction = 1.0 if status is Status.ACCEPTED else 0.0
    return dataclasses.replace(known, status=status, reason=report["message"], fraction=fraction)
