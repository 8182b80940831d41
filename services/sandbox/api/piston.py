"""Piston's interface (https://piston.readthedocs.io/en/latest/api-v2): GET /api/v2/runtimes, POST /api/v2/execute.

The first text file is the program, under a name of the sandbox's choice; `output` is standard output followed by
standard error, not the two as they were interleaved.
"""

from __future__ import annotations

import base64
import re
import signal
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from perigee.errors import FieldViolation, InvalidArgumentError, PerigeeError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.kit.http import CompatRouter, call_context, write_error
from services.sandbox.api.compat import Servicer, Text, find_runtime, names_of, rename_fields, whole

Version = tuple[int, int, int]

_COMPARATOR = re.compile(
    r"(?P<sign>[\^~=v]|>=|<=|>|<)?(?P<major>\d{1,9}|[xX*])(?:\.(?P<minor>\d{1,9}|[xX*]))?(?:\.(?P<patch>\d{1,9}|[xX*]))?"
)


def selects(selector: str, version: str) -> bool:
    """Returns whether a selector of npm's kind (3.x, ^3.10, ~3.10.2, >=3.8 <4, *, alternatives with ||) accepts a
    version.

    Of the version, the first dotted number counts; one without a number is never accepted.
    """
    number = re.search(r"\d{1,9}(?:\.\d{1,9})*", version)
    if number is None:
        return False
    return any(_takes_all(part, _pad(number[0].split("."))) for part in selector.split("||"))


def _takes_all(comparators: str, version: Version) -> bool:
    # a sign may be apart from its number
    parts = re.sub(r"([\^~=<>])\s+", r"\1", comparators).split()
    return all(_takes(part, version) for part in parts)


def _takes(comparator: str, version: Version) -> bool:
    match = _COMPARATOR.fullmatch(comparator)
    if match is None:
        return False
    given: list[str] = []
    for part in (match["major"], match["minor"], match["patch"]):
        if part is None or not part.isdigit():
            break
        given.append(part)
    low, sign = _pad(given), match["sign"]
    if not given:
        return sign not in ("<", ">")
    if sign in (">", "<", ">=", "<="):
        after = _next(low, len(given))
        return {">": version >= after, ">=": version >= low, "<": version < low, "<=": version < after}[sign]
    if sign == "^":
        fixed = next((index for index, part in enumerate(low[: len(given)], 1) if part), len(given))
        return low <= version < _next(low, fixed)
    if sign == "~":
        return low <= version < _next(low, min(len(given), 2))
    return low <= version < _next(low, len(given))


def _next(version: Version, numbers: int) -> Version:
    """Returns the first version that differs in the given number of leading numbers."""
    kept = [*version[: numbers - 1], version[numbers - 1] + 1]
    return _pad([str(part) for part in kept])


def _pad(parts: list[str]) -> Version:
    major, minor, patch = (*(int(part) for part in parts[:3]), 0, 0, 0)[:3]
    return major, minor, patch


_FIELDS = {
    "limits.wall_ms": "run_timeout",
    "limits.cpu_ms": "run_cpu_time",
    "limits.memory_bytes": "run_memory_limit",
    "compile_limits.wall_ms": "compile_timeout",
    "compile_limits.cpu_ms": "compile_cpu_time",
    "compile_limits.memory_bytes": "compile_memory_limit",
}


class PistonFile(BaseModel):
    """File of the request: the program, or one beside it."""

    name: Text | None = None
    content: Text
    encoding: Literal["utf8", "base64", "hex"] = "utf8"


class PistonRequest(BaseModel):
    """Program to run; times are in milliseconds, memory in bytes, -1 and absence mean the sandbox's default."""

    language: Text
    version: Text
    files: list[PistonFile]
    stdin: Text = ""
    args: list[Text] = []
    compile_timeout: float | None = Field(None, ge=0, allow_inf_nan=False)
    run_timeout: float | None = Field(None, ge=0, allow_inf_nan=False)
    compile_cpu_time: float | None = Field(None, ge=0, allow_inf_nan=False)
    run_cpu_time: float | None = Field(None, ge=0, allow_inf_nan=False)
    compile_memory_limit: float | None = Field(None, ge=-1, allow_inf_nan=False)
    run_memory_limit: float | None = Field(None, ge=-1, allow_inf_nan=False)


