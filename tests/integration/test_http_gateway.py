"""The sandbox over real HTTP: its own routes, SandboxFusion's and Piston's."""

import asyncio
import base64
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.kit.config import HttpConfig
from services.kit.server import serving
from services.sandbox.__main__ import lifespan
from services.sandbox.config import SandboxConfig
from tests.fixtures.sandbox import skip_unless_possible

ROOT = Path(__file__).parents[2]
SLEEPER = {"language": "python", "source": "import time\ntime.sleep(60)", "limits": {"wall_ms": 120_000}}
HELLO = {"language": "python", "source": "print('hello')"}


@asynccontextmanager
async def running_gateway(state_path: Path, **fields: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a sandbox of its own."""
    skip_unless_possible("zygote")
    config = SandboxConfig(isolation="zygote", state_path=str(state_path), http=HttpConfig(port=0), **fields)
    async with (
        serving(config, lifespan) as app,
        httpx.AsyncClient(base_url=f"http://{app.http_address}", timeout=60) as client,
    ):
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with running_gateway(tmp_path_factory.mktemp("gateway"), slots=1) as client:
        yield client


async def test_a_program_runs(gateway: httpx.AsyncClient) -> None:
    source = "import sys\nprint(input(), *sys.argv[1:])\nsys.stdout.flush()\nsys.stdout.buffer.write(b'\\xff')"
    body = {"language": "python", "source": source, "stdin": "héllo", "args": ["a", "b"]}
    response = await gateway.post("/v1/execute", json=body)
    assert response.status_code == 200
    answer = response.json()
    assert answer["status"] == "ok"
    assert base64.b64decode(answer["stdout_base64"]) == "héllo a b\n".encode() + b"\xff"
    assert answer["stderr"] == ""
    assert answer["peak_memory_bytes"] > 0


async def test_a_submission_is_judged(gateway: httpx.AsyncClient) -> None:
    tests = [{"stdio": {"stdin": "2", "expected_stdout": "4"}}, {"stdio": {"stdin": "3", "expected_stdout": "6"}}]
    body = {"language": "python", "source": "n = int(input())\nprint(n * n)", "tests": tests}
    answer = (await gateway.post("/v1/judge", json=body)).json()
    assert answer["verdict"] == "wrong_answer"
    assert [result["verdict"] for result in answer["results"]] == ["accepted", "wrong_answer"]
    assert answer["passed"] == 1


async def test_runtimes_are_listed(gateway: httpx.AsyncClient) -> None:
    [python] = [each for each in (await gateway.get("/v1/runtimes")).json()["runtimes"] if each["language"] == "python"]
    assert python["isolation"].startswith("zygote")
    assert python["maximum_limits"]["wall_ms"] == 120_000


async def test_wrong_requests_name_their_fields(gateway: httpx.AsyncClient) -> None:
    unread = await gateway.post("/v1/judge", json={"langage": "python", "tests": [{"stdio": {"stdin": 1}}]})
    assert unread.status_code == 400
    assert [each["field"] for each in unread.json()["error"]["field_violations"]] == ["langage", "tests[0].stdio.stdin"]
    refused = await gateway.post("/v1/execute", json={"language": "python", "limits": {"wall_ms": 10**9}})
    assert refused.status_code == 400
    assert {each["field"] for each in refused.json()["error"]["field_violations"]} == {"limits.wall_ms"}


async def test_a_deadline_ends_the_program_and_frees_the_slot(gateway: httpx.AsyncClient) -> None:
    late = await gateway.post("/v1/execute", json=SLEEPER, headers={"X-Timeout-Seconds": "0.5"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
    assert (await gateway.post("/v1/execute", json=HELLO)).json()["stdout"] == "hello\n"


async def until_busy(client: httpx.AsyncClient) -> None:
    """Returns when a program runs."""
    while "\nperigee_sandbox_busy_slots 1.0" not in (await client.get("/metrics")).text:
        pass


async def test_a_caller_that_goes_away_frees_the_slot(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, slots=1, queue_limit=0) as client:
        leaving = asyncio.create_task(client.post("/v1/execute", json=SLEEPER))
        await until_busy(client)
        full = await client.post("/v1/execute", json=HELLO)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "RESOURCE_EXHAUSTED")
        assert int(full.headers["retry-after"]) >= 1
        leaving.cancel()
        while (free := await client.post("/v1/execute", json=HELLO)).status_code == 429:
            pass
        assert free.json()["stdout"] == "hello\n"


async def test_the_service_is_ready_and_documented(gateway: httpx.AsyncClient) -> None:
    assert (await gateway.get("/healthz")).json() == {"status": "ok"}
    assert (await gateway.get("/readyz")).json() == {"ready": {"perigee.sandbox.v1.SandboxService": True}}
    paths = (await gateway.get("/openapi.json")).json()["paths"]
    assert {"/v1/execute", "/v1/sessions/{session_id}/cells", "/run_code", "/api/v2/execute", "/readyz"} <= paths.keys()
    assert "perigee_sandbox_http_request_seconds" in (await gateway.get("/metrics")).text


async def run_fusion(gateway: httpx.AsyncClient, code: str, **fields: Any) -> dict[str, Any]:
    response = await gateway.post("/run_code", json={"code": code, "language": "python"} | fields)
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


async def test_sandbox_fusion_s_clients_are_answered(gateway: httpx.AsyncClient) -> None:
    ran = await run_fusion(gateway, "print(input())", stdin="1", compile_timeout=10, run_timeout=10)
    assert (ran["status"], ran["message"], ran["compile_result"], ran["files"]) == ("Success", "", None, {})
    result = ran["run_result"]
    assert (result["status"], result["return_code"], result["stdout"]) == ("Finished", 0, "1\n")
    assert result["execution_time"] > 0
    failed = await run_fusion(gateway, "import sys\nsys.exit(3)")
    assert (failed["status"], failed["run_result"]["return_code"]) == ("Failed", 3)
    late = await run_fusion(gateway, "while True: pass", run_timeout=0.5)
    assert (late["status"], late["run_result"]["status"]) == ("Failed", "TimeLimitExceeded")


async def test_sandbox_fusion_s_clients_are_refused_in_their_form(gateway: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    unread = await gateway.post("/run_code", content=b'{"code": "\\ud800", "run_timeout": -1}', headers=headers)
    assert unread.status_code == 422
    assert [each["loc"] for each in unread.json()["detail"]] == [
        ["body", "code"],
        ["body", "language"],
        ["body", "run_timeout"],
    ]
    unknown = await gateway.post("/run_code", json={"code": "x", "language": "cobol", "run_timeout": 1e6})
    assert unknown.status_code == 422
    assert [each["loc"] for each in unknown.json()["detail"]] == [["body", "language"], ["body", "run_timeout"]]
    broken = await gateway.post("/run_code", content=b"{", headers=headers)
    assert broken.status_code == 422


async def run_piston(gateway: httpx.AsyncClient, content: str, **fields: Any) -> dict[str, Any]:
    body = {"language": "py", "version": "3.x", "files": [{"name": "my.py", "content": content}]}
    response = await gateway.post("/api/v2/execute", json=body | fields)
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


async def test_piston_s_clients_are_answered(gateway: httpx.AsyncClient) -> None:
    [python] = [each for each in (await gateway.get("/api/v2/runtimes")).json() if each["language"] == "python"]
    assert "py" in python["aliases"]
    source = "import sys\nprint(input(), *sys.argv[1:])"
    ran = await run_piston(gateway, source, stdin="in", args=["1", "2"], version=python["version"])
    assert (ran["language"], ran["version"]) == ("python", python["version"])
    assert ran["run"] | {"cpu_time": 0, "wall_time": 0, "memory": 0} == {
        "stdout": "in 1 2\n",
        "stderr": "",
        "output": "in 1 2\n",
        "code": 0,
        "signal": None,
        "message": None,
        "status": None,
        "cpu_time": 0,
        "wall_time": 0,
        "memory": 0,
    }
    assert "compile" not in ran
    killed = (await run_piston(gateway, "import os\nos.kill(os.getpid(), 11)"))["run"]
    assert (killed["code"], killed["signal"], killed["status"]) == (None, "SIGSEGV", "SG")
    late = (await run_piston(gateway, "import time\ntime.sleep(60)", run_timeout=300))["run"]
    assert (late["signal"], late["status"]) == ("SIGKILL", "TO")


async def test_piston_s_clients_are_refused_in_their_form(gateway: httpx.AsyncClient) -> None:
    files = [{"content": "print(1)"}]
    for body, message in (
        ({"language": "py", "files": files}, "version: Field required"),
        ({"language": "py", "version": "2.x", "files": files}, "py-2.x runtime is unknown"),
        ({"language": "py", "version": "*", "files": []}, "files: must include at least one utf8 encoded file"),
        (
            {"language": "py", "version": "*", "files": files, "run_timeout": 10**6},
            "run_timeout: is 1000000, at most 120000 is allowed; run_cpu_time: is 1000000, at most 120000 is allowed",
        ),
    ):
        response = await gateway.post("/api/v2/execute", json=body)
        assert (response.status_code, response.json()) == (400, {"message": message})


async def test_other_interfaces_keep_the_rules(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, slots=1, server={"token": "right"}) as client:
        for path, key in (("/run_code", "detail"), ("/api/v2/execute", "message")):
            refused = await client.post(path, json={})
            assert refused.status_code == 401
            assert refused.json().keys() == {key}


async def test_a_process_drains_http_on_sigterm(tmp_path: Path) -> None:
    skip_unless_possible("zygote")
    process, address = await asyncio.to_thread(start_service, tmp_path)
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as client:
            source = "import time\nprint('begun', flush=True)\ntime.sleep(0.5)\nprint('done')"
            body = {"execute": {"language": "python", "source": source}}
            async with client.stream("POST", "/v1/execute/stream", json=body) as response:
                lines = response.aiter_lines()
                assert json.loads(await anext(lines)) == {"stdout": "begun\n"}
                process.send_signal(signal.SIGTERM)
                said, finished = [json.loads(line) async for line in lines]
            assert (said["stdout"], finished["finished"]["status"]) == ("done\n", "ok")
        assert await asyncio.to_thread(process.wait, 60) == 0
    finally:
        process.kill()
        process.wait()


def start_service(state_path: Path) -> tuple[subprocess.Popen[str], str]:
    """A sandbox in a process of its own, and where it answers HTTP."""
    settings = {"isolation": "zygote", "state_path": state_path, "slots": 1, "http.port": 0}
    overrides = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "services.sandbox", *overrides]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    address = ""
    for line in process.stderr:
        if '"http listening"' in line:
            address = json.loads(line)["address"]
        if '"listening"' in line:
            return process, address
    raise AssertionError("the service did not start")
