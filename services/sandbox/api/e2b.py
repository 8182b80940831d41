"""E2B's interface (https://e2b.dev/docs): its SDK creates sandboxes, runs cells and commands, and moves files.

A sandbox is a session; its contexts are the session's. Everything is below /e2b, and the sandbox of a call is in its
header `E2b-Sandbox-Id`. The API key is the service's token. Cells and commands of a sandbox run one after another.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import hashlib
import math
import posixpath
import secrets
import struct
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import UploadFile

from perigee.errors import (
    AlreadyExistsError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PerigeeError,
    UnavailableError,
    UnimplementedError,
)
from perigee.json_codec import dump_json
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.kit.http import CompatRouter, StreamResponse, call_context, read_token, write_error
from services.sandbox.api.compat import Servicer, Text, find_runtime, to_bundle
from services.sandbox.api.run_jupyter import KERNEL
from services.sandbox.runtime.sessions import OnOutput, Session, Sessions

PREFIX = "/e2b"
_ENVD_VERSION = "0.6.4"
"""Version of E2B's agent whose interface this is."""
_HOME = "/home/user"
_OWN_CONTEXT, _DEFAULT_CONTEXT = "e2b", "default"
_PREFIX_BYTES = 5
"""Flags and length before a message of a Connect stream."""
_INSIDE = Path(__file__).with_name("e2b_inside.py").read_text(encoding="utf-8")
_KEYS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}
_METHODS = {
    "Stat": ("stat_path", ("path",)),
    "ListDir": ("list_dir", ("path", "depth")),
    "MakeDir": ("make_dir", ("path",)),
    "Move": ("move", ("source", "destination")),
    "Remove": ("remove", ("path",)),
}
_ERRORS = {"FileNotFoundError": NotFoundError, "FileExistsError": AlreadyExistsError}


class NewSandbox(BaseModel):
    """Sandbox to create; the timeout is in seconds."""

    templateID: Text = ""
    timeout: float = Field(300, gt=0, allow_inf_nan=False)
    metadata: dict[Text, Text] = {}
    envVars: dict[Text, Text] = {}


class Timeout(BaseModel):
    """Seconds from now after which a sandbox ends."""

    timeout: float | None = Field(None, ge=0, allow_inf_nan=False)


class Execution(BaseModel):
    """Cell to run."""

    code: Text
    context_id: Text | None = None
    language: Text | None = None
    env_vars: dict[Text, Text] | None = None


class NewContext(BaseModel):
    """Context to create."""

    language: Text = "python"
    cwd: Text = _HOME


class Process(BaseModel):
    """Command to run."""

    cmd: Text
    args: list[Text] = []
    envs: dict[Text, Text] = {}
    cwd: Text = ""


class Start(BaseModel):
    """Message that starts a command."""

    process: Process


@dataclass
class Sandbox:
    """Session with what E2B's clients know of it."""

    session: Session
    new: NewSandbox
    key_digest: str
    started_at: datetime
    ends_at: datetime
    latest: float
    """When the session ends in any case, in monotonic time."""
    contexts: dict[str, NewContext] = field(default_factory=lambda: {_DEFAULT_CONTEXT: NewContext()})

    @property
    def gone(self) -> bool:
        """Whether it has ended, as its time is over or otherwise."""
        return not self.session.alive or time.monotonic() > self.session.ends_at

    def set_timeout(self, seconds: float) -> None:
        """Lets the sandbox end in some seconds, and no later than any session."""
        left_s = min(seconds, self.latest - time.monotonic())
        self.session.ends_at = time.monotonic() + left_s
        self.ends_at = datetime.now(UTC) + timedelta(seconds=left_s)

    def describe(self) -> dict[str, Any]:
        """Returns what a list of sandboxes says of it."""
        return {
            "sandboxID": self.session.id,
            "templateID": self.new.templateID or KERNEL,
            "clientID": "perigee",
            "envdVersion": _ENVD_VERSION,
            "startedAt": self.started_at.isoformat(),
            "endAt": self.ends_at.isoformat(),
            "cpuCount": 1,
            "memoryMB": self.session.limits.memory_bytes >> 20,
            "diskSizeMB": 0,
            "state": "running",
            "metadata": self.new.metadata,
        }

    def credentials(self, key: str) -> dict[str, Any]:
        """Returns what a client needs to reach it; both of its tokens are the caller's own key."""
        return {**self.describe(), "envdAccessToken": key, "trafficAccessToken": key}


