"""Runs programs and submissions in slots, and turns what the agents report into verdicts."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from services.kit.telemetry import get_logger
from services.sandbox import metrics
from services.sandbox.box import wire
from services.sandbox.box.limits import BoxLimits
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
_REASON_BY_STOP = {
    "wall": "wall-clock limit of {wall_ms} ms",
    "cpu": "CPU limit of {cpu_ms} ms",
    "memory": "memory limit of {memory_bytes} bytes",
    "output": "output limit of {output_bytes} bytes",
}


async def execute(pool: Pool, program: Program) -> Execution:
    """Runs a program once; the box's own failures come back as INFRA_ERROR."""
    header = _header("program", program.limits, program.arguments, "", False)
    blobs = [program.source, program.stdin]
    execution: Execution | None = None
    peak_bytes = 0
    try:
        async with _job(pool, "execute", header, blobs, program.limits, 1) as (_, frames):
            async for frame in frames:
                if frame.header["kind"] == "program":
                    execution = _execution(frame, program.limits)
                elif frame.header["kind"] == "done":
                    peak_bytes = frame.header["peak_bytes"]
                elif frame.header["kind"] == "end" and execution is None:
                    reason = _explain("memory", program.limits)
                    execution = Execution(
                        _abrupt_end(frame),
                        exit_code=-1,
                        signal=9,
                        peak_bytes=program.limits.memory_bytes,
                        reason=reason,
                    )
    except BoxFailedError as error:
        execution = Execution(Verdict.INFRA_ERROR, reason=error.message)
    assert execution is not None
    metrics.JOBS.labels("execute", execution.verdict.name).inc()
    return dataclasses.replace(execution, peak_bytes=peak_bytes or execution.peak_bytes)


async def judge(pool: Pool, submission: Submission) -> Judgement:
    """Runs a submission against its tests in one box; the box's own failures come back as INFRA_ERROR."""
    functions = bool(submission.function_name)
    header = _header(
        "functions" if functions else "program",
        submission.limits,
        [],
        submission.function_name,
        submission.stop_at_first_failure,
    )
    blobs = [submission.source, *(_input(test) for test in submission.tests)]
    results: list[TestOutcome] = []
    wall_ms = peak_bytes = 0
    try:
        async with _job(pool, "judge", header, blobs, submission.limits, len(submission.tests)) as (slot, frames):
            async for frame in frames:
                kind = frame.header["kind"]
                if kind in ("call", "program"):
                    result = _result(frame, submission.tests[len(results)], submission.limits)
                    results.append(result)
                    if submission.stop_at_first_failure and frame.header["awaits_answer"]:
                        slot.answer(result.verdict is Verdict.ACCEPTED)
                elif kind == "load":
                    results += [_failure(frame, submission.limits)] * (len(submission.tests) - len(results))
                elif kind == "done":
                    wall_ms, peak_bytes = frame.header["wall_us"] // 1000, frame.header["peak_bytes"]
                elif kind == "end" and len(results) < len(submission.tests) and not wall_ms and not peak_bytes:
                    results.append(TestOutcome(_abrupt_end(frame), reason=_explain("memory", submission.limits)))
    except BoxFailedError as error:
        log.warning("box_failed", reason=error.message)
        return _count(
            Judgement(
                Verdict.INFRA_ERROR, [TestOutcome(Verdict.INFRA_ERROR, reason=error.message)] * len(submission.tests)
            )
        )
    compile_failed = bool(results) and results[0].verdict is Verdict.COMPILE_ERROR
    rest = results[0] if compile_failed else TestOutcome(Verdict.SKIPPED)
    results += [rest] * (len(submission.tests) - len(results))
    verdict = next((result.verdict for result in results if result.verdict is not Verdict.ACCEPTED), Verdict.ACCEPTED)
    return _count(Judgement(verdict, results, wall_ms, peak_bytes))


def _count(judgement: Judgement) -> Judgement:
    metrics.JOBS.labels("judge", judgement.verdict.name).inc()
    return judgement


