"""Functions judged by the caller's own Python, and judging that stops at the first failure, for tests of each kind."""

from __future__ import annotations

import time

import pytest

from perigee.sandbox.client import SandboxClient
from perigee.sandbox.v1 import sandbox_pb2 as pb
from tests.fixtures.sandbox import function_tests, stdio_tests


def verdicts(response: pb.JudgeResponse) -> list[str]:
    return [pb.TestVerdict.Name(result.verdict).removeprefix("TEST_VERDICT_") for result in response.results]


def code_tests(*codes: str) -> list[pb.TestCase]:
    return [pb.TestCase(code=pb.CodeTest(code=code)) for code in codes]


async def judge_code(sandbox: SandboxClient, source: str, *codes: str, setup: str = "") -> pb.JudgeResponse:
    request = pb.JudgeRequest(
        language="python", source=source.encode(), function_name="f", tests=code_tests(*codes), setup_code=setup
    )
    return await sandbox.judge(request)


async def test_statements_with_assert(sandbox: SandboxClient) -> None:
    """As in MBPP."""
    codes = [
        "assert f(2) == 4",
        "assert f(3) == 10, 'three'",
        "assert f('a') == 'aa'\nassert f([1]) == [1, 1]",
        "f(None)",
    ]
    response = await judge_code(sandbox, "def f(x): return 2 * x", *codes)
    assert verdicts(response) == ["ACCEPTED", "WRONG_ANSWER", "ACCEPTED", "RUNTIME_ERROR"]
    assert "three" in response.results[1].reason
    assert "TypeError" in response.results[3].reason


async def test_a_definition_of_check(sandbox: SandboxClient) -> None:
    """As in HumanEval."""
    check = "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(x=3) == %d\n"
    response = await judge_code(sandbox, "def f(x): return 2 * x", check % 6, check % 7)
    assert verdicts(response) == ["ACCEPTED", "WRONG_ANSWER"]


async def test_a_submission_that_compiles_for_some_tests(sandbox: SandboxClient) -> None:
    """It forges that it does not compile, from a moment on for which the first test waits."""
    until = time.time() + 1
    source = f"""
import sys, time
frame = sys._getframe()
while "peer" not in frame.f_locals: frame = frame.f_back
if time.time() > {until}: frame.f_locals["peer"].send({{"compile_error": "no"}})
def f(x): return x
"""
    wait = f"import time\ntime.sleep(max(0, {until} - time.time()))\nassert f(1) == 1"
    found = verdicts(await judge_code(sandbox, source, wait, "assert f(1) == 1"))
    assert found in (["ACCEPTED", "COMPILE_ERROR"], ["COMPILE_ERROR"] * 2)


async def test_setup_code_runs_before_each_test(sandbox: SandboxClient) -> None:
    setup = "import math\ndef expected(x):\n  return math.floor(2.5 * x)\nseen = []"
    codes = ["seen.append(1)\nassert f(2) == expected(2)", "assert seen == []\nassert f(4) == expected(4)"]
    response = await judge_code(sandbox, "def f(x): return 5 * x // 2", *codes, setup=setup)
    assert verdicts(response) == ["ACCEPTED", "ACCEPTED"]


async def test_values_that_pass(sandbox: SandboxClient) -> None:
    source = "def f(x): return x"
    values = ["1 << 80", "1.5", "'ü'", "b'\\xff'", "None", "True", "[1, [2]]", "(1, (2,))", "{1: 'a', (2, 3): {4}}", "1j", "float('inf')"]  # noqa: E501  # fmt: skip
    codes = [f"x = {value}\nassert f(x) == x and type(f(x)) is type(x)" for value in values]
    assert verdicts(await judge_code(sandbox, source, *codes)) == ["ACCEPTED"] * len(values)


async def test_classes_objects_and_callbacks(sandbox: SandboxClient) -> None:
    source = (
        "class Box:\n  def __init__(s, v): s.v = v\n  def map(s, g): return Box(g(s.v))\n"
        "  def __eq__(s, o): return True\n"
        "def f(node):\n  node.v += 1\n  yield from (node, node.v)\n"
    )
    codes = [
        "assert Box(2).map(lambda v: 3 * v).v == 6",
        "class Node: v = 1\nn = Node()\nn.v = 1\nassert list(f(n)) == [n, 2] and n.v == 2",
        "assert Box(2) == Box(3)",
    ]
    assert verdicts(await judge_code(sandbox, source, *codes)) == ["ACCEPTED", "ACCEPTED", "WRONG_ANSWER"]


async def test_function_tests_in_the_forms_of_leetcode(sandbox: SandboxClient) -> None:
    lru = "class LRU:\n  def __init__(self, n: int): self.d = OrderedDict()\n  def put(self, k, v): self.d[k] = v\n  def get(self, k): return self.d.get(k, -1)"  # noqa: E501
    tail = "class Solution:\n  def tail(self, head):\n    return head.next"
    by_name = {
        "LRU": (lru, function_tests([([["LRU", "put", "get"], [[1], [1, 2], [1]]], [None, None, 2])]), ""),
        "tail": (tail, function_tests([([[1, 2]], [2]), ([[1]], [])]), "(ListNode) -> ListNode"),
        "Solution().tail": (tail, function_tests([([[1, 2]], [3])]), "(ListNode) -> ListNode"),
    }
    found = {}
    for name, (source, tests, signature) in by_name.items():
        request = pb.JudgeRequest(language="python", source=source.encode(), function_name=name, tests=tests)
        request.function_signature = signature
        found[name] = verdicts(await sandbox.judge(request))
    accepted = ["ACCEPTED"]
    assert found == {"LRU": accepted, "tail": accepted * 2, "Solution().tail": ["WRONG_ANSWER"]}


