"""Configuration of the sandbox service."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from services.kit.config import Audience, HttpConfig, Model, ServerConfig, ServiceConfig

MIB = 1024 * 1024


class LimitsConfig(Model):
    """Limits of one program; times hold for each test, memory and space for the whole sandbox."""

    wall_ms: int = Field(10_000, ge=1)
    """Wall-clock time."""
    cpu_ms: int = Field(5_000, ge=1)
    """CPU time of the program and all its children, checked every 50 ms."""
    memory_bytes: int = Field(256 * MIB, ge=16 * MIB)
    """Memory of all processes and files together; beyond it the program is killed."""
    processes: int = Field(64, ge=1)
    """Processes and threads at once."""
    file_bytes: int = Field(16 * MIB, ge=65536)
    """Space in the working folder, and again in /tmp; also the largest file."""
    output_bytes: int = Field(1 * MIB, ge=1)
    """Standard output, standard error and a call's result, each; past it the program is ended."""
    files: int = Field(4096, ge=16)
    """Files, folders and links in the working folder, and again in /tmp."""


class ExtraTimeConfig(Model):
    """Time that submissions in one language have beyond their limits."""

    factor: float = Field(1.0, ge=1)
    """Factor of `wall_ms` and `cpu_ms`."""
    added_ms: int = Field(0, ge=0)
    """Added to both then."""


class SandboxServerConfig(ServerConfig):
    """Address and bounds of the server."""

    max_concurrent_rpcs: int = Field(2048, ge=1)
    """Calls served at once, over gRPC and over HTTP each; more are refused with RESOURCE_EXHAUSTED. A job that
    waits in the queue is a call, too."""


class SandboxConfig(ServiceConfig):
    """Section of the sandbox in a recipe."""

    section: ClassVar[str] = "sandbox"
    audience: ClassVar[Audience] = "sandbox"
    renamed_keys: ClassVar[Mapping[str, str]] = {"overtaking_seconds": "priority_window_seconds"}

    server: SandboxServerConfig = SandboxServerConfig()
    """How the service listens."""
    http: HttpConfig = HttpConfig()
    """How the service answers HTTP."""
    isolation: Literal["auto", "zygote", "crun", "process"] = "auto"
    """Isolation of programs: `zygote` (Python forked from a warm interpreter, other languages in
    containers), `crun` (a container for everything), `auto` (the first of these two that works here), or `process`
    (rlimits only: unsafe for untrusted programs)."""
    oci_runtime: Literal["crun", "runc", "runsc"] = "crun"
    """Command that runs containers; runsc (gVisor) has not been tried."""
    slots: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1, le=1000)
    """Jobs that run at once; the number of cores unless set."""
    queue_limit: int = Field(1024, ge=0)
    """Jobs that wait for a slot; more are refused with RESOURCE_EXHAUSTED and a retry hint."""
    queue_seconds: float = Field(60.0, gt=0)
    """Longest wait for a slot; past it, or when its caller's deadline is expected to come first, a job is refused with
    RESOURCE_EXHAUSTED and a retry hint."""
    priority_window_seconds: float = Field(5.0, ge=0)
    """Time after a large job in which smaller ones may come and still go before it."""
    default_limits: LimitsConfig = LimitsConfig()
    """Limits of a request that sets none, where its runtime has no other."""
    maximum_limits: LimitsConfig = LimitsConfig(
        wall_ms=120_000,
        cpu_ms=120_000,
        memory_bytes=2048 * MIB,
        processes=512,
        file_bytes=512 * MIB,
        output_bytes=16 * MIB,
        files=65536,
    )
    """Highest limits that a request may set."""
    compile_limits: LimitsConfig = LimitsConfig(
        wall_ms=30_000,
        cpu_ms=20_000,
        memory_bytes=1024 * MIB,
        processes=64,
        file_bytes=64 * MIB,
        output_bytes=65536,
    )
    """Limits of compilers, where a request or a runtime sets none."""
    compile_cache_bytes: int = Field(256 * MIB, ge=0)
    """Memory for what compilers made of programs, checkers and interactors, which need not be compiled again; the least
    recently used make room."""
    compile_cache_entries: int = Field(1000, ge=0)
    """Most compiled programs in that memory."""
    extra_time: dict[str, ExtraTimeConfig] = {}
    """Extra time of submissions that are judged, by language; a request's own for the same language goes before it."""
    max_source_bytes: int = Field(1 * MIB, ge=1)
    """Largest source of a program."""
    max_file_bytes: int = Field(32 * MIB, ge=1)
    """Largest file of a request, and all files of one together; also the largest standard input."""
    max_output_file_bytes: int = Field(16 * MIB, ge=1)
    """Output files of a response together; what is beyond is cut."""
    max_files: int = Field(500, ge=1)
    """Most files of a request, and of a response."""
    max_tests: int = Field(1000, ge=1)
    """Most tests of one submission."""
    max_batch: int = Field(1000, ge=1)
    """Most requests of a batch."""
    max_request_bytes: int = Field(64 * MIB + 4 * MIB, ge=4 * MIB)
    """Largest message that is read at all over gRPC; fields that are too large are reported below this. The service
    answers nobody else while it reads one, which takes about 1 ms for each MiB."""
    max_sessions: int = Field(16, ge=0)
    """Sessions at once; more are refused with RESOURCE_EXHAUSTED."""
    session_idle_seconds: int = Field(600, ge=1)
    """A session without a cell for this time ends, unless its request sets another."""
    session_maximum_idle_seconds: int = Field(3600, ge=1)
    """Longest idle time that a request may ask for."""
    session_seconds: int = Field(4 * 3600, ge=1)
    """A session ends after this time, however busy."""
    result_cache_seconds: float = Field(600.0, ge=0)
    """Time for which the response to an idempotency key is kept."""
    result_cache_bytes: int = Field(64 * MIB, ge=0)
    """Memory for responses to idempotency keys; the oldest make room."""
    runtimes_path: str | None = None
    """Folder of further runtime descriptions, a YAML file each; they replace runtimes of the same name."""
    images_path: str = "/var/lib/perigee/images"
    """Folder of images that `perigee sandbox image build` has made; their runtimes are offered beside the host's."""
    python_path: str | None = None
    """Interpreter that runs Python programs; unset takes Debian's, else the one under the service's own."""
    init_path: str | None = None
    """Compiled init of containers; unset compiles it at start."""
    first_uid: int | None = Field(None, ge=1000, le=2**31 - 2**16)
    """User id of the first worker slot; each further slot takes the next one. Unset takes a range that no other service
    of the machine is likely to have."""
    state_path: str = "/run/perigee/sandbox"
    """Folder for what exists while the service runs; leftovers of a killed service are removed at start."""

    @property
    def message_bytes(self) -> int:
        """Large enough for a file that is too large to be named in an error."""
        return self.max_request_bytes
