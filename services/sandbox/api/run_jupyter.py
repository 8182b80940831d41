"""SandboxFusion's notebooks: POST /run_jupyter runs cells in a kernel of their own.

A cell that fails is no failure of the notebook, as there. `cell_timeout` interrupts a cell; past `total_timeout` the
notebook has Failed, without results.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.kit.http import CompatRouter, call_context
from services.sandbox.api.compat import Servicer, Text, rename_fields, to_bundle, whole
from services.sandbox.api.sandbox_fusion import (
    CommandRunResult,
    FusionError,
    read_files,
    write_files,
    write_fusion_error,
)

KERNEL = "jupyter"
"""Runtime of notebooks."""
_FIELDS = {
    "output_files": "fetch_files",
    "wall_ms": "total_timeout",
    "limits.wall_ms": "total_timeout",
    "limits.cpu_ms": "total_timeout",
    "limits.memory_bytes": "memory_limit_MB",
}


class RunJupyterRequest(BaseModel):
    """Cells to run one after another; timeouts are in seconds, 0 is none, files are base64 by path."""

    cells: list[Text]
    cell_timeout: float = Field(0, ge=0, allow_inf_nan=False)
    total_timeout: float = Field(45, gt=0, allow_inf_nan=False)
    memory_limit_MB: float = Field(-1, allow_inf_nan=False)
    kernel: Literal["python3"] = "python3"
    files: dict[Text, Text | None] = {}
    fetch_files: list[Text] = []


class CellRunResult(BaseModel):
    """Output of a cell: `display` has MIME bundles, `error` at most one exception."""

    stdout: str
    stderr: str
    display: list[dict[str, Any]]
    error: list[dict[str, Any]]


class RunJupyterResponse(BaseModel):
    """Results of the cells; `driver` says how the notebook ended."""

    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    driver: CommandRunResult | None = None
    cells: list[CellRunResult] = []
    executor_pod_name: str | None = None
    files: dict[str, str] = {}


def run_jupyter_api(servicer: Servicer) -> CompatRouter:
    """Returns the router of the interface in front of a servicer."""
    router = APIRouter(tags=["SandboxFusion"])
    pod_name = socket.gethostname()

    @router.post("/run_jupyter", responses={"4XX": {"model": FusionError}, "5XX": {"model": FusionError}})
    async def run_jupyter(body: RunJupyterRequest, request: Request) -> RunJupyterResponse:
        """Runs the cells of a notebook in a new kernel."""
        try:
            response = await run_notebook(servicer, body, call_context(request))
        except InvalidArgumentError as error:
            raise rename_fields(error, _FIELDS) from error
        response.executor_pod_name = pod_name
        return response

    return CompatRouter(router, write_fusion_error)


async def run_notebook(servicer: Servicer, body: RunJupyterRequest, context: Any) -> RunJupyterResponse:
    """Runs the cells in a session, and ends it."""
    total_ms = whole(body.total_timeout * 1000)
    limits = pb.Limits(wall_ms=total_ms, cpu_ms=total_ms)
    if body.memory_limit_MB > 0:
        limits.memory_bytes = whole(body.memory_limit_MB * 2**20, 2**64 - 1)
    files = read_files(body.files)
    session = await servicer.CreateSession(
        pb.CreateSessionRequest(language=KERNEL, limits=limits, files=files), context
    )
    started = time.monotonic()
    try:
        responses = await _run_cells(servicer, body, session.session_id, context)
    finally:
        await servicer.CloseSession(pb.CloseSessionRequest(session_id=session.session_id), context)
    return to_run_jupyter_response(responses, time.monotonic() - started, body.total_timeout)


async def _run_cells(
    servicer: Servicer, body: RunJupyterRequest, session_id: str, context: Any
) -> list[pb.RunCellResponse]:
    """Runs the cells until the time is over or the session ends."""
    ends_at = time.monotonic() + body.total_timeout
    responses: list[pb.RunCellResponse] = []
    for index, code in enumerate(body.cells):
        left_s = ends_at - time.monotonic()
        if left_s <= 0 or (responses and not responses[-1].alive):
            break
        cell = pb.RunCellRequest(
            session_id=session_id,
            code=code.encode() or b"\n",
            wall_ms=whole(min(left_s, body.cell_timeout or left_s) * 1000),
            output_files=body.fetch_files if index == len(body.cells) - 1 else (),
        )
        responses.append(await servicer.RunCell(cell, context))
    return responses


def to_run_jupyter_response(
    responses: Sequence[pb.RunCellResponse], seconds: float, total_timeout: float
) -> RunJupyterResponse:
    """Converts the responses to the cells that ran, in so many seconds."""
    if seconds >= total_timeout:
        driver = CommandRunResult(status="TimeLimitExceeded", execution_time=seconds)
        return RunJupyterResponse(status="Failed", driver=driver)
    cells = [to_cell_result(response) for response in responses]
    last = responses[-1] if responses else pb.RunCellResponse(alive=True)
    if last.alive:
        driver = CommandRunResult(status="Finished", execution_time=seconds, return_code=0)
        return RunJupyterResponse(status="Success", driver=driver, cells=cells, files=write_files(last.files))
    return RunJupyterResponse(
        status="SandboxError" if last.status == pb.STATUS_INFRA_ERROR else "Failed",
        message=last.reason,
        driver=CommandRunResult(status="Error", execution_time=seconds, stderr=last.reason),
        cells=cells,
    )


def to_cell_result(response: pb.RunCellResponse) -> CellRunResult:
    """Converts the response to a cell; a limit is an error, too."""
    name = response.error_name or pb.Status.Name(response.status).removeprefix("STATUS_")
    error = {
        "ename": name,
        "evalue": response.error_value or response.reason,
        "traceback": response.error_traceback.splitlines(),
    }
    return CellRunResult(
        stdout=response.stdout.decode(errors="replace"),
        stderr=response.stderr.decode(errors="replace"),
        display=[to_bundle(display) for display in response.displays],
        error=[] if response.status == pb.STATUS_OK else [error],
    )
