"""What the documents of the sandbox show is run as it stands there, but for the ports and the folder of images."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible, skip_without_kernel
from tests.fixtures.sandbox_fronts import Fronts

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/sandbox.md", "docs/http.md")
JSON_CURL = (7, 82)


def blocks(document: str, language: str = "") -> list[str]:
    """The code blocks of a document in a language."""
    text = (ROOT / document).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for named, block in found if named == language]


def curls() -> list[str]:
    """Every call by curl, in blocks and within lines."""
    inline = re.findall(r"`(curl [^`]+)`", (ROOT / "README.md").read_text())
    return inline + [block for document in DOCUMENTS for block in blocks(document) if block.startswith("curl")]


def expected(command: str) -> dict[str, object] | list[dict[str, object]]:
    """A part of the answer, or of a stream's lines, by what the call is about."""
    answers: dict[str, dict[str, object] | list[dict[str, object]]] = {
        "/v1/execute/stream": [{"stdout": "one\n"}, {"stdout": "two\n"}, {"finished": {"status": "ok", "stdout": ""}}],
        "/v1/execute/batch": [
            {"index": 0, "response": {"stdout": "one\n"}},
            {"index": 1, "error": {"code": 3, "field_violations": {"language": "..."}}},
        ],
        "langage": json.loads(blocks("docs/http.md", "json")[0]),
        "X-Timeout-Seconds": {"error": {"code": "DEADLINE_EXCEEDED"}},
        "/run_code": {"status": "Success", "run_result": {"stdout": "2\n"}},
        "/run_jupyter": {
            "status": "Success",
            "cells": [{}, {"display": [{"text/plain": "42"}]}, {"stdout": "shell\n"}],
        },
        "/api/v2/execute": {"language": "python", "run": {"stdout": "2\n", "code": 0}},
        "/v1/judge": {"verdict": "accepted", "passed": 2},
        "/v1/patches/judge": {"verdict": "accepted", "fail_to_pass_passed": 1},
        "/v1/assess": {"verdict": "accepted", "score": 1},
        "/v1/runtimes": {"runtimes": [{"language": "..."}]},
        "std::cout": {"status": "ok", "stdout": "42"},
        "print(6 * 7)": {"status": "ok", "stdout": "42\n"},
        "print(input())": {"status": "ok", "stdout": "hello\n"},
    }
    for part, answer in answers.items():
        if part in command:
            return answer
    raise AssertionError(f"it is not known what this should answer: {command}")


def is_part(part: object, whole: object) -> bool:
    """Whether `whole` has all that `part` has; `...` stands for any text."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(is_part(value, whole.get(name)) for name, value in part.items())
    if isinstance(part, list):
        return isinstance(whole, list) and all(map(is_part, part, whole))
    return part in (whole, "...")


def skip_without_curl() -> None:
    """Skips the test where curl cannot send JSON by itself."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    reported = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout
    if tuple(map(int, reported.split()[1].split(".")[:2])) < JSON_CURL:
        pytest.skip("needs curl 7.82")


@pytest.mark.parametrize("command", curls(), ids=lambda command: re.findall(r"\d(/\S+)$", command.strip())[0])
async def test_calls_by_curl(fronts: Fronts, command: str) -> None:
    skip_without_curl()
    if "/run_jupyter" in command:
        await skip_without_kernel(fronts.grpc)
    base = str(fronts.http.base_url).rstrip("/")
    answer = expected(command)
    reported = await run_lines(command, base)
    if isinstance(answer, list):
        lines = sorted(map(json.loads, reported.splitlines()), key=lambda line: line.get("index", 0))
        assert is_part(answer, lines), reported
    else:
        assert is_part(answer, json.loads(reported)), reported


async def run_lines(lines: str, base: str) -> str:
    """What lines of a shell print when they call the sandbox at another address."""
    lines, calls = re.subn(r"http://127\.0\.0\.1:(8056|8080)", base, lines)
    assert calls
    process = await asyncio.create_subprocess_exec("bash", "-c", lines, stdout=subprocess.PIPE)
    reported = (await asyncio.wait_for(process.communicate(), 60))[0].decode()
    assert process.returncode == 0
    return reported


async def test_a_session_by_curl(fronts: Fronts) -> None:
    skip_without_curl()
    [lines] = [block for block in blocks("docs/http.md") if "/v1/sessions" in block]
    reported = await run_lines(lines, str(fronts.http.base_url).rstrip("/"))
    first, second, closed = re.findall(r"\{.*?\}", reported)
    assert json.loads(first)["status"] == "ok"
    assert json.loads(second)["result"] == "42"
    assert json.loads(closed) == {}


PRINTED = {
    "print(6 * 7)": "42\n\n",
    "int(input()) * 7": "42\n \\d+ \\d+\n",
    "packed.getvalue()": "\\d+\n\n",
    "pb.JudgeRequest": "TEST_VERDICT_ACCEPTED 4.0 4.0\n",
    "sandbox.session()": "area\n 12.566370614359172\n",
    'sandbox.session("jupyter")': r"drawn\n\n(\{'text/plain': \d+\}\n)?\{'text/plain': \d+, 'image/png': \d+\}\n",
}


@pytest.mark.parametrize("part", PRINTED)
async def test_calls_by_the_client(fronts: Fronts, part: str) -> None:
    if "jupyter" in part:
        await skip_without_kernel(fronts.grpc)
    [source] = {block for document in DOCUMENTS for block in blocks(document, "python") if part in block}
    command = (sys.executable, "-c", source.replace("127.0.0.1:50056", fronts.grpc.target))
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=ROOT)
    printed = (await asyncio.wait_for(process.communicate(), 60))[0].decode()
    assert process.returncode == 0
    assert re.fullmatch(PRINTED[part], printed), printed


def write_runtime(folder: Path) -> Path:
    """The runtime that the document describes, with its image; skips the test where busybox needs libraries."""
    busybox = Path("/bin/busybox")
    if not busybox.exists() or subprocess.run(["ldd", busybox], capture_output=True).returncode == 0:
        pytest.skip("needs a static busybox: apt-get install busybox-static")
    [description] = blocks("docs/sandbox.md", "yaml")
    [commands] = [block for block in blocks("docs/sandbox.md") if "busybox" in block]
    make_image = commands.splitlines()[0].replace("/srv/images", str(folder))
    subprocess.run(["bash", "-c", make_image], check=True, timeout=60)
    runtimes = folder / "runtimes"
    runtimes.mkdir()
    (runtimes / "shell.yaml").write_text(description.replace("/srv/images", str(folder)))
    return runtimes


async def test_a_runtime_of_one_s_own(tmp_path: Path) -> None:
    skip_unless_possible("crun")
    runtimes = write_runtime(tmp_path)
    async with running_sandbox(tmp_path / "state", runtimes_path=str(runtimes), slots=1) as client:
        request = pb.ExecuteRequest(language="shell-only", source=b"ls / | tr '\\n' ' '")
        response = await client.execute(request)
        assert response.status == pb.STATUS_OK, response
        seen = response.stdout.decode().split()
        assert {"bin", "box"} <= set(seen)
        assert "usr" not in seen
