"""What is compiled to nothing that can be executed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
import yaml

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

# Its compiler does what the source says.
RUNTIME = {
    **{"name": "own", "title": "Own", "source": "main.sh", "requires": ["sh"]},
    **{"compile": ["sh", "{source}"], "run": ["./program"]},
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def own_compiler(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SandboxClient]:
    """A sandbox with a compiler that makes anything."""
    skip_unless_possible("crun")
    folder = tmp_path_factory.mktemp("runtimes")
    (folder / "own.yaml").write_text(yaml.safe_dump(RUNTIME))
    paths = {"state_path": tmp_path_factory.mktemp("sandbox"), "runtimes_path": str(folder)}
    async with running_sandbox(isolation="crun", slots=1, max_sessions=0, **paths) as client:
        yield client


@pytest.mark.parametrize(
    "source",
    [
        "true",
        "echo text > program",
        "echo text > program; chmod +x program",
        "echo '#!/nothing' > program; chmod +x program",
        "mkdir program",
        "ln -s program program",
        "head -c 100 /bin/sh > program; chmod +x program",
    ],
)
async def test_what_cannot_be_executed_does_not_compile(own_compiler: SandboxClient, source: str) -> None:
    response = await own_compiler.execute(pb.ExecuteRequest(language="own", source=source.encode()))
    assert response.status == pb.STATUS_COMPILE_ERROR, response
    assert "nothing that can be executed" in response.reason
    assert response.compile.status == pb.STATUS_COMPILE_ERROR
    test = pb.TestCase(stdio=pb.StdioTest())
    judged = await own_compiler.judge(pb.JudgeRequest(language="own", source=source.encode(), tests=[test]))
    assert judged.verdict == pb.TEST_VERDICT_COMPILE_ERROR, judged
    assert "nothing that can be executed" in judged.results[0].reason


async def test_a_checker_that_cannot_be_executed_makes_the_test_unjudgeable(own_compiler: SandboxClient) -> None:
    checker = pb.Checker(program=pb.Program(language="own", source=b"true"))
    tests = [pb.TestCase(stdio=pb.StdioTest(expected_stdout=b"1"))]
    request = pb.JudgeRequest(language="bash", source=b"echo 1", tests=tests, checker=checker)
    response = await own_compiler.judge(request)
    assert response.verdict == pb.TEST_VERDICT_UNJUDGEABLE, response
    assert "nothing that can be executed" in response.results[0].reason


async def test_an_empty_program_is_run_as_one(own_compiler: SandboxClient) -> None:
    statuses = {}
    for language in ("python", "bash", "c"):
        response = await own_compiler.execute(pb.ExecuteRequest(language=language))
        statuses[language] = pb.Status.Name(response.status)
    assert statuses == {"python": "STATUS_OK", "bash": "STATUS_OK", "c": "STATUS_COMPILE_ERROR"}
    tests = [pb.TestCase(stdio=pb.StdioTest(expected_stdout=b"1"))]
    response = await own_compiler.judge(pb.JudgeRequest(language="python", tests=tests))
    assert response.verdict == pb.TEST_VERDICT_WRONG_ANSWER
