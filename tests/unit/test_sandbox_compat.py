"""Other sandboxes' requests and responses in Perigee's terms, and back."""

import base64
import math
from unittest.mock import AsyncMock, Mock

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from perigee.errors import InternalError, InvalidArgumentError, ResourceExhaustedError
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.api import e2b, piston, sandbox_fusion
from services.sandbox.api.compat import find_runtime, rename_fields
from services.sandbox.api.piston import selects

PYTHON = pb.Runtime(language="python", version="3.11.2", aliases=["py"])
CPP = pb.Runtime(language="cpp", version="g++ 12.2.0", aliases=["c++17"], compiled=True)
NODE = pb.Runtime(language="javascript", version="18.19.0")
RUNTIMES = [PYTHON, CPP, NODE]


async def test_a_failure_of_the_sandbox_is_no_fault_of_e2b_s_caller() -> None:
    failed = AsyncMock(return_value=pb.RunCellResponse(status=pb.STATUS_INFRA_ERROR, reason="the box broke"))
    sandboxes = Mock(**{"servicer.RunCell": failed, "addressed.return_value.session": Mock(id="s", ends_at=math.inf)})
    app = FastAPI()
    app.include_router(e2b.sandbox_router(sandboxes))

    async def with_deadline(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "deadline": None}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(with_deadline), base_url="http://e2b") as client:
        for path, body in (("files", {"content": b"x"}), ("filesystem.Filesystem/Stat", {"json": {"path": "a"}})):
            with pytest.raises(InternalError, match="the box broke"):
                await client.post(f"/e2b/{path}", params={"path": "a"}, **body)


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("python", PYTHON),
        ("Python3", PYTHON),
        ("c++", CPP),
        ("C++17", CPP),
        ("nodejs", NODE),
        ("js", NODE),
        ("cobol", None),
        ("", None),
    ],
)
def test_languages_are_found_by_the_names_of_other_sandboxes(name: str, found: pb.Runtime | None) -> None:
    assert find_runtime(RUNTIMES, name) == found


def test_a_runtime_s_own_name_goes_before_a_synonym() -> None:
    node = pb.Runtime(language="node")
    assert find_runtime([NODE, node], "node") == node
    assert find_runtime([node, NODE], "js") == node


@pytest.mark.parametrize(
    ("selector", "taken"),
    [
        *[(selector, True) for selector in ("*", "", "x", "3", "3.x", "3.11", "3.11.2", "=3.11.2", "v3.11.2", "^3.10")],
        *[(selector, True) for selector in ("~3.11.1", "~3", ">=3.8 <4", ">= 3.8", "<=3.11", "2.x || 3.x", ">3.10")],
        *[(selector, False) for selector in ("2", "3.10.0", "3.12.x", "^3.12", "^2", "~3.10", ">3.11", "<3.11", "<3")],
        *[(selector, False) for selector in ("latest", "^", "3.11.2-beta", "9" * 5000, "3.11.2.4", "<*")],
    ],
)
def test_versions_are_selected_as_npm_does(selector: str, taken: bool) -> None:
    assert selects(selector, "3.11.2") is taken


def test_a_caret_fixes_the_first_number_that_is_not_zero() -> None:
    assert selects("^0.3.1", "0.3.9")
    assert not selects("^0.3.1", "0.4.0")
    assert not selects("^0.0.3", "0.0.4")
    assert selects("12.x", "g++ (Debian 12.2.0-14) 12.2.0")
    assert not selects("*", "unknown")


def test_fields_are_renamed_and_reported_once() -> None:
    wrong = [(field, "is too much") for field in ("limits.wall_ms", "limits.cpu_ms")] + [("args[0]", "has NUL")]
    error = InvalidArgumentError("x", violations=[sandbox_fusion.FieldViolation(*each) for each in wrong])
    renamed = rename_fields(error, sandbox_fusion._FIELDS)
    assert renamed.message == "run_timeout: is too much; args[0]: has NUL"
    assert [violation.field for violation in renamed.violations] == ["run_timeout", "args[0]"]


def test_a_fusion_request_becomes_an_execution() -> None:
    body = sandbox_fusion.RunCodeRequest(
        code="é",
        language="cpp",
        stdin="1",
        compile_timeout=20,
        run_timeout=0.0015,
        memory_limit_MB=64,
        files={"a/b.bin": encode(b"\xff"), "none": None},
        fetch_files=["out.txt", "/etc/passwd"],
    )
    assert sandbox_fusion.to_execute_request(body, CPP) == pb.ExecuteRequest(
        loopback=True,
        language="cpp",
        source="é".encode(),
        stdin=b"1",
        limits=pb.Limits(wall_ms=2, cpu_ms=2, memory_bytes=64 << 20),
        files=[pb.File(path="a/b.bin", content=b"\xff")],
        output_files=["out.txt"],
        compile_limits=pb.Limits(wall_ms=20_000, cpu_ms=20_000),
    )