class PistonStage(BaseModel):
    """Result of a stage. `status` is RE for a non-zero exit code, SG a signal, TO a time limit, OL and EL too much
    output on standard output or error, XX a failure of the sandbox.
    """

    stdout: str
    stderr: str
    output: str
    code: int | None
    signal: str | None
    message: str | None
    status: Literal["RE", "SG", "TO", "OL", "EL", "XX"] | None
    cpu_time: int | None
    wall_time: int
    memory: int | None


class PistonResponse(BaseModel):
    """Results of the stages; `run` is the compiler's if it failed."""

    language: str
    version: str
    run: PistonStage
    compile: PistonStage | None = None


class PistonRuntime(BaseModel):
    """Language and its names."""

    language: str
    version: str
    aliases: list[str]


class PistonError(BaseModel):
    """Reason why a request was refused."""

    message: str


def piston_api(servicer: Servicer) -> CompatRouter:
    """Returns the router of the interface in front of a servicer."""
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": PistonError}, "5XX": {"model": PistonError}}
    router = APIRouter(prefix="/api/v2", tags=["Piston"], responses=errors)

    @router.get("/runtimes")
    async def runtimes(request: Request) -> list[PistonRuntime]:
        """Lists the languages with their versions and names."""
        listed = await servicer.ListRuntimes(pb.ListRuntimesRequest(), call_context(request))
        return [to_piston_runtime(runtime) for runtime in listed.runtimes]

    @router.post("/execute", response_model_exclude_unset=True)
    async def execute(body: PistonRequest, request: Request) -> PistonResponse:
        """Compiles a program if its language needs it, and runs it once."""
        context = call_context(request)
        listed = await servicer.ListRuntimes(pb.ListRuntimesRequest(), context)
        runtime = find_runtime(listed.runtimes, body.language)
        if runtime is None or not selects(body.version, runtime.version):
            raise InvalidArgumentError(f"{body.language}-{body.version} runtime is unknown")
        try:
            response = await servicer.Execute(to_execute_request(body, runtime), context)
        except InvalidArgumentError as error:
            raise rename_fields(error, _FIELDS) from error
        return to_piston_response(response, runtime)

    return CompatRouter(router, write_piston_error)


def to_execute_request(body: PistonRequest, runtime: pb.Runtime) -> pb.ExecuteRequest:
    """Converts a request; raises InvalidArgumentError when a file cannot be decoded or none is text."""
    program = next((index for index, file in enumerate(body.files) if file.encoding == "utf8"), None)
    if program is None:
        raise InvalidArgumentError.for_field("files", "must include at least one utf8 encoded file")
    violations: list[FieldViolation] = []
    files: list[pb.File] = []
    for index, file in enumerate(body.files):
        if index == program:
            continue
        try:
            files.append(pb.File(path=file.name or f"file{index}.code", content=_decode(file)))
        except ValueError:
            violations.append(FieldViolation(f"files[{index}].content", f"is not {file.encoding}"))
    if violations:
        raise InvalidArgumentError.for_fields(violations)
    request = pb.ExecuteRequest(
        language=runtime.language,
        source=body.files[program].content.encode(),
        stdin=(body.stdin if body.stdin.endswith("\n") else f"{body.stdin}\n").encode(),
        args=body.args,
        limits=_limits(body.run_timeout, body.run_cpu_time, body.run_memory_limit),
        files=files,
    )
    if runtime.compiled:
        limits = _limits(body.compile_timeout, body.compile_cpu_time, body.compile_memory_limit)
        request.compile_limits.CopyFrom(limits)
    return request


