"""Reads requests for sessions, and bounds batches."""

from __future__ import annotations

from collections.abc import Sized

from perigee.errors import InvalidArgumentError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.cells import Cell
from services.sandbox.config import SandboxConfig
from services.sandbox.jobs import Program
from services.sandbox.requests import Reader
from services.sandbox.runtimes import Catalog


def check_batch(requests: Sized, config: SandboxConfig) -> None:
    """Raises InvalidArgumentError for a batch of a wrong size."""
    if not len(requests):
        raise InvalidArgumentError.of("requests", "must not be empty")
    if len(requests) > config.max_batch:
        raise InvalidArgumentError.of("requests", f"has {len(requests)} items, at most {config.max_batch} are taken")


def read_session(request: pb.CreateSessionRequest, config: SandboxConfig, catalog: Catalog) -> tuple[Program, int]:
    """The interpreter of a session and its idle time; raises InvalidArgumentError."""
    reader = Reader(config, catalog)
    runtime = reader.read_runtime("language", request.language)
    if runtime is not None and runtime.python is None:
        reader.refuse("language", f"{runtime.name} has no sessions")
    files = reader.read_files("files", request.files, None)
    reader.check_environment("env", request.env)
    limits = reader.read_limits("limits", request.limits, runtime.limits if runtime else config.default_limits)
    idle_s = request.idle_seconds if request.HasField("idle_seconds") else config.session_idle_seconds
    if not 1 <= idle_s <= config.session_maximum_idle_seconds:
        reader.refuse("idle_seconds", f"is {idle_s}, must be from 1 to {config.session_maximum_idle_seconds}")
    reader.finish()
    assert runtime is not None
    return Program(runtime, b"", limits, limits, files, dict(request.env)), idle_s


def read_cell(request: pb.RunCellRequest, config: SandboxConfig, catalog: Catalog) -> Cell:
    """A cell; raises InvalidArgumentError."""
    reader = Reader(config, catalog)
    if not request.session_id:
        reader.refuse("session_id", "is required")
    reader.check_source("code", request.code)
    files = reader.read_files("files", request.files, None)
    reader.check_paths("output_files", request.output_files)
    wall_ms = request.wall_ms if request.HasField("wall_ms") else None
    if wall_ms is not None and not 1 <= wall_ms <= config.maximum_limits.wall_ms:
        reader.refuse("wall_ms", f"is {wall_ms}, must be from 1 to {config.maximum_limits.wall_ms}")
    reader.finish()
    return Cell(request.code, files, list(request.output_files), wall_ms)
