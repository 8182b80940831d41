"""Sources that aim at the compiler: they do not compile or reach a limit, show nothing of the host, and never hang."""

from __future__ import annotations

import asyncio
import os

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.attack_runs import (
    COMPILE_ERROR,
    MEMORY_LIMIT,
    OK,
    OUTPUT_LIMIT,
    RUNTIME_ERROR,
    TIME_LIMIT,
    assert_serves,
    language_of,
    make_limits,
    read_program,
    skip_unless_there,
)

AT_ONCE_S = 90.0
COMPILE_LIMITS = pb.Limits(wall_ms=20_000, cpu_ms=1000)
MESSAGE_BYTES = 64 << 10
HELD = (COMPILE_ERROR, TIME_LIMIT, MEMORY_LIMIT, OUTPUT_LIMIT)


async def compile_program(client: SandboxClient, name: str, **replacements: str) -> pb.ExecuteResponse:
    """Compiles and runs one of the programs; the sandbox serves afterwards."""
    await skip_unless_there(client, name)
    language = language_of(name)
    request = pb.ExecuteRequest(
        language=language,
        source=read_program(name, **replacements),
        limits=make_limits(language),
        compile_limits=COMPILE_LIMITS,
    )
    async with asyncio.timeout(AT_ONCE_S):
        response = await client.execute(request, timeout_s=AT_ONCE_S)
    assert max(len(response.compile.stdout), len(response.compile.stderr)) <= MESSAGE_BYTES
    await assert_serves(client, language)
    return response


@pytest.mark.parametrize(
    "name",
    [
        "include_random.c",
        "include_zero.c",
        "include_itself.c",
        "macro_bomb.c",
        "error_flood.c",
        "template_bomb.cpp",
        "constant_loop.cpp",
    ],
)
async def test_compilers_are_limited(every_language: SandboxClient, name: str) -> None:
    response = await compile_program(every_language, f"compilers/{name}")
    assert response.status in HELD, response
    assert response.stdout == b""


async def test_input_of_the_compiler_is_empty(every_language: SandboxClient) -> None:
    response = await compile_program(every_language, "compilers/include_input.c")
    assert response.status in (OK, *HELD), response


async def test_a_program_of_gigabytes_is_not_made(every_language: SandboxClient) -> None:
    """Its making, or its start, fails for want of room."""
    response = await compile_program(every_language, "compilers/static_array.c")
    assert response.status in (*HELD, RUNTIME_ERROR), response


async def test_an_expression_deeper_than_the_compiler(every_language: SandboxClient) -> None:
    deep = "(" * 50_000 + "1" + ")" * 50_000
    response = await compile_program(every_language, "compilers/Deep.java", deep=deep)
    assert response.status in HELD, response


@pytest.mark.parametrize("name", ["include_secret.c", "embed_secret.c", "include_environment.c"])
async def test_compilers_show_nothing_of_the_host(every_language: SandboxClient, host_secret: str, name: str) -> None:
    response = await compile_program(every_language, f"compilers/{name}", secret=host_secret)
    assert response.status in HELD, response
    shown = response.stdout + response.stderr + response.compile.stdout + response.compile.stderr
    assert b"root:" not in shown
    assert b"secret-" not in shown
    for variable in ("PYTEST_CURRENT_TEST", "PYTEST_VERSION"):
        assert os.environ[variable].encode() not in shown


async def test_many_compilers_at_once(every_language: SandboxClient) -> None:
    """Attacks on the compiler hold up only themselves."""
    names = ["macro_bomb.c", "template_bomb.cpp", "include_zero.c", "static_array.c"]
    attacks = [compile_program(every_language, f"compilers/{name}") for name in names]
    _, *responses = await asyncio.gather(assert_serves(every_language), *attacks)
    assert {response.status for response in responses} <= {*HELD, RUNTIME_ERROR}