def test_a_fusion_request_leaves_open_what_it_does_not_say() -> None:
    body = sandbox_fusion.RunCodeRequest(code="x", language="nodejs")
    limits = pb.Limits(wall_ms=10_000, cpu_ms=10_000)
    assert sandbox_fusion.to_execute_request(body, NODE) == pb.ExecuteRequest(
        loopback=True, language="javascript", source=b"x", limits=limits
    )
    assert sandbox_fusion.to_execute_request(body, None).language == "nodejs"
    long = sandbox_fusion.RunCodeRequest(code="x", language="python", run_timeout=1e30)
    assert sandbox_fusion.to_execute_request(long, PYTHON).limits.wall_ms == 2**32 - 1


def test_fusion_s_python_may_talk_to_itself_and_pytest_is_a_command() -> None:
    python = pb.Runtime(language="python-test", sessions=True)
    request = sandbox_fusion.to_execute_request(sandbox_fusion.RunCodeRequest(code="x", language="pytest"), python)
    assert (request.language, request.source, request.loopback) == ("python-test", b"", True)
    assert list(request.command) == ["python3", "-m", "pytest", "test_main.py"]
    assert list(request.files) == [pb.File(path="test_main.py", content=b"x")]


def test_fusion_s_files_have_room() -> None:
    body = sandbox_fusion.RunCodeRequest(code="x", language="python", files={"a": encode(bytes(20 << 20))})
    assert sandbox_fusion.to_execute_request(body, PYTHON).limits.file_bytes == 40 << 20


def test_fusion_files_that_are_no_base64_are_all_named() -> None:
    body = sandbox_fusion.RunCodeRequest(code="x", language="python", files={"a": "?", "b": "YQ==", "c": "YQ"})
    with pytest.raises(InvalidArgumentError) as caught:
        sandbox_fusion.to_execute_request(body, PYTHON)
    assert [violation.field for violation in caught.value.violations] == ["files.a", "files.c"]


@pytest.mark.parametrize(
    "wrong", [{"code": "\ud800"}, {"run_timeout": 0}, {"run_timeout": "nan"}, {"files": {"\ud800": ""}}]
)
def test_fusion_requests_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        sandbox_fusion.RunCodeRequest(**({"code": "x", "language": "python"} | wrong))  # type: ignore[arg-type]


def test_a_fusion_response_tells_success() -> None:
    response = pb.ExecuteResponse(
        status=pb.STATUS_OK,
        stdout=b"\xff1",
        wall_ms=1500,
        compile=pb.CompileResult(stderr=b"warning", wall_ms=200),
        files=[
            pb.OutputFile(path="a", content=b"\0"),
            pb.OutputFile(path="b", content=b"cut", truncated=True),
            pb.OutputFile(path="c", error="not found"),
        ],
    )
    assert sandbox_fusion.to_run_code_response(response, True, "pod").model_dump() == {
        "status": "Success",
        "message": "b is too large to be returned",
        "compile_result": {
            "status": "Finished",
            "execution_time": 0.2,
            "return_code": 0,
            "stdout": "",
            "stderr": "warning",
        },
        "run_result": {
            "status": "Finished",
            "execution_time": 1.5,
            "return_code": 0,
            "stdout": "\ufffd1",
            "stderr": "",
        },
        "executor_pod_name": "pod",
        "files": {"a": "AA=="},
    }


@pytest.mark.parametrize(
    ("response", "status", "run_status", "return_code"),
    [
        (pb.ExecuteResponse(status="STATUS_RUNTIME_ERROR", exit_code=3), "Failed", "Finished", 3),
        (pb.ExecuteResponse(status="STATUS_RUNTIME_ERROR", exit_code=-1, signal=11), "Failed", "Finished", -11),
        (pb.ExecuteResponse(status="STATUS_TIME_LIMIT", exit_code=-1, signal=9), "Failed", "TimeLimitExceeded", None),
        (pb.ExecuteResponse(status="STATUS_MEMORY_LIMIT", exit_code=0), "Failed", "Finished", -9),
        (pb.ExecuteResponse(status="STATUS_OUTPUT_LIMIT", exit_code=0), "Failed", "Finished", -9),
        (pb.ExecuteResponse(status="STATUS_INFRA_ERROR", exit_code=0), "SandboxError", "Error", None),
    ],
)
def test_a_fusion_response_tells_failures(
    response: pb.ExecuteResponse, status: str, run_status: str, return_code: int | None
) -> None:
    response.reason = "why"
    reported = sandbox_fusion.to_run_code_response(response, True)
    assert (reported.status, reported.message) == (status, "why")
    assert reported.run_result is not None
    assert (reported.run_result.status, reported.run_result.return_code) == (run_status, return_code)


