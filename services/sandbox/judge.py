"""Runs programs and submissions in slots, and turns what the agents report into verdicts."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from services.kit.telemetry import get_logger
from services.sandbox import metrics
from services.sandbox.box.control import Message, memory_file
from services.sandbox.box.limits import BoxLimits
from services.sandbox.box.payload import (
    COMPILE_ERROR,
    EXCEPTION,
    LOADED,
    NOT_JSON,
    TOO_LONG,
    VALUE,
    Job,
    Reply,
    encode_job,
    read_replies,
)
from services.sandbox.compare import same_json_text, same_tokens
from services.sandbox.jobs import (
    Execution,
    FunctionTest,
    Judgement,
    Program,
    StdioTest,
    Submission,
    TestOutcome,
    Verdict,
)
from services.sandbox.pool import Pool
from services.sandbox.slots import BoxFailedError, Slot

log = get_logger(__name__)

OUTPUT_CUT_BYTES = 4096
_GRACE_S = 10.0
_VERDICT_BY_STOP = {
    "wall": Verdict.TIME_LIMIT,
    "cpu": Verdict.TIME_LIMIT,
    "memory": Verdict.MEMORY_LIMIT,
    "output": Verdict.OUTPUT_LIMIT,
    "died": Verdict.RUNTIME_ERROR,
    "exception": Verdict.RUNTIME_ERROR,
    "not_json": Verdict.WRONG_ANSWER,
    "compile": Verdict.COMPILE_ERROR,
}
_STOP_BY_REPLY = {EXCEPTION: "exception", NOT_JSON: "not_json", COMPILE_ERROR: "compile", TOO_LONG: "output"}
_FORGED = "the submission wrote to the file of its replies"
_REASON_BY_STOP = {
    "wall": "wall-clock limit of {wall_ms} ms",
    "cpu": "CPU limit of {cpu_ms} ms",
    "memory": "memory limit of {memory_bytes} bytes",
    "output": "output limit of {output_bytes} bytes",
}


async def execute(pool: Pool, program: Program) -> Execution:
    """Runs a program once; the box's own failures come back as INFRA_ERROR."""
    limits = program.limits
    job = Job({"arguments": program.arguments}, program.source, [program.stdin])
    execution: Execution | None = None
    peak_bytes = 0
    try:
        async with _run(pool, "execute", "programs", job, limits, False) as (_, messages):
            async for message in messages:
                if message.header["kind"] == "program":
                    execution = _execution(message, limits)
                elif message.header["kind"] == "done":
                    peak_bytes = message.header["peak_bytes"]
                elif execution is None:
                    _check_memory_kill(message)
                    reason = _explain("memory", limits)
                    execution = Execution(
                        Verdict.MEMORY_LIMIT, -1, signal.SIGKILL, peak_bytes=limits.memory_bytes, reason=reason
                    )
    except BoxFailedError as error:
        execution = Execution(Verdict.INFRA_ERROR, reason=error.message)
    assert execution is not None
    metrics.JOBS.labels("execute", execution.verdict.name).inc()
    return dataclasses.replace(execution, peak_bytes=peak_bytes or execution.peak_bytes)


async def judge(pool: Pool, submission: Submission) -> Judgement:
    """Runs a submission against its tests in one box; the box's own failures come back as INFRA_ERROR."""
    tests, limits = submission.tests, submission.limits
    stop_early = submission.stop_at_first_failure
    header = {"arguments": [], "function_name": submission.function_name}
    job = Job(header, submission.source, [_input(test) for test in tests])
    results: list[TestOutcome] = []
    wall_ms = peak_bytes = 0
    mode = "functions" if submission.function_name else "programs"
    try:
        async with _run(pool, "judge", mode, job, limits, stop_early) as (slot, messages):
            async for message in messages:
                kind = message.header["kind"]
                if kind == "program":
                    results.append(_program_result(message, tests[len(results)], limits))
                    if message.header["awaits_answer"]:
                        slot.answer(results[-1].verdict is Verdict.ACCEPTED)
                elif kind == "functions":
                    results += function_results(message, tests[len(results) :], limits)
                elif kind == "done":
                    wall_ms, peak_bytes = message.header["wall_us"] // 1000, message.header["peak_bytes"]
                elif not peak_bytes and len(results) < len(tests):
                    _check_memory_kill(message)
                    results.append(TestOutcome(Verdict.MEMORY_LIMIT, reason=_explain("memory", limits)))
    except BoxFailedError as error:
        log.warning("box_failed", reason=error.message)
        failed = TestOutcome(Verdict.INFRA_ERROR, reason=error.message)
        return _count(Judgement(Verdict.INFRA_ERROR, [failed] * len(tests)))
    return _count(_sum_up(results, len(tests), stop_early, wall_ms, peak_bytes))