class E2bServicer(Servicer, Protocol):
    """Servicer with its sessions, whose end E2B's clients choose."""

    sessions: Sessions

    async def RunCell(
        self, request: pb.RunCellRequest, context: Any, /, on_output: OnOutput | None = None
    ) -> pb.RunCellResponse: ...


class Sandboxes:
    """Sandboxes of all callers, for as long as their sessions live."""

    def __init__(self, servicer: E2bServicer) -> None:
        self.servicer = servicer
        self._by_id: dict[str, Sandbox] = {}

    async def create(self, new: NewSandbox, key: str, context: Any) -> Sandbox:
        """Starts a session with the largest times that are allowed for a cell."""
        listed = (await self.servicer.ListRuntimes(pb.ListRuntimesRequest(), context)).runtimes
        sessions = [runtime for runtime in listed if runtime.sessions]
        runtime = find_runtime(sessions, new.templateID) or find_runtime(sessions, KERNEL)
        runtime = runtime or find_runtime(sessions, "python")
        if runtime is None:
            raise UnimplementedError("no runtime of this service has sessions")
        most = runtime.maximum_limits
        limits = pb.Limits(wall_ms=most.wall_ms, cpu_ms=most.cpu_ms)
        variables = {"HOME": _HOME, "PWD": _HOME, **new.envVars}
        request = pb.CreateSessionRequest(language=runtime.language, limits=limits, env=variables)
        session = self.servicer.sessions.find((await self.servicer.CreateSession(request, context)).session_id)
        session.idle_s = math.inf
        sandbox = Sandbox(session, new, _digest(key), datetime.now(UTC), datetime.now(UTC), session.ends_at)
        sandbox.set_timeout(new.timeout)
        self._by_id = {name: each for name, each in self._by_id.items() if not each.gone}
        self._by_id[session.id] = sandbox
        return sandbox

    def find(self, sandbox_id: str) -> Sandbox:
        """Returns a sandbox; raises NotFoundError when it has ended or never existed."""
        sandbox = self._by_id.get(sandbox_id)
        if sandbox is None or sandbox.gone:
            raise NotFoundError(f"sandbox {sandbox_id[:40]!r} does not exist")
        return sandbox

    def addressed(self, request: Request) -> Sandbox:
        """Returns the sandbox that a request is for; raises UnavailableError, which clients read as its end."""
        try:
            return self.find(request.headers.get("e2b-sandbox-id", ""))
        except NotFoundError as error:
            raise UnavailableError("The sandbox was not found") from error

    def of_key(self, key: str) -> list[Sandbox]:
        """Returns the sandboxes that were created with a key."""
        return [each for each in self._by_id.values() if not each.gone and each.key_digest == _digest(key)]


def e2b_apis(servicer: E2bServicer) -> tuple[CompatRouter, CompatRouter]:
    """Returns the routers of E2B's API and of what its clients ask a sandbox for."""
    sandboxes = Sandboxes(servicer)
    return (
        CompatRouter(control_router(sandboxes), write_api_error),
        CompatRouter(sandbox_router(sandboxes), write_envd_error, frozenset({f"{PREFIX}/files"})),
    )


def write_api_error(error: PerigeeError) -> tuple[int, Any]:
    """Returns status and body of an error of the API."""
    status, _ = write_error(error)
    return status, {"code": status, "message": error.message}


def write_envd_error(error: PerigeeError) -> tuple[int, Any]:
    """Returns status and body of an error of a sandbox, in Connect's form; 502 is a sandbox that is gone."""
    status, _ = write_error(error)
    return (502 if status == 503 else status), {"code": error.code.name.lower(), "message": error.message}