def test_a_fusion_response_to_what_does_not_compile_has_no_run() -> None:
    response = pb.ExecuteResponse(status="STATUS_COMPILE_ERROR", compile=pb.CompileResult(exit_code=1, stderr=b"no"))
    reported = sandbox_fusion.to_run_code_response(response, True)
    assert reported.status == "Failed"
    assert reported.run_result is None
    assert reported.compile_result is not None
    assert (reported.compile_result.return_code, reported.compile_result.stderr) == (1, "no")


def test_a_source_that_an_interpreter_refuses_is_a_run_that_failed() -> None:
    compiled = pb.CompileResult(exit_code=1, stderr=b"SyntaxError: invalid syntax", status="STATUS_COMPILE_ERROR")
    response = pb.ExecuteResponse(status="STATUS_COMPILE_ERROR", compile=compiled)
    reported = sandbox_fusion.to_run_code_response(response, False)
    assert (reported.status, reported.compile_result) == ("Failed", None)
    assert reported.run_result is not None
    assert (reported.run_result.status, reported.run_result.return_code) == ("Finished", 1)
    assert reported.run_result.stderr == "SyntaxError: invalid syntax"
    whole = piston.to_piston_response(response, PYTHON)
    assert (whole.compile, whole.run.code, whole.run.status) == (None, 1, "RE")


def test_a_compiler_that_meets_a_limit() -> None:
    compiled = pb.CompileResult(exit_code=-1, signal=9, status="STATUS_TIME_LIMIT", reason="wall-clock limit of 5 ms")
    response = pb.ExecuteResponse(status="STATUS_COMPILE_ERROR", compile=compiled)
    reported = sandbox_fusion.to_run_code_response(response, True)
    assert (reported.status, reported.run_result) == ("Failed", None)
    assert reported.compile_result is not None
    assert (reported.compile_result.status, reported.compile_result.return_code) == ("TimeLimitExceeded", None)
    stage = piston.to_piston_response(response, CPP).compile
    assert stage is not None
    assert (stage.code, stage.signal, stage.status) == (None, "SIGKILL", "TO")


def test_fusion_errors_have_fastapi_s_form() -> None:
    assert sandbox_fusion.write_fusion_error(InvalidArgumentError.for_field("code", "must not be empty")) == (
        422,
        {"detail": [{"loc": ["body", "code"], "msg": "must not be empty", "type": "value_error"}]},
    )
    assert sandbox_fusion.write_fusion_error(ResourceExhaustedError("full")) == (429, {"detail": "full"})


def test_a_piston_request_becomes_an_execution() -> None:
    body = piston.PistonRequest.model_validate(
        {
            "language": "c++",
            "version": "*",
            "files": [
                {"name": "data.bin", "content": "ff00", "encoding": "hex"},
                {"name": "main.cpp", "content": "int main"},
                {"content": "/w==", "encoding": "base64"},
                {"name": "notes.txt", "content": "é"},
            ],
            "stdin": "in",
            "args": ["1"],
            "compile_timeout": 10000,
            "run_timeout": 3000,
            "run_cpu_time": 1000,
            "compile_memory_limit": -1,
            "run_memory_limit": 2**25,
        }
    )
    assert piston.to_execute_request(body, CPP) == pb.ExecuteRequest(
        language="cpp",
        source=b"int main",
        stdin=b"in\n",
        args=["1"],
        limits=pb.Limits(wall_ms=3000, cpu_ms=1000, memory_bytes=2**25),
        compile_limits=pb.Limits(wall_ms=10_000, cpu_ms=10_000),
        files=[
            pb.File(path="data.bin", content=b"\xff\0"),
            pb.File(path="file2.code", content=b"\xff"),
            pb.File(path="notes.txt", content="é".encode()),
        ],
    )


def test_a_piston_request_leaves_open_what_it_does_not_say() -> None:
    body = piston.PistonRequest(language="py", version="3", files=[piston.PistonFile(content="x")])
    assert piston.to_execute_request(body, PYTHON) == pb.ExecuteRequest(
        language="python", source=b"x", stdin=b"\n", limits=pb.Limits()
    )


def test_piston_files_must_have_a_program_and_be_what_they_say() -> None:
    binary = piston.PistonFile(content="zz", encoding="hex")
    body = piston.PistonRequest(language="py", version="3", files=[binary])
    with pytest.raises(InvalidArgumentError, match="at least one utf8 encoded file"):
        piston.to_execute_request(body, PYTHON)
    body = piston.PistonRequest(language="py", version="3", files=[piston.PistonFile(content="x"), binary])
    with pytest.raises(InvalidArgumentError, match=r"files\[1\].content: is not hex"):
        piston.to_execute_request(body, PYTHON)


