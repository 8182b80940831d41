"""Runs the programs of `sandbox_attacks` and tells whether the sandbox serves as before."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb

PROGRAMS = Path(__file__).parent / "sandbox_attacks"
LANGUAGES = {
    ".py": "python",
    ".c": "c",
    ".cpp": "cpp",
    ".java": "java",
    ".js": "javascript",
    ".sh": "bash",
    ".pl": "perl",
}
HELLOS = {
    "python": b"print(open('/proc/self/status').read().count('Uid') + 41)",
    "c": b'#include <stdio.h>\nint main(void) { puts("42"); }',
    "cpp": b"#include <iostream>\nint main() { std::cout << 42 << std::endl; }",
    "java": b"public class Main { public static void main(String[] arguments) { System.out.println(42); } }",
    "javascript": b"console.log(42)",
    "bash": b"echo 42",
    "perl": b'print "42\\n"',
}
SMALL = {
    "wall_ms": 10_000,
    "cpu_ms": 400,
    "memory_bytes": 64 << 20,
    "processes": 16,
    "file_bytes": 1 << 20,
    "output_bytes": 65536,
}
# Node and Java start with tens of threads and a large heap.
LARGE = {**SMALL, "cpu_ms": 2000, "wall_ms": 20_000, "memory_bytes": 512 << 20, "processes": 64}
CALL_S = 110.0
OK, RUNTIME_ERROR, TIME_LIMIT = pb.STATUS_OK, pb.STATUS_RUNTIME_ERROR, pb.STATUS_TIME_LIMIT
MEMORY_LIMIT, OUTPUT_LIMIT, COMPILE_ERROR = pb.STATUS_MEMORY_LIMIT, pb.STATUS_OUTPUT_LIMIT, pb.STATUS_COMPILE_ERROR


@dataclass(frozen=True)
class Attack:
    """A program, what it is started with, and how it may end when it is held; `stdout` counts where it ends well."""

    program: str
    ends: tuple[int, ...] = (OK,)
    stdout: bytes | None = b"held\n"
    limits: Mapping[str, int] = field(default_factory=dict)
    args: Sequence[str] = ()

    def __str__(self) -> str:
        return "-".join([self.program, *(Path(argument).name for argument in self.args)])


def read_program(name: str, **replacements: str) -> bytes:
    """A program's source, each @NAME@ in it replaced."""
    source = (PROGRAMS / name).read_text()
    for word, text in replacements.items():
        source = source.replace(f"@{word.upper()}@", text)
    return source.encode()


def language_of(name: str) -> str:
    """The runtime that a program's name ends in."""
    return LANGUAGES[Path(name).suffix]


def make_limits(language: str, **changes: int) -> pb.Limits:
    """Small limits, larger where a language cannot start with them."""
    return pb.Limits(**{**(LARGE if language in ("java", "javascript") else SMALL), **changes})


async def run_program(client: SandboxClient, name: str, limits: Mapping[str, int] = {}, **fields: Any) -> Any:
    """Runs one of the programs; `fields` are those of an ExecuteRequest."""
    language = language_of(name)
    request = {"language": language, "source": read_program(name), "limits": make_limits(language, **limits)}
    return await client.execute(pb.ExecuteRequest(**{**request, **fields}), timeout_s=CALL_S)


async def assert_serves(client: SandboxClient, language: str = "python") -> None:
    """Every slot runs the next job as if nothing had happened."""
    request = pb.ExecuteRequest(language=language, source=HELLOS[language])
    jobs = [client.execute(request, timeout_s=CALL_S) for _ in os.sched_getaffinity(0)]
    for response in await asyncio.gather(*jobs):
        assert (response.status, response.stdout) == (OK, b"42\n"), response


async def assert_held(client: SandboxClient, attack: Attack) -> pb.ExecuteResponse:
    """Runs an attack, checks how it ended, and that the next jobs are served."""
    response: pb.ExecuteResponse = await run_program(client, attack.program, attack.limits, args=attack.args)
    assert response.status in attack.ends, response
    if response.status == OK and attack.stdout is not None:
        assert (response.stdout, response.stderr) == (attack.stdout, b"")
    await assert_serves(client, language_of(attack.program))
    return response


async def skip_unless_there(client: SandboxClient, program: str) -> None:
    """Skips the test where the service knows the program's language but the machine lacks its tools."""
    language = language_of(program)
    for runtime in (await client.list_runtimes(pb.ListRuntimesRequest())).missing:
        if runtime.language == language:
            pytest.skip(f"needs {language} in the sandbox: {runtime.reason}")
