"""Verdicts of the sandbox, in every isolation."""

from __future__ import annotations

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import function_tests, stdio_tests

DOUBLE = function_tests([([number], 2 * number) for number in range(5)])
QUICK = pb.Limits(wall_ms=2500, cpu_ms=800, memory_bytes=64 << 20)


def verdict_names(response: pb.JudgeResponse) -> list[str]:
    return [pb.TestVerdict.Name(result.verdict).removeprefix("TEST_VERDICT_") for result in response.results]


async def judge_function(sandbox: SandboxClient, source: str, **fields: object) -> pb.JudgeResponse:
    request = pb.JudgeRequest(language="python", source=source.encode(), function_name="f", tests=DOUBLE, limits=QUICK)
    request.MergeFrom(pb.JudgeRequest(**fields))  # type: ignore[arg-type]
    return await sandbox.judge(request)


@pytest.mark.parametrize(
    ("source", "verdicts"),
    [
        ("def f(x): return x * 2", ["ACCEPTED"] * 5),
        ("def f(x): return x * 2.0", ["ACCEPTED"] * 5),
        ("def f(x): return x + 1", ["WRONG_ANSWER", "ACCEPTED", *["WRONG_ANSWER"] * 3]),
        ("def f(x): return str(2 * x)", ["WRONG_ANSWER"] * 5),
        ("def f(x): return {x}", ["WRONG_ANSWER"] * 5),
        ("def f(x):\n  print(2 * x)", ["WRONG_ANSWER"] * 5),
        ("def f(x) return x", ["COMPILE_ERROR"] * 5),
        ("x = '\0'", ["COMPILE_ERROR"] * 5),
        ("def g(x): return 2 * x", ["RUNTIME_ERROR"] * 5),
        ("1 / 0", ["RUNTIME_ERROR"] * 5),
        ("def f(x): return 2 * x if x != 3 else 1 / 0", [*["ACCEPTED"] * 3, "RUNTIME_ERROR", "ACCEPTED"]),
        ("import os\ndef f(x): return 2 * x if x != 1 else os._exit(0)", ["ACCEPTED", "RUNTIME_ERROR", *["ACCEPTED"] * 3]),  # noqa: E501
        ("import sys\ndef f(x): return 2 * x if x != 1 else sys.exit(0)", ["ACCEPTED", "RUNTIME_ERROR", *["ACCEPTED"] * 3]),  # noqa: E501
        ("def f(x):\n  while x == 1: pass\n  return 2 * x", ["ACCEPTED", "TIME_LIMIT", *["ACCEPTED"] * 3]),
        ("import time\ndef f(x):\n  x == 1 and time.sleep(5)\n  return 2 * x", ["ACCEPTED", "TIME_LIMIT", *["ACCEPTED"] * 3]),  # noqa: E501
        ("while True: pass", ["TIME_LIMIT"] * 5),
        ("def f(x): return 'a' * 10**7 if x == 4 else 2 * x", [*["ACCEPTED"] * 4, "OUTPUT_LIMIT"]),
        ("def f(x): return bytearray(10**9) if x == 4 else 2 * x", [*["ACCEPTED"] * 4, "MEMORY_LIMIT"]),
    ],
)  # fmt: skip
async def test_function_verdicts(sandbox: SandboxClient, source: str, verdicts: list[str]) -> None:
    response = await judge_function(sandbox, source)
    assert verdict_names(response) == verdicts
    assert response.passed == verdicts.count("ACCEPTED")
    expected = next((verdict for verdict in verdicts if verdict != "ACCEPTED"), "ACCEPTED")
    assert pb.TestVerdict.Name(response.verdict) == f"TEST_VERDICT_{expected}"


@pytest.mark.parametrize(
    ("source", "verdicts"),
    [
        ("def f(x): return 2 * x", ["ACCEPTED"] * 5),
        ("def f(x): return 2 * x if x < 2 else 0", ["ACCEPTED", "ACCEPTED", "WRONG_ANSWER", "SKIPPED", "SKIPPED"]),
        ("def f(x): return 2 * x if x < 2 else 1 / 0", ["ACCEPTED", "ACCEPTED", "RUNTIME_ERROR", "SKIPPED", "SKIPPED"]),
    ],
)
async def test_stop_at_first_failure(sandbox: SandboxClient, source: str, verdicts: list[str]) -> None:
    response = await judge_function(sandbox, source, stop_at_first_failure=True)
    assert verdict_names(response) == verdicts


@pytest.mark.parametrize(
    ("source", "verdicts"),
    [
        (b"print(int(input()) * 2)", ["ACCEPTED", "ACCEPTED", "ACCEPTED"]),
        (b"print(int(input()) + 1)", ["ACCEPTED", "WRONG_ANSWER", "WRONG_ANSWER"]),
        (b"print(2", ["COMPILE_ERROR"] * 3),
        (b"x = int(input())\nprint(4 // (x - 1))", ["RUNTIME_ERROR", "ACCEPTED", "WRONG_ANSWER"]),
        (b"x = int(input())\nprint(2 * x)\nif x == 2: exit(3)", ["ACCEPTED", "RUNTIME_ERROR", "ACCEPTED"]),
        (b"x = int(input())\nwhile x == 3: pass\nprint(2 * x)", ["ACCEPTED", "ACCEPTED", "TIME_LIMIT"]),
        (b"x = int(input())\nwhile x == 3: print('a' * 10000)\nprint(2 * x)", ["ACCEPTED", "ACCEPTED", "OUTPUT_LIMIT"]),
        (b"x = int(input())\nif x == 3: bytearray(10**9)\nprint(2 * x)", ["ACCEPTED", "ACCEPTED", "MEMORY_LIMIT"]),
    ],
)
async def test_stdio_verdicts(sandbox: SandboxClient, source: bytes, verdicts: list[str]) -> None:
    tests = stdio_tests([(b"1\n", b"2"), (b"2\n", b"4\n"), (b"3\n", b" 6")])
    response = await sandbox.judge(pb.JudgeRequest(language="python", source=source, tests=tests, limits=QUICK))
    assert verdict_names(response) == verdicts
