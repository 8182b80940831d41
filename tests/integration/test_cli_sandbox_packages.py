"""Packages of other judges, judged: inputs by generators, validators, graders in Python, a validator's passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from perigee.cli.sandbox.connection import open_sandbox
from perigee.cli.sandbox.judge import judge, verdict_name
from perigee.cli.sandbox.packages import open_problem, prepare_tests
from perigee.errors import InvalidArgumentError
from perigee.rpc import ChannelOptions
from perigee.testgen.plan import Program
from tests.unit.test_cli_sandbox_packages import GRADER, write

DMOJ = """
generator: gen.py
checker: check.py
validator: valid.py
test_cases:
- {generator_args: [3], points: 4}
- {batched: [{generator_args: [5]}, {generator_args: [6]}], points: 6, dependencies: []}
"""
GENERATE = "import sys\nprint(sys.argv[1])\nprint(int(sys.argv[1]) * 2, file=sys.stderr)"
CHECK = "def check(process_output, judge_output, **kwargs):\n    return process_output.split() == judge_output.split()"


async def judged(address: str, folder: Path, source: str, validate: bool = False) -> tuple[list[str], float]:
    """The verdicts of a solution in Python, and its points."""
    problem = open_problem(folder)
    async with open_sandbox(address, ChannelOptions()) as sandbox:
        tests = await prepare_tests(sandbox, problem, validate)
        solutions = [Program("a.py", "python", source.encode())]
        [each] = [each async for each in judge(sandbox, problem, solutions, tests)]
    return [verdict_name(result.verdict) for result in each.response.results], each.response.points


async def test_a_package_of_dmoj(sandbox_address: str, tmp_path: Path) -> None:
    folder = write(tmp_path, init_DOT_yml=DMOJ, gen_DOT_py=GENERATE, check_DOT_py=CHECK, valid_DOT_py="int(input())")
    right = await judged(sandbox_address, folder, "print(int(input()) * 2)", validate=True)
    assert right == (["ACCEPTED"] * 3, 10)
    wrong = await judged(sandbox_address, folder, "x = int(input())\nprint(x * 2 if x != 5 else 0)")
    assert wrong == (["ACCEPTED", "WRONG_ANSWER", "SKIPPED"], 4)
    init = "generator: gen.py\nvalidator: valid.py\ntest_cases: [{batched: [{generator_args: [5]}], points: 6}]"
    write(folder, init_DOT_yml=init, valid_DOT_py="assert int(input()) != 5")
    with pytest.raises(InvalidArgumentError, match=r"valid\.py on test batch 1, case 1 says that it is not valid"):
        await judged(sandbox_address, folder, "pass", validate=True)


async def test_a_grader_of_dmoj(sandbox_address: str, tmp_path: Path) -> None:
    init = "custom_judge: grade.py\ntest_cases: [{in: one, points: 3}]"
    folder = write(tmp_path, init_DOT_yml=init, grade_DOT_py=GRADER, one="4")
    assert await judged(sandbox_address, folder, "print(int(input()) + 1)") == (["ACCEPTED"], 3)
    assert await judged(sandbox_address, folder, "print(int(input()))") == (["WRONG_ANSWER"], 0)


async def test_a_package_of_kattis(sandbox_address: str, tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        problem_DOT_yaml="name: Words\nvalidation: default\nvalidator_flags: float_tolerance 0.1\n",
        data__secret__1_DOT_in="1",
        data__secret__1_DOT_ans="Yes 2.0",
    )
    assert await judged(sandbox_address, folder, "print('YES', 2.05)") == (["ACCEPTED"], 1)
    assert await judged(sandbox_address, folder, "print('YES', 2.2)") == (["WRONG_ANSWER"], 0)
