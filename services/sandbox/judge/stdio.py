"""Judges programs by their output: by a comparison here, or by the caller's checker in a sandbox of its own.

The exit codes and messages of checkers and interactors are testlib's (https://github.com/MikeMirzayanov/testlib): 0
`_ok`, 1 `_wa`, 2 `_pe`, 7 `_points` with the message `points FRACTION TEXT`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from perigee.sandbox.compare import find_difference
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.runtime.failure import SandboxFailedError, UnjudgeableError
from services.sandbox.runtime.jobs import (
    Comparator,
    Program,
    Submission,
)
from services.sandbox.runtime.programs import (
    LoadedProgram,
    exit_code_of,
    explain,
    is_wall_limited,
    memory_streams,
    open_program,
    read_execution,
    read_output,
)
from services.sandbox.runtime.sandboxes import SandboxFactory
from services.sandbox.runtime.worker_slots import SlotPair, WorkerSlot

_MESSAGE_CHARACTERS = 1000
_UTF8_BYTES = 4
_ACCEPTED, _WRONG_ANSWER, _PRESENTATION_ERROR, _FAIL, _POINTS = 0, 1, 2, 3, 7
_FRACTION = re.compile(r"\s*(?:points\s+)?([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?!\S)", re.ASCII)
# uncaught exceptions of Python and of the JVM, a panic of Go: their exit codes are those of wrong answers
_CRASH = re.compile(rb"\s*(?:Traceback \(most recent call last\):|Exception in thread \"|panic: )")


@dataclass(frozen=True)
class Decision:
    """Decision of a checker or an interactor.

    `verdict` is ACCEPTED, WRONG_ANSWER, UNJUDGEABLE or INFRA_ERROR, `fraction` the part of the test's points from 0 to
    1, None for a failure, `message` the program's own, or why it failed. `is_declared` is set where the program itself
    says that the test is wrong.
    """

    verdict: pb.TestVerdict.ValueType
    fraction: float | None
    message: str
    is_declared: bool = False


def read_decision(exit_code: int, signal: int, stderr: bytes, limit: str = "") -> Decision:
    """Reads the decision of a checker or an interactor from how its process ended.

    `signal` is 0 unless one ended the program, `limit` names the limit that it passed, empty for none. Whatever is no
    decision is a failure of the program, UNJUDGEABLE: other exit codes, a signal, a limit, an uncaught exception, or
    points without a fraction from 0 to 1 as the first word or right after a first word `points`. Later words are not
    searched: messages quote what submissions wrote.
    """
    message = stderr[: _UTF8_BYTES * _MESSAGE_CHARACTERS].decode(errors="replace").strip()[:_MESSAGE_CHARACTERS]
    if limit:
        return _failure(f"passed its {limit}", message)
    if signal:
        return _failure(f"was ended by signal {signal}", message)
    if exit_code == _ACCEPTED:
        return Decision(pb.TEST_VERDICT_ACCEPTED, 1.0, message)
    if exit_code in (_WRONG_ANSWER, _PRESENTATION_ERROR):
        if _CRASH.match(stderr):
            end = stderr[-_MESSAGE_CHARACTERS:].decode(errors="replace").strip().rpartition("\n")[2]
            return _failure("ended with an uncaught exception", end)
        return Decision(pb.TEST_VERDICT_WRONG_ANSWER, 0.0, message)
    if exit_code == _POINTS:
        return _read_points(message)
    return replace(_failure(f"ended with exit code {exit_code}", message), is_declared=exit_code == _FAIL)


def _read_points(message: str) -> Decision:
    found = _FRACTION.match(message)
    if found is None:
        return _failure("ended with exit code 7 without a message like `points 0.5`", message)
    fraction = float(found[1])
    if not 0 <= fraction <= 1:
        return _failure(f"gave {found[1]} points, which is no fraction from 0 to 1", message)
    return Decision(pb.TEST_VERDICT_ACCEPTED if fraction == 1 else pb.TEST_VERDICT_WRONG_ANSWER, fraction, message)


def _failure(reason: str, message: str) -> Decision:
    text = f"the checking program {reason}: {message}" if message else f"the checking program {reason}"
    return Decision(pb.TEST_VERDICT_UNJUDGEABLE, None, text[:_MESSAGE_CHARACTERS])


CUT_BYTES = 4096
_LARGE_BYTES = 1 << 18
CHECKER_FILES = ("input.txt", "output.txt", "answer.txt")


_TRIAL_OUTPUTS = (b"", b"0\n", b"1 1\n", b"x\n")
# Results of the tests that were run, with points from 0 to 1, and the compilation, if there was one.
Results = tuple[list[pb.TestResult], pb.CompileResult | None]


async def judge_stdio(factory: SandboxFactory, submission: Submission, pair: SlotPair) -> Results:
    """Returns the result of each test, up to the first failure when that is asked for."""
    results: list[pb.TestResult] = []
    async with AsyncExitStack() as stack:
        loaded = await stack.enter_async_context(open_program(factory, submission.program, pair.program))
        if not await loaded.load():
            return [], loaded.compiled
        checker: LoadedProgram | None = None
        for test in submission.request.tests:
            with memory_streams(test.stdio.stdin) as streams:
                run, _ = await loaded.run(streams, test.stdio.args)
                if loaded.compile_failed:
                    return [], loaded.compiled
                execution = read_execution(run, streams, submission.program.limits)
            if execution.status == pb.STATUS_OK and submission.checker is not None and checker is None:
                checker = await stack.enter_async_context(open_checker(factory, submission.checker, pair.judge))
            results.append(await judge_output(execution, test.stdio, submission.comparator, checker))
            if submission.request.stop_at_first_failure and results[-1].verdict != pb.TEST_VERDICT_ACCEPTED:
                break
    return results, loaded.compiled


async def judge_output(
    execution: pb.ExecuteResponse, test: pb.StdioTest, comparator: Comparator, checker: LoadedProgram | None
) -> pb.TestResult:
    """Returns the result of a test whose program has ended."""
    result = unjudged_result(execution)
    if execution.status != pb.STATUS_OK:
        return result
    if checker is not None:
        decision = await run_checker(checker, test.stdin, execution.stdout, test.expected_stdout)
        return decide(result, decision)
    if len(execution.stdout) + len(test.expected_stdout) > _LARGE_BYTES:
        difference = await asyncio.to_thread(find_difference, execution.stdout, test.expected_stdout, comparator)
    else:
        difference = find_difference(execution.stdout, test.expected_stdout, comparator)
    if difference is None:
        result.points = 1.0
    else:
        result.verdict, result.reason = pb.TEST_VERDICT_WRONG_ANSWER, difference
    return result


def verdict_of(status: pb.Status.ValueType) -> pb.TestVerdict.ValueType:
    """Returns the verdict on a program of which nothing is expected but that it ends well."""
    if status == pb.STATUS_OK:
        return pb.TEST_VERDICT_ACCEPTED
    return pb.TestVerdict.Value(f"TEST_VERDICT_{pb.Status.Name(status).removeprefix('STATUS_')}")


def unjudged_result(execution: pb.ExecuteResponse) -> pb.TestResult:
    """Returns the result of a test before its output is compared."""
    reason = execution.reason
    if execution.status == pb.STATUS_RUNTIME_ERROR and not reason:
        last_line = execution.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        end = f"signal {execution.signal}" if execution.signal else f"exit code {execution.exit_code}"
        reason = last_line or end
    return pb.TestResult(
        verdict=verdict_of(execution.status),
        wall_ms=execution.wall_ms,
        output=execution.stdout[:CUT_BYTES],
        reason=reason,
        cpu_ms=execution.cpu_ms,
        peak_memory_bytes=execution.peak_memory_bytes,
        exit_code=execution.exit_code,
        signal=execution.signal,
        stderr=execution.stderr[:CUT_BYTES],
        output_truncated=execution.stdout_truncated or len(execution.stdout) > CUT_BYTES,
        wall_limited=execution.wall_limited,
    )


def decide(result: pb.TestResult, decision: Decision) -> pb.TestResult:
    """Sets what a checker or an interactor decided, and returns the result."""
    result.verdict, result.points, result.reason = decision.verdict, decision.fraction or 0.0, decision.message
    return result


@asynccontextmanager
async def open_checker(factory: SandboxFactory, program: Program, slot: WorkerSlot) -> AsyncIterator[LoadedProgram]:
    """Yields a checker or an interactor, compiled; raises as `check_compiled`."""
    async with open_program(factory, program, slot) as loaded:
        await loaded.load()
        check_compiled(loaded)
        yield loaded


def check_compiled(loaded: LoadedProgram) -> None:
    """Raises UnjudgeableError for a checker or interactor that does not compile, SandboxFailedError when its
    compiler was starved.
    """
    if not loaded.compile_failed:
        return
    error = SandboxFailedError if loaded.compiler_was_starved else UnjudgeableError
    raise error(f"the checking program does not compile: {compiler_message(loaded)}")


def compiler_message(loaded: LoadedProgram) -> str:
    """Returns the end of a compiler's output."""
    compiled = loaded.compiled
    assert compiled is not None
    return (compiled.stderr or compiled.stdout).decode(errors="replace").strip()[-1000:] or compiled.reason