def to_piston_response(response: pb.ExecuteResponse, runtime: pb.Runtime) -> PistonResponse:
    """Converts a response."""
    compiled = _compile_stage(response.compile) if response.HasField("compile") else None
    names = {"language": runtime.language, "version": runtime.version}
    run = compiled if response.status == pb.STATUS_COMPILE_ERROR and compiled is not None else _run_stage(response)
    if compiled is None or not runtime.compiled:  # an interpreter refuses its source when it runs
        return PistonResponse(**names, run=run)
    return PistonResponse(**names, run=run, compile=compiled)


def to_piston_runtime(runtime: pb.Runtime) -> PistonRuntime:
    """Converts a runtime; adds the names that clients of other sandboxes may use."""
    names = {*runtime.aliases, *names_of(runtime.language)} - {runtime.language}
    return PistonRuntime(language=runtime.language, version=runtime.version, aliases=sorted(names))


def write_piston_error(error: PerigeeError) -> tuple[int, Any]:
    """Returns the HTTP status and body of an error."""
    status, _ = write_error(error)
    return status, {"message": error.message}


def _run_stage(response: pb.ExecuteResponse) -> PistonStage:
    stdout = response.stdout.decode(errors="replace")
    stderr = response.stderr.decode(errors="replace")
    code, name, message, status = _ending(response)
    return PistonStage(
        stdout=stdout,
        stderr=stderr,
        output=stdout + stderr,
        code=code,
        signal=name,
        message=message,
        status=status,
        cpu_time=response.cpu_ms,
        wall_time=response.wall_ms,
        memory=response.peak_memory_bytes,
    )


def _ending(
    response: pb.ExecuteResponse,
) -> tuple[int | None, str | None, str | None, Literal["RE", "SG", "TO", "OL", "EL", "XX"] | None]:
    """Returns exit code, signal, message and status of a run."""
    match response.status:
        case pb.STATUS_OK:
            return response.exit_code, None, None, None
        case pb.STATUS_TIME_LIMIT:
            return None, "SIGKILL", response.reason or "Time limit exceeded", "TO"
        case pb.STATUS_MEMORY_LIMIT:
            return None, "SIGKILL", response.reason or "Memory limit exceeded", "SG"
        case pb.STATUS_OUTPUT_LIMIT if response.stderr_truncated and not response.stdout_truncated:
            return None, "SIGKILL", "stderr length exceeded", "EL"
        case pb.STATUS_OUTPUT_LIMIT:
            return None, "SIGKILL", "stdout length exceeded", "OL"
        case pb.STATUS_RUNTIME_ERROR | pb.STATUS_COMPILE_ERROR if response.signal:
            return None, _signal_name(response.signal), f"Caught fatal signal {response.signal}", "SG"
        case pb.STATUS_RUNTIME_ERROR | pb.STATUS_COMPILE_ERROR:
            return response.exit_code, None, f"Exited with error status {response.exit_code}", "RE"
        case _:
            return None, None, response.reason, "XX"


def _compile_stage(compiled: pb.CompileResult) -> PistonStage:
    ended = pb.ExecuteResponse(
        status=compiled.status or (pb.STATUS_COMPILE_ERROR if compiled.exit_code else pb.STATUS_OK),
        exit_code=compiled.exit_code,
        signal=compiled.signal,
        stdout=compiled.stdout,
        stderr=compiled.stderr,
        wall_ms=compiled.wall_ms,
        reason=compiled.reason,
    )
    return _run_stage(ended).model_copy(update={"cpu_time": None, "memory": None})


def _decode(file: PistonFile) -> bytes:
    match file.encoding:
        case "base64":
            return base64.b64decode(file.content, validate=True)
        case "hex":
            return bytes.fromhex(file.content)
        case _:
            return file.content.encode()


def _limits(timeout_ms: float | None, cpu_ms: float | None, memory_bytes: float | None) -> pb.Limits:
    limits = pb.Limits()
    if timeout_ms:
        limits.wall_ms = whole(timeout_ms)
    # a caller that sets one time means it for both
    if cpu_ms or timeout_ms:
        limits.cpu_ms = whole(cpu_ms or timeout_ms or 0)
    if memory_bytes and memory_bytes > 0:
        limits.memory_bytes = whole(memory_bytes, 2**64 - 1)
    return limits


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
