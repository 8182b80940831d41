"""The code verifier with a real sandbox."""

from __future__ import annotations

import pytest

from perigee.buffer.v1.buffer_pb2 import VERDICT_CORRECT, VERDICT_FAILED, VERDICT_UNGRADABLE, VERDICT_WRONG
from perigee.reward.client import RewardClient
from perigee.reward.v1 import reward_pb2 as pb
from perigee.sandbox.v1 import sandbox_pb2 as sandbox_pb
from services.reward.config import CodeConfig
from tests.fixtures.reward import running_reward, score, score_one
from tests.fixtures.sandbox import function_tests, stdio_tests

DOUBLE = function_tests([([3], 6), ([0], 0), ([-2], -4)])


def code_item(item_id: str, response: str, **fields: object) -> pb.ScoreItem:
    parameters = {"language": "python", "function_name": "f", "tests": DOUBLE} | fields
    return pb.ScoreItem(id=item_id, response=response, answer_marker="#", code=pb.CodeVerifier(**parameters))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("program", "verdict", "reason"),
    [
        ("double it #def f(x):return 2*x", VERDICT_CORRECT, ""),
        ("#def f(x):return x", VERDICT_WRONG, "wrong answer"),
        ("#def f(x):return", VERDICT_WRONG, "wrong answer"),
        ("#def f(x) return 2*x", VERDICT_WRONG, "compile error"),
        ("#def g(x):return 2*x", VERDICT_WRONG, ""),
        ("#def f(x):return 1/0", VERDICT_WRONG, "runtime error"),
        ("def f(x):return 2*x", VERDICT_UNGRADABLE, "no answer marker"),
        ("#", VERDICT_UNGRADABLE, "empty"),
        ("#\0", VERDICT_WRONG, ""),
    ],
)
async def test_programs_get_their_verdicts(
    coding_reward: RewardClient, program: str, verdict: int, reason: str
) -> None:
    outcome = await score_one(coding_reward, code_item("a", program))
    assert outcome.verdict == verdict, outcome
    assert outcome.reward == (1.0 if verdict == VERDICT_CORRECT else 0.0)
    assert reason in outcome.reason
    assert outcome.verifier == "code"


async def test_an_endless_program_is_wrong_by_its_limit(coding_reward: RewardClient) -> None:
    limits = sandbox_pb.Limits(wall_ms=500, cpu_ms=500)
    outcome = await score_one(coding_reward, code_item("a", "#def f(x):\n while True: pass", limits=limits))
    assert (outcome.verdict, outcome.reward) == (VERDICT_WRONG, 0.0)
    assert "time limit" in outcome.reason


async def test_partial_credit_is_the_share_of_passed_tests(coding_reward: RewardClient) -> None:
    items = [
        code_item("all", "#def f(x):return 2*x", partial_credit=True),
        code_item("third", "#def f(x):return x", partial_credit=True),
        code_item("compile", "#def f(", partial_credit=True),
        code_item("none", "#def f(x):return 'no'", partial_credit=True),
    ]
    outcomes = {outcome.id: outcome for outcome in await score(coding_reward, items)}
    assert outcomes["all"].verdict == VERDICT_CORRECT
    assert {name: round(outcome.reward, 6) for name, outcome in outcomes.items()} == {
        "all": 1.0,
        "third": 0.333333,
        "compile": 0.0,
        "none": 0.0,
    }


async def test_standard_input_programs(coding_reward: RewardClient) -> None:
    fields = {"function_name": "", "tests": stdio_tests([(b"3\n", b"6\n"), (b"4\n", b"8\n")])}
    item = code_item("a", "#print(2*int(input()))", **fields)
    assert (await score_one(coding_reward, item)).verdict == VERDICT_CORRECT


async def test_a_prompt_that_the_sandbox_refuses_has_failed_for_good(coding_reward: RewardClient) -> None:
    tests = [sandbox_pb.TestCase(function=sandbox_pb.FunctionTest(arguments_json="[3", expected_json="6"))]
    outcome = await score_one(coding_reward, code_item("a", "#def f(x):return 2*x", tests=tests))
    assert (outcome.verdict, outcome.HasField("reward"), outcome.retryable) == (VERDICT_FAILED, False, False)
    assert "arguments_json" in outcome.reason


async def test_points_and_a_checkers_share_are_partial_credit(coding_reward: RewardClient) -> None:
    tests = function_tests([([3], 6), ([0], 0), ([-2], -4)])
    for test, points in zip(tests, (5, 1, 2), strict=True):
        test.points = points
    whole = await score_one(coding_reward, code_item("a", "#def f(x):return x", tests=tests, partial_credit=True))
    assert (whole.verdict, whole.reward) == (VERDICT_WRONG, 1 / 8)
    # Exit code 7 gives the share that the checker's message tells.
    checker = sandbox_pb.Checker(
        program=sandbox_pb.Program(
            language="python", source=b"import sys\nprint('0.25', file=sys.stderr)\nsys.exit(7)\n"
        )
    )
    fields = {"function_name": "", "tests": stdio_tests([(b"1\n", b"2\n")]), "checker": checker, "partial_credit": True}
    graded = await score_one(coding_reward, code_item("b", "#print(0)", **fields))
    assert (graded.verdict, graded.reward) == (VERDICT_WRONG, 0.25)


