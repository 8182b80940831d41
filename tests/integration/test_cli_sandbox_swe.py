"""`perigee sandbox swe` against a real sandbox."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from perigee.cli.sandbox.swe import judge_patch, make_request
from perigee.rpc import ChannelOptions
from tests.fixtures.command_line import run_perigee

TASK = {
    "repository": "sums",
    "FAIL_TO_PASS": json.dumps(["test_sums.py::test_add"]),
    "PASS_TO_PASS": [],
    "patch": "--- a/sums.py\n+++ b/sums.py\n@@ -1,2 +1,2 @@\n def add(a, b):\n-    return a - b\n+    return a + b\n",
}


async def test_a_task_in_the_form_of_swe_bench(
    sandbox_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums/sums.py").write_text("def add(a, b):\n    return a - b\n")
    (tmp_path / "sums/test_sums.py").write_text("from sums import add\ndef test_add(): assert add(2, 3) == 5\n")
    (tmp_path / "task.json").write_text(json.dumps(TASK))
    (tmp_path / "nothing.patch").write_text("")
    right = await run_perigee("swe", "task.json", "--address", sandbox_address, folder=tmp_path)
    assert (right.code, right.stdout.decode().splitlines()[-1]) == (0, "accepted"), right.stderr
    (tmp_path / "sums/report.xml").write_text("<t><testcase name='a'><failure/></testcase></t>")
    tests = {"framework": "junit", "command": ["cat", "report.xml"]}
    (tmp_path / "other.json").write_text(json.dumps({"repository": "sums", "tests": tests, "fail_to_pass": ["a"]}))
    request = make_request(tmp_path / "other.json", tmp_path / "nothing.patch")
    assert await judge_patch(sandbox_address, ChannelOptions(), request, as_json=True) == 1
    response = json.loads(capsys.readouterr().out)
    assert (response["verdict"], response["tests"][0]["outcome"]) == (
        "TEST_VERDICT_WRONG_ANSWER",
        "TEST_OUTCOME_FAILED",
    )
