"""Nothing of one job reaches another: not what it leaves behind, and not while both run."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.faults.attack_runs import CALL_S, OK, assert_serves, make_limits, read_program, run_program
from tests.fixtures.sandbox import stdio_tests

EVERY_SLOT = 2 * len(os.sched_getaffinity(0))


@asynccontextmanager
async def running(client: SandboxClient, source: bytes, said: bytes, **fields: Any) -> AsyncIterator[None]:
    """A program that has said this and runs for as long as the block lasts."""
    limits = make_limits("python", wall_ms=100_000)
    request = pb.ExecuteRequest(language="python", source=source, limits=limits, **fields)
    async with aclosing(client.execute_stream(request, timeout_s=CALL_S)) as events:  # type: ignore[type-var]
        assert (await anext(events)).stdout == said
        yield


@pytest.mark.parametrize(
    ("leave", "look", "left"),
    [
        ("leftovers/leave_everything.py", "leftovers/look_around.py", b"left\n"),
        ("leftovers/leave_marker.py", "leftovers/search_marker.py", b"13000\n"),
        ("resources/fork_chain.py", "leftovers/look_around.py", b"held\n"),
        ("resources/deep_folders.py", "leftovers/look_around.py", b"held\n"),
    ],
)
async def test_nothing_is_left_for_the_next_job(sandbox: SandboxClient, leave: str, look: str, left: bytes) -> None:
    for _ in range(EVERY_SLOT):
        assert (await run_program(sandbox, leave, {"cpu_ms": 5000})).stdout == left
    for _ in range(EVERY_SLOT):
        response = await run_program(sandbox, look)
        assert (response.status, response.stdout, response.stderr) == (OK, b"held\n", b"")


async def test_jobs_do_not_see_each_other(sandbox: SandboxClient) -> None:
    key = b"sesame" * 3
    async with running(sandbox, read_program("leftovers/hold.py"), b"18\n", stdin=key):
        for program, args in (("leftovers/look_at_neighbour.py", []), ("breakouts/abstract_socket.py", [key.decode()])):
            response = await run_program(sandbox, program, args=args)
            assert (response.status, response.stdout, response.stderr) == (OK, b"held\n", b"")


async def test_environment_of_a_job_is_its_own(sandbox: SandboxClient) -> None:
    key = f"sesame-{secrets.token_hex(8)}"
    source = b"import os, time\nprint(os.environ['KEY'], flush=True)\ntime.sleep(90)"
    async with running(sandbox, source, f"{key}\n".encode(), env={"KEY": key}):
        during = await run_program(sandbox, "secrets/search.py", {"cpu_ms": 10_000})
    after = [await run_program(sandbox, "secrets/search.py", {"cpu_ms": 10_000}) for _ in range(EVERY_SLOT)]
    assert {response.stdout for response in (during, *after)} == {b"nothing\n"}
    bare = [await run_program(sandbox, "breakouts/environment.py", args=["KEY"]) for _ in range(EVERY_SLOT)]
    assert {response.stdout for response in bare} == {b"held\n"}


async def test_a_test_leaves_nothing_for_the_next_one(sandbox: SandboxClient) -> None:
    """Each run leaves its input wherever it can and prints what the runs before it left."""
    source = b"""
import glob
kept = [open(path).read() for path in sorted(glob.glob('/box/*.note') + glob.glob('/tmp/*') + glob.glob('/dev/shm/*'))]
text = input()
for folder in ('/box', '/tmp', '/dev/shm'):
    open(f'{folder}/{text}.note', 'w').write(text)
print(text, *kept)
"""
    tests = stdio_tests([(word, word) for word in (b"one", b"two", b"three", b"four")])
    response = await sandbox.judge(pb.JudgeRequest(language="python", source=source, tests=tests))
    assert response.verdict == pb.TEST_VERDICT_ACCEPTED, response
    assert response.passed == 4


async def test_a_compiled_program_cannot_change_its_later_runs(every_language: SandboxClient) -> None:
    source, limits = read_program("compilers/rewrites_itself.c"), make_limits("c")
    tests = stdio_tests([(b"", b"42")] * 4)
    for _ in range(EVERY_SLOT):
        request = pb.JudgeRequest(language="c", source=source, tests=tests, limits=limits)
        response = await every_language.judge(request)
        assert (response.verdict, response.passed) == (pb.TEST_VERDICT_ACCEPTED, 4), response
        executed = await run_program(every_language, "compilers/rewrites_itself.c")
        assert (executed.status, executed.stdout) == (OK, b"42\n"), executed
    await assert_serves(every_language, "c")
