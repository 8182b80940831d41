"""Programs that are compiled once."""

from __future__ import annotations

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import stdio_tests
from tests.fixtures.sandbox_fronts import Fronts

CHECKER = b"""
#include "word.h"
#include <stdio.h>
int main(void) { fputs(WORD, stderr); return 0; }
"""


def request(word: str, **fields: object) -> pb.JudgeRequest:
    files = [pb.File(path="word.h", content=f'#define WORD "{word}"'.encode())]
    checker = pb.Program(language="c", source=CHECKER, files=files, **fields)
    return pb.JudgeRequest(
        language="python", source=b"print()", tests=stdio_tests([(b"", b"")]), checker=pb.Checker(program=checker)
    )


async def test_a_checker_is_compiled_once_for_each_of_its_files_and_limits(fronts: Fronts) -> None:
    for word in ("one", "two", "one"):
        response = await fronts.grpc.judge(request(word))
        assert (response.verdict, response.results[0].reason) == (pb.TEST_VERDICT_ACCEPTED, word)
    before = await compile_hits(fronts)
    await fronts.grpc.judge(request("two"))
    assert await compile_hits(fronts) == before + 1
    slow = await fronts.grpc.judge(request("one", compile_limits=pb.Limits(wall_ms=1)))
    assert slow.results[0].verdict in (pb.TEST_VERDICT_INFRA_ERROR, pb.TEST_VERDICT_UNJUDGEABLE)
    assert "wall-clock limit of 1 ms" in slow.results[0].reason


async def compile_hits(fronts: Fronts) -> float:
    text = (await fronts.http.get("/metrics")).text
    line = next(line for line in text.splitlines() if line.startswith("perigee_sandbox_compile_cache_hits_total"))
    return float(line.split()[1])


POISON = b"""
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>
int main(void) {
    chmod("program", 0755);
    unlink("program");
    FILE *file = fopen("program", "w");
    if (file) { fputs("#!/bin/sh\\necho poisoned\\n", file); fclose(file); chmod("program", 0755); }
    puts("fine");
}
"""


async def test_a_program_cannot_change_what_was_compiled(fronts: Fronts) -> None:
    program = pb.ExecuteRequest(language="c", source=POISON)
    for cached in (False, True, True):
        response = await fronts.grpc.execute(program)
        assert (response.status, response.stdout) == (pb.STATUS_OK, b"fine\n")
        assert (response.compile.cached, response.compile.wall_ms == 0) == (cached, cached)
    tests = stdio_tests([(b"", b"fine")] * 3)
    judged = await fronts.grpc.judge(pb.JudgeRequest(language="c", source=POISON, tests=tests))
    assert judged.passed == 3
    assert judged.compile.cached


async def test_what_does_not_compile_is_not_kept(fronts: Fronts) -> None:
    for _ in range(2):
        response = await fronts.grpc.execute(pb.ExecuteRequest(language="c", source=b"int main(void) { return x; }"))
        assert response.status == pb.STATUS_COMPILE_ERROR
        assert not response.compile.cached


async def test_arguments_of_the_compiler(fronts: Fronts) -> None:
    source = b"int answer(void);\nint main(void) { return answer() - ANSWER; }"
    file = pb.File(path="answer.c", content=b"int answer(void) { return 42; }")
    program = pb.ExecuteRequest(language="c", source=source, files=[file], compile_args=["-DANSWER=42", "answer.c"])
    assert (await fronts.grpc.execute(program)).status == pb.STATUS_OK


JAVA_HEAP = """
public class Main { public static void main(String[] a) {
  java.util.List<int[]> kept = new java.util.ArrayList<>();
  while (true) kept.add(new int[1 << 18]);
} }
"""
NODE_HEAP = "const kept = []; while (true) kept.push(new Array(1 << 16).fill(kept.length));"


@pytest.mark.parametrize(("language", "source"), [("java", JAVA_HEAP), ("javascript", NODE_HEAP)])
async def test_a_full_heap_is_the_memory_limit(fronts: Fronts, language: str, source: str) -> None:
    known = [runtime.language for runtime in (await fronts.grpc.list_runtimes(pb.ListRuntimesRequest())).runtimes]
    if language not in known:
        pytest.skip(f"needs {language}")
    limits = pb.Limits(memory_bytes=200 << 20, wall_ms=60_000, cpu_ms=60_000)
    request = pb.ExecuteRequest(language=language, source=source.encode(), limits=limits)
    response = await fronts.grpc.execute(request, timeout_s=110)
    assert response.status == pb.STATUS_MEMORY_LIMIT, response
