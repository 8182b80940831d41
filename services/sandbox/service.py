"""SandboxService: protobuf in, domain call, protobuf out."""

from __future__ import annotations

from typing import Any

import grpc

from perigee.sandbox.v1 import sandbox_pb2 as pb
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceServicer
from services.sandbox.config import LimitsConfig, SandboxConfig
from services.sandbox.jobs import Execution, Judgement, Verdict
from services.sandbox.judge import execute, judge
from services.sandbox.pool import Pool
from services.sandbox.requests import LANGUAGES, LIMIT_FIELDS, read_program, read_submission

FULL_NAME = "perigee.sandbox.v1.SandboxService"
_STATUS_NAMES = {Verdict.ACCEPTED: "OK", Verdict.COMPILE_ERROR: "RUNTIME_ERROR"}

Context = grpc.aio.ServicerContext[Any, Any]


class SandboxService(SandboxServiceServicer):
    """Serves a pool of slots."""

    def __init__(self, pool: Pool, config: SandboxConfig) -> None:
        self._pool = pool
        self._config = config

    async def Execute(self, request: pb.ExecuteRequest, context: Context) -> pb.ExecuteResponse:
        """Runs one program once."""
        return _execute_response(await execute(self._pool, read_program(request, self._config)))

    async def Judge(self, request: pb.JudgeRequest, context: Context) -> pb.JudgeResponse:
        """Runs a submission against its tests."""
        return _judge_response(await judge(self._pool, read_submission(request, self._config)))

    async def ListRuntimes(self, request: pb.ListRuntimesRequest, context: Context) -> pb.ListRuntimesResponse:
        """Tells the languages with their versions, limits and isolation."""
        runtimes = [
            pb.Runtime(
                language=language,
                version=self._pool.version,
                default_limits=_limits(self._config.default_limits),
                maximum_limits=_limits(self._config.maximum_limits),
                isolation=self._pool.isolation.label,
            )
            for language in LANGUAGES
        ]
        return pb.ListRuntimesResponse(runtimes=runtimes)


def _execute_response(execution: Execution) -> pb.ExecuteResponse:
    name = _STATUS_NAMES.get(execution.verdict, execution.verdict.name)
    return pb.ExecuteResponse(
        status=pb.Status.Value(f"STATUS_{name}"),
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
    )


def _judge_response(judgement: Judgement) -> pb.JudgeResponse:
    results = [
        pb.TestResult(
            verdict=_verdict(result.verdict), wall_ms=result.wall_ms, output=result.output, reason=result.reason
        )
        for result in judgement.results
    ]
    return pb.JudgeResponse(
        verdict=_verdict(judgement.verdict),
        results=results,
        passed=sum(result.verdict is Verdict.ACCEPTED for result in judgement.results),
        wall_ms=judgement.wall_ms,
        peak_memory_bytes=judgement.peak_bytes,
    )


def _verdict(verdict: Verdict) -> pb.TestVerdict.ValueType:
    return pb.TestVerdict.Value(f"TEST_VERDICT_{verdict.name}")


def _limits(config: LimitsConfig) -> pb.Limits:
    return pb.Limits(**{name: getattr(config, name) for name in LIMIT_FIELDS})
