"""What a caller's checker or interactor decided, read from how its process ended.

The exit codes and messages are testlib's (https://github.com/MikeMirzayanov/testlib): 0 `_ok`, 1 `_wa`, 2 `_pe`,
7 `_points` with the message `points SHARE TEXT`.


Judges programs by what they print: by a comparison here, or by the caller's checker in a box of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from perigee.sandbox.compare import find_difference
from services.sandbox.runtime.helper_process import BoxFailedError
from services.sandbox.runtime.jobs import (
    CompileReport,
    Execution,
    How,
    InputFile,
    Program,
    StdioTest,
    Submission,
    TestOutcome,
    Verdict,
)
from services.sandbox.runtime.pool import Slot
from services.sandbox.runtime.programs import (
    LoadedProgram,
    explain,
    memory_streams,
    open_program,
    read_execution,
    read_output,
)
from services.sandbox.runtime.sandboxes import Opener
from services.sandbox.runtime.worker_slots import Place

_MESSAGE_CHARACTERS = 1000
_UTF8_BYTES = 4
_ACCEPTED, _WRONG_ANSWER, _PRESENTATION_ERROR, _POINTS = 0, 1, 2, 7
_SHARE = re.compile(r"\s*(?:points\s+)?([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?!\S)", re.ASCII)
# uncaught exceptions of Python and of the JVM, a panic of Go: their exit codes are those of wrong answers
_CRASH = re.compile(rb"\s*(?:Traceback \(most recent call last\):|Exception in thread \"|panic: )")


@dataclass(frozen=True)
class Decision:
    """ACCEPTED, WRONG_ANSWER or INFRA_ERROR; the share of the test's points, from 0 to 1 or None for a failure; and the
    program's message, or why it failed.
    """

    verdict: Verdict
    share: float | None
    message: str


def read_decision(exit_code: int, signal: int, stderr: bytes, limit: str = "") -> Decision:
    """What a checker or an interactor decided.

    `signal` is 0 unless one ended the program, `limit` says which limit it passed, empty for none. Whatever is not a
    decision is a failure of the program, told as INFRA_ERROR, and never a wrong answer: other exit codes, a signal, a
    limit, an uncaught exception, or points without a share from 0 to 1 as the first word or right after the first
    word `points`. Nothing is searched for further on, since messages quote what submissions wrote.
    """
    message = stderr[: _UTF8_BYTES * _MESSAGE_CHARACTERS].decode(errors="replace").strip()[:_MESSAGE_CHARACTERS]
    if limit:
        return _failure(f"passed its {limit}", message)
    if signal:
        return _failure(f"was ended by signal {signal}", message)
    if exit_code == _ACCEPTED:
        return Decision(Verdict.ACCEPTED, 1.0, message)
    if exit_code in (_WRONG_ANSWER, _PRESENTATION_ERROR):
        if _CRASH.match(stderr):
            end = stderr[-_MESSAGE_CHARACTERS:].decode(errors="replace").strip().rpartition("\n")[2]
            return _failure("ended with an uncaught exception", end)
        return Decision(Verdict.WRONG_ANSWER, 0.0, message)
    if exit_code == _POINTS:
        return _read_points(message)
    return _failure(f"ended with exit code {exit_code}", message)


def _read_points(message: str) -> Decision:
    found = _SHARE.match(message)
    if found is None:
        return _failure("ended with exit code 7 without a message like `points 0.5`", message)
    share = float(found[1])
    if not 0 <= share <= 1:
        return _failure(f"gave {found[1]} points, which is no share from 0 to 1", message)
    return Decision(Verdict.ACCEPTED if share == 1 else Verdict.WRONG_ANSWER, share, message)


def _failure(reason: str, message: str) -> Decision:
    text = f"the checking program {reason}: {message}" if message else f"the checking program {reason}"
    return Decision(Verdict.INFRA_ERROR, None, text[:_MESSAGE_CHARACTERS])


CUT_BYTES = 4096
_LARGE_BYTES = 1 << 18
CHECKER_FILES = ("input.txt", "output.txt", "answer.txt")


async def judge_stdio(
    opener: Opener, submission: Submission, slot: Slot
) -> tuple[list[TestOutcome], CompileReport | None]:
    """The outcome of each test, up to the first failure when that is asked for."""
    results: list[TestOutcome] = []
    async with AsyncExitStack() as stack:
        loaded = await stack.enter_async_context(open_program(opener, submission.program, slot.program))
        if not await loaded.load():
            return [], loaded.compile_report
        checker: LoadedProgram | None = None
        for test in submission.tests:
            assert isinstance(test, StdioTest)
            with memory_streams(test.stdin) as streams:
                outcome, _ = await loaded.run(streams, test.arguments)
                if loaded.compile_report is not None and not loaded.compile_report.ok:
                    return [], loaded.compile_report
                execution = read_execution(outcome, streams, submission.program.limits)
            if execution.verdict is Verdict.ACCEPTED and submission.checker is not None and checker is None:
                checker = await stack.enter_async_context(open_checker(opener, submission.checker, slot.judge))
            results.append(await judge_output(execution, test, submission.how, checker))
            if submission.stop_at_first_failure and results[-1].verdict is not Verdict.ACCEPTED:
                break
    return results, loaded.compile_report


async def judge_output(execution: Execution, test: StdioTest, how: How, checker: LoadedProgram | None) -> TestOutcome:
    """The outcome of a test whose program has ended."""
    outcome = read_outcome(execution)
    if execution.verdict is not Verdict.ACCEPTED:
        return outcome
    if checker is not None:
        decision = await run_checker(checker, test.stdin, execution.stdout, test.expected)
        return decide(outcome, decision)
    if len(execution.stdout) + len(test.expected) > _LARGE_BYTES:
        difference = await asyncio.to_thread(find_difference, execution.stdout, test.expected, how)
    else:
        difference = find_difference(execution.stdout, test.expected, how)
    if difference is not None:
        return dataclasses.replace(outcome, verdict=Verdict.WRONG_ANSWER, reason=difference)
    return dataclasses.replace(outcome, share=1.0)


def read_outcome(execution: Execution) -> TestOutcome:
    """What is known of a test from how its program ended."""
    reason = execution.reason
    if execution.verdict is Verdict.RUNTIME_ERROR and not reason:
        words = execution.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        end = f"signal {execution.signal}" if execution.signal else f"exit code {execution.exit_code}"
        reason = words or end
    return TestOutcome(
        verdict=execution.verdict,
        wall_ms=execution.wall_ms,
        output=execution.stdout[:CUT_BYTES],
        reason=reason,
        cpu_ms=execution.cpu_ms,
        peak_bytes=execution.peak_bytes,
        exit_code=execution.exit_code,
        signal=execution.signal,
        stderr=execution.stderr[:CUT_BYTES],
        output_truncated=execution.stdout_truncated or len(execution.stdout) > CUT_BYTES,
    )


def decide(outcome: TestOutcome, decision: Decision) -> TestOutcome:
    """The outcome with what a checker or an interactor decided."""
    return dataclasses.replace(outcome, verdict=decision.verdict, share=decision.share or 0.0, reason=decision.message)


@asynccontextmanager
async def open_checker(opener: Opener, program: Program, place: Place) -> AsyncIterator[LoadedProgram]:
    """A checker or an interactor, compiled; raises BoxFailedError when it does not compile, for that is no fault of the
    submission's.
    """
    async with open_program(opener, program, place) as loaded:
        if not await loaded.load():
            raise BoxFailedError(f"the checking program does not compile: {compiler_words(loaded)}")
        yield loaded


def compiler_words(loaded: LoadedProgram) -> str:
    """What a compiler said last."""
    report = loaded.compile_report
    assert report is not None
    return (report.stderr or report.stdout).decode(errors="replace").strip()[-1000:] or report.reason


async def run_checker(checker: LoadedProgram, stdin: bytes, output: bytes, expected: bytes) -> Decision:
    """Runs a checker on one output."""
    contents = (stdin, output, expected)
    files = [InputFile(name, content) for name, content in zip(CHECKER_FILES, contents, strict=True)]
    with memory_streams(b"") as streams:
        outcome, _ = await checker.run(streams, CHECKER_FILES, files)
        if checker.compile_report is not None and not checker.compile_report.ok:
            raise BoxFailedError(f"the checking program does not compile: {compiler_words(checker)}")
        limits = checker.program.limits
        message, _ = read_output(streams.stderr, limits.output_bytes)
    limit = explain(outcome, limits) if outcome.stop else ""
    return read_decision(outcome.exit_code if outcome.exit_code is not None else -1, outcome.signal, message, limit)