def control_router(sandboxes: Sandboxes) -> APIRouter:
    """Returns the routes that create, list and end sandboxes."""
    router = APIRouter(prefix=PREFIX, tags=["E2B"])

    @router.post("/v2/sandboxes", status_code=201)
    @router.post("/sandboxes", status_code=201)
    async def create(body: NewSandbox, request: Request) -> dict[str, Any]:
        """Creates a sandbox."""
        return (await sandboxes.create(body, _key(request), call_context(request))).credentials(_key(request))

    @router.get("/v2/sandboxes")
    @router.get("/sandboxes")
    async def list_sandboxes(request: Request, metadata: str = "") -> list[dict[str, Any]]:
        """Lists the sandboxes of the caller's key that were created with the metadata."""
        wanted = read_metadata(metadata)
        return [each.describe() for each in sandboxes.of_key(_key(request)) if wanted <= each.new.metadata.items()]

    @router.get("/sandboxes/{sandbox_id}")
    async def get_sandbox(sandbox_id: str) -> dict[str, Any]:
        """Describes a sandbox."""
        return sandboxes.find(sandbox_id).describe()

    @router.post("/v2/sandboxes/{sandbox_id}/connect")
    @router.post("/sandboxes/{sandbox_id}/connect")
    async def connect(sandbox_id: str, body: Timeout, request: Request) -> dict[str, Any]:
        """Returns what a client needs to reach a sandbox."""
        sandbox = sandboxes.find(sandbox_id)
        if body.timeout is not None and body.timeout > (sandbox.ends_at - datetime.now(UTC)).total_seconds():
            sandbox.set_timeout(body.timeout)
        return sandbox.credentials(_key(request))

    @router.post("/sandboxes/{sandbox_id}/timeout", status_code=204)
    async def set_timeout(sandbox_id: str, body: Timeout) -> None:
        """Lets a sandbox end some seconds from now."""
        sandboxes.find(sandbox_id).set_timeout(body.timeout or 0)

    @router.delete("/sandboxes/{sandbox_id}", status_code=204)
    async def kill(sandbox_id: str, request: Request) -> None:
        """Ends a sandbox."""
        sandbox = sandboxes.find(sandbox_id)
        sandbox.set_timeout(0)
        close = pb.CloseSessionRequest(session_id=sandbox.session.id)
        await sandboxes.servicer.CloseSession(close, call_context(request))

    return router


