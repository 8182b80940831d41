# ruff: noqa: E501 -- a request a line
"""Wrong requests are refused field by field, over gRPC and HTTP alike."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from perigee.errors import InvalidArgumentError, ResourceExhaustedError
from perigee.json_codec import write_message
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import stdio_tests
from tests.fixtures.sandbox_fronts import Fronts, running_fronts

HELLO = pb.ExecuteRequest(language="python", source=b"print(1)")
TESTS = stdio_tests([(b"", b"")])


def execute(**fields: Any) -> pb.ExecuteRequest:
    request = pb.ExecuteRequest()
    request.CopyFrom(HELLO)
    request.MergeFrom(pb.ExecuteRequest(**fields))
    return request


def judge(**fields: Any) -> pb.JudgeRequest:
    request = pb.JudgeRequest(language="python", source=b"print(1)")
    request.MergeFrom(pb.JudgeRequest(**fields))
    return request


def file(path: str) -> list[pb.File]:
    return [pb.File(path="right"), pb.File(path=path)]


WRONG_RUNS = {
    "unknown language": (execute(language="cobol"), {"language"}),
    "no language": (pb.ExecuteRequest(source=b"x"), {"language"}),
    "source too large": (execute(source=b"#" * (2 << 20)), {"source"}),
    "path that leaves": (execute(files=file("../x")), {"files[1].path"}),
    "path that leaves later": (execute(files=file("a/../../x")), {"files[1].path"}),
    "absolute path": (execute(files=file("/x")), {"files[1].path"}),
    "NUL in a path": (execute(files=file("a\0b")), {"files[1].path"}),
    "empty path": (execute(files=file("")), {"files[1].path"}),
    "path of the folder": (execute(files=file(".")), {"files[1].path"}),
    "files that do not fit": (execute(files=[pb.File(path="a", content=b"x" * (20 << 20))]), {"files"}),
    "path with a dot": (execute(files=file("./x")), {"files[1].path"}),
    "path of too long a name": (execute(files=file("x" * 300)), {"files[1].path"}),
    "the same path twice": (execute(files=file("right")), {"files[1].path"}),
    "path of the source": (execute(files=file("main.py")), {"files[1].path"}),
    "a file that is a folder": (execute(files=[*file("a"), pb.File(path="a/b")]), {"files[1].path"}),
    "too many files": (execute(files=[pb.File(path=str(number)) for number in range(501)]), {"files"}),
    "output that leaves": (execute(output_files=["a", "../x", "/x", "\0"]), {"output_files[1]", "output_files[2]", "output_files[3]"}),
    "limits above the maximum": (
        execute(limits=pb.Limits(wall_ms=120_001, cpu_ms=120_001, memory_bytes=1 << 40, processes=10_000, file_bytes=1 << 40, output_bytes=1 << 40)),
        {f"limits.{name}" for name in ("wall_ms", "cpu_ms", "memory_bytes", "processes", "file_bytes", "output_bytes")},
    ),
    "limits of nothing": (execute(limits=pb.Limits(wall_ms=0, memory_bytes=0)), {"limits.wall_ms", "limits.memory_bytes"}),
    "compile limits": (execute(compile_limits=pb.Limits(wall_ms=10**9)), {"compile_limits.wall_ms"}),
    "NUL in an argument": (execute(args=["right", "a\0b"]), {"args[1]"}),
    "name of a variable": (execute(env={"A=B": "x"}), {"env"}),
    "value of a variable": (execute(env={"A": "a\0b"}), {"env['A']"}),
    "long key": (execute(idempotency_key="x" * 129), {"idempotency_key"}),
    "all at once": (
        pb.ExecuteRequest(language="?", limits=pb.Limits(wall_ms=10**9), files=file("/x"), args=["\0"]),
        {"language", "limits.wall_ms", "files[1].path", "args[0]"},
    ),
}  # fmt: skip
WRONG_SUBMISSIONS = {
    "no tests": (judge(), {"tests"}),
    "a test of no kind": (judge(tests=[pb.TestCase()]), {"tests"}),
    "tests of two kinds": (judge(tests=[*TESTS, pb.TestCase(code=pb.CodeTest(code="x"))]), {"tests"}),
    "too many tests": (judge(tests=TESTS * 1001), {"tests"}),
    "no function": (judge(tests=[pb.TestCase(code=pb.CodeTest(code="x"))]), {"function_name"}),
    "an empty code test": (judge(function_name="f", tests=[pb.TestCase(code=pb.CodeTest())]), {"tests[0].code.code"}),
    "functions of C": (judge(language="c", function_name="f", tests=[pb.TestCase(code=pb.CodeTest(code="x"))]), {"language"}),
    "no interactor": (judge(tests=[pb.TestCase(interactive=pb.InteractiveTest())]), {"interactor"}),
    "an interactor for nobody": (judge(tests=TESTS, interactor=pb.Program(language="python", source=b"x")), {"interactor"}),
    "a wrong checker": (
        judge(tests=TESTS, checker=pb.Checker(program=pb.Program(language="?", files=file("../x")))),
        {"checker.program.language", "checker.program.source", "checker.program.files[1].path"},
    ),
    "a wrong tolerance": (judge(tests=TESTS, checker=pb.Checker(floats=pb.FloatTolerance(absolute=-1))), {"checker.floats.absolute"}),
    "points": (judge(tests=[*TESTS, pb.TestCase(stdio=pb.StdioTest(), points=-1)]), {"tests[1].points"}),
    "NUL in an argument": (judge(tests=[pb.TestCase(stdio=pb.StdioTest(args=["\0"]))]), {"tests[0].stdio.args[0]"}),
}  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def small(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fronts]:
    """A sandbox with one slot, whose process is this one's."""
    async with running_fronts(tmp_path_factory.mktemp("sandbox"), slots=1, max_sessions=1) as both:
        yield both