@asynccontextmanager
async def _job(
    pool: Pool, kind: str, header: dict[str, Any], blobs: list[bytes], limits: BoxLimits, runs: int
) -> AsyncIterator[tuple[Slot, AsyncIterator[wire.Frame]]]:
    """A slot that runs the job, and its frames; a slot that overruns all its limits counts as failed."""
    async with pool.take() as slot:
        started = time.monotonic()
        try:
            # one run more than there are inputs: loading a submission has the limits of a run
            async with asyncio.timeout((runs + 1) * limits.wall_ms / 1000 + _GRACE_S):
                yield slot, _checked(slot.frames(header, blobs, limits))
        except TimeoutError as error:
            raise BoxFailedError(f"slot {slot.place.index} overran its limits") from error
        finally:
            metrics.JOB_SECONDS.labels(kind).observe(time.monotonic() - started)


async def _checked(frames: AsyncIterator[wire.Frame]) -> AsyncIterator[wire.Frame]:
    async for frame in frames:
        if frame.header["kind"] == "failed":
            raise BoxFailedError(frame.header["reason"])
        yield frame


def _header(mode: str, limits: BoxLimits, arguments: list[str], function_name: str, stop: bool) -> dict[str, Any]:
    return {
        "mode": mode,
        "limits": dataclasses.asdict(limits),
        "arguments": arguments,
        "function_name": function_name,
        "stop_at_first_failure": stop,
    }


def _input(test: StdioTest | FunctionTest) -> bytes:
    return test.stdin if isinstance(test, StdioTest) else test.arguments_json


def _abrupt_end(frame: wire.Frame) -> Verdict:
    """The verdict of a job whose agent ended without a report: memory, or the box has failed."""
    if frame.header["killed_for_memory"]:
        return Verdict.MEMORY_LIMIT
    raise BoxFailedError(
        f"the box ended with status {frame.header['status']}: {frame.header['reason'].strip() or 'no report'}"
    )


def _explain(stop: str | None, limits: BoxLimits) -> str:
    return _REASON_BY_STOP.get(stop or "", "").format(**dataclasses.asdict(limits))


def _execution(frame: wire.Frame, limits: BoxLimits) -> Execution:
    header = frame.header
    verdict = _program_verdict(header)
    return Execution(
        verdict=verdict,
        exit_code=header["exit_code"] if header["exit_code"] is not None else -1,
        signal=header["signal"],
        stdout=frame.blobs[0],
        stderr=frame.blobs[1],
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


def _failure(frame: wire.Frame, limits: BoxLimits) -> TestOutcome:
    header = frame.header
    reason = header["reason"] or _explain(header["stop"], limits) or _last_words(header)
    return TestOutcome(
        _VERDICT_BY_STOP[header["stop"]], header["wall_us"] // 1000, frame.blobs[0][:OUTPUT_CUT_BYTES], reason
    )


def _last_words(header: dict[str, Any]) -> str:
    return f"signal {header['signal']}" if header["signal"] else f"exit code {header['exit_code']}"


def _result(frame: wire.Frame, test: StdioTest | FunctionTest, limits: BoxLimits) -> TestOutcome:
    header = frame.header
    if isinstance(test, FunctionTest):
        if header["stop"] is not None:
            return _failure(frame, limits)
        verdict = Verdict.ACCEPTED if same_json_text(frame.blobs[0], test.expected) else Verdict.WRONG_ANSWER
        return TestOutcome(verdict, header["wall_us"] // 1000, frame.blobs[0][:OUTPUT_CUT_BYTES])
    verdict = _program_verdict(header)
    reason = header["reason"] or _explain(header["stop"], limits)
    if verdict is Verdict.RUNTIME_ERROR:
        reason = frame.blobs[1].decode(errors="replace").strip().rpartition("\n")[2] or _last_words(header)
    elif verdict is Verdict.ACCEPTED and not same_tokens(frame.blobs[0], test.expected):
        verdict = Verdict.WRONG_ANSWER
    return TestOutcome(verdict, header["wall_us"] // 1000, frame.blobs[0][:OUTPUT_CUT_BYTES], reason)
