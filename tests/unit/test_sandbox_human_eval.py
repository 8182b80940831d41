"""Code tests of a public data set, with the submission and the test in processes of their own."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from tests.fixtures.data import find_data
from tests.fixtures.sandbox_code_tests import RunCodeTest

BROKEN = {
    "another value": "return (value, 'broken')",
    "an object that equals everything": "return AlwaysEqual()",
    "nothing": "return None",
    "a list that equals everything": "return AlwaysEqualList([value])",
    "an exception": "raise ValueError('broken')",
    "an end of iteration": "raise StopIteration",
    "an exit": "raise SystemExit(0)",
    "an end of the process": "import os; os._exit(0)",
}
WRAPPED = """
{source}
class AlwaysEqual:
    __eq__ = __le__ = __ge__ = __lt__ = __gt__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
    __abs__ = __sub__ = __rsub__ = lambda self, *others: self
    __iter__ = lambda self: iter(())
class AlwaysEqualList(AlwaysEqual, list):
    pass
_original = {name}
def {name}(*arguments, **keywords):
    value = _original(*arguments, **keywords)
    {ending}
"""


@pytest.fixture(scope="module")
def problems() -> list[dict[str, str]]:
    """Some of the problems; the integration tests judge all of them."""
    with gzip.open(find_data("HumanEval.jsonl.gz"), "rt") as file:
        return [json.loads(line) for line in file][::8]


def test_reference_solutions_pass(code_test: RunCodeTest, problems: list[dict[str, str]]) -> None:
    for problem in problems:
        source = problem["prompt"] + problem["canonical_solution"]
        run = code_test(source, problem["test"], name=problem["entry_point"], setup=problem["prompt"])
        assert run.loaded == ("loaded", "")
        assert (run.ending, run.message) == ("passed", ""), problem["task_id"]
        assert run.calls > 0
        assert run.status == 0


@pytest.mark.parametrize("what", BROKEN)
def test_no_solution_passes_that_returns(code_test: RunCodeTest, problems: list[dict[str, str]], what: str) -> None:
    """And none of them blames the test."""
    endings: Counter[str] = Counter()
    for problem in problems:
        name = problem["entry_point"]
        source = problem["prompt"] + problem["canonical_solution"]
        wrapped = WRAPPED.format(source=source, name=name, ending=BROKEN[what])
        run = code_test(wrapped, problem["test"], name=name, setup=problem["prompt"])
        endings[run.ending] += 1
    assert set(endings) <= {"failed", "submission_error"}
    assert endings.total() == len(problems)