async def refused_by_http(fronts: Fronts, path: str, body: Any) -> list[str]:
    """The fields that HTTP names."""
    response = await fronts.http.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == "INVALID_ARGUMENT"
    assert all(violation["description"] for violation in error["field_violations"])
    return [violation["field"] for violation in error["field_violations"]]


def fields_of(error: InvalidArgumentError) -> list[str]:
    assert all(violation.description for violation in error.violations)
    return [violation.field for violation in error.violations]


@pytest.mark.parametrize("what", WRONG_RUNS)
async def test_wrong_runs(small: Fronts, what: str) -> None:
    request, fields = WRONG_RUNS[what]
    with pytest.raises(InvalidArgumentError) as error:
        await small.grpc.execute(request)
    assert sorted(fields_of(error.value)) == sorted(fields)
    assert sorted(await refused_by_http(small, "/v1/execute", write_message(request))) == sorted(fields)


@pytest.mark.parametrize("what", WRONG_SUBMISSIONS)
async def test_wrong_submissions(small: Fronts, what: str) -> None:
    request, fields = WRONG_SUBMISSIONS[what]
    with pytest.raises(InvalidArgumentError) as error:
        await small.grpc.judge(request)
    assert sorted(fields_of(error.value)) == sorted(fields)
    assert sorted(await refused_by_http(small, "/v1/judge", write_message(request))) == sorted(fields)


async def test_a_request_of_200_megabytes_is_not_read(small: Fronts) -> None:
    request = execute(files=[pb.File(path="large", content=bytes(200 << 20))])
    with pytest.raises(ResourceExhaustedError, match="larger than max"):
        await small.grpc.execute(request)
    response = await small.http.post(
        "/v1/execute", content=bytes(103 << 20), headers={"content-type": "application/json"}
    )
    assert "is larger than 106954752 bytes" in response.text


async def test_a_file_of_40_megabytes(small: Fronts) -> None:
    request = execute(files=[pb.File(path="large", content=bytes(40 << 20))])
    with pytest.raises(InvalidArgumentError) as error:
        await small.grpc.execute(request)
    assert set(fields_of(error.value)) == {"files[0].content", "files"}
    content = base64.b64encode(bytes(40 << 20)).decode()
    body = {"language": "python", "source": "x", "files": [{"path": "large", "content_base64": content}]}
    assert set(await refused_by_http(small, "/v1/execute", body)) == {"files[0].content", "files"}


async def test_text_that_is_not_utf_8(small: Fronts) -> None:
    """No parser tells which field of a message has it."""
    data = execute(args=["XY"]).SerializeToString().replace(b"XY", b"\xff\xfe")
    call = small.grpc.channel.unary_unary("/perigee.sandbox.v1.SandboxService/Execute")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(data, timeout=30)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "not of the method's message" in (error.value.details() or "")
    headers = {"content-type": "application/json"}
    for content, field in (
        (b'{"language": "python", "source": "x", "args": ["\xff"]}', "body"),
        (b'{"language": "python", "source": "x", "args": ["", "\\ud800"]}', "args[1]"),
        (b'{"language": "python", "source": "\\ud800"}', "source"),
        (b'{"language": "python", "source_base64": "?"}', "source_base64"),
        (b'{"language": "python", "source": "x", "limits": {"wall_ms": "soon"}}', "limits.wall_ms"),
        (b"[1]", "body"),
        (b"{", "body"),
    ):
        response = await small.http.post("/v1/execute", content=content, headers=headers)
        assert response.status_code == 400, content
        assert [each["field"] for each in response.json()["error"]["field_violations"]] == [field]


async def test_wrong_sessions(small: Fronts) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        await small.grpc.create_session(pb.CreateSessionRequest(language="c", idle_seconds=0, files=file("/x")))
    assert set(fields_of(error.value)) == {"language", "idle_seconds", "files[1].path"}
    with pytest.raises(InvalidArgumentError) as error:
        await small.grpc.run_cell(pb.RunCellRequest(code=b"\xff", output_files=["/x"], wall_ms=0))
    assert set(fields_of(error.value)) == {"session_id", "code", "output_files[0]", "wall_ms"}
