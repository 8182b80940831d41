"""Turns what became of jobs into messages."""

from __future__ import annotations

from collections.abc import Iterable

from perigee.errors import InvalidArgumentError, PerigeeError, to_status
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.api.requests import LIMIT_FIELDS
from services.sandbox.config import LimitsConfig
from services.sandbox.runtime.jobs import CompileReport, Execution, Judgement, OutputFile, TestOutcome, Verdict, Worth
from services.sandbox.runtime.programs import Piece
from services.sandbox.runtime.sessions import CellOutcome

_STATUS_NAMES = {Verdict.ACCEPTED: "OK"}


def status_of(verdict: Verdict) -> pb.Status.ValueType:
    """The status of a run."""
    return pb.Status.Value(f"STATUS_{_STATUS_NAMES.get(verdict, verdict.name)}")


def verdict_of(verdict: Verdict) -> pb.TestVerdict.ValueType:
    """The verdict of a test."""
    return pb.TestVerdict.Value(f"TEST_VERDICT_{verdict.name}")


def execute_response(execution: Execution) -> pb.ExecuteResponse:
    """The response of a run."""
    return pb.ExecuteResponse(
        status=status_of(execution.verdict),
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
        files=output_files(execution.files),
    )


def stream_response(piece: Piece) -> pb.ExecuteStreamResponse:
    """An event with output."""
    if piece.stream == "stdout":
        return pb.ExecuteStreamResponse(stdout=piece.content)
    return pb.ExecuteStreamResponse(stderr=piece.content)


def compile_result(report: CompileReport | None) -> pb.CompileResult | None:
    """What a compiler said, if there was one."""
    if report is None:
        return None
    return pb.CompileResult(
        exit_code=report.exit_code, stdout=report.stdout, stderr=report.stderr, wall_ms=report.wall_ms
    )


def output_files(files: Iterable[OutputFile]) -> list[pb.OutputFile]:
    """The files that a program left."""
    return [
        pb.OutputFile(path=file.path, content=file.content, truncated=file.truncated, error=file.error)
        for file in files
    ]


def judge_response(judgement: Judgement) -> pb.JudgeResponse:
    """The response of a judged submission."""
    return pb.JudgeResponse(
        verdict=verdict_of(judgement.verdict),
        results=[test_result(*pair) for pair in zip(judgement.results, judgement.worths, strict=True)],
        passed=sum(result.verdict is Verdict.ACCEPTED for result in judgement.results),
        wall_ms=judgement.wall_ms,
        peak_memory_bytes=judgement.peak_bytes,
        points=judgement.points,
        max_points=judgement.most_points,
        compile=compile_result(judgement.compile),
    )


def test_result(result: TestOutcome, worth: Worth) -> pb.TestResult:
    """The response's part of one test."""
    return pb.TestResult(
        verdict=verdict_of(result.verdict),
        wall_ms=result.wall_ms,
        output=result.output,
        reason=result.reason,
        name=worth.name,
        points=result.share * worth.points,
        cpu_ms=result.cpu_ms,
        peak_memory_bytes=result.peak_bytes,
        exit_code=result.exit_code,
        signal=result.signal,
        stderr=result.stderr,
        output_truncated=result.output_truncated,
    )


def is_final(response: pb.ExecuteResponse | pb.JudgeResponse) -> bool:
    """Whether a response says something of the program; the sandbox's own failures may pass."""
    if isinstance(response, pb.ExecuteResponse):
        return response.status != pb.STATUS_INFRA_ERROR
    return all(result.verdict != pb.TEST_VERDICT_INFRA_ERROR for result in response.results)


def cell_response(outcome: CellOutcome) -> pb.RunCellResponse:
    """The response of a cell."""
    return pb.RunCellResponse(
        status=status_of(outcome.verdict),
        stdout=outcome.stdout,
        stderr=outcome.stderr,
        stdout_truncated=outcome.stdout_truncated,
        stderr_truncated=outcome.stderr_truncated,
        result=outcome.result,
        error_name=outcome.error_name,
        error_value=outcome.error_value,
        wall_ms=outcome.wall_ms,
        cpu_ms=outcome.cpu_ms,
        peak_memory_bytes=outcome.peak_bytes,
        reason=outcome.reason,
        files=output_files(outcome.files),
        alive=outcome.alive,
        execution_count=outcome.execution_count,
    )


def item_error(error: PerigeeError) -> pb.ItemError:
    """Why one item of a batch has no response."""
    item = pb.ItemError(code=to_status(error).code, message=error.message)
    if isinstance(error, InvalidArgumentError):
        item.field_violations.update({violation.field: violation.description for violation in error.violations})
    if error.retry_after_s is not None:
        item.retry_after_ms = round(error.retry_after_s * 1000)
    return item


def limits_message(config: LimitsConfig) -> pb.Limits:
    """All limits, set."""
    return pb.Limits(**{name: getattr(config, name) for name in LIMIT_FIELDS})
