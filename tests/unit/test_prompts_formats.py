"""Published sets of programming problems as prompts: right solutions pass the tests that come out, wrong ones do not."""

# ruff: noqa: E501

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from perigee.cli.prompts.app import prompts_app
from perigee.cli.prompts.formats import find_signature
from perigee.reward.items import read_prompt_line
from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.compare import find_result_difference
from services.sandbox.agent.code_tests import PASSED
from services.sandbox.agent.json_calls import make_json_call, to_json
from services.sandbox.agent.submission import find_function, load_module
from tests.fixtures.sandbox_code_tests import RunCodeTest

LEETCODE_PROMPT = "from typing import *\nclass ListNode:\n    def __init__(self, val=0, next=None):\n        self.val = val\n        self.next = next\ndef is_same_list(a, b):\n    while a and b and a.val == b.val:\n        a, b = a.next, b.next\n    return a is None and b is None\n"
PRIVATE = base64.b64encode(
    zlib.compress(pickle.dumps(json.dumps([{"input": "[3, 4]\n2", "output": "[5, 6]", "testtype": "functional"}])))
).decode()
ADD = "class Solution:\n    def add(self, nums: List[int], k: int) -> List[int]:\n        return [n + k for n in nums]"
TWICE = "def twice(x):\n    return 2 * x"


class Sly:
    """A class that must not be made of a file's data."""


RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "apps": ({"problem_id": 7, "question": "Double it.", "solutions": "[]", "difficulty": "interview", "url": "u", "starter_code": "",
              "input_output": json.dumps({"fn_name": "twice", "inputs": [[2], [3]], "outputs": [[4], [6]]})}, TWICE),
    "apps of LeetCode": ({"id": 8, "question": "Add.", "starter_code": "class Solution:\n    def add(self, nums: List[int], k: int) -> List[int]:\n        ",
                          "input_output": {"fn_name": "add", "inputs": [[[1], 1], [[1, 2], 1]], "outputs": [[2], [2, 3]]}}, ADD),
    "taco": ({"question": "Double the number.", "input_output": json.dumps({"inputs": ["1\n", ["2"]], "outputs": ["2\n", ["4"]]}),
              "time_limit": "2.0 seconds", "source": "codeforces", "starter_code": "", "name": None}, ""),
    "livecodebench": ({"question_title": "Add", "question_content": "Add k.", "platform": "leetcode", "question_id": "3", "difficulty": "easy",
                       "starter_code": "class Solution:\n    def add(self, nums: List[int], k: int) -> List[int]:\n        ",
                       "public_test_cases": json.dumps([{"input": "[1]\n1", "output": "[2]", "testtype": "functional"}]),
                       "private_test_cases": PRIVATE, "metadata": json.dumps({"func_name": "add"})}, ADD),
    "livecodebench unpacked": ({"question_content": "Add k.", "question_id": "4", "starter_code": ADD, "metadata": {"func_name": "add"},
                                "public_test_cases": [{"input": "[1]\n1", "output": "[2]", "testtype": "functional"}], "private_test_cases": []}, ADD),
    "humaneval": ({"task_id": "HumanEval/0", "prompt": "def twice(x):\n    '''Doubles.'''\n", "entry_point": "twice", "canonical_solution": "    return 2 * x\n",
                   "test": "METADATA = {}\ndef check(candidate):\n    assert candidate(1) == 2\n"}, TWICE),
    "evalplus": ({"task_id": "HumanEval/1", "prompt": "def twice(x):\n    '''Doubles.'''\n", "entry_point": "twice", "canonical_solution": "    return 2 * x\n",
                  "base_input": [[1], [[1, "a"]]], "plus_input": [[0.1], [[]]], "atol": 0, "contract": ""}, TWICE),
    "mbpp": ({"task_id": 2, "code": TWICE, "prompt": "Write a function.", "test_imports": ["import math"], "test_list": ["assert twice(2) == math.floor(4.5)"],
              "test": "inputs = [[1], [[2]]]\nresults = [2, [2, 2]]\nfor i, (inp, exp) in enumerate(zip(inputs, results)):\n    assert twice(*inp) == exp"}, TWICE),
    "leetcode-checks": ({"task_id": "tail", "question_id": 9, "problem_description": "Tail.", "starter_code": "class Solution:\n    def tail(self, head): ",
                         "prompt": LEETCODE_PROMPT, "entry_point": "Solution().tail",
                         "test": "def check(candidate):\n    assert is_same_list(candidate(head=ListNode(1, ListNode(2))), ListNode(2))"},
                        "class Solution:\n    def tail(self, head: Optional[ListNode]): return head.next"),
    "leetcode-queries": ({"task_id": "tail", "query": "Tail. Complete this code:\nclass Solution:\n    def tail(self, head):", "prompt": LEETCODE_PROMPT,
                          "completion": "", "entry_point": "Solution().tail", "meta": "{}",
                          "test": "def check(candidate):\n    assert is_same_list(candidate(head=ListNode(1, ListNode(2))), ListNode(2))"},
                         "class Solution:\n    def tail(self, head: Optional[ListNode]): return head.next"),
    "leetcode": ({"slug": "tail", "content": "Tail.", "metaData": json.dumps({"name": "tail", "params": [{"name": "head", "type": "ListNode"}], "return": {"type": "ListNode"}}),
                  "test_cases": [{"input": "[1,2]", "output": "[2]"}, {"input": "[1]", "output": "[]"}]}, "class Solution:\n    def tail(self, head): return head.next"),
    "leetcode in place": ({"slug": "sort", "content": "Sort.", "meta_data": {"name": "sort", "params": [{"name": "nums", "type": "integer[]"}], "return": {"type": "void"}},
                           "test_cases": [{"input": {"nums": [2, 1]}, "expected_output": [1, 2]}, {"input": [[3]], "expected": [3]}]}, "class Solution:\n    def sort(self, nums): nums.sort()"),
    "leetcode design": ({"slug": "box", "content": "Box.", "metaData": json.dumps({"classname": "Box", "systemdesign": True}),
                         "tests": [{"input": '["Box","get"]\n[[5],[]]', "output": "[null,5]"}]}, "class Box:\n    def __init__(self, v): self.v = v\n    def get(self): return self.v"),
}  # fmt: skip
LEFT_OUT = [
    ({"question": "q", "input_output": "", "id": 1}, "it has no tests"),
    ({"question": "q", "input_output": "{", "id": 1}, "its input_output is not JSON"),
    ({"question": "q", "input_output": {"inputs": ["1"], "outputs": []}, "id": 1}, "it has not as many outputs as inputs"),
    ({"question": "q", "input_output": {"inputs": [1], "outputs": [1], "fn_name": "f"}, "id": 1}, "the arguments of a test are no list"),
    ({"question": "q", "input_output": {"inputs": [[1]], "outputs": [float("nan")], "fn_name": "f"}, "id": 1}, "a test has a number that JSON does not have"),
    (RECORDS["humaneval"][0] | {"prompt": "Double the number."}, "its prompt does not begin the function that is its entry point"),
    ({"unknown": 1}, "its columns are of no known format"),
    (RECORDS["livecodebench"][0] | {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Sly()))).decode()}, "its test cases cannot be unpacked"),
    (RECORDS["mbpp"][0] | {"test_list": ["assert other(2) == 4"]}, "its tests call no function of its solution"),
    (RECORDS["leetcode in place"][0] | {"meta_data": {"name": "f", "output": {"paramindex": 1}}}, "its result is another argument than the first"),
    (RECORDS["leetcode"][0] | {"test_cases": [{"output": "[2]"}]}, "a test case has no input"),
    (RECORDS["leetcode"][0] | {"test_cases": [{"input": "[2]"}]}, "a test case has no output"),
]  # fmt: skip