def sandbox_router(sandboxes: Sandboxes) -> APIRouter:
    """Returns the routes for cells, files and commands of the sandbox that a header names."""
    router = APIRouter(prefix=PREFIX, tags=["E2B"])

    async def run_cell(
        sandbox: Sandbox, code: str, request: Request, on_output: OnOutput | None = None, **fields: Any
    ) -> pb.RunCellResponse:
        if (timeout_ms := request.headers.get("connect-timeout-ms", "")).isdecimal():
            fields["wall_ms"] = min(int(timeout_ms) or 1, sandbox.session.limits.wall_ms)
        cell = pb.RunCellRequest(session_id=sandbox.session.id, code=code.encode() or b"\n", **fields)
        response = await sandboxes.servicer.RunCell(cell, call_context(request), on_output=on_output)
        if time.monotonic() > sandbox.session.ends_at:  # it was ended meanwhile
            sandboxes.addressed(request)
        if response.status == pb.STATUS_INFRA_ERROR:
            raise InternalError(response.reason)
        return response

    async def stream_cell(
        sandbox: Sandbox, code: str, request: Request, **fields: Any
    ) -> AsyncGenerator[tuple[str, bytes] | pb.RunCellResponse, None]:
        """Yields what a cell prints, by the name of the stream, then its response."""
        pieces: asyncio.Queue[tuple[str, bytes] | None] = asyncio.Queue()  # the session bounds its output
        sent = {"stdout": 0, "stderr": 0}
        running = asyncio.create_task(
            run_cell(sandbox, code, request, lambda name, piece: pieces.put_nowait((name, piece)), **fields)
        )
        running.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                sent[piece[0]] += len(piece[1])
                yield piece
            response = await running
            yield "stdout", response.stdout[sent["stdout"] :]
            yield "stderr", response.stderr[sent["stderr"] :]
            yield response
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    @router.get("/health", status_code=204)
    async def health(request: Request) -> None:
        """Says whether a sandbox runs."""
        sandboxes.addressed(request)

    @router.post("/execute")
    async def execute(body: Execution, request: Request) -> Response:
        """Runs a cell; a line of JSON for each part of its output."""
        sandbox = sandboxes.addressed(request)
        context_id = body.context_id or _DEFAULT_CONTEXT
        code = _in_language(body.code, body.language or _find_context(sandbox, context_id).language)
        parts = stream_cell(sandbox, code, request, context=context_id, env=body.env_vars)
        return StreamResponse(write_cell(parts), "application/x-ndjson")

    @router.post("/contexts")
    async def create_context(body: NewContext, request: Request) -> dict[str, str]:
        """Creates an interpreter with variables of its own."""
        sandbox = sandboxes.addressed(request)
        _in_language("", body.language)
        context_id = secrets.token_hex(16)
        made = await run_cell(sandbox, f"__import__('os').chdir({body.cwd!r})", request, context=context_id)
        if made.status != pb.STATUS_OK:
            raise InvalidArgumentError.for_field("cwd", f"{made.error_value or made.reason}")
        sandbox.contexts[context_id] = body
        return _context(context_id, body)

    @router.get("/contexts")
    async def list_contexts(request: Request) -> list[dict[str, str]]:
        """Lists the interpreters."""
        sandbox = sandboxes.addressed(request)
        return [_context(context_id, context) for context_id, context in sandbox.contexts.items()]

    @router.delete("/contexts/{context_id}", status_code=204)
    async def remove_context(context_id: str, request: Request) -> None:
        """Ends an interpreter."""
        sandbox = sandboxes.addressed(request)
        _find_context(sandbox, context_id)
        del sandbox.contexts[context_id]
        await _restart(context_id, sandbox, request)

    @router.post("/contexts/{context_id}/restart", status_code=204)
    async def restart_context(context_id: str, request: Request) -> None:
        """Starts an interpreter anew."""
        sandbox = sandboxes.addressed(request)
        _find_context(sandbox, context_id)
        await _restart(context_id, sandbox, request)

    async def _restart(context_id: str, sandbox: Sandbox, request: Request) -> None:
        restart = pb.RestartSessionRequest(session_id=sandbox.session.id, context=context_id)
        await sandboxes.servicer.RestartSession(restart, call_context(request))

    @router.get("/files")
    async def read_file(path: str, request: Request) -> Response:
        """Returns a file."""
        sandbox = sandboxes.addressed(request)
        [file] = (
            await run_cell(sandbox, "", request, context=_OWN_CONTEXT, output_files=[_below_home(path)])
        ).files or [pb.OutputFile(error="the sandbox has ended")]
        if file.truncated:
            raise InvalidArgumentError.for_field("path", f"{path} is too large to be returned")
        if file.error:
            raise NotFoundError(f"{path}: {file.error}")
        return Response(file.content, media_type="application/octet-stream")

    @router.post("/files")
    async def write_file(request: Request, path: str = "") -> list[dict[str, str]]:
        """Writes files."""
        sandbox = sandboxes.addressed(request)
        files = await _read_upload(request, path)
        written = [pb.File(path=_below_home(name), content=content) for name, content in files]
        response = await run_cell(sandbox, "", request, context=_OWN_CONTEXT, files=written)
        if response.status != pb.STATUS_OK:
            raise InvalidArgumentError.for_field("path", response.error_value or response.reason)
        return [
            {"name": posixpath.basename(file.path), "type": "file", "path": f"{_HOME}/{file.path}"} for file in written
        ]

    @router.post("/filesystem.Filesystem/{method}")
    async def call_filesystem(method: str, body: dict[str, Any], request: Request) -> Any:
        """Calls a method of E2B's file system service."""
        sandbox = sandboxes.addressed(request)
        if method not in _METHODS:
            raise UnimplementedError(f"{method} is not offered")
        function, names = _METHODS[method]
        arguments = {name: body[name] for name in names if name in body}
        code = f"{_INSIDE}\nimport json\nprint(json.dumps({function}(**{arguments!r})))"
        response = await run_cell(sandbox, code, request, context=_OWN_CONTEXT)
        if response.status != pb.STATUS_OK:
            message = response.error_value or response.reason
            raise _ERRORS.get(response.error_name, InvalidArgumentError)(message)
        return Response(response.stdout, media_type="application/json")

    @router.post("/process.Process/Start")
    async def start_process(request: Request) -> Response:
        """Runs a command to its end."""
        sandbox = sandboxes.addressed(request)
        process = read_start(await request.body()).process
        code = f"{_INSIDE}\nrun({[process.cmd, *process.args]!r}, {process.envs!r}, {process.cwd!r})"

        async def events() -> AsyncGenerator[bytes, None]:
            yield _event("start", {"pid": 1})
            try:
                async with aclosing(stream_cell(sandbox, code, request, context=_OWN_CONTEXT)) as parts:
                    async for part in parts:
                        yield write_process(part)
            except PerigeeError as error:
                yield _envelope({"error": write_envd_error(error)[1]}, last=True)

        return StreamResponse(events(), "application/connect+json")

    @router.post("/process.Process/SendSignal")
    async def send_signal(request: Request) -> dict[str, str]:
        """Interrupts the command that runs."""
        sandbox = sandboxes.addressed(request)
        await sandbox.session.interrupt()
        return {}

    return router


def read_metadata(text: str) -> set[tuple[str, str]]:
    """Returns the pairs of a form, whose names and values clients quote once more."""
    return {(unquote(name), unquote(value)) for name, value in parse_qsl(text, keep_blank_values=True)}


def _key(request: Request) -> str:
    """Returns the token by which the caller was let in, whichever header has it."""
    return (read_token(request.headers) or "").partition(" ")[2]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _context(context_id: str, context: NewContext) -> dict[str, str]:
    return {"id": context_id, "language": context.language, "cwd": context.cwd}


