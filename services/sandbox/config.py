"""Configuration of the sandbox service."""

from __future__ import annotations

import os
from typing import ClassVar, Literal

from pydantic import Field

from services.kit.config import HttpConfig, Model, ServiceConfig

MIB = 1024 * 1024


class LimitsConfig(Model):
    """Limits of one program; times hold for each test, memory and space for the whole box."""

    wall_ms: int = Field(10_000, ge=1)
    """Wall-clock time."""
    cpu_ms: int = Field(5_000, ge=1)
    """CPU time of the program and all its children, checked every 50 ms."""
    memory_bytes: int = Field(256 * MIB, ge=16 * MIB)
    """Memory of all processes and files together; past it the program is killed."""
    processes: int = Field(64, ge=1)
    """Processes and threads at once."""
    file_bytes: int = Field(16 * MIB, ge=65536)
    """Space in the working folder, and again in /tmp; also the largest file."""
    output_bytes: int = Field(1 * MIB, ge=1)
    """Standard output, standard error and a call's result, each; past it the program is ended."""


class SandboxConfig(ServiceConfig):
    """The sandbox's section of a recipe."""

    section: ClassVar[str] = "sandbox"

    http: HttpConfig = HttpConfig()
    """How the service answers HTTP."""
    isolation: Literal["auto", "zygote", "crun", "process"] = "auto"
    """How programs are kept apart: `zygote` (warm interpreter, namespaces, cgroup), `crun` (a container per job),
    `auto` (the first of these two that works here), or `process` (rlimits only: unsafe for programs that nobody has
    read)."""
    slots: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1, le=1000)
    """Programs that run at once; the number of cores unless set."""
    queue_limit: int = Field(1024, ge=0)
    """Jobs that wait for a slot; more are refused with RESOURCE_EXHAUSTED and a retry hint."""
    default_limits: LimitsConfig = LimitsConfig()
    """Limits of a request that sets none."""
    maximum_limits: LimitsConfig = LimitsConfig(
        wall_ms=60_000,
        cpu_ms=60_000,
        memory_bytes=1024 * MIB,
        processes=256,
        file_bytes=256 * MIB,
        output_bytes=4 * MIB,
    )
    """Limits that a request may ask for at most."""
    max_source_bytes: int = Field(1 * MIB, ge=1)
    """Largest source of a program."""
    max_tests: int = Field(1000, ge=1)
    """Most tests of one submission."""
    python_path: str | None = None
    """The interpreter inside the box; unset takes /usr/bin/python3, else the service's own."""
    preload: tuple[str, ...] = (
        *("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools", "heapq"),
        *("itertools", "json", "math", "operator", "random", "re", "string", "typing"),
    )
    """Modules that the warm interpreter has imported before any job comes."""
    first_uid: int = Field(60001, ge=1000, le=2**31)
    """User of the first slot's programs; each further slot takes the next number."""
    state_path: str = "/run/perigee/sandbox"
    """Folder for what exists while the service runs; leftovers of a killed service are cleared from it at start."""
