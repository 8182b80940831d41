"""Patches are judged by a repository's tests, whatever they do to these; assessments go stage by stage."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from perigee.errors import InvalidArgumentError
from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from services.sandbox.runtime.jobs import make_tar
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

RUNTIME = "name: tests\ntitle: Python with pytest\nsource: main.py\npython: true\npackages: [pytest]\npreload: [json]\n"
WRONG, ACCEPTED = pb.TEST_VERDICT_WRONG_ANSWER, pb.TEST_VERDICT_ACCEPTED
PYTEST = pb.TestRun(framework=pb.TEST_FRAMEWORK_PYTEST)
REPOSITORY = {
    "sums.py": "def add(a, b):\n    return a - b\n\n\ndef same(a):\n    return a\n",
    "tests/test_sums.py": "from sums import add, same\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\n"
    "def test_same():\n    assert same(4) == 4\n",
}
FAIL, PASS = "tests/test_sums.py::test_add", "tests/test_sums.py::test_same"
MENDED = {"sums.py": REPOSITORY["sums.py"].replace("a - b", "a + b")}
UNCHECKED = "import _pytest.python\n_pytest.python.Function.runtest = lambda self: None\n" + REPOSITORY["sums.py"]
FORGED = "import pytest\n\n\n@pytest.hookimpl(tryfirst=True)\ndef pytest_pyfunc_call(pyfuncitem):\n    return True\n"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SandboxClient]:
    """A sandbox with a runtime that has pytest."""
    skip_unless_possible("crun")
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path_factory.mktemp("repositories")
    (folder / "runtimes").mkdir()
    (folder / "runtimes/tests.yaml").write_text(RUNTIME)
    async with running_sandbox(folder / "state", slots=1, runtimes_path=str(folder / "runtimes")) as sandbox:
        yield sandbox


def make_patch(changes: dict[str, str]) -> bytes:
    """A patch that replaces or adds whole files."""
    parts = []
    for path, text in changes.items():
        old, new = REPOSITORY.get(path, "").splitlines(), text.splitlines()
        head = [f"diff --git a/{path} b/{path}"] + ([] if old else ["new file mode 100644"])
        head += [f"--- a/{path}" if old else "--- /dev/null", f"+++ b/{path}"]
        parts += [*head, f"@@ -{min(1, len(old))},{len(old)} +1,{len(new)} @@"]
        parts += [*(f"-{line}" for line in old), *(f"+{line}" for line in new)]
    return "".join(f"{part}\n" for part in parts).encode()


def patch_request(changes: dict[str, str], **fields: object) -> pb.JudgePatchRequest:
    files = {**REPOSITORY, **fields.pop("repository", {})}  # type: ignore[dict-item]
    archive = make_tar(pb.File(path=path, content=text.encode()) for path, text in files.items())
    defaults = {"language": "tests", "tests": PYTEST, "fail_to_pass": [FAIL], "pass_to_pass": [PASS]}
    return pb.JudgePatchRequest(
        archives=[pb.Archive(content=archive)],
        patch=make_patch(changes),
        **{**defaults, **fields},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("changes", "verdict", "reason"),
    [
        (MENDED, ACCEPTED, ""),
        ({"sums.py": MENDED["sums.py"].replace("return a\n", "return 0\n")}, WRONG, PASS),
        ({"tests/test_sums.py": "def test_add(): pass\ndef test_same(): pass"}, WRONG, FAIL),
        (
            {"conftest.py": FORGED, "pytest.py": "def main(): pass", "pytest.ini": "[pytest]\naddopts=-k same"},
            WRONG,
            FAIL,
        ),
        ({"sums.py": "import os\nos._exit(0)"}, WRONG, "left no report"),
        ({"sums.py": UNCHECKED}, WRONG, "a test that fails in every repository"),
        ({"sums.py": "while True: pass"}, pb.TEST_VERDICT_TIME_LIMIT, "limit of"),
    ],
)
async def test_a_patch_is_judged_by_the_tests_of_the_repository(
    client: SandboxClient, changes: dict[str, str], verdict: pb.TestVerdict.ValueType, reason: str
) -> None:
    cpu_ms = 200 if verdict == pb.TEST_VERDICT_TIME_LIMIT else None
    response = await client.judge_patch(patch_request(changes, limits=pb.Limits(cpu_ms=cpu_ms)))
    assert response.verdict == verdict, response
    assert reason in response.reason


async def test_a_patch_that_does_not_apply_is_wrong_and_broken_tests_judge_nothing(client: SandboxClient) -> None:
    request = patch_request(MENDED)
    request.patch = request.patch.replace(b"a - b", b"a * b")
    response = await client.judge_patch(request)
    assert response.verdict == WRONG
    assert "the patch does not apply: error: patch failed: sums.py:1" in response.reason
    broken = {"tests/test_sums.py": REPOSITORY["tests/test_sums.py"].replace("same(4) == 4", "same(4) == 5")}
    response = await client.judge_patch(patch_request(MENDED, repository=broken))
    assert response.verdict == pb.TEST_VERDICT_UNJUDGEABLE
    assert PASS in response.reason
    response = await client.judge_patch(patch_request(MENDED, test_patch=b"--- a/x\n+++ b/x\n@@ -1 +1 @@\n-1\n+2\n"))
    assert response.verdict == pb.TEST_VERDICT_UNJUDGEABLE
    assert "test_patch does not apply" in response.reason


async def test_tests_that_come_with_the_task_are_not_changed_by_setup_or_patch(client: SandboxClient) -> None:
    test = "from sums import add\n\n\ndef test_more():\n    assert add(1, 1) == 2\n"
    fields = {"fail_to_pass": ["tests/test_more.py::test_more"], "test_patch": make_patch({"tests/test_more.py": test})}
    setup = ["sh", "-c", "echo 'def test_more(): pass' > tests/test_more.py; echo > built"]
    response = await client.judge_patch(patch_request({"note.txt": "text\n"}, setup=setup, **fields))
    assert (response.verdict, response.pass_to_pass_passed) == (WRONG, 1), response
    response = await client.judge_patch(patch_request(MENDED, setup=setup, **fields))
    assert (response.verdict, response.fail_to_pass_passed) == (ACCEPTED, 1), response
    assert {test.id: pb.TestOutcome.Name(test.outcome) for test in response.tests} == {
        "tests/test_more.py::test_more": "TEST_OUTCOME_PASSED",
        PASS: "TEST_OUTCOME_PASSED",
        FAIL: "TEST_OUTCOME_PASSED",
    }


async def test_what_setup_leaves_is_none_of_the_request_s(client: SandboxClient) -> None:
    deep = "import os\nfor _ in range(6):\n    os.mkdir('a' * 200)\n    os.chdir('a' * 200)\nopen('x', 'w')\n"
    setup = ["sh", "-c", "test ! -e deep.py || python3 deep.py"]
    response = await client.judge_patch(patch_request({"deep.py": deep}, setup=setup))
    assert response.verdict == pb.TEST_VERDICT_COMPILE_ERROR, response
    assert "too long a path" in response.reason


async def test_stages_have_scores_and_hidden_files_of_their_own(client: SandboxClient) -> None:
    hidden = pb.File(path="test_hidden.py", content=b"import os\ndef test_one(): pass\ndef test_two(): assert 0")
    look = ["sh", "-c", "test -e built && ! test -e test_hidden.py"]
    stages = [
        pb.Stage(name="build", command=["sh", "-c", "echo 1 > built"], keep=True, weight=0),
        pb.Stage(name="before", command=look, needs=["build"]),
        pb.Stage(name="hidden", tests=PYTEST, files=[hidden], needs=["build"], weight=2),
        pb.Stage(name="after", command=look),
        pb.Stage(name="never", command=["true"], needs=["hidden"]),
    ]
    request = pb.AssessRequest(language="tests", files=[pb.File(path="a.py", content=b"")], stages=stages)
    response = await client.assess(request)
    scores = {stage.name: stage.score for stage in response.stages}
    assert scores == {"build": 1, "before": 1, "hidden": 0.5, "after": 1, "never": 0}, response
    assert (response.verdict, response.score) == (WRONG, 3 / 5)
    assert response.stages[4].verdict == pb.TEST_VERDICT_SKIPPED
    stages[1].needs.append("later")
    stages[0].files.append(hidden)
    request = pb.AssessRequest(language="tests", stages=stages)
    with pytest.raises(InvalidArgumentError, match=r"stages\[0\].keep: is for.*stages\[1\].needs: names 'later'"):
        await client.assess(request)


async def test_the_tests_of_one_file_are_a_language(client: SandboxClient) -> None:
    source = b"from more import answer\ndef test_one(): assert answer == 42\ndef test_two(): assert answer == 43"
    files = [pb.File(path="more.py", content=b"answer = 42")]
    response = await client.execute(pb.ExecuteRequest(language="pytest", source=source, files=files))
    assert (response.status, response.exit_code) == (pb.STATUS_RUNTIME_ERROR, 1), response
    assert b"1 failed, 1 passed" in response.stdout


async def test_a_session_edits_patches_and_tests(client: SandboxClient) -> None:
    files = [pb.File(path=path, content=text.encode()) for path, text in REPOSITORY.items()]
    patch = pb.File(path="mend.patch", content=make_patch(MENDED))
    async with client.session("tests") as session:
        cell = pb.RunCellRequest(session_id=session.id, files=files, tests=PYTEST)
        before = await client.run_cell(cell)
        apply = "__import__('subprocess').run(['git', 'apply', 'mend.patch']).returncode"
        applied = pb.RunCellRequest(session_id=session.id, files=[patch], code=apply.encode())
        assert (await client.run_cell(applied)).result == "0"
        after = await client.run_cell(pb.RunCellRequest(session_id=session.id, tests=PYTEST))
    outcomes = [{test.id: pb.TestOutcome.Name(test.outcome)[13:] for test in cell.tests} for cell in (before, after)]
    assert outcomes == [{FAIL: "FAILED", PASS: "PASSED"}, {FAIL: "PASSED", PASS: "PASSED"}], (before, after)
    assert "assert -1 == 5" in before.tests[0].message
    assert not after.files
