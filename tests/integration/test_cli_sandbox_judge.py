"""`perigee sandbox judge` and `runtimes` against a real sandbox."""

import json
from pathlib import Path

import pytest

from services.sandbox.config import SandboxServerConfig
from tests.fixtures.command_line import run_perigee
from tests.fixtures.sandbox import running_sandbox, skip_unless_possible

SOLUTIONS = {
    "good.py": "print(2 * int(input()))",
    "wrong_sign.py": "n = int(input())\nprint(2 * abs(n))",
    "slow_three.py": "n = int(input())\nwhile n == 3: pass\nprint(2 * n)",
    "crash_three.py": "n = int(input())\nassert n != 3\nprint(2 * n)",
}


@pytest.fixture
def problem(tmp_path: Path) -> Path:
    (tmp_path / "problem.yaml").write_text("limits: {wall_ms: 1500, cpu_ms: 500}\n")
    for folder in ("tests", "solutions"):
        (tmp_path / folder).mkdir()
    for number in (1, 3, -2):
        (tmp_path / "tests" / f"of{number}.in").write_text(f"{number}\n")
        (tmp_path / "tests" / f"of{number}.out").write_text(f"{2 * number}\n")
    for name, source in SOLUTIONS.items():
        (tmp_path / "solutions" / name).write_text(source)
    return tmp_path


async def test_solutions_get_what_their_names_say(sandbox_address: str, problem: Path) -> None:
    ended = await run_perigee("judge", str(problem), "--address", sandbox_address)
    assert ended.code == 0, ended.stderr
    lines = ended.stdout.decode().splitlines()[-4:]
    assert [line.partition(",")[0] for line in lines] == [
        "solutions/crash_three.py: RUNTIME_ERROR",
        "solutions/good.py: ACCEPTED",
        "solutions/slow_three.py: TIME_LIMIT",
        "solutions/wrong_sign.py: WRONG_ANSWER",
    ]
    assert ["(as its name says)" in line for line in lines] == [True, False, True, True]


async def test_json_holds_every_test(sandbox_address: str, problem: Path) -> None:
    chosen = ["--solution", "solutions/crash_three.py", "--solution", "solutions/good.py"]
    ended = await run_perigee("judge", str(problem), *chosen, "--json", PERIGEE_SANDBOX_ADDRESS=sandbox_address)
    assert ended.code == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert report["as_expected"] is True
    crash, good = report["solutions"]
    assert (crash["verdict"], crash["expected"], crash["passed"]) == ("RUNTIME_ERROR", "RUNTIME_ERROR", 2)
    assert {test["name"]: test["verdict"] for test in crash["tests"]} == {
        "of-2": "ACCEPTED",
        "of1": "ACCEPTED",
        "of3": "RUNTIME_ERROR",
    }
    assert [test["output"] for test in good["tests"]] == ["2\n", "6\n", "-4\n"]


async def test_a_solution_that_breaks_its_promise_is_reported(sandbox_address: str, problem: Path) -> None:
    (problem / "solutions" / "wrong_not.py").write_text(SOLUTIONS["good.py"])
    (problem / "solutions" / "good.py").write_text(SOLUTIONS["wrong_sign.py"])
    ended = await run_perigee("judge", str(problem), "--address", sandbox_address)
    assert ended.code == 1
    lines = {line.partition(":")[0]: line for line in ended.stdout.decode().splitlines()[-5:]}
    assert "WRONG_ANSWER, 2 of 3 tests" in lines["solutions/good.py"]
    assert "ACCEPTED, 3 of 3 tests" in lines["solutions/wrong_not.py"]
    assert lines["solutions/wrong_not.py"].endswith("(its name says WRONG_ANSWER)")


async def test_a_mistake_in_the_problem_is_reported_before_anything_runs(sandbox_address: str, problem: Path) -> None:
    (problem / "problem.yaml").write_text("limit: {}")
    ended = await run_perigee("judge", str(problem), "--address", sandbox_address)
    assert (ended.code, ended.stdout) == (2, b"")
    assert ended.messages == [f"perigee: {problem}/problem.yaml: limit: unknown key; did you mean limits?"]


async def test_a_runtime_that_is_not_there_is_named(sandbox_address: str, problem: Path) -> None:
    (problem / "problem.yaml").write_text("language: cobol-85")
    ended = await run_perigee("judge", str(problem), "--address", sandbox_address)
    assert ended.code == 2
    assert "solutions/crash_three.py: this sandbox has no runtime cobol-85; it has " in ended.stderr
    assert " bash, c, " in ended.stderr


async def test_limits_that_the_sandbox_refuses_are_named(sandbox_address: str, problem: Path) -> None:
    (problem / "problem.yaml").write_text("limits: {wall_ms: 3600000}")
    ended = await run_perigee("judge", str(problem), "--address", sandbox_address)
    assert ended.code == 2
    assert "limits.wall_ms" in ended.stderr


@pytest.mark.parametrize(("command", "code"), [("judge", 3), ("runtimes", 3), ("make-tests", 3), ("run", 125)])
async def test_nobody_listening_is_reported_with_what_to_do(problem: Path, command: str, code: int) -> None:
    argument = {"run": [str(problem / "solutions" / "good.py")], "runtimes": []}.get(command, [str(problem)])
    ended = await run_perigee(command, *argument, "--address", "127.0.0.1:1")
    assert (ended.code, ended.stdout) == (code, b"")
    (line,) = ended.messages
    assert "127.0.0.1:1 cannot be reached" in line
    assert line.endswith("; start one: perigee sandbox serve")


async def test_runtimes_are_listed(sandbox_address: str) -> None:
    table = await run_perigee("runtimes", "--address", sandbox_address)
    assert table.code == 0, table.stderr
    assert "python" in table.stdout.decode()
    document = await run_perigee("runtimes", "--json", "--address", sandbox_address)
    runtimes = {runtime["language"]: runtime for runtime in json.loads(document.stdout)["runtimes"]}
    assert runtimes["python"]["default_limits"]["wall_ms"] == 10_000


async def test_the_token_is_taken_from_the_environment(tmp_path: Path) -> None:
    skip_unless_possible("zygote")
    async with running_sandbox(tmp_path, isolation="zygote", server=SandboxServerConfig(token="secret")) as client:  # type: ignore[arg-type]
        refused = await run_perigee("runtimes", "--address", client.target, PERIGEE_TOKEN="other")
        served = await run_perigee("runtimes", "--address", client.target, PERIGEE_TOKEN="secret")
    assert refused.code == 3
    assert "token" in refused.stderr
    assert served.code == 0
