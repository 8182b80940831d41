"""Judges functions by the caller's own Python: the test runs in a box of its own and calls the submission in another,
so that what the test expects is out of the submission's reach.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from services.sandbox.box.code_tests import FAILED, PASSED, SUBMISSION_ERROR
from services.sandbox.box.limits import BoxLimits
from services.sandbox.box.orders import Outcome
from services.sandbox.box.python_calls import CALLED
from services.sandbox.box.remote_function import COMPILE_ERROR, LOAD_ERROR, LOADED
from services.sandbox.execute import read_execution, read_output
from services.sandbox.jobs import CodeTest, CompileReport, Submission, TestOutcome, Verdict
from services.sandbox.judge_stdio import read_outcome
from services.sandbox.pairs import Pair, pipes
from services.sandbox.pool import Slot
from services.sandbox.programs import LoadedProgram, Streams, explain, last_words, open_program, opened
from services.sandbox.slots import Opener

_PATIENCE_MS = 5000
_REPORT_BYTES = 65536
_REPLY_BYTES = 1 << 20
_LEAST_MEMORY_BYTES = 128 << 20
_ENDINGS = {
    PASSED: Verdict.ACCEPTED,
    FAILED: Verdict.WRONG_ANSWER,
    SUBMISSION_ERROR: Verdict.RUNTIME_ERROR,
}
_LOAD_VERDICTS = {COMPILE_ERROR: Verdict.COMPILE_ERROR, LOAD_ERROR: Verdict.RUNTIME_ERROR}


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
    if loaded != LOADED:
        reason = known.reason if outcome.signal or outcome.exit_code else report["message"]
        return dataclasses.replace(known, verdict=Verdict.RUNTIME_ERROR, reason=reason)
    verdict = _ENDINGS.get(report["ending"], Verdict.INFRA_ERROR)
    share = 1.0 if verdict is Verdict.ACCEPTED else 0.0
    return dataclasses.replace(known, verdict=verdict, reason=report["message"], share=share)