def _sum_up(results: list[TestOutcome], tests: int, stop_early: bool, wall_ms: int, peak_bytes: int) -> Judgement:
    """Fills up what was not run, and forgets what should not have been."""
    failed = next((index for index, result in enumerate(results) if result.verdict is not Verdict.ACCEPTED), None)
    verdict = Verdict.ACCEPTED if failed is None else results[failed].verdict
    rest = TestOutcome(Verdict.SKIPPED)
    if verdict is Verdict.COMPILE_ERROR:
        rest = results[0]
    elif failed is not None and stop_early:
        results = results[: failed + 1]
    return Judgement(verdict, [*results, *[rest] * (tests - len(results))], wall_ms, peak_bytes)


def _count(judgement: Judgement) -> Judgement:
    metrics.JOBS.labels("judge", judgement.verdict.name).inc()
    return judgement


@asynccontextmanager
async def _run(
    pool: Pool, kind: str, mode: str, job: Job, limits: BoxLimits, stop_early: bool
) -> AsyncIterator[tuple[Slot, AsyncIterator[Message]]]:
    """A slot that runs the job, and what it tells; a slot that overruns all its limits counts as failed."""
    runs = len(job.inputs)
    header = {"mode": mode, "runs": runs, "stop_at_first_failure": stop_early, "limits": dataclasses.asdict(limits)}
    async with pool.take() as slot:
        started = time.monotonic()
        try:
            # one run more than there are inputs: loading a submission has the limits of a run
            async with asyncio.timeout((2 * runs + 1) * limits.wall_ms / 1000 + _GRACE_S):
                file = memory_file(encode_job(job))
                try:
                    yield slot, _checked(slot.messages(header, file, limits))
                finally:
                    os.close(file)
        except TimeoutError as error:
            raise BoxFailedError(f"slot {slot.place.index} overran its limits") from error
        finally:
            metrics.JOB_SECONDS.labels(kind).observe(time.monotonic() - started)


