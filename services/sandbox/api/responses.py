"""Turns results of jobs into messages."""

from __future__ import annotations

from perigee.errors import InvalidArgumentError, PerigeeError, to_status
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.runtime.execute import OutputChunk
from services.sandbox.runtime.jobs import (
    CompileReport,
    Execution,
    JudgeResult,
    Status,
    TestResult,
    TestWeight,
)


def verdict_of(verdict: Status) -> pb.TestVerdict.ValueType:
    """Returns the verdict of a test."""
    return pb.TestVerdict.Value(f"TEST_VERDICT_{verdict.name}")


def execute_response(execution: Execution) -> pb.ExecuteResponse:
    """Returns the response of a run."""
    return pb.ExecuteResponse(
        status=execution.status.of_run,
        exit_code=execution.exit_code,
        signal=execution.signal,
        stdout=execution.stdout,
        stderr=execution.stderr,
        stdout_truncated=execution.stdout_truncated,
        stderr_truncated=execution.stderr_truncated,
        wall_ms=execution.wall_ms,
        cpu_ms=execution.cpu_ms,
        peak_memory_bytes=execution.peak_bytes,
        reason=execution.reason,
        compile=compile_result(execution.compile),
        files=execution.files,
    )


def stream_response(piece: OutputChunk) -> pb.ExecuteStreamResponse:
    """Returns an event with output."""
    if piece.stream == "stdout":
        return pb.ExecuteStreamResponse(stdout=piece.content)
    return pb.ExecuteStreamResponse(stderr=piece.content)


def compile_result(report: CompileReport | None) -> pb.CompileResult | None:
    """Returns the result of a compilation, if there was one."""
    if report is None:
        return None
    return pb.CompileResult(
        exit_code=report.exit_code, stdout=report.stdout, stderr=report.stderr, wall_ms=report.wall_ms
    )


def judge_response(result: JudgeResult) -> pb.JudgeResponse:
    """Returns the response of a judged submission."""
    return pb.JudgeResponse(
        verdict=verdict_of(result.status),
        results=[test_result(*pair) for pair in zip(result.results, result.weights, strict=True)],
        passed=sum(each.status is Status.ACCEPTED for each in result.results),
        wall_ms=result.wall_ms,
        peak_memory_bytes=result.peak_bytes,
        points=result.points,
        max_points=result.most_points,
        compile=compile_result(result.compile),
    )


def test_result(result: TestResult, weight: TestWeight) -> pb.TestResult:
    """Returns the result of one test."""
    return pb.TestResult(
        verdict=verdict_of(result.status),
        wall_ms=result.wall_ms,
        output=result.output,
        reason=result.reason,
        name=weight.name,
        points=result.fraction * weight.points,
        cpu_ms=result.cpu_ms,
        peak_memory_bytes=result.peak_bytes,
        exit_code=result.exit_code,
        signal=result.signal,
        stderr=result.stderr,
        output_truncated=result.output_truncated,
    )


def is_final(response: pb.ExecuteResponse | pb.JudgeResponse) -> bool:
    """Returns whether a response is about the program, and no failure of the sandbox, which may be temporary."""
    if isinstance(response, pb.ExecuteResponse):
        return response.status != pb.STATUS_INFRA_ERROR
    return all(result.verdict != pb.TEST_VERDICT_INFRA_ERROR for result in response.results)


def item_error(error: PerigeeError) -> pb.ItemError:
    """Returns the error of one item of a batch."""
    item = pb.ItemError(code=to_status(error).code, message=error.message)
    if isinstance(error, InvalidArgumentError):
        item.field_violations.update({violation.field: violation.description for violation in error.violations})
    if error.retry_after_s is not None:
        item.retry_after_ms = round(error.retry_after_s * 1000)
    return item
