"""SandboxFusion's interface (https://bytedance.github.io/SandboxFusion): POST /run_code.

A requested file that does not exist is missing from the response, as there, and so is one outside of the working
folder; one that is too large is named in `message` and missing, not cut. A failure of the sandbox is a SandboxError
with status 200, as there; a request that is refused (invalid, no free slot) has an HTTP status of its own.
"""

from __future__ import annotations

import base64
import posixpath
import socket
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from perigee.errors import FieldViolation, InvalidArgumentError, PerigeeError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.kit.http import CompatRouter, call_context, write_error
from services.sandbox.api.compat import Servicer, Text, find_runtime, rename_fields, whole

_CANNOT_EXECUTE = 126
_MUCH_BYTES = 8 << 20
# what there are further libraries for, or another way to run
_RUNTIMES = {"python": "python-science", "pytest": "python-test"}
# what sources need not say there: .NET's implicit usings, and types that nobody checks
_BEGINNINGS = {
    "csharp": "using System; using System.Collections.Generic; using System.IO; using System.Linq; "
    "using System.Threading; using System.Threading.Tasks; ",
    "typescript": "// @ts-nocheck\n",
}
_PYTEST = ["python3", "-m", "pytest", "test_main.py"]
_FIELDS = {
    "source": "code",
    "output_files": "fetch_files",
    "limits.wall_ms": "run_timeout",
    "limits.cpu_ms": "run_timeout",
    "limits.memory_bytes": "memory_limit_MB",
    "compile_limits.wall_ms": "compile_timeout",
    "compile_limits.cpu_ms": "compile_timeout",
}


class RunCodeRequest(BaseModel):
    """Program to run; timeouts are in seconds, files are base64 by path."""

    code: Text
    language: Text
    stdin: Text | None = None
    compile_timeout: float = Field(10, gt=0, allow_inf_nan=False)
    run_timeout: float = Field(10, gt=0, allow_inf_nan=False)
    memory_limit_MB: float = Field(-1, allow_inf_nan=False)
    files: dict[Text, Text | None] = {}
    fetch_files: list[Text] = []


class CommandRunResult(BaseModel):
    """Result of a compiler or a program; `return_code` is minus the signal that ended it."""

    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    execution_time: float | None = None
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None


class RunCodeResponse(BaseModel):
    """Result; Failed when an exit code is not 0 or a limit was passed."""

    status: Literal["Success", "Failed", "SandboxError"]
    message: str
    compile_result: CommandRunResult | None = None
    run_result: CommandRunResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = {}


class FusionErrorDetail(BaseModel):
    """Violation of one field."""

    loc: list[str]
    msg: str
    type: str


class FusionError(BaseModel):
    """Reason why a request was refused."""

    detail: str | list[FusionErrorDetail]


def sandbox_fusion_api(servicer: Servicer) -> CompatRouter:
    """Returns the router of the interface in front of a servicer."""
    router = APIRouter(tags=["SandboxFusion"])
    pod_name = socket.gethostname()

    @router.post("/run_code", responses={"4XX": {"model": FusionError}, "5XX": {"model": FusionError}})
    async def run_code(body: RunCodeRequest, request: Request) -> RunCodeResponse:
        """Compiles a program if its language needs it, and runs it once."""
        context = call_context(request)
        listed = await servicer.ListRuntimes(pb.ListRuntimesRequest(), context)
        names = (_RUNTIMES.get(body.language.lower(), body.language), body.language)
        runtime = next(filter(None, (find_runtime(listed.runtimes, name) for name in names)), None)
        try:
            response = await servicer.Execute(to_execute_request(body, runtime), context)
        except InvalidArgumentError as error:
            raise rename_fields(error, _FIELDS) from error
        return to_run_code_response(response, runtime is not None and runtime.compiled, pod_name)

    return CompatRouter(router, write_fusion_error)


def to_execute_request(body: RunCodeRequest, runtime: pb.Runtime | None) -> pb.ExecuteRequest:
    """Converts a request; without a runtime the language is passed on as it is, to be refused.

    Raises InvalidArgumentError for files that are not base64.
    """
    # SandboxFusion has no limit of CPU time: the timeout sets both
    run_ms = whole(body.run_timeout * 1000)
    limits = pb.Limits(wall_ms=run_ms, cpu_ms=run_ms)
    if body.memory_limit_MB > 0:
        limits.memory_bytes = whole(body.memory_limit_MB * 2**20, 2**64 - 1)
    request = pb.ExecuteRequest(
        language=runtime.language if runtime else body.language,
        source=complete_source(runtime.language if runtime else "", body.code).encode(),
        stdin=(body.stdin or "").encode(),
        limits=limits,
        files=read_files(body.files),
        output_files=[path for path in body.fetch_files if posixpath.normpath(path).split("/")[0] not in ("", "..")],
        loopback=True,  # SandboxFusion does not take the network away
    )
    if (size := sum(len(file.content) for file in request.files)) > _MUCH_BYTES:  # there is no limit of space there
        request.limits.file_bytes = 2 * size
    if body.language.lower() == "pytest":
        request.files.add(path=_PYTEST[-1], content=request.source)
        request.command.extend(_PYTEST)
        request.ClearField("source")
    if runtime is not None and runtime.compiled:
        compile_ms = whole(body.compile_timeout * 1000)
        request.compile_limits.CopyFrom(pb.Limits(wall_ms=compile_ms, cpu_ms=compile_ms))
    return request