async def _checked(messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for message in messages:
        if message.header["kind"] == "failed":
            raise BoxFailedError(message.header["reason"])
        try:
            yield message
        finally:
            message.close()


def _input(test: StdioTest | FunctionTest) -> bytes:
    return test.stdin if isinstance(test, StdioTest) else test.arguments_json


def _check_memory_kill(message: Message) -> None:
    """Raises BoxFailedError unless the job's agent was killed for want of memory before it could report."""
    if not message.header["killed_for_memory"]:
        reason = message.header["reason"].strip() or "no report"
        raise BoxFailedError(f"the box ended with status {message.header['status']}: {reason}")


def _explain(stop: str | None, limits: BoxLimits) -> str:
    return _REASON_BY_STOP.get(stop or "", "").format(**dataclasses.asdict(limits))


def _execution(message: Message, limits: BoxLimits) -> Execution:
    header = message.header
    stdout, stderr, _ = (os.pread(file, limits.output_bytes, 0) for file in message.descriptors)
    return Execution(
        verdict=_program_verdict(header),
        exit_code=header["exit_code"] if header["exit_code"] is not None else -1,
        signal=header["signal"],
        stdout=stdout,
        stderr=stderr,
        stdout_truncated=header["stdout_truncated"],
        stderr_truncated=header["stderr_truncated"],
        wall_ms=header["wall_us"] // 1000,
        cpu_ms=header["cpu_us"] // 1000,
        reason=_explain(header["stop"], limits),
    )


def _program_verdict(header: dict[str, Any]) -> Verdict:
    if header["stop"] is not None:
        return _VERDICT_BY_STOP[header["stop"]]
    if header["compile_error"]:
        return Verdict.COMPILE_ERROR
    return Verdict.ACCEPTED if header["exit_code"] == 0 else Verdict.RUNTIME_ERROR


def _last_words(header: dict[str, Any]) -> str:
    return f"signal {header['signal']}" if header["signal"] else f"exit code {header['exit_code']}"


def _program_result(message: Message, test: StdioTest | FunctionTest, limits: BoxLimits) -> TestOutcome:
    assert isinstance(test, StdioTest)
    header = message.header
    stdout, stderr, compiler = (os.pread(file, limits.output_bytes, 0) for file in message.descriptors)
    verdict, reason = _program_verdict(header), _explain(header["stop"], limits)
    if verdict is Verdict.COMPILE_ERROR:
        reason = compiler.decode(errors="replace")
    elif verdict is Verdict.RUNTIME_ERROR:
        reason = stderr.decode(errors="replace").strip().rpartition("\n")[2] or _last_words(header)
    elif verdict is Verdict.ACCEPTED and not same_tokens(stdout, test.expected):
        verdict = Verdict.WRONG_ANSWER
    return TestOutcome(verdict, header["wall_us"] // 1000, stdout[:OUTPUT_CUT_BYTES], reason)


def function_results(
    message: Message, tests: Sequence[StdioTest | FunctionTest], limits: BoxLimits
) -> list[TestOutcome]:
    """The results that one process of a submission gives: of the tests it answered, and of the one that ended it.

    A submission that cannot be loaded gives the same result for all of `tests`.
    """
    header = message.header
    times_ms = [time_us // 1000 for time_us in header["answers_us"]]
    replies = read_replies(message.descriptors[0], len(times_ms), limits.output_bytes)
    if not replies or replies[0].kind != LOADED:
        result = _reply_result(replies[0], None, limits, times_ms[0]) if replies else _end_result(header, limits)
        return [result] * len(tests)
    results = [
        _reply_result(reply, test, limits, time_ms)
        for reply, test, time_ms in zip(replies[1:], tests, times_ms[1:], strict=False)
    ]
    # an answer that was told but is not there was forged; it keeps its place, so that the next ones meet their tests
    results += [TestOutcome(Verdict.RUNTIME_ERROR, reason=_FORGED)] * (len(times_ms) - 1 - len(results))
    complete = len(results) == len(tests)
    return results if complete else [*results, _end_result(header, limits)]


def _reply_result(reply: Reply, test: StdioTest | FunctionTest | None, limits: BoxLimits, wall_ms: int) -> TestOutcome:
    stop = _STOP_BY_REPLY.get(reply.kind)
    if stop is not None:
        reason = _explain(stop, limits) or reply.payload.decode(errors="replace")
        return TestOutcome(_VERDICT_BY_STOP[stop], wall_ms, reason=reason)
    if not isinstance(test, FunctionTest) or reply.kind != VALUE:
        return TestOutcome(Verdict.RUNTIME_ERROR, wall_ms, reason=_FORGED)
    verdict = Verdict.ACCEPTED if same_json_text(reply.payload, test.expected) else Verdict.WRONG_ANSWER
    return TestOutcome(verdict, wall_ms, reply.payload[:OUTPUT_CUT_BYTES])


def _end_result(header: dict[str, Any], limits: BoxLimits) -> TestOutcome:
    stop = header["stop"] or "died"
    return TestOutcome(
        _VERDICT_BY_STOP[stop], header["wall_us"] // 1000, reason=_explain(stop, limits) or _last_words(header)
    )
