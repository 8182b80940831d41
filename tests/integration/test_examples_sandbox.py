"""The examples of the sandbox say of themselves what is true."""

import json
import shutil
from pathlib import Path

import pytest

from tests.fixtures.command_line import ROOT, run_perigee

EXAMPLES = ROOT / "examples" / "sandbox"
# A third of the inputs that are made by default, which tell as much of the solutions.
FEW = ("--candidates", "16", "--minimum", "12")


@pytest.fixture
def shortest_path(tmp_path: Path) -> Path:
    return shutil.copytree(EXAMPLES / "shortest-path", tmp_path / "shortest-path")


async def test_all_solutions_of_best_piece(sandbox_address: str) -> None:
    ended = await run_perigee("judge", str(EXAMPLES / "best-piece"), "--json", "--address", sandbox_address)
    assert ended.code == 0, ended.stdout
    reports = {report["solution"]: report for report in json.loads(ended.stdout)["solutions"]}
    assert {name: report["verdict"] for name, report in reports.items() if name.endswith(".py")} == {
        "solutions/running.py": "ACCEPTED",
        "solutions/slow_pairs.py": "TIME_LIMIT",
        "solutions/wrong_empty.py": "WRONG_ANSWER",
    }
    assert reports["solutions/prefixes.cpp"]["verdict"] == "ACCEPTED"
    assert reports["solutions/prefixes.cpp"]["compile"]["exit_code"] == 0
    points = {name: (report["points"], report["max_points"]) for name, report in reports.items()}
    assert points["solutions/running.py"] == (8, 8)
    assert points["solutions/slow_pairs.py"] == (5, 8)


async def test_shortest_path_is_dropped_until_eight_of_ten_are_enough(
    sandbox_address: str, shortest_path: Path
) -> None:
    strict = await run_perigee("make-tests", str(shortest_path), *FEW, "--address", sandbox_address)
    assert strict.code == 1, strict.stderr
    assert "8 of 10 solutions pass all 16 cases, 9 must" in strict.stdout.decode()
    lenient = await run_perigee(
        "make-tests", str(shortest_path), *FEW, "--pass-fraction", "0.8", "--address", sandbox_address
    )
    assert lenient.code == 0
    summary = json.loads((shortest_path / "make-tests.json").read_text())
    failing = {report["name"] for report in summary["solutions"] if report["failed"]}
    assert failing == {"known/both_ends.py", "known/hurried.py"}
    assert len(list((shortest_path / "tests").iterdir())) == 32