def _find_context(sandbox: Sandbox, context_id: str) -> NewContext:
    context = sandbox.contexts.get(context_id)
    if context is None:
        raise NotFoundError(f"Context {context_id} not found")
    return context


def _in_language(code: str, language: str) -> str:
    """Returns the cell that runs code of a language."""
    if language.lower() in ("python", "python3"):
        return code
    if language.lower() in ("bash", "sh"):
        return f"%%bash\n{code}"
    raise InvalidArgumentError.for_field("language", f"{language!r} is not offered; python and bash are")


def _below_home(path: str) -> str:
    """Returns a path relative to the working folder; raises InvalidArgumentError for one that is not below it."""
    relative = posixpath.relpath(posixpath.join(_HOME, path), _HOME)
    if relative.split("/")[0] == "..":
        raise InvalidArgumentError.for_field("path", f"{path} is not below {_HOME}")
    return relative


def read_start(body: bytes) -> Start:
    """Returns the message of a Connect stream that starts a command; raises RequestValidationError."""
    try:
        return Start.model_validate_json(body[_PREFIX_BYTES:])
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from error


async def _read_upload(request: Request, path: str) -> list[tuple[str, bytes]]:
    """Returns the files of an upload: a body, or a form with a file for each."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return [(path, await request.body())]
    async with request.form() as form:
        uploads = [each for _, each in form.multi_items() if isinstance(each, UploadFile)]
        read = [(each.filename or "", await each.read()) for each in uploads]
    return [(path, read[0][1])] if path and len(read) == 1 else read


async def write_cell(
    parts: AsyncGenerator[tuple[str, bytes] | pb.RunCellResponse, None],
) -> AsyncGenerator[bytes, None]:
    """Yields the parts of a cell's output as lines of JSON; an error after the first is a line, too."""
    begun = False
    decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}
    try:
        async with aclosing(parts):
            async for part in parts:
                if isinstance(part, pb.RunCellResponse):
                    for line in write_results(part):
                        yield line
                elif text := decoders[part[0]].decode(part[1]):
                    begun = True
                    yield _line(part[0], text=text, timestamp=time.time_ns())
    except PerigeeError as error:
        if not begun:
            raise
        yield _line("error", name=error.code.name, value=error.message, traceback="")


def write_results(response: pb.RunCellResponse) -> Iterator[bytes]:
    """Yields lines for what a cell displayed and raised."""
    yield _line("number_of_executions", execution_count=response.execution_count)
    for display in response.displays:
        yield _line("result", is_main_result=display.is_result, **_result(to_bundle(display)))
    if not response.displays and response.HasField("result"):
        yield _line("result", is_main_result=True, text=response.result)
    if response.status != pb.STATUS_OK:
        name = response.error_name or pb.Status.Name(response.status).removeprefix("STATUS_")
        yield _line(
            "error",
            name=name,
            value=response.error_value or response.reason,
            traceback=response.error_traceback or response.stderr.decode(errors="replace"),
        )
    yield _line("end_of_execution")


def _line(kind: str, **fields: Any) -> bytes:
    return dump_json({"type": kind, **fields}) + b"\n"


def _result(bundle: dict[str, Any]) -> dict[str, Any]:
    """Returns a MIME bundle under E2B's names; a text that is the repr of a string goes without its quotes."""
    result: dict[str, Any] = {_KEYS[name]: value for name, value in bundle.items() if name in _KEYS}
    text = result.get("text")
    if isinstance(text, str) and len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        result["text"] = text[1:-1]
    return {**result, "extra": {name: value for name, value in bundle.items() if name not in _KEYS} or None}


def write_process(part: tuple[str, bytes] | pb.RunCellResponse) -> bytes:
    """Returns the events for what a command has printed, or for its end, in Connect's envelopes."""
    if not isinstance(part, pb.RunCellResponse):
        return _event("data", {part[0]: base64.b64encode(part[1]).decode()}) if part[1] else b""
    response = part
    if response.status == pb.STATUS_OK:
        code = int(response.result)
        end = _event("end", {"exitCode": code, "exited": True, "status": f"exit status {code}"})
        return end + _envelope({}, last=True)
    late = response.status == pb.STATUS_TIME_LIMIT
    error = {"code": "deadline_exceeded" if late else "internal", "message": response.error_value or response.reason}
    return _envelope({"error": error}, last=True)


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return _envelope({"event": {kind: fields}})


def _envelope(message: dict[str, Any], last: bool = False) -> bytes:
    """Returns a message of a Connect stream: flags, length, JSON."""
    body = dump_json(message)
    return struct.pack(">BI", 2 if last else 0, len(body)) + body
