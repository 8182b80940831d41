"""E2B's SDK against the sandbox; the interface alone where the SDK is not installed."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.sandbox.config import SandboxConfig
from tests.fixtures.sandbox_fronts import Fronts
from tests.integration.test_sandbox_docs import blocks

KEY = "a-key"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guarded(fronts: Fronts) -> AsyncIterator[httpx.AsyncClient]:
    """HTTP client of the sandbox, which sends an API key."""
    async with httpx.AsyncClient(base_url=fronts.http.base_url, timeout=110, headers={"x-api-key": KEY}) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sandbox(guarded: httpx.AsyncClient) -> AsyncIterator[dict[str, str]]:
    """Headers that name a sandbox."""
    created = await guarded.post("/e2b/v2/sandboxes", json={"templateID": "base", "metadata": {"of": "test"}})
    assert created.status_code == 201
    yield {"e2b-sandbox-id": created.json()["sandboxID"]}
    await guarded.delete(f"/e2b/sandboxes/{created.json()['sandboxID']}")


async def execute(client: httpx.AsyncClient, sandbox: dict[str, str], code: str, **fields: Any) -> list[dict[str, Any]]:
    answered = await client.post("/e2b/execute", json={"code": code, **fields}, headers=sandbox)
    assert answered.status_code == 200
    return [json.loads(line) for line in answered.text.splitlines()]


async def test_cells_are_lines(guarded: httpx.AsyncClient, sandbox: dict[str, str]) -> None:
    lines = await execute(guarded, sandbox, "print('out')\n6 * 7")
    assert {"type": "number_of_executions", "execution_count": 1} in lines
    assert [line["text"] for line in lines if line["type"] == "stdout"] == ["out\n"]
    [result] = [line for line in lines if line["type"] == "result"]
    assert (result["text"], result["is_main_result"]) == ("42", True)
    [error] = [line for line in await execute(guarded, sandbox, "1 / 0") if line["type"] == "error"]
    assert (error["name"], error["value"]) == ("ZeroDivisionError", "division by zero")
    refused = await guarded.post("/e2b/execute", json={"code": "1", "language": "r"}, headers=sandbox)
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_argument")


async def test_files_and_folders(guarded: httpx.AsyncClient, sandbox: dict[str, str]) -> None:
    content = bytes(range(256)) + b"\r\n--"
    written = await guarded.post(
        "/e2b/files", params={"path": "/home/user/d/f"}, files={"file": ("d/f", content)}, headers=sandbox
    )
    assert written.json() == [{"name": "f", "type": "file", "path": "/home/user/d/f"}]
    assert (await guarded.get("/e2b/files", params={"path": "d/f"}, headers=sandbox)).content == content
    assert (await guarded.get("/e2b/files", params={"path": "no"}, headers=sandbox)).status_code == 404

    async def call(method: str, **fields: Any) -> httpx.Response:
        return await guarded.post(f"/e2b/filesystem.Filesystem/{method}", json=fields, headers=sandbox)

    [entry] = (await call("ListDir", path="/home/user/d", depth=1)).json()["entries"]
    assert (entry["name"], entry["path"], entry["size"]) == ("f", "/home/user/d/f", str(len(content)))
    assert (await call("MakeDir", path="d")).json()["code"] == "already_exists"
    assert (await call("Move", source="d/f", destination="e/g")).json()["entry"]["name"] == "g"
    assert (await call("Remove", path="e")).status_code == 200
    assert (await call("Stat", path="e/g")).json()["code"] == "not_found"
    assert (await call("WatchDir", path="e")).status_code == 501


async def test_commands_are_streams_of_envelopes(guarded: httpx.AsyncClient, sandbox: dict[str, str]) -> None:
    command = "echo $NAME; cat no; exit 3"
    body = json.dumps({"process": {"cmd": "/bin/bash", "args": ["-c", command], "envs": {"NAME": "n"}}}).encode()
    answered = await guarded.post(
        "/e2b/process.Process/Start",
        content=struct.pack(">BI", 0, len(body)) + body,
        headers={"content-type": "application/connect+json", **sandbox},
    )
    messages, rest = [], answered.content
    while rest:
        flags, size = struct.unpack(">BI", rest[:5])
        messages.append((flags, json.loads(rest[5 : 5 + size])))
        rest = rest[5 + size :]
    start, stdout, stderr, end, last = messages
    assert "start" in start[1]["event"]
    assert base64.b64decode(stdout[1]["event"]["data"]["stdout"]) == b"n\n"
    assert b"No such file" in base64.b64decode(stderr[1]["event"]["data"]["stderr"])
    assert end[1]["event"]["end"]["exitCode"] == 3
    assert last == (2, {})


async def test_a_sandbox_is_listed_for_its_key_and_ends(guarded: httpx.AsyncClient) -> None:
    created = (await guarded.post("/e2b/sandboxes", json={"timeout": 60, "metadata": {"a b": "ü&"}})).json()
    for metadata, found in (("a%2520b=%25C3%25BC%2526", [created["sandboxID"]]), ("a%2520b=u", []), ("c=", [])):
        listed = (await guarded.get("/e2b/v2/sandboxes", params={"metadata": metadata})).json()
        assert [each["sandboxID"] for each in listed] == found
    path, headers = f"/e2b/sandboxes/{created['sandboxID']}", {"e2b-sandbox-id": created["sandboxID"]}
    assert created["sandboxID"] in {each["sandboxID"] for each in (await guarded.get("/e2b/v2/sandboxes")).json()}
    assert (await guarded.get("/e2b/v2/sandboxes", headers={"x-api-key": "another"})).json() == []
    assert (await guarded.get("/e2b/health", headers=headers)).status_code == 204
    assert (await guarded.post(f"{path}/timeout", json={"timeout": 0})).status_code == 204
    assert (await guarded.get("/e2b/health", headers=headers)).status_code == 502
    assert (await guarded.delete(path)).status_code == 404


async def test_whoever_sends_a_token_otherwise_lists_its_own(guarded: httpx.AsyncClient) -> None:
    one, two = {"authorization": "Bearer one"}, {"authorization": "Bearer two"}
    created = (await guarded.post("/e2b/sandboxes", json={"timeout": 60}, headers=one)).json()
    assert created["envdAccessToken"] == "one"
    assert (await guarded.get("/e2b/sandboxes", headers=two)).json() == []
    listed = (await guarded.get("/e2b/sandboxes", headers=one)).json()
    assert [each["sandboxID"] for each in listed] == [created["sandboxID"]]
    await guarded.delete(f"/e2b/sandboxes/{created['sandboxID']}")


async def test_no_sandbox_outlives_a_session(guarded: httpx.AsyncClient, sandbox: dict[str, str]) -> None:
    path = f"/e2b/sandboxes/{sandbox['e2b-sandbox-id']}"
    described = (await guarded.get(path)).json()
    for ending in ("timeout", "connect"):
        assert (await guarded.post(f"{path}/{ending}", json={"timeout": 1e300})).status_code in (200, 204)
    changed = (await guarded.get(path)).json()
    begin, end = (datetime.fromisoformat(changed[name]) for name in ("startedAt", "endAt"))
    assert end <= begin + timedelta(seconds=SandboxConfig().session_seconds)
    assert end > datetime.fromisoformat(described["endAt"])


async def test_wrong_messages_are_refused_by_field(guarded: httpx.AsyncClient, sandbox: dict[str, str]) -> None:
    headers = {"content-type": "application/connect+json", **sandbox}
    for body, field in ((b"", "body"), (b"0000 {}", "process"), (b'     {"process": {"cmd": 1}}', "process.cmd")):
        refused = await guarded.post("/e2b/process.Process/Start", content=body, headers=headers)
        assert (refused.status_code, field in refused.json()["message"]) == (400, True), refused.text


async def test_a_file_that_cannot_be_written_is_an_error(guarded: httpx.AsyncClient, sandbox: dict[str, str]) -> None:
    for path, status in (("taken", 200), ("taken/below", 400)):
        files = {"file": (path, b"x")}
        assert (await guarded.post("/e2b/files", files=files, headers=sandbox)).status_code == status


async def test_bodies_of_other_types_need_the_header(guarded: httpx.AsyncClient) -> None:
    answered = await guarded.post("/e2b/files", files={"file": ("f", b"x")})
    assert answered.status_code == 502


class SeenError(Exception):
    """What a callback raises, which ends its call."""


def see(message: Any) -> None:
    """Sees what a cell prints."""
    assert str(message) == "first\n"
    raise SeenError


def use_sdk(sdk: Any, url: str) -> None:
    """Does with the SDK what its users do; `url` is that of the interface."""
    options = {"api_key": KEY, "api_url": url, "sandbox_url": url}
    with sdk.Sandbox.create(timeout=60, metadata={"m": "1"}, envs={"E": "env"}, **options) as sandbox:
        assert sandbox.is_running()
        assert sandbox.run_code("import os; x = 1; print(os.environ['E'])").logs.stdout == ["env\n"]
        assert sandbox.run_code("x += 1; x").text == "2"
        failed = sandbox.run_code("import sys; print('e', file=sys.stderr); 1 / 0")
        assert failed.logs.stderr[0].startswith("e\n")
        assert failed.error.name == "ZeroDivisionError"
        assert sandbox.run_code("os.environ['C']", envs={"C": "c"}).text == "c"
        with pytest.raises(SeenError):  # what is printed comes before the cell has ended
            sandbox.run_code("print('first', flush=True)\nimport time\ntime.sleep(90)", on_stdout=see, timeout=60)
        assert sandbox.run_code("6 * 7").text == "42"

        context = sandbox.create_code_context(cwd="/home/user")
        assert sandbox.run_code("'x' in globals()", context=context).text == "False"
        sandbox.restart_code_context(context)
        sandbox.remove_code_context(context)

        files = sandbox.files
        assert files.write("/home/user/d/text", "text").path == "/home/user/d/text"
        files.write_files([{"path": "a", "data": b"\x00\xff"}, {"path": "b", "data": "b"}])
        assert (files.read("d/text"), bytes(files.read("a", format="bytes"))) == ("text", b"\x00\xff")
        assert sandbox.run_code("open('/home/user/d/text').read()").text == "text"
        assert [entry.name for entry in files.list("/home/user/d")] == ["text"]
        assert files.make_dir("made")
        assert not files.make_dir("made")
        assert files.rename("a", "c").path == "/home/user/c"
        assert (files.exists("a"), files.exists("c"), files.get_info("c").size) == (False, True, 2)
        files.remove("c")
        with pytest.raises(sdk.NotFoundException):
            files.read("c")

        ran = sandbox.commands.run("echo out; echo err >&2; pwd", cwd="/home/user/d", envs={"A": "1"})
        assert (ran.stdout, ran.stderr, ran.exit_code) == ("out\n/box/d\n", "err\n", 0)
        with pytest.raises(sdk.CommandExitException) as ended:
            sandbox.commands.run("exit 7")
        assert ended.value.exit_code == 7
        with pytest.raises(sdk.TimeoutException):
            sandbox.commands.run("sleep 30", timeout=1)

        sandbox.set_timeout(120)
        same = sdk.Sandbox.connect(sandbox.sandbox_id, **options)
        assert same.run_code("x").text == "2"
        assert sandbox.sandbox_id in {each.sandbox_id for each in sdk.Sandbox.list(**options).next_items()}
        assert sandbox.get_info().metadata == {"m": "1"}
        assert sandbox.kill()
        assert not sandbox.is_running()


def show_plot(sdk: Any, url: str) -> None:
    """Draws with the SDK."""
    options = {"api_key": KEY, "api_url": url, "sandbox_url": url}
    with sdk.Sandbox.create(timeout=60, **options) as sandbox:
        run = sandbox.run_code("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()\n!echo shell\n'text'")
        assert base64.b64decode(run.results[0].png).startswith(b"\x89PNG")
        assert (run.text, run.logs.stdout) == ("text", ["shell\n"])
        assert sandbox.run_code("echo $((6 * 7))", language="bash").logs.stdout == ["42\n"]


def run_documented(sdk: Any, url: str) -> None:
    """Runs what the document shows."""
    [source] = [block for block in blocks("docs/http.md", "python") if "e2b_code_interpreter" in block]
    source = source.replace("http://127.0.0.1:8080/e2b", url).replace('"any"', f'"{KEY}"')
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "3\n2 numbers\n\n", ran.stderr


@pytest.mark.parametrize("use", [use_sdk, show_plot, run_documented])
async def test_the_sdk_of_e2b(guarded: httpx.AsyncClient, use: Callable[[Any, str], None]) -> None:
    sdk = pytest.importorskip("e2b_code_interpreter", reason="needs the distribution e2b-code-interpreter")
    if use is show_plot:  # the other uses need no kernel
        listed = (await guarded.get("/v1/runtimes")).json()
        if any(each["language"] == "jupyter" for each in listed["missing"]):
            pytest.skip("needs the runtime jupyter")
    sdk.CommandExitException = importlib.import_module("e2b").CommandExitException
    await asyncio.to_thread(use, sdk, f"{guarded.base_url}/e2b")