@pytest.mark.parametrize(
    ("response", "ending"),
    [
        (pb.ExecuteResponse(status="STATUS_OK"), (0, None, None)),
        (pb.ExecuteResponse(status="STATUS_RUNTIME_ERROR", exit_code=3), (3, None, "RE")),
        (pb.ExecuteResponse(status="STATUS_RUNTIME_ERROR", exit_code=-1, signal=11), (None, "SIGSEGV", "SG")),
        (pb.ExecuteResponse(status="STATUS_RUNTIME_ERROR", exit_code=-1, signal=40), (None, "SIG40", "SG")),
        (pb.ExecuteResponse(status="STATUS_TIME_LIMIT", signal=9), (None, "SIGKILL", "TO")),
        (pb.ExecuteResponse(status="STATUS_MEMORY_LIMIT", signal=9), (None, "SIGKILL", "SG")),
        (pb.ExecuteResponse(status="STATUS_OUTPUT_LIMIT", stdout_truncated=True), (None, "SIGKILL", "OL")),
        (pb.ExecuteResponse(status="STATUS_OUTPUT_LIMIT", stderr_truncated=True), (None, "SIGKILL", "EL")),
        (pb.ExecuteResponse(status="STATUS_INFRA_ERROR", reason="the slot died"), (None, None, "XX")),
        (pb.ExecuteResponse(), (None, None, "XX")),
    ],
)
def test_a_piston_response_tells_how_it_ended(
    response: pb.ExecuteResponse, ending: tuple[int | None, str | None, str | None]
) -> None:
    run = piston.to_piston_response(response, PYTHON).run
    assert (run.code, run.signal, run.status) == ending
    assert (run.message is None) == (response.status == pb.STATUS_OK)


def test_a_piston_response_has_both_stages() -> None:
    response = pb.ExecuteResponse(
        status=pb.STATUS_OK,
        stdout=b"out",
        stderr=b"err",
        wall_ms=5,
        cpu_ms=4,
        peak_memory_bytes=1000,
        compile=pb.CompileResult(stderr=b"warning", wall_ms=7),
    )
    reported = piston.to_piston_response(response, CPP).model_dump(exclude_unset=True)
    nothing = {"signal": None, "message": None, "status": None, "code": 0}
    assert reported == {
        "language": "cpp",
        "version": "g++ 12.2.0",
        "run": {"stdout": "out", "stderr": "err", "output": "outerr", "cpu_time": 4, "wall_time": 5, "memory": 1000}
        | nothing,
        "compile": {
            "stdout": "",
            "stderr": "warning",
            "output": "warning",
            "cpu_time": None,
            "wall_time": 7,
            "memory": None,
        }
        | nothing,
    }
    assert "compile" not in piston.to_piston_response(pb.ExecuteResponse(), PYTHON).model_dump(exclude_unset=True)


def test_a_piston_response_to_what_does_not_compile_repeats_the_compiler() -> None:
    response = pb.ExecuteResponse(status="STATUS_COMPILE_ERROR", compile=pb.CompileResult(exit_code=1, stderr=b"no"))
    reported = piston.to_piston_response(response, CPP)
    assert reported.run == reported.compile
    assert (reported.run.code, reported.run.status, reported.run.stderr) == (1, "RE", "no")


def test_piston_lists_a_language_under_all_its_names() -> None:
    assert piston.to_piston_runtime(CPP).model_dump() == {
        "language": "cpp",
        "version": "g++ 12.2.0",
        "aliases": ["c++", "c++17", "g++"],
    }


@pytest.mark.parametrize(
    ("language", "code", "source"),
    [
        ("php", "echo 1;", "<?php\necho 1;"),
        ("php", "\n<?php echo 1;", "<?php echo 1;"),
        ("typescript", "1 === 2", "// @ts-nocheck\n1 === 2"),
        ("python", " x", " x"),
    ],
)
def test_sources_leave_out_what_they_may(language: str, code: str, source: str) -> None:
    body = sandbox_fusion.RunCodeRequest(code=code, language=language)
    request = sandbox_fusion.to_execute_request(body, pb.Runtime(language=language))
    assert request.source.decode() == source
    csharp = sandbox_fusion.RunCodeRequest(code="class P {}", language="csharp")
    assert sandbox_fusion.to_execute_request(csharp, pb.Runtime(language="csharp")).source.startswith(b"using System; ")


def test_files_outside_of_the_working_folder_are_left_out() -> None:
    wanted = ["a", "/etc/passwd", "../b", "c/../../d"]
    body = sandbox_fusion.RunCodeRequest(code="x", language="python", fetch_files=wanted)
    assert list(sandbox_fusion.to_execute_request(body, PYTHON).output_files) == ["a"]
