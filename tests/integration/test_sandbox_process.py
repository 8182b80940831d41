"""The isolation without root: the same verdicts, and never chosen by itself."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.config import SandboxConfig
from services.sandbox.runtime.isolation import choose_isolation, read_machine
from tests.fixtures.sandbox import function_tests, running_sandbox, skip_unless_possible, stdio_tests

QUICK = pb.Limits(wall_ms=1500, cpu_ms=600, memory_bytes=256 << 20)
DOUBLE = function_tests([([number], 2 * number) for number in range(3)])


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter: programs run under a uid of their own when the service is root."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def plain(open_folder: Path) -> AsyncIterator[SandboxClient]:
    async with running_sandbox(open_folder, isolation="process") as client:
        yield client


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("def f(x): return 2 * x", "ACCEPTED"),
        ("def f(x): return x", "WRONG_ANSWER"),
        ("def f(x) return x", "COMPILE_ERROR"),
        ("def f(x): return 1 / 0", "RUNTIME_ERROR"),
        ("while True: pass", "TIME_LIMIT"),
        ("import time\ntime.sleep(30)", "TIME_LIMIT"),
    ],
)
async def test_verdicts(plain: SandboxClient, source: str, verdict: str) -> None:
    request = pb.JudgeRequest(language="python", source=source.encode(), function_name="f", tests=DOUBLE, limits=QUICK)
    response = await plain.judge(request)
    assert pb.TestVerdict.Name(response.verdict) == f"TEST_VERDICT_{verdict}"


async def test_it_says_what_it_is(plain: SandboxClient) -> None:
    runtimes = (await plain.list_runtimes(pb.ListRuntimesRequest())).runtimes
    assert {runtime.isolation for runtime in runtimes} == {"process (unsafe)"}


def test_it_is_never_chosen_by_itself() -> None:
    skip_unless_possible("zygote")
    assert not choose_isolation(SandboxConfig(), read_machine()).unsafe


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("c", b'#include <stdio.h>\nint main(void) { int x; scanf("%d", &x); printf("%d", 2 * x); }'),
        ("bash", b"read x; echo $((2 * x))"),
    ],
)
async def test_other_languages(plain: SandboxClient, language: str, source: bytes) -> None:
    response = await plain.judge(
        pb.JudgeRequest(language=language, source=source, tests=stdio_tests([(b"4", b"8"), (b"0", b"0")]))
    )
    assert [result.verdict for result in response.results] == [pb.TEST_VERDICT_ACCEPTED] * 2