async def test_a_checker_decides_and_its_failure_is_no_wrong_answer(
    coding_reward: RewardClient, sandbox_address: str
) -> None:
    even = b"import sys\nsys.exit(int(open(sys.argv[2]).read()) % 2)\n"
    broken = b"1 / 0\n"

    def item(name: str, program: bytes, response: str) -> pb.ScoreItem:
        checker = sandbox_pb.Checker(program=sandbox_pb.Program(language="python", source=program))
        return code_item(name, response, function_name="", tests=stdio_tests([(b"", b"")]), checker=checker)

    items = [item("even", even, "#print(4)"), item("odd", even, "#print(5)")]
    outcomes = {outcome.id: outcome.verdict for outcome in await score(coding_reward, items)}
    assert outcomes == {"even": VERDICT_CORRECT, "odd": VERDICT_WRONG}
    async with running_reward(sandbox_address=sandbox_address, code=CodeConfig(timeout_s=3)) as client:
        failed = await score_one(client, item("broken", broken, "#print(4)"))
    assert (failed.verdict, failed.HasField("reward"), failed.retryable) == (VERDICT_FAILED, False, False)
    assert failed.unjudgeable
    assert "the checking program ended" in failed.reason


async def test_a_dialogue_with_the_interactor(coding_reward: RewardClient) -> None:
    guess = b"""
import sys
secret = int(open(sys.argv[1]).read())
for _ in range(10):
    print('?', flush=True)
    number = int(input())
    if number == secret:
        print('yes', flush=True)
        sys.exit(0)
    print('less' if secret < number else 'more', flush=True)
sys.exit(1)
"""
    player = """low, high = 0, 1000
while True:
    input()
    middle = (low + high) // 2
    print(middle, flush=True)
    reply = input()
    if reply == 'yes': break
    if reply == 'less': high = middle - 1
    else: low = middle + 1
"""
    tests = [sandbox_pb.TestCase(interactive=sandbox_pb.InteractiveTest(input=b"617"))]
    fields = {
        "function_name": "",
        "tests": tests,
        "interactor": sandbox_pb.Program(language="python", source=guess),
    }
    items = [
        code_item("bisects", f"#{player}", **fields),
        code_item("repeats", "#for _ in range(10): input(); print(1, flush=True); input()", **fields),
    ]
    outcomes = {outcome.id: outcome.verdict for outcome in await score(coding_reward, items)}
    assert outcomes == {"bisects": VERDICT_CORRECT, "repeats": VERDICT_WRONG}


async def test_assertions_with_setup_and_files(coding_reward: RewardClient) -> None:
    tests = [sandbox_pb.TestCase(code=sandbox_pb.CodeTest(code="assert f(WORD) == 'ello'"))]
    fields = {"tests": tests, "setup_code": "WORD = 'hello'"}
    items = [
        code_item("right", "#def f(x): return x[1:]", **fields),
        code_item("wrong", "#def f(x): return x", **fields),
    ]
    outcomes = {outcome.id: outcome.verdict for outcome in await score(coding_reward, items)}
    assert outcomes == {"right": VERDICT_CORRECT, "wrong": VERDICT_WRONG}
    reading = {
        "function_name": "",
        "tests": stdio_tests([(b"", b"7\n")]),
        "files": [sandbox_pb.File(path="data/number.txt", content=b"7")],
    }
    item = code_item("reads", "#print(open('data/number.txt').read())", **reading)
    assert (await score_one(coding_reward, item)).verdict == VERDICT_CORRECT


async def test_fenced_programs_and_compile_errors(coding_reward: RewardClient) -> None:
    fenced = "At first:\n```python\ndef f(x): return x\n```\nThen:\n```python\ndef f(x):\n    return 2 * x\n```\nDone."
    tests = pb.CodeVerifier(language="python", function_name="f", tests=DOUBLE)
    outcome = await score_one(coding_reward, pb.ScoreItem(id="a", response=fenced, code=tests))
    assert outcome.verdict == VERDICT_CORRECT
    broken = await score_one(coding_reward, code_item("b", "#def f(x):\n  return (2 * x"))
    assert (broken.verdict, broken.reward) == (VERDICT_WRONG, 0.0)
    assert broken.reason.startswith("compile error: ")
    assert len(broken.reason) > len("compile error: ")


async def test_a_patch_is_judged_by_its_repository(coding_reward: RewardClient) -> None:
    test = b"from sums import add\ndef test_add(): assert add(2, 3) == 5\n"
    task = sandbox_pb.JudgePatchRequest(
        language="python-test",
        test_files=[sandbox_pb.File(path="test_sums.py", content=test)],
        tests=sandbox_pb.TestRun(framework=sandbox_pb.TEST_FRAMEWORK_PYTEST),
        fail_to_pass=["test_sums.py::test_add"],
    )
    patch = "--- /dev/null\n+++ b/sums.py\n@@ -0,0 +1,2 @@\n+def add(a, b):\n+    return a {} b\n"
    responses = [f"So:\n```diff\n{patch.format(sign)}```" for sign in "+-"]
    items = [
        pb.ScoreItem(id=str(index), response=response, patch=pb.PatchVerifier(task=task))
        for index, response in enumerate(responses)
    ]
    outcomes = {outcome.id: outcome for outcome in await score(coding_reward, items)}
    assert [outcomes[str(index)].verdict for index in range(2)] == [VERDICT_CORRECT, VERDICT_WRONG]
    assert "the first is test_sums.py::test_add" in outcomes["1"].reason