def complete_source(language: str, code: str) -> str:
    """Returns a source with what it may leave out there."""
    if language == "php":
        code = code.lstrip()
        return code if code.startswith("<?php") else f"<?php\n{code}"
    return _BEGINNINGS.get(language, "") + code


def read_files(files: Mapping[str, str | None]) -> list[pb.File]:
    """Returns files by path that come as base64; raises InvalidArgumentError for those that do not."""
    read: list[pb.File] = []
    violations: list[FieldViolation] = []
    for path, content in files.items():
        try:
            if content is not None:
                read.append(pb.File(path=path, content=base64.b64decode(content, validate=True)))
        except ValueError:
            violations.append(FieldViolation(f"files.{path}", "is not base64"))
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    return read


def write_files(files: Iterable[pb.OutputFile]) -> dict[str, str]:
    """Returns the files that are there and whole by path, as base64."""
    return {
        file.path: base64.b64encode(file.content).decode() for file in files if not file.error and not file.truncated
    }


def to_run_code_response(
    response: pb.ExecuteResponse, is_compiled: bool, pod_name: str | None = None
) -> RunCodeResponse:
    """Converts a response; the source of a language that is not compiled is refused by its run."""
    compiled = _compile_result(response.compile) if is_compiled and response.HasField("compile") else None
    if response.status == pb.STATUS_INFRA_ERROR:
        return RunCodeResponse(
            status="SandboxError",
            message=response.reason,
            compile_result=compiled,
            run_result=CommandRunResult(status="Error", stderr=response.reason),
            executor_pod_name=pod_name,
        )
    too_large = [file.path for file in response.files if file.truncated]
    messages = [f"{path} is too large to be returned" for path in too_large]
    if response.status != pb.STATUS_OK and response.reason:
        messages.insert(0, response.reason)
    return RunCodeResponse(
        status="Success" if response.status == pb.STATUS_OK else "Failed",
        message="; ".join(messages),
        compile_result=compiled,
        run_result=_run_result(response, is_compiled),
        executor_pod_name=pod_name,
        files=write_files(response.files),
    )


def write_fusion_error(error: PerigeeError) -> tuple[int, Any]:
    """Returns the HTTP status and body of an error: violations as FastAPI reports them, or one sentence."""
    if isinstance(error, InvalidArgumentError) and error.violations:
        detail = [
            {"loc": ["body", each.field], "msg": each.description, "type": "value_error"} for each in error.violations
        ]
        return 422, {"detail": detail}
    status, _ = write_error(error)
    return status, {"detail": error.message}


def _run_result(response: pb.ExecuteResponse, is_compiled: bool) -> CommandRunResult | None:
    if response.status == pb.STATUS_COMPILE_ERROR:
        if is_compiled and response.compile.exit_code:
            return None
        # of an interpreter that refuses the source, or a shell that cannot execute what was compiled
        code = response.compile.exit_code or _CANNOT_EXECUTE
        said = response.compile.stderr.decode(errors="replace") if response.compile.exit_code else response.reason
        return CommandRunResult(status="Finished", execution_time=0.0, return_code=code, stdout="", stderr=said)
    stdout = response.stdout.decode(errors="replace")
    stderr = response.stderr.decode(errors="replace")
    seconds = response.wall_ms / 1000
    if response.status == pb.STATUS_TIME_LIMIT:
        return CommandRunResult(status="TimeLimitExceeded", execution_time=seconds, stdout=stdout, stderr=stderr)
    return_code = -response.signal if response.signal else response.exit_code
    if response.status in (pb.STATUS_MEMORY_LIMIT, pb.STATUS_OUTPUT_LIMIT) and return_code == 0:
        return_code = -9  # the sandbox ended it, whatever its own exit code was
    return CommandRunResult(
        status="Finished", execution_time=seconds, return_code=return_code, stdout=stdout, stderr=stderr
    )


def _compile_result(compiled: pb.CompileResult) -> CommandRunResult:
    was_late = compiled.status == pb.STATUS_TIME_LIMIT
    return CommandRunResult(
        status="TimeLimitExceeded" if was_late else "Finished",
        execution_time=compiled.wall_ms / 1000,
        return_code=None if was_late else -compiled.signal if compiled.signal else compiled.exit_code,
        stdout=compiled.stdout.decode(errors="replace"),
        stderr=compiled.stderr.decode(errors="replace"),
    )