def import_records(records: list[dict[str, Any]], folder: Path, *options: str) -> tuple[int, str, list[dict[str, Any]]]:
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = CliRunner().invoke(prompts_app, ["import", str(source), str(out), *options])
    return result.exit_code, result.output, [json.loads(line) for line in out.read_text().splitlines()]


def passes(code: pb.CodeVerifier, source: str, code_test: RunCodeTest) -> bool:
    """Runs a verifier's tests without a sandbox."""
    names = load_module(source.encode(), code.function_name, "submission.py")
    call = make_json_call(find_function(names, code.function_name), code.function_signature, names)
    for test in code.tests:
        if test.HasField("code"):
            run = code_test(source, test.code.code, name=code.function_name, setup=code.setup_code)
            assert run.ending == PASSED or not run.message.startswith(("the test raised", "the setup code raised")), run
            if run.ending != PASSED:
                return False
        else:
            found = to_json(call(test.function.arguments_json.encode()), 1000).encode()
            if find_result_difference(found, json.loads(test.function.expected_json)) is not None:
                return False
    return True


@pytest.mark.parametrize("name", RECORDS)
def test_right_solutions_pass_and_wrong_ones_do_not(name: str, tmp_path: Path, code_test: RunCodeTest) -> None:
    record, solution = RECORDS[name]
    exit_code, output, [line] = import_records([record], tmp_path)
    assert exit_code == 0, output
    assert line["id"].startswith(name.split()[0])
    code = read_prompt_line(line, "line").item.code
    if not solution:
        assert [(test.stdio.stdin, test.stdio.expected_stdout) for test in code.tests] == [
            (b"1\n", b"2\n"),
            (b"2", b"4"),
        ]
        return
    assert passes(code, solution, code_test)
    wrong = (
        solution.replace("return ", "return 7 and ")
        .replace("7 and head.next", "head")
        .replace("2 * x", "3 * x")
        .replace("n + k", "n")
    )
    assert not passes(
        code, wrong.replace("nums.sort()", "nums.reverse() or nums.pop()").replace("7 and self.v", "6"), code_test
    )


def test_records_that_become_no_prompt_are_counted_by_reason(tmp_path: Path) -> None:
    good = RECORDS["humaneval"][0]
    records = [good, *(record for record, _ in LEFT_OUT), good]
    exit_code, output, lines = import_records(records, tmp_path)
    assert (exit_code, len(lines)) == (1, 1)
    for _, reason in LEFT_OUT:
        assert f"1 records left out: {reason} (" in output
    assert "1 records left out: its id is that of an earlier record" in output
    assert f"in.jsonl:{len(records)}" in output


def test_tests_beyond_the_most_are_counted(tmp_path: Path) -> None:
    _, output, [line] = import_records([RECORDS["apps"][0]], tmp_path, "--max-tests", "1", "--format", "apps")
    assert len(line["tests"]) == 1
    assert "1 tests left out: beyond the first 1 of a problem" in output


def test_signatures_of_starters() -> None:
    starter = (
        "# class ListNode: ...\nclass Solution:\n    def f(self, a: Optional[ListNode], k: int) -> None:\n        "
    )
    assert find_signature(starter, "f") == "(Optional[ListNode], int) -> void"
    assert find_signature("def f(a): return", "f") == "(Any) -> Any"
    assert find_signature("class {", "f") == ""


@pytest.mark.parametrize(
    ("format_name", "record", "reason"),
    [
        ("apps", {"input_output": '{"inputs": ["1"], "outputs": ["1"]}'}, "it has no question, which apps has"),
        ("leetcode", {"metaData": "[1]"}, "a column is not as leetcode has it"),
        ("humaneval", {"prompt": "p", "entry_point": "f"}, "it has no task_id, which humaneval has"),
    ],
)
def test_a_record_of_another_form_is_left_out_by_name(
    tmp_path: Path, format_name: str, record: dict[str, Any], reason: str
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    arguments = ["import", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--format", format_name]
    result = CliRunner().invoke(prompts_app, arguments)
    assert (result.exit_code, reason in result.output) == (1, True)
