"""Judges programs by their output: by a comparison here, or by the caller's checker in a sandbox of its own."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from perigee.sandbox.compare import find_difference
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.judge.checkers import OpenChecker, open_checker, run_checker
from services.sandbox.judge.decisions import Decision
from services.sandbox.judge.groups import Schedule, skipped_result
from services.sandbox.judge.results import UNDECIDED, Results, decide, run_passes, unjudged_result
from services.sandbox.runtime.jobs import Comparator, Submission
from services.sandbox.runtime.programs import memory_streams, open_program, read_execution
from services.sandbox.runtime.sandboxes import SandboxFactory
from services.sandbox.runtime.worker_slots import SlotPair

_LARGE_BYTES = 1 << 18


async def judge_stdio(factory: SandboxFactory, submission: Submission, pair: SlotPair) -> Results:
    """Returns the result of each test."""
    results: list[pb.TestResult] = []
    schedule = Schedule(submission.request)
    async with AsyncExitStack() as stack:
        loaded = await stack.enter_async_context(open_program(factory, submission.program, pair.program))
        if not await loaded.load():
            return [], loaded.compiled
        checker: OpenChecker | None = None

        async def run_pass(stdin: bytes, test: pb.TestCase) -> tuple[pb.TestResult, Decision]:
            nonlocal checker
            with memory_streams(stdin) as streams:
                run, _ = await loaded.run(streams, test.stdio.args, input_is_file=True)
                execution = read_execution(run, streams, submission.program.limits)
            if execution.status == pb.STATUS_OK and submission.checker is not None and checker is None:
                opening = open_checker(factory, submission.checker, pair.judge, submission.request.passes)
                checker = await stack.enter_async_context(opening)
            return await judge_output(execution, stdin, test, submission.comparator, checker)

        for test in submission.request.tests:
            result = skipped_result()
            if not schedule.skips(test):
                result = await run_passes(run_pass, test, test.stdio.stdin, submission.request.passes)
                if loaded.compile_failed:
                    return [], loaded.compiled
            schedule.note(test, result)
            results.append(result)
    return results, loaded.compiled


async def judge_output(
    execution: pb.ExecuteResponse,
    stdin: bytes,
    test: pb.TestCase,
    comparator: Comparator,
    checker: OpenChecker | None,
) -> tuple[pb.TestResult, Decision]:
    """Returns the result of a test whose program has ended, and the checker's decision, if there is one."""
    result = unjudged_result(execution)
    expected = test.stdio.expected_stdout
    if execution.status != pb.STATUS_OK:
        return result, UNDECIDED
    if checker is not None:
        decision = await run_checker(checker, stdin, execution.stdout, test, expected)
        return decide(result, decision), decision
    if len(execution.stdout) + len(expected) > _LARGE_BYTES:
        difference = await asyncio.to_thread(find_difference, execution.stdout, expected, comparator)
    else:
        difference = find_difference(execution.stdout, expected, comparator)
    if difference is None:
        result.points = 1.0
    else:
        result.verdict, result.reason = pb.TEST_VERDICT_WRONG_ANSWER, difference
    return result, UNDECIDED