async def run_checker(checker: LoadedProgram, stdin: bytes, output: bytes, expected: bytes) -> Decision:
    """Runs a checker on one output.

    One that fails is at fault only where it says so itself, or fails on the expected output, too, or on any where none
    is expected: a submission must not gain by what it prints.
    """
    decision = await _run_checker(checker, stdin, output, expected)
    if decision.verdict != pb.TEST_VERDICT_UNJUDGEABLE or decision.is_declared:
        return decision
    for other in [expected] if expected else [stdin, *_TRIAL_OUTPUTS]:
        tried = await _run_checker(checker, stdin, other, expected)
        if tried.verdict != pb.TEST_VERDICT_UNJUDGEABLE:
            verdict = tried.verdict if tried.fraction is None else pb.TEST_VERDICT_WRONG_ANSWER
            return replace(decision, verdict=verdict)
    return decision


async def _run_checker(checker: LoadedProgram, stdin: bytes, output: bytes, expected: bytes) -> Decision:
    contents = (stdin, output, expected)
    files = [pb.File(path=name, content=content) for name, content in zip(CHECKER_FILES, contents, strict=True)]
    with memory_streams(b"") as streams:
        run, _ = await checker.run(streams, CHECKER_FILES, files)
        check_compiled(checker)
        limits = checker.program.limits
        message, _ = read_output(streams.stderr, limits.output_bytes)
    limit = explain(run, limits)
    if is_wall_limited(run, limits):
        reason = f"the checker passed its {limit} after {run.cpu_ms} ms of CPU time"
        return Decision(pb.TEST_VERDICT_INFRA_ERROR, None, reason)
    return read_decision(exit_code_of(run), run.signal, message, limit)