async def test_exceptions_that_a_test_expects(sandbox: SandboxClient) -> None:
    expected = (
        "try:\n  f(-1)\n  assert False, 'no exception'\nexcept ValueError as error:\n  assert 'negative' in str(error)"
    )
    assert verdicts(await judge_code(sandbox, "def f(x): raise ValueError('negative')", expected)) == ["ACCEPTED"]
    assert verdicts(await judge_code(sandbox, "def f(x): return 1", expected)) == ["WRONG_ANSWER"]


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("def f(x): return", "WRONG_ANSWER"),
        ("def f(x) return", "COMPILE_ERROR"),
        ("def g(x): return 4", "RUNTIME_ERROR"),
        ("def f(x): return 1 / 0", "RUNTIME_ERROR"),
        ("import os\ndef f(x): os._exit(0)", "RUNTIME_ERROR"),
        ("def f(x):\n  while True: pass", "TIME_LIMIT"),
        ("def f(x): return bytearray(1 << 30)", "MEMORY_LIMIT"),
    ],
)
async def test_submissions_that_fail(sandbox: SandboxClient, source: str, verdict: str) -> None:
    request = pb.JudgeRequest(
        language="python",
        source=source.encode(),
        function_name="f",
        tests=code_tests("assert f(2) == 4"),
        limits=pb.Limits(cpu_ms=300, memory_bytes=64 << 20),
    )
    assert verdicts(await sandbox.judge(request)) == [verdict]


async def test_a_submission_cannot_make_its_test_one_that_is_at_fault(sandbox: SandboxClient) -> None:
    """Else an answer could have it that it is never counted as wrong."""
    source = "def f(x): return ['missing', '/missing', 'import missing', range(10 ** 9)][x]"
    response = await judge_code(
        sandbox,
        source,
        "assert eval(f(0)) == 4",
        "assert open(f(1)).read() == '4'",
        "exec(f(2))",
        "assert f(0) == 4, unknown_name",
        "import sys\nsys.exit(f(0) != 4)",
    )
    assert verdicts(response) == ["WRONG_ANSWER"] * 5
    early = "import os, threading\nthreading.Timer(0.5, os._exit, (0,)).start()\ndef f(x): return x"
    request = pb.JudgeRequest(
        language="python",
        source=early.encode(),
        function_name="f",
        setup_code="import time\ntime.sleep(4)",
        tests=code_tests("assert f(1) == 1"),
    )
    assert verdicts(await sandbox.judge(request)) == ["RUNTIME_ERROR"]


async def test_a_submission_that_has_answered_is_not_waited_for(sandbox: SandboxClient) -> None:
    """A process that goes on after its last answer could overrun what all its tests may take."""
    source = b"import os, time\nos._exit = lambda code: time.sleep(50)\ndef f(x): return x"
    request = pb.JudgeRequest(language="python", source=source, function_name="f", tests=function_tests([([1], 1)]))
    request.limits.wall_ms = 50_000
    assert verdicts(await sandbox.judge(request, timeout_s=20)) == ["ACCEPTED"]


async def test_a_test_that_fails_is_no_wrong_answer(sandbox: SandboxClient) -> None:
    response = await judge_code(
        sandbox, "def f(x): return 4", "assert f(2) == 4\nmissing", "assert (", "assert f(2) == 4"
    )
    assert verdicts(response) == ["UNJUDGEABLE", "UNJUDGEABLE", "ACCEPTED"]
    assert "missing" in response.results[0].reason


GUESS = pb.Program(language="python", source=b"import sys\nsys.exit(input() != open(sys.argv[1]).read())")
BY_KIND = {
    "stdio": pb.JudgeRequest(
        source=b"print(input())", tests=stdio_tests([(b"1", b"1"), (b"2", b"3"), (b"4", b"4"), (b"5", b"6")])
    ),
    "checker": pb.JudgeRequest(
        source=b"print(input())",
        tests=stdio_tests([(b"1", b"1"), (b"2", b"3"), (b"4", b"4"), (b"5", b"6")]),
        checker=pb.Checker(program=pb.Program(language="python", source=b"import sys\na, b = (open(n).read().split() for n in sys.argv[2:])\nsys.exit(a != b)")),  # noqa: E501
    ),
    "function": pb.JudgeRequest(
        source=b"def f(x): return x",
        function_name="f",
        tests=function_tests([([1], 1), ([2], 3), ([4], 4), ([5], 6)]),
    ),
    "code": pb.JudgeRequest(
        source=b"def f(x): return x",
        function_name="f",
        tests=code_tests(*(f"assert f({x}) == {y}" for x, y in ((1, 1), (2, 3), (4, 4), (5, 6)))),
    ),
    "interactive": pb.JudgeRequest(
        source=b"print(1)",
        tests=[pb.TestCase(interactive=pb.InteractiveTest(input=number)) for number in (b"1", b"2", b"1", b"2")],
        interactor=GUESS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BY_KIND)
async def test_judging_stops_at_the_first_failure_when_it_is_asked_to(sandbox: SandboxClient, kind: str) -> None:
    request = pb.JudgeRequest(language="python", stop_at_first_failure=True)
    request.MergeFrom(BY_KIND[kind])
    response = await sandbox.judge(request)
    assert verdicts(response) == ["ACCEPTED", "WRONG_ANSWER", "SKIPPED", "SKIPPED"]
    assert (response.verdict, response.passed, response.points) == (pb.TEST_VERDICT_WRONG_ANSWER, 1, 1)
    request.stop_at_first_failure = False
    response = await sandbox.judge(request)
    assert verdicts(response) == ["ACCEPTED", "WRONG_ANSWER", "ACCEPTED", "WRONG_ANSWER"]
    assert (response.passed, response.points, response.max_points) == (2, 2, 4)
